// The streamed tier's policy, all of it: how a call is cut into items, in which order they are drawn, how
// far the stages run apart, and on how many blocks. A plain function of shape, dtype and device.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "streamed.h"

namespace cbam {

struct Device {
  int64_t l2_bytes;
  int32_t multiprocessors;
  int32_t shared_bytes;  // most shared memory that a block may ask for
};

namespace policy {

// Sizes are the ones at which the modelled traffic of benchmarks/cuda_bytes.py is least.
constexpr int64_t kItemBytes = 32 << 10;     // what one item reads of x, about
constexpr int64_t kMaxItemBytes = 64 << 10;  // where narrower tiles would cost more in partial sums
constexpr int kTileBytes = 128;              // width of a contiguous tile: a cache line
constexpr int kMinTileBytes = 64;
constexpr int kGradTileBytes = 256;        // backward: each tile leaves sums and reads gradients a channel
constexpr int64_t kMaxTermRows = 1024;     // where rows are short, the channels' terms would not fit
constexpr int64_t kPoolPositions = 512;    // channels-last: positions a partial pool, at most
constexpr int kPoolBytes = 64;             // channels-last: width of a partial pool's tile
constexpr int64_t kInlineMlp = 128 << 10;  // multiplications that one block may do for a unit
constexpr int kHiddenTile = 16, kGateTile = 128;
constexpr int64_t kConvPositions = 1024;
constexpr int64_t kStagedBytes = 40 << 10;  // most shared memory for the maps of a convolution's item
constexpr int64_t kKernelBytes = 8 << 10;   // most shared memory for the convolution's weights
constexpr int64_t kFoldPoolBytes = 32 << 10;
constexpr int kBlocks = 2;  // a multiprocessor, where L2 holds what they have in flight

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
inline int floor_power(int64_t v) {
  int p = 1;
  while (int64_t{p} * 2 <= v && p < (1 << 30)) p *= 2;
  return p;
}
// At most 2**30: a tile's size is the smaller of it and something else.
inline int ceil_power(int64_t v) {
  int p = 1;
  while (p < v && p < (1 << 30)) p *= 2;
  return p;
}
inline int log2_of(int power) {
  int n = 0;
  while ((1 << n) < power) ++n;
  return n;
}
inline int64_t gcd(int64_t a, int64_t b) {
  return b ? gcd(b, a % b) : a;
}

}  // namespace policy

inline int element_bytes(int dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}
inline int accumulate_bytes(int dtype) {
  return dtype == kFloat64 ? 8 : 4;
}

// Which instantiation runs: elements a vector, and channels folded into one row (1: none).
struct Variant {
  int32_t vector, fold;
};

// `aligned`: every tensor of x's size starts at a multiple of 16 bytes.
inline Variant choose_variant(const Problem& p, bool aligned) {
  const int full = 16 / element_bytes(p.dtype);
  if (!aligned) return {1, 1};
  if (p.layout == kChannelsLast) return {p.channels % full == 0 ? full : 1, 1};
  if (p.positions % full == 0) return {full, 1};
  const int fold = static_cast<int>(full / policy::gcd(full, p.positions));
  const bool fits = p.positions >= full && fold * p.positions / full <= kThreads;
  if (p.dtype != kFloat64 && fits && p.channels % fold == 0) return {full, fold};
  return {1, 1};
}

namespace policy {

inline Tiling contiguous_tiling(const Problem& p, const Schedule& s, int vector, bool reduces, bool large,
                                int sms) {
  Tiling t{};
  const int64_t vector_bytes = int64_t{vector} * element_bytes(p.dtype);
  const int64_t row_bytes = s.row_elements * int64_t{element_bytes(p.dtype)};
  if (s.fold > 1) {
    t.columns = s.row_vectors;
    t.positions = static_cast<int32_t>(p.positions);
    t.tiles = 1;
    int64_t rows = std::max<int64_t>(1, kItemBytes / row_bytes);
    // Each chunk of a reduction leaves sums a position, and each of the backward's passes reads gradients a
    // position: few chunks where there are many samples.
    if (reduces) rows = std::max<int64_t>(rows, 512 / element_bytes(p.dtype) / s.fold);
    if ((reduces || large) && p.samples * ceil_div(s.rows, rows) > 4 * sms) rows *= 2;
    t.chunks = static_cast<int32_t>(ceil_div(s.rows, rows));
    t.chunk_rows = static_cast<int32_t>(ceil_div(s.rows, t.chunks));
    t.chunks = static_cast<int32_t>(ceil_div(s.rows, t.chunk_rows));
    return t;
  }
  const bool wide = large && (!reduces || s.rows * int64_t{kTileBytes} > kItemBytes);
  int width = wide ? kGradTileBytes : kTileBytes;
  if (!wide && s.rows * int64_t{width} > kMaxItemBytes) width = kMinTileBytes;
  while (s.rows * int64_t{width} * 2 <= (large ? kItemBytes : kItemBytes / 2)) width *= 2;
  t.columns = static_cast<int32_t>(std::min<int64_t>(32, ceil_power(ceil_div(width, vector_bytes))));
  t.columns = std::min(t.columns, ceil_power(s.row_vectors));
  t.columns_log2 = log2_of(t.columns);
  t.positions = t.columns * vector;
  t.tiles = static_cast<int32_t>(ceil_div(s.row_vectors, t.columns));
  t.chunk_rows = s.rows;
  if (wide || !reduces) {
    int64_t rows = (wide ? kMaxItemBytes : kItemBytes) / (t.columns * vector_bytes);
    if (!reduces) rows = std::min<int64_t>(rows, kMaxTermRows);
    t.chunk_rows = static_cast<int32_t>(ceil_div(s.rows, ceil_div(s.rows, rows)));
  }
  t.chunks = static_cast<int32_t>(ceil_div(s.rows, t.chunk_rows));
  return t;
}

inline Tiling channels_last_tiling(const Problem& p, int vector, bool reduces, bool large) {
  Tiling t{};
  const int64_t row_bytes = p.channels * int64_t{element_bytes(p.dtype)};
  const int64_t row_vectors = ceil_div(p.channels, vector);
  t.columns = std::min(32, ceil_power(row_vectors));
  t.columns_log2 = log2_of(t.columns);
  int64_t positions = kTileBytes / element_bytes(p.dtype);
  const bool wide = large && (!reduces || positions * row_bytes > kItemBytes);
  if (wide)
    positions = kGradTileBytes / element_bytes(p.dtype);
  else if (positions * row_bytes > kMaxItemBytes)
    positions /= 2;
  positions = std::max(positions, std::min<int64_t>(kItemBytes / 2 / row_bytes, kThreads));
  t.tiles = static_cast<int32_t>(ceil_div(p.positions, std::min(positions, p.positions)));
  t.positions = static_cast<int32_t>(ceil_div(p.positions, t.tiles));
  t.tiles = static_cast<int32_t>(ceil_div(p.positions, t.positions));
  t.chunk_rows = static_cast<int32_t>(row_vectors);
  if (wide) {
    const int64_t slice_bytes = int64_t{t.positions} * t.columns * vector * element_bytes(p.dtype);
    const int64_t slices = std::max<int64_t>(1, kMaxItemBytes / slice_bytes);
    t.chunk_rows = static_cast<int32_t>(std::min(row_vectors, slices * t.columns));
  }
  t.chunks = static_cast<int32_t>(ceil_div(row_vectors, t.chunk_rows));
  return t;
}

inline void plan_pool(const Problem& p, Schedule& s, int vector) {
  const int64_t vector_bytes = int64_t{vector} * element_bytes(p.dtype);
  s.pool_chunks = 1;
  if (p.layout == kChannelsLast) {
    const int64_t vectors = ceil_div(p.channels, vector);
    s.pool_lanes = std::min({32, ceil_power(vectors), ceil_power(ceil_div(kPoolBytes, vector_bytes))});
    s.pool_chunks = static_cast<int32_t>(ceil_div(p.positions, kPoolPositions));
    s.pool_rows = static_cast<int32_t>(ceil_div(p.positions, s.pool_chunks));
    s.pool_chunks = static_cast<int32_t>(ceil_div(p.positions, s.pool_rows));
    s.pool_items = static_cast<int32_t>(ceil_div(vectors, s.pool_lanes)) * s.pool_chunks;
  } else if (s.fold > 1) {
    s.pool_lanes = static_cast<int32_t>(std::min(32, floor_power(std::max<int64_t>(1, p.positions / 8))));
    const int64_t row = s.row_elements * int64_t{accumulate_bytes(p.dtype)};
    s.pool_rows = static_cast<int32_t>(std::max<int64_t>(1, kFoldPoolBytes / row));
    s.pool_items = static_cast<int32_t>(ceil_div(s.rows, s.pool_rows));
  } else {
    s.pool_lanes = std::min(kThreads, floor_power(std::max<int64_t>(1, s.row_vectors / 4)));
    const int64_t pass = kThreads / s.pool_lanes;
    const int64_t pass_bytes = pass * s.row_elements * element_bytes(p.dtype);
    s.pool_rows = static_cast<int32_t>(pass * std::max<int64_t>(1, kItemBytes * 3 / 4 / pass_bytes));
    s.pool_items = static_cast<int32_t>(ceil_div(s.rows, s.pool_rows));
  }
}

inline void plan_conv(const Problem& p, Schedule& s, bool backward) {
  const int64_t a = accumulate_bytes(p.dtype), maps = backward ? 3 : 2;
  const int64_t plane = int64_t{p.height} * p.width;
  s.conv_halo = static_cast<int32_t>(std::min<int64_t>(
      p.positions, p.kernel_d / 2 * plane + int64_t{p.kernel_h / 2} * p.width + p.kernel_w / 2));
  const int64_t room = kStagedBytes / (maps * a) - 2 * int64_t{s.conv_halo};
  const int64_t wanted = std::max<int64_t>(kConvPositions, 2 * int64_t{s.conv_halo});
  s.conv_staged = p.positions <= kStagedBytes / (maps * a) || room >= kThreads;
  int64_t positions = std::min(p.positions, wanted);
  if (s.conv_staged && p.positions > kStagedBytes / (maps * a)) positions = std::min(positions, room);
  s.conv_items = static_cast<int32_t>(ceil_div(p.positions, positions));
  s.conv_positions = static_cast<int32_t>(ceil_div(p.positions, s.conv_items));
  s.conv_items = static_cast<int32_t>(ceil_div(p.positions, s.conv_positions));
  s.kernel_staged = 2 * taps(p) * a <= kKernelBytes;
}

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
    const int64_t groups = s.fold > 1 || t.columns == 32 ? kThreads / t.columns : kThreads / 32;
    return groups * t.columns * vector * value;
  };
  const int64_t mean_max = a == 8 ? 24 : 12;
  const int64_t pairs = 2 * int64_t{kThreads} * a;
  const int64_t kernel = s.kernel_staged ? 2 * taps(p) * a : 0;
  const int64_t window = s.conv_staged ? conv_window(p, s) * a : 0;
  const int64_t fold_sums = s.fold > 1 ? std::max<int64_t>(16 << 10, pairs) : 0;
  const int64_t terms = 4 * a * (last ? int64_t{s.map.columns} * vector : channels(s.map));
  const int64_t mlp = kBatch * (int64_t{kThreads} + kMlpStage) * a;  // column_dot's vectors and partial sums
  switch (stage) {
    case kPool:
      if (last) return bytes({kThreads * vector * mean_max});
      if (s.fold > 1) return bytes({s.pool_rows * int64_t{s.row_elements} * a});
      return bytes({kThreads / 32 * mean_max});
    case kHidden:
    case kGate:
    case kHiddenGrad:
    case kPoolGrad:
      return mlp;
    case kSpatialPool:
      return last ? bytes({p.channels * a}) : bytes({channels(s.reduce) * a, columns(s.reduce, mean_max)});
    case kConv:
      return bytes({kernel, window, window});
    case kOutput:
      return bytes({channels(s.map) * a, s.map.positions * a});
    case kCross:
      return bytes({channels(s.reduce) * a, s.reduce.positions * a, s.reduce.positions * a,
                    std::max(columns(s.reduce, a), fold_sums)});
    case kConvGrad:
      return bytes({kernel, window, window, window, kThreads / 32 * 2 * a});
    case kGateGrad:
      return bytes({last ? 0 : channels(s.map) * a, s.map.positions * a, s.map.positions * a,
                    s.map.positions * a, s.map.positions * 4,
                    std::max(last ? columns(s.map, a) : 0, fold_sums)});
    case kFinishPools:
      return 0;
    case kLogitGrad:
      return kThreads * a;
    case kInputGrad:
      return bytes({terms, terms, s.map.positions * a, s.map.positions * a, s.map.positions * a,
                    s.map.positions * a, s.map.positions * 4});
    default:
      return bytes({kWeightStage * kWeightTile * a, kWeightStage * kWeightTile * a});
  }
}

