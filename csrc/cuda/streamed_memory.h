// The memory that a plan of the streamed tier needs: shared memory of each stage, scratch and counters.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "policy_tiles.h"

namespace cbam {

inline bool is_backward(int operation) {
  return operation >= kCbamBackward;
}

namespace policy {

inline int64_t conv_window(const Problem& p, const Schedule& s) {
  return std::min<int64_t>(p.positions, s.conv_positions + 2 * int64_t{s.conv_halo});
}

// Each stage's shared memory, in the order in which its code takes it; see Shared in streamed_engine.cuh.
inline int64_t stage_shared(const Streamed& k, int stage, int vector) {
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const int64_t a = accumulate_bytes(p.dtype);
  const auto bytes = [](std::initializer_list<int64_t> sizes) {
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    return total;
  };
  const bool last = p.layout == kChannelsLast;
  const auto channels = [&](const Tiling& t) { return last ? p.channels : int64_t{t.chunk_rows} * s.fold; };
  // What a reduction over the row lanes of a tile leaves: one value a column and group of lanes.
  const auto columns = [&](const Tiling& t, int64_t value) {
    const int64_t groups = s.fold > 1 || s.ragged || t.columns == 32 ? kThreads / t.columns : kThreads / 32;
    return groups * (t.columns * vector + (s.fold > 1 ? 0 : 32)) * value;
  };
  const int64_t mean_max = a == 8 ? 24 : 12;
  const int64_t pairs = 2 * int64_t{kThreads} * a;
  const int64_t kernel = s.kernel_staged ? 2 * taps(p) * a : 0;
  const int64_t window = s.conv_staged ? conv_window(p, s) * a : 0;
  const int64_t fold_sums = s.fold > 1 ? std::max<int64_t>(16 << 10, pairs) : 0;
  const int64_t terms = 4 * a * (last ? int64_t{s.map.columns} * vector : channels(s.map));
  // column_dot's vectors, and its partial sums for one of them.
  const int64_t mlp = bytes(
      {kBatch * kMlpStage * a, std::max(kThreads * (16 / element_bytes(p.dtype)), kThreads) * a + 32 * a});
  const int64_t conv_grad = bytes({kernel, window, 2 * window, kThreads / 32 * 2 * a});
  // A pass over x: if it gathers dq, that is at the end, behind what it took to do so.
  const auto pass = [&](int64_t own) {
    return s.gather_tiles ? std::max(own, conv_grad) + bytes({2 * s.conv_positions * a}) : own;
  };
  const auto matrix_tile = [&](MatrixTile t) {
    return bytes({32, kWeightStage * t.rows * a, kWeightStage * t.columns * a});
  };
  const int64_t positions = s.map.positions + s.reach;
  const int64_t fields = s.gather_tiles ? 0 : positions * a;
  switch (stage) {
    case kPool:
      if (last) return bytes({kThreads * (vector + 1) * mean_max});
      if (s.fold > 1) return bytes({s.pool_rows * int64_t{s.row_elements} * a});
      return bytes({kThreads / 32 * mean_max});
    case kHidden:
    case kGate:
    case kPoolGrad:
      return mlp;
    case kHiddenGrad:
      return s.hidden_blocks ? 0 : mlp;
    case kSpatialPool:
      return last ? bytes({p.channels * a}) : bytes({channels(s.reduce) * a, columns(s.reduce, mean_max)});
    case kConv:
      return bytes({kernel, 2 * window});
    case kOutput:
      return bytes({channels(s.map) * a, positions * a});
    case kCross:
      return bytes({channels(s.reduce) * a, s.reduce.positions * a, s.reduce.positions * a,
                    std::max(columns(s.reduce, a), fold_sums)});
    case kConvGrad:
      return conv_grad;
    case kGateGrad:
      return pass(bytes({last ? 0 : channels(s.map) * a, fields, fields, positions * a, positions * 4,
                         std::max(last ? columns(s.map, a) : 0, fold_sums)}));
    case kFinishPools:
      return 0;
    case kLogitGrad:
      return s.hidden_blocks ? bytes({kMlpSamples * s.gate_tile * a}) + mlp : kThreads * a;
    case kInputGrad:
      return pass(bytes({terms, terms, positions * a, fields, fields, positions * a, positions * 4}));
    default:
      return std::max(matrix_tile(kTileW1), matrix_tile(kTileW2));
  }
}

// A chained sample's slot, in the order of take_slot in streamed_engine.cuh; dq, which a pass gathers, is
// behind it.
inline int64_t slot_bytes(const Problem& p) {
  const int64_t a = accumulate_bytes(p.dtype);
  return round_up(p.channels * a, 16) + round_up(pool_count(p.pools) * p.channels * a, 16) +
         round_up(p.positions * a, 16) + round_up(p.hidden * a, 16) + round_up(2 * p.positions * a, 16);
}

}  // namespace policy

inline int64_t counter_words(const Streamed& k) {
  return kUnitCounters + int64_t{k.s.units} * kCounters;
}

// Calls visit(pointer, bytes) for every tensor of scratch but the counters, in the order of Scratch; bytes
// are zero where this call needs none.
template <class Visit>
void visit_scratch(Streamed& k, Visit visit) {
  const Problem& p = k.p;
  const Schedule& s = k.s;
  Scratch& w = k.w;
  const int64_t a = accumulate_bytes(p.dtype), n = p.samples;
  const int64_t slots = s.ring ? int64_t{s.ring} * s.unit_samples : int64_t{s.units} * s.unit_samples;
  const auto runs = [&](int stage) { return s.stage_plan[stage] >= 0; };
  const auto take = [&](auto*& pointer, bool wanted, int64_t bytes) {
    void* at = visit(wanted ? bytes : 0);
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(at);
  };
  const bool backward = is_backward(k.operation);
  const bool scale = k.operation == kScaleForward || k.operation == kScaleBackward;
  const bool parts = runs(kPool) && s.pool_chunks > 1;
  const bool chunks = runs(kSpatialPool) && s.reduce.chunks > 1;
  const bool mlp_grad = backward && !scale && p.pools;
  take(w.pool_parts, parts, 5 * n * s.pool_chunks * p.channels * a);
  take(w.pool_marks, parts, n * s.pool_chunks * p.channels * 4);
  take(w.hidden, p.pools && !scale, n * p.hidden * a);
  take(w.spatial_parts, chunks, 2 * n * s.reduce.chunks * p.positions * a);
  take(w.spatial_marks, chunks, n * s.reduce.chunks * p.positions * 4);
  take(w.spatial_grad, runs(kCross) && !s.chained, slots * s.reduce.chunks * p.positions * a);
  take(w.pooled_grad, runs(kConvGrad), slots * 2 * p.positions * a);
  take(w.cross_parts, runs(kCross) && !s.chained, slots * s.reduce.tiles * p.channels * a);
  take(w.gate_parts, runs(kGateGrad) && !s.direct_logits, slots * s.map.tiles * p.channels * a);
  take(w.logit_grad, mlp_grad, n * p.channels * a);
  take(w.hidden_parts, mlp_grad && p.w1.data && !s.chained,
       slots * std::max(1, s.hidden_blocks) * p.hidden * a);
  take(w.hidden_grad, mlp_grad && p.w1.data, n * s.pool_vectors * p.hidden * a);
  take(w.pool_grad, runs(kInputGrad) && p.pools, slots * pool_count(p.pools) * p.channels * a);
  take(w.conv_parts, runs(kConvGrad) || s.gather_tiles, n * s.conv_items * (2 * taps(p) + 2) * a);
  take(w.weight_parts, s.join_items, s.weight_splits * grad_layout(p).entries * a);
}

// Behind each tensor of scratch: where the host checks accesses by address, what runs out of one must not
// land in the next.
#ifdef CBAM_SIMT
constexpr int64_t kScratchGap = 256;
#else
constexpr int64_t kScratchGap = 0;
#endif

// Bytes of scratch; with a base, also points k.w into it.
inline int64_t lay_out_scratch(Streamed& k, char* base) {
  int64_t used = 0;
  visit_scratch(k, [&](int64_t bytes) -> void* {
    const int64_t at = used;
    used += policy::round_up(bytes, 256) + (bytes ? kScratchGap : 0);
    return base && bytes ? base + at : nullptr;
  });
  return used;
}

}  // namespace cbam
