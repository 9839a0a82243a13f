// Runs the streamed tier's kernels of one dtype (CBAM_ELEMENT) on the host; see cuda_streamed.py.
#include <iterator>

#include "policy.h"
#include "streamed_backward.cuh"
#include "streamed_forward.cuh"

using namespace cbam;
using T = CBAM_ELEMENT;

namespace {

enum Size {
  kOperation, kDType, kLayoutOf, kSamples, kChannels, kDepth, kHeight, kWidth, kKernelD, kKernelH, kKernelW, kHiddenOf,
  kPools, kSpatial, kTiesOf, kResidual, kAligned, kWide, kHasW1, kL2, kMultiprocessors, kSharedBytes, kSizes
};

Problem sizes_of(const int64_t* v) {
  Problem p{};
  p.samples = v[kSamples];
  p.channels = v[kChannels];
  p.depth = int32_t(v[kDepth]);
  p.height = int32_t(v[kHeight]);
  p.width = int32_t(v[kWidth]);
  p.positions = v[kDepth] * v[kHeight] * v[kWidth];
  p.kernel_d = int32_t(v[kKernelD]);
  p.kernel_h = int32_t(v[kKernelH]);
  p.kernel_w = int32_t(v[kKernelW]);
  p.hidden = v[kHiddenOf];
  p.pools = int32_t(v[kPools]);
  p.spatial = int32_t(v[kSpatial]);
  p.ties = int32_t(v[kTiesOf]);
  p.residual = int32_t(v[kResidual]);
  p.dtype = int32_t(v[kDType]);
  p.layout = int32_t(v[kLayoutOf]);
  return p;
}

template <class Tr> void launch(const Streamed& k) {
  const simt::LaunchConfig config{.grid = unsigned(k.grid), .block = kThreads, .shared = unsigned(k.shared_bytes)};
  if (is_backward(k.operation)) simt::launch(config, "streamed_backward", streamed_backward_kernel<Tr>, k);
  else simt::launch(config, "streamed_forward", streamed_forward_kernel<Tr>, k);
}

}  // namespace

// report: 0 or 1, scratch bytes, counter words, grid, vector, fold, units, samples a unit, reduce chunks,
// pool chunks, ring, conv items, stages, shared bytes.
extern "C" SIMT_API void plan(const int64_t* sizes, int64_t* report) {
  Streamed k{};
  k.p = sizes_of(sizes);
  if (sizes[kHasW1]) k.p.w1.data = sizes;  // only asked whether it is there
  k.operation = int32_t(sizes[kOperation]);
  const Device device{sizes[kL2], int32_t(sizes[kMultiprocessors]), int32_t(sizes[kSharedBytes])};
  const Variant variant = choose_variant(k.p, sizes[kAligned]);
  report[0] = plan_streamed(k, variant, device);
  const int64_t values[] = {lay_out_scratch(k, nullptr), counter_words(k), k.grid, variant.vector, variant.fold, k.s.units,
                            k.s.unit_samples, k.s.reduce.chunks, k.s.pool_chunks, k.s.ring, k.s.conv_items, k.s.plans,
                            k.shared_bytes};
  std::copy(std::begin(values), std::end(values), report + 1);
}

extern "C" SIMT_API void run(const int64_t* sizes, double eps, const void* x, const void* dy, void* y, void* dx, const void* w1,
                             const void* b1, const void* w2, const void* b2, const void* conv_weight, const void* conv_bias,
                             const void* bn_weight, const void* bn_bias, const void* bn_mean, const void* bn_var, void* pooled,
                             void* pool_index, void* channel_gate, void* spatial_pool, void* spatial_index, void* spatial_gate,
                             void* z, const void* dz, void* dz_out, void* dchannel_gate, void* dw1, void* db1, void* dw2,
                             void* db2, void* dconv_weight, void* dconv_bias, void* dbn_weight, void* dbn_bias,
                             uint32_t* counters, char* scratch, int64_t launches) {
  Streamed k{};
  Problem& p = k.p = sizes_of(sizes);
  const auto wide = [&](int i) { return int32_t(sizes[kWide] >> i & 1); };
  p.x = x;
  p.dy = dy;
  p.y = y;
  p.dx = dx;
  p.w1 = {w1, wide(0)};
  p.b1 = {b1, wide(1)};
  p.w2 = {w2, wide(2)};
  p.b2 = {b2, wide(3)};
  p.conv_weight = {conv_weight, wide(4)};
  p.conv_bias = {conv_bias, wide(5)};
  p.bn_weight = {bn_weight, wide(6)};
  p.bn_bias = {bn_bias, wide(7)};
  p.bn_mean = {bn_mean, wide(8)};
  p.bn_var = {bn_var, wide(9)};
  p.bn_eps = eps;
  p.pooled = pooled;
  p.pool_index = pool_index;
  p.channel_gate = channel_gate;
  p.spatial_pool = spatial_pool;
  p.spatial_index = spatial_index;
  p.spatial_gate = spatial_gate;
  p.z = z;
  p.dz = dz;
  p.dz_out = dz_out;
  p.dchannel_gate = dchannel_gate;
  p.dw1 = {dw1, wide(0)};
  p.db1 = {db1, wide(1)};
  p.dw2 = {dw2, wide(2)};
  p.db2 = {db2, wide(3)};
  p.dconv_weight = {dconv_weight, wide(4)};
  p.dconv_bias = {dconv_bias, wide(5)};
  p.dbn_weight = {dbn_weight, wide(6)};
  p.dbn_bias = {dbn_bias, wide(7)};
  k.operation = int32_t(sizes[kOperation]);
  const Device device{sizes[kL2], int32_t(sizes[kMultiprocessors]), int32_t(sizes[kSharedBytes])};
  const Variant variant = choose_variant(p, sizes[kAligned]);
  plan_streamed(k, variant, device);
  lay_out_scratch(k, scratch);
  k.w.counters = counters;
  for (int64_t i = 0; i < launches; ++i) {
    if (p.layout == kChannelsLast) {
      if (variant.vector > 1) launch<StreamedTraits<T, kVector<T>, kChannelsLast, false>>(k);
      else launch<StreamedTraits<T, 1, kChannelsLast, false>>(k);
    } else if (variant.fold > 1) {
      if constexpr (sizeof(T) < 8) launch<StreamedTraits<T, kVector<T>, kContiguous, true>>(k);
    } else {
      if (variant.vector > 1) launch<StreamedTraits<T, kVector<T>, kContiguous, false>>(k);
      else launch<StreamedTraits<T, 1, kContiguous, false>>(k);
    }
  }
}
