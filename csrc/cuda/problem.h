// One call of an op as plain data: what kernels, launchers and host-side tests share. No torch types.
#pragma once

#include <stdint.h>

namespace cbam {

enum DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
enum Layout : int32_t { kContiguous = 0, kChannelsLast = 1 };

// The integers of cbam_fused/_config.py.
enum PoolBits : int32_t { kAvg = 1, kMax = 2, kLp = 4, kLse = 8, kBlend = 16 };
enum SpatialKind : int32_t { kSpatialNone = 0, kMaxMean = 1, kMeanMax = 2, kSpatialBlend = 3 };
enum Ties : int32_t { kTiesFirst = 0, kTiesSplit = 1 };

// A learnt tensor, or nothing: its elements are float where `wide`, else of x's dtype.
struct Weight {
  const void* data;
  int32_t wide;
};

// The gradient of a Weight, in the weight's dtype; data is null where it is not wanted.
struct WeightGrad {
  void* data;
  int32_t wide;
};

// Letters as in design.md; A is double for float64 x, else float. An index array holds int16 where
// the extent it points into is below 2**15, else int32. Pointers that an op does not use are null.
struct Problem {
  const void* x;       // (N, C, P) or, channels-last, (N, P, C)
  const void* dy;      // as x
  void* y;             // as x
  void* dx;            // as x
  Weight w1;           // (h, C); null for a single layer, whose w2 is (C, C)
  Weight b1;           // (h)
  Weight w2;           // (C, h)
  Weight b2;           // (C)
  Weight conv_weight;  // (planes, k)
  Weight conv_bias;    // (1)
  Weight bn_weight;    // (1)
  Weight bn_bias;      // (1)
  Weight bn_mean;      // (1); null without a norm
  Weight bn_var;       // (1)
  double bn_eps;

  void* pooled;         // A (N, K, C), the K pools in bit order
  void* pool_index;     // (N, C), into P; null where not saved
  void* channel_gate;   // A (N, C)
  void* spatial_pool;   // A (N, 2, P), [max, mean]
  void* spatial_index;  // (N, P), into C; null where not saved
  void* hidden_layer;   // A (N, M, h), before the ReLU in each of the MLP's M passes; null where not saved
                        // and without w1
  void* spatial_gate;   // A (N, P)
  void* z;              // A (N, P)
  const void* dz;       // A (N, P), attention_backward: gradient of the logits before the norm
  void* dz_out;         // A (N, P), scale_backward: gradient of the logits after the norm
  void* dchannel_gate;  // A (N, C): read by attention_backward, written by scale_backward

  WeightGrad dw1, db1, dw2, db2, dconv_weight, dconv_bias, dbn_weight, dbn_bias;

  int64_t samples;               // N
  int64_t channels;              // C
  int64_t positions;             // P = depth * height * width
  int64_t hidden;                // h, or C for a single layer
  int32_t depth, height, width;  // the spatial sizes, padded with ones at the front
  int32_t kernel_d, kernel_h, kernel_w;
  int32_t pools, spatial, ties, residual;
  int32_t dtype, layout;
};

#if defined(__CUDACC__) || defined(CBAM_SIMT)
#define CBAM_HOST_DEVICE __host__ __device__
#else
#define CBAM_HOST_DEVICE
#endif

CBAM_HOST_DEVICE inline int pool_count(int pools) {
  return (pools & 1) + (pools >> 1 & 1) + (pools >> 2 & 1) + (pools >> 3 & 1);
}

// Vectors that the MLP sees: one for each pool, or their blend.
CBAM_HOST_DEVICE inline int mlp_passes(int pools) {
  return pools & kBlend ? 1 : pool_count(pools);
}

// Row of `pooled` that holds the pool of this bit.
CBAM_HOST_DEVICE inline int pool_row(int pools, int bit) {
  return pool_count(pools & (bit - 1));
}

// Whether dx depends on x itself: shared ties compare it, the p = 2 norm and log-sum-exp scale by it.
CBAM_HOST_DEVICE inline bool dx_needs_x(const Problem& p) {
  const bool has_maximum = (p.pools & kMax) || p.spatial;
  return (p.ties == kTiesSplit && has_maximum) || (p.pools & (kLp | kLse));
}

// int16 holds every index (and every count of ties) of an extent below this.
constexpr int64_t kShortIndexExtent = int64_t{1} << 15;

CBAM_HOST_DEVICE inline int64_t taps(const Problem& p) {
  return int64_t{p.kernel_d} * p.kernel_h * p.kernel_w;
}

}  // namespace cbam