struct Builder {
  Streamed& k;
  int previous = -1;
  int last_stage = -1;

  // Appends the next stage of the chain; `items` a sample or, with per_unit, a unit.
  void add(int stage, int lag, int64_t items, bool per_unit, std::initializer_list<int> tail = {}) {
    Schedule& s = k.s;
    StagePlan& d = s.plan[s.plans];
    d = {};
    d.stage = stage;
    d.lag = lag;
    d.items = static_cast<int32_t>(items);
    d.per_sample = !per_unit;
    std::fill(d.tail, d.tail + kTails, -1);
    std::copy(tail.begin(), tail.end(), d.tail);
    d.total = per_unit ? Count{0, d.items} : Count{d.items, 0};
    d.wait_counter = -1;
    if (previous >= 0) {
      const StagePlan& before = s.plan[previous];
      const bool tailed = before.tail[0] >= 0;
      d.wait_counter = tailed ? kTailDone : before.stage;
      d.wait_for = tailed ? Count{0, 1} : before.total;
    }
    s.stage_plan[stage] = s.plans;
    previous = s.plans++;
    last_stage = stage;
  }

  // Puts the stages into the order in which a step draws them.
  void order(std::initializer_list<int> stages) {
    Schedule& s = k.s;
    StagePlan sorted[8];
    int n = 0;
    uint32_t first = 0;
    for (int stage : stages) {
      const int at = s.stage_plan[stage];
      if (at < 0) continue;
      sorted[n] = s.plan[at];
      sorted[n].first = first;
      first += sorted[n].items * (sorted[n].per_sample ? s.unit_samples : 1);
      s.stage_plan[stage] = n++;
    }
    std::copy(sorted, sorted + n, s.plan);
    s.step_items = first;
  }
};

}  // namespace policy

