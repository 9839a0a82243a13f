// The CPU kernels compiled for AVX-512.
#if defined(__x86_64__)
#include "kernels.h"

// The attributes cover this file's kernels but nothing of the standard library, which the linker
// might share with code for older machines.
#if defined(__clang__)
#pragma clang attribute push(                                                             \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2")
#endif

#define CBAM_VECTOR_BYTES 64
namespace cbam_fused {
namespace avx512 {
namespace {
#include "stages.h"
}  // namespace
}  // namespace avx512
const Kernels* kernels_avx512() {
  return &avx512::kKernels;
}
}  // namespace cbam_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
