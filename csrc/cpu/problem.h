// One call of the CPU backend as plain sizes and pointers: what the kernels know, with no torch type.
#pragma once

#include <cstdint>

namespace cbam_fused {

// The bits and numbers of cbam_fused/_config.py.
enum Pools : int { kAvg = 1, kMax = 2, kLp = 4, kLse = 8, kBlend = 16 };
enum Ties : int { kFirst = 0, kSplit = 1 };
enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
// Runs body over [0, count), each index once, on at most `count` threads.
using Parallel = void (*)(int64_t count, ParallelBody body, void* context);

// "A" below is the accumulation type: double for double x, else float.
struct Problem {
  int64_t N = 0, C = 0, P = 0;     // samples, channels, positions; P = D * H * W
  int64_t D = 1, H = 1, W = 1;     // spatial sizes, leading ones for 1-D and 2-D
  int64_t kD = 1, kH = 1, kW = 1;  // kernel of the spatial gate, odd
  int64_t hidden = 0;              // width of the MLP, 0 for a single layer
  int pools = 0;                   // 0: no channel gate
  bool spatial = false;
  int ties = kFirst;
  bool residual = false;
  bool channels_last = false;

  const void* x = nullptr;   // (N, C, P) or (N, P, C), the call's dtype
  const void* dy = nullptr;  // as x
  void* out = nullptr;       // y or dx, as x

  const void* w1 = nullptr;  // (hidden, C)  A, or x's dtype where matrices_as_x
  const void* b1 = nullptr;  // (hidden)     A or null
  const void* w2 = nullptr;  // (C, hidden)  as w1; (C, C) for a single layer
  const void* b2 = nullptr;  // (C)          A or null
  bool matrices_as_x = false;
  const void* planes = nullptr;     // (2, kD, kH, kW)  A: weights on the max map, then the mean map
  double scale = 1.0, shift = 0.0;  // spatial logits = scale * conv + shift

  void* pooled = nullptr;         // (N, K, C)    A
  void* pool_index = nullptr;     // (N, C)       int16 or int32
  void* channel_gate = nullptr;   // (N, C)       A
  void* spatial_pool = nullptr;   // (N, 2, P)    A
  void* spatial_index = nullptr;  // (N, P)       int16 or int32
  void* hidden_layer = nullptr;   // (N, M, h)    A: before ReLU
  void* spatial_gate = nullptr;   // (N, P)       A
  void* z = nullptr;              // (N, P)       A: logits, where the call is cut there
  bool wide_pool_index = false, wide_spatial_index = false;  // int32

  void* dgate = nullptr;  // (N, C)       A: sum_p dy x s, where the call is cut there
  void* dz = nullptr;     // (N, P)       A
  void* dw1 = nullptr;    // gradients of the parameters, A, shaped as they are
  void* db1 = nullptr;
  void* dw2 = nullptr;
  void* db2 = nullptr;
  void* dplanes = nullptr;  // (2, kD, kH, kW)  A
  double* dnorm = nullptr;  // (2): sum of dlogits, sum of dlogits * conv

  char* scratch = nullptr;  // scratch_bytes(problem) bytes, aligned to 64
  int threads = 1;
  int64_t cache_bytes = 0;                  // of the last level, for this call
  int64_t second_level = int64_t(1) << 20;  // of the second level, for each of its threads
  bool slow_last_level = false;             // so that it is no place for outputs (caches.h)
  Parallel parallel = nullptr;
};

// Which part of the block a call runs.
enum class Stage : int { kWhole, kAttention, kScale };

struct Kernels {
  int64_t (*scratch_bytes)(const Problem&, DType, bool backward);
  void (*forward)(const Problem&, DType, Stage);
  void (*backward)(const Problem&, DType, Stage);
};

const Kernels* kernels_baseline();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#if defined(__clang__) ? __clang_major__ >= 10 : __GNUC__ >= 11  // compilers that surely know it
#define CBAM_HAS_AVX512_BF16 1
const Kernels* kernels_avx512_bf16();
#endif
#endif

}  // namespace cbam_fused