inline bool is_backward(int operation) {
  return operation >= kCbamBackward;
}

// How many units are in flight: the depth of the pipeline, and the samples a unit.
struct Depth {
  int32_t lag, unit_samples, blocks;
};

inline Depth choose_depth(const Problem& p, int operation, int64_t items, const Device& device) {
  const int64_t sample = p.channels * p.positions * int64_t{element_bytes(p.dtype)};
  const int64_t streams = is_backward(operation) ? 3 : 2;
  Depth chosen{1, 1, 1};
  for (int blocks : {policy::kBlocks, 1}) {
    for (int lag : {2, 1}) {
      const int64_t wanted = policy::ceil_div(3 * int64_t{blocks} * device.multiprocessors, 2 * lag * items);
      const int64_t unit = std::min(std::max<int64_t>(wanted, 1), std::max<int64_t>(p.samples, 1));
      if ((2 * lag + 2) * streams * unit * sample * 2 <= device.l2_bytes) {
        return {lag, static_cast<int32_t>(unit), blocks};
      }
    }
  }
  return chosen;
}

// Fills in k.s and the launch shape for k.p and k.operation. False where the shape is out of reach:
// an item would need more shared memory than the device gives a block.
inline bool plan_streamed(Streamed& k, Variant variant, const Device& device) {
  using namespace policy;
  const Problem& p = k.p;
  Schedule& s = k.s;
  s = {};
  std::fill(s.stage_plan, s.stage_plan + kStageCount, -1);
  const bool last = p.layout == kChannelsLast;
  const int vector = variant.vector;
  s.fold = variant.fold;
  s.rows = static_cast<int32_t>(last ? p.positions : p.channels / s.fold);
  s.row_elements = static_cast<int32_t>(last ? p.channels : p.positions * s.fold);
  s.row_vectors = static_cast<int32_t>(ceil_div(s.row_elements, vector));
  const bool backward = is_backward(k.operation), gate = p.pools != 0, spatial = p.spatial != kSpatialNone;
  // The backward's larger items, of which x, dy and dx of one a multiprocessor have to stay in half of L2.
  const bool large = backward && 3 * device.multiprocessors * kMaxItemBytes <= device.l2_bytes / 2;
  const auto tiling = [&](bool reduces) {
    if (last) return channels_last_tiling(p, vector, reduces, large);
    return contiguous_tiling(p, s, vector, reduces, large, device.multiprocessors);
  };
  s.reduce = tiling(true);
  s.map = tiling(false);
  plan_pool(p, s, vector);
  if (spatial) plan_conv(p, s, backward);
  s.pool_vectors = p.pools & kBlend ? 1 : pool_count(p.pools);

  const int64_t reduce_items = int64_t{s.reduce.tiles} * s.reduce.chunks;
  const int64_t map_items = int64_t{s.map.tiles} * s.map.chunks;
  const Depth depth = choose_depth(p, k.operation, std::max(reduce_items, map_items), device);
  s.unit_samples = depth.unit_samples;
  s.units = static_cast<int32_t>(ceil_div(p.samples, s.unit_samples));
  const int lag = depth.lag;
  const int64_t groups = ceil_div(s.unit_samples, kMlpSamples);

  const int64_t weights = p.w1.data ? 2 * p.hidden * p.channels : p.channels * p.channels;
  const bool inline_mlp = weights * s.pool_vectors * s.unit_samples <= kInlineMlp;
  s.hidden_tile = p.w1.data ? kHiddenTile : kThreads;
  s.gate_tile = kGateTile;
  const int64_t hidden_items = ceil_div(p.hidden, s.hidden_tile) * groups;
  const int64_t gate_items = ceil_div(p.channels, s.gate_tile) * groups;
  const int64_t logit_items = ceil_div(p.channels, kLogitTile);

  Builder b{k};
  switch (k.operation) {
    case kCbamForward:
    case kAttentionForward: {
      const bool whole = k.operation == kCbamForward;
      if (gate) {
        const bool parts = s.pool_chunks > 1;
        if (inline_mlp && parts)
          b.add(kPool, 0, s.pool_items, false, {kFinishPools, kHidden, kGate});
        else if (inline_mlp)
          b.add(kPool, 0, s.pool_items, false, {kHidden, kGate});
        else if (parts)
          b.add(kPool, 0, s.pool_items, false, {kFinishPools});
        else
          b.add(kPool, 0, s.pool_items, false);
        if (!inline_mlp) {
          b.add(kHidden, lag, hidden_items, true);
          b.add(kGate, lag, gate_items, true);
        }
      }
      if (spatial) {
        b.add(kSpatialPool, gate ? lag : 0, reduce_items, false);
        b.add(kConv, gate ? 2 * lag : lag, s.conv_items, false);
      }
      if (whole) b.add(kOutput, gate && spatial ? 2 * lag : lag, map_items, false);
      // The wide stages keep dependent narrow ones apart, so that few items find their inputs unfinished.
      if (inline_mlp)
        b.order({kConv, kPool, kSpatialPool, kOutput});
      else
        b.order({kConv, kHidden, kPool, kGate, kOutput, kSpatialPool});
      break;
    }
    case kScaleForward:
      b.add(kOutput, 0, map_items, false);
      b.order({kOutput});
      break;
    case kScaleBackward:
      b.add(kCross, 0, reduce_items, false);
      s.logits_grad_items =
          s.reduce.chunks > 1 ? static_cast<int32_t>(ceil_div(p.positions, kThreads * 4)) : 0;
      if (gate || s.logits_grad_items) {
        b.add(kLogitGrad, lag, (gate ? logit_items : 0) + s.logits_grad_items, false);
      }
      b.order({kLogitGrad, kCross});
      break;
    default: {
      const bool whole = k.operation == kCbamBackward;
      int at = 0;  // lag of the stage to come
      if (whole && (spatial || gate)) {
        b.add(kCross, 0, reduce_items, false);
        at = lag;
      }
      if (spatial) {
        b.add(kConvGrad, at, s.conv_items, false);
        if (gate) {
          if (!whole) at += lag;
          b.add(kGateGrad, at, map_items, false);
          at += lag;
        }
      }
      if (gate) {
        if (inline_mlp && p.w1.data) {
          b.add(kLogitGrad, at, logit_items, false, {kHiddenGrad, kPoolGrad});
        } else if (inline_mlp) {
          b.add(kLogitGrad, at, logit_items, false, {kPoolGrad});
        } else {
          b.add(kLogitGrad, at, logit_items, false);
          if (p.w1.data) b.add(kHiddenGrad, at, hidden_items, true);
          b.add(kPoolGrad, at, gate_items, true);
        }
      }
      if (b.previous >= 0) s.plan[b.previous].feeds_weights = 1;
      b.add(kInputGrad, at + (gate && !spatial ? lag : 0), map_items, false);
      b.order({kConvGrad, kLogitGrad, kCross, kHiddenGrad, kGateGrad, kPoolGrad, kInputGrad});
      if (!gate && !spatial) break;
      const auto tile = [](int64_t rows, int64_t columns) {
        return ceil_div(rows, kWeightTile) * ceil_div(columns, kWeightTile);
      };
      int64_t items = 0;
      if (gate) {
        if (p.w1.data) items += tile(p.hidden, p.channels);
        items += tile(p.channels, p.hidden);
      }
      if (spatial) items += ceil_div(2 * taps(p) + 2, kConvColumns);
      s.weight_items = static_cast<uint32_t>(items);
    }
  }

  int deepest = 0;
  for (int i = 0; i < s.plans; ++i) {
    deepest = std::max(deepest, s.plan[i].lag);
    const StagePlan& d = s.plan[i];
    if (d.feeds_weights) {
      s.weights_ready = static_cast<uint32_t>(
          d.tail[0] >= 0 ? s.units : d.total.per_sample * p.samples + int64_t{d.total.per_unit} * s.units);
    }
  }
  if (backward) {
    // A unit takes over the scratch of the unit `ring` before it, which has long finished by then.
    s.ring = std::min(deepest + 2, std::max(s.units, 1));
    if (s.ring == s.units) s.ring = 0;
    s.ring_counter = b.last_stage;
  }
  const int64_t main = int64_t{s.step_items} * (s.units + deepest);
  if (main + s.weight_items >= (int64_t{1} << 32) - kThreads * device.multiprocessors) return false;
  s.main_items = static_cast<uint32_t>(main);

  int64_t shared = s.weight_items ? stage_shared(k, kStageCount, vector) : 0;
  for (int i = 0; i < s.plans; ++i) {
    shared = std::max(shared, stage_shared(k, s.plan[i].stage, vector));
    for (int stage : s.plan[i].tail) {
      if (stage >= 0) shared = std::max(shared, stage_shared(k, stage, vector));
    }
  }
  k.shared_bytes = static_cast<int32_t>(std::min<int64_t>(shared, INT32_MAX));
  k.blocks_per_multiprocessor = depth.blocks;
  k.grid = static_cast<int32_t>(
      std::min<int64_t>(main + s.weight_items, int64_t{depth.blocks} * device.multiprocessors));
  k.shared_limit = device.shared_bytes - kStaticShared;
  return shared <= k.shared_limit;
}

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
  take(w.spatial_grad, runs(kCross), slots * s.reduce.chunks * p.positions * a);
  take(w.pooled_grad, runs(kConvGrad), slots * 2 * p.positions * a);
  take(w.cross_parts, runs(kCross), slots * s.reduce.tiles * p.channels * a);
  take(w.gate_parts, runs(kGateGrad), slots * s.map.tiles * p.channels * a);
  take(w.logit_grad, mlp_grad, n * p.channels * a);
  take(w.hidden_grad, mlp_grad && p.w1.data, n * s.pool_vectors * p.hidden * a);
  take(w.pool_grad, runs(kInputGrad) && p.pools, slots * pool_count(p.pools) * p.channels * a);
  take(w.conv_parts, runs(kConvGrad), n * s.conv_items * (2 * taps(p) + 2) * a);
}

// Bytes of scratch; with a base, also points k.w into it.
inline int64_t lay_out_scratch(Streamed& k, char* base) {
  int64_t used = 0;
  visit_scratch(k, [&](int64_t bytes) -> void* {
    const int64_t at = used;
    used += policy::round_up(bytes, 256);
    return base && bytes ? base + at : nullptr;
  });
  return used;
}

}  // namespace cbam
