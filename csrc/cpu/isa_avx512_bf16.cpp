// The CPU kernels for bfloat16 compiled for AVX-512 with conversions to bfloat16 (AVX512_BF16). The other
// dtypes have nothing of them; theirs are those of isa_avx512.cpp.
#include "kernels.h"

#if defined(CBAM_HAS_AVX512_BF16)

// The attributes cover this file's kernels but nothing of the standard library, which the linker
// might share with code for older machines.
#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,bmi,bmi2")
#endif

#define CBAM_VECTOR_BYTES 64
#define CBAM_BF16_ALONE
namespace cbam_fused {
namespace avx512_bf16 {
namespace {
#include "stages.h"

const Kernels& kernels(DType dtype) {
  return dtype == DType::kBFloat16 ? kKernels : *kernels_avx512();
}
const Kernels kAllKernels = {
    [](const Problem& p, DType dtype, bool backward) {
      return kernels(dtype).scratch_bytes(p, dtype, backward);
    },
    [](const Problem& p, DType dtype, Stage stage) { kernels(dtype).forward(p, dtype, stage); },
    [](const Problem& p, DType dtype, Stage stage) { kernels(dtype).backward(p, dtype, stage); }};
}  // namespace
}  // namespace avx512_bf16
const Kernels* kernels_avx512_bf16() {
  return &avx512_bf16::kAllKernels;
}
}  // namespace cbam_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
