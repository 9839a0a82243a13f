// The CPU kernels compiled for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "kernels.h"

// The attributes cover this file's kernels but nothing of the standard library, which the linker
// might share with code for older machines.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define CBAM_VECTOR_BYTES 32
namespace cbam_fused {
namespace avx2 {
namespace {
#include "stages.h"
}  // namespace
}  // namespace avx2
const Kernels* kernels_avx2() {
  return &avx2::kKernels;
}
}  // namespace cbam_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
