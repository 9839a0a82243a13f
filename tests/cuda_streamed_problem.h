// Builds a Streamed from flat arguments: what the host driver and the PTX runner of the tests share.
#pragma once

#include <cstdint>

#include "policy.h"

namespace cbam {

// Indices of `sizes`; the order of cuda_streamed.py.
enum Size {
  kOperationAt,
  kDTypeAt,
  kLayoutAt,
  kSamplesAt,
  kChannelsAt,
  kDepthAt,
  kHeightAt,
  kWidthAt,
  kKernelDAt,
  kKernelHAt,
  kKernelWAt,
  kHiddenAt,
  kPoolsAt,
  kSpatialAt,
  kTiesAt,
  kResidualAt,
  kAlignedAt,
  kWideAt,
  kHasW1At,
  kL2At,
  kMultiprocessorsAt,
  kSharedBytesAt
};

inline Problem sizes_of(const int64_t* v) {
  Problem p{};
  p.samples = v[kSamplesAt];
  p.channels = v[kChannelsAt];
  p.depth = int32_t(v[kDepthAt]);
  p.height = int32_t(v[kHeightAt]);
  p.width = int32_t(v[kWidthAt]);
  p.positions = v[kDepthAt] * v[kHeightAt] * v[kWidthAt];
  p.kernel_d = int32_t(v[kKernelDAt]);
  p.kernel_h = int32_t(v[kKernelHAt]);
  p.kernel_w = int32_t(v[kKernelWAt]);
  p.hidden = v[kHiddenAt];
  p.pools = int32_t(v[kPoolsAt]);
  p.spatial = int32_t(v[kSpatialAt]);
  p.ties = int32_t(v[kTiesAt]);
  p.residual = int32_t(v[kResidualAt]);
  p.dtype = int32_t(v[kDTypeAt]);
  p.layout = int32_t(v[kLayoutAt]);
  if (v[kHasW1At])
    // Planning only asks whether it is there, its size and its alignment.
    p.w1 = {reinterpret_cast<const void*>(uintptr_t{16}), int32_t(v[kWideAt] & 1)};
  return p;
}

// Fills report: fits, scratch bytes, counter words, grid, vector, fold, units, samples a unit, reduce
// chunks, pool chunks, ring, conv items, stages, shared bytes, lag of the last stage, reduce tiles, blocks a
// multiprocessor, static shared bytes, map tiles an item that gathers, hidden blocks, whether samples are
// chained, whether rows are ragged, and shares of the batch that weight gradients are summed in.
inline Variant plan_call(const int64_t* sizes, Streamed& k, int64_t* report) {
  k.operation = int32_t(sizes[kOperationAt]);
  const Device device{sizes[kL2At], int32_t(sizes[kMultiprocessorsAt]), int32_t(sizes[kSharedBytesAt])};
  Variant variant = choose_variant(k.p, sizes[kAlignedAt]);
  const bool fits = plan_streamed(k, variant, device);
  if (report) {
    const int64_t values[] = {fits,
                              lay_out_scratch(k, nullptr),
                              counter_words(k),
                              k.grid,
                              variant.vector,
                              variant.fold,
                              k.s.units,
                              k.s.unit_samples,
                              k.s.reduce.chunks,
                              k.s.pool_chunks,
                              k.s.ring,
                              k.s.conv_items,
                              k.s.plans,
                              k.shared_bytes,
                              k.s.plan[k.s.plans - 1].lag,
                              k.s.reduce.tiles,
                              k.blocks_per_multiprocessor,
                              kStaticShared,
                              k.s.gather_tiles,
                              k.s.hidden_blocks,
                              k.s.chained,
                              k.s.ragged,
                              k.s.weight_splits};
    for (int i = 0; i < int(sizeof(values) / sizeof(values[0])); ++i) report[i] = values[i];
  }
  return variant;
}

// `pointers` in the order of cuda_streamed.py.
inline Variant make_call(const int64_t* sizes, double eps, void* const* pointers, uint32_t* counters,
                         char* scratch, Streamed& k) {
  Problem& p = k.p = sizes_of(sizes);
  const auto wide = [&](int i) { return int32_t(sizes[kWideAt] >> i & 1); };
  int at = 0;
  for (const void** t : {&p.x, &p.dy}) *t = pointers[at++];
  for (void** t : {&p.y, &p.dx}) *t = pointers[at++];
  int i = 0;
  for (Weight* w : {&p.w1, &p.b1, &p.w2, &p.b2, &p.conv_weight, &p.conv_bias, &p.bn_weight, &p.bn_bias,
                    &p.bn_mean, &p.bn_var}) {
    *w = {pointers[at++], wide(i++)};
  }
  p.bn_eps = eps;
  for (void** t : {&p.pooled, &p.pool_index, &p.channel_gate, &p.spatial_pool, &p.spatial_index,
                   &p.hidden_layer, &p.spatial_gate, &p.z}) {
    *t = pointers[at++];
  }
  p.dz = pointers[at++];
  for (void** t : {&p.dz_out, &p.dchannel_gate}) *t = pointers[at++];
  i = 0;
  for (WeightGrad* g :
       {&p.dw1, &p.db1, &p.dw2, &p.db2, &p.dconv_weight, &p.dconv_bias, &p.dbn_weight, &p.dbn_bias}) {
    *g = {pointers[at++], wide(i++)};
  }
  const Variant variant = plan_call(sizes, k, nullptr);
  lay_out_scratch(k, scratch);
  k.w.counters = counters;
  return variant;
}

}  // namespace cbam
