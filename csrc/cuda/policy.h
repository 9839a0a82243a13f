// The streamed tier's policy for order: in which order a call's items are drawn, how far the stages run
// apart, and on how many blocks. With policy_tiles.h a plain function of shape, dtype and device.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "streamed_memory.h"

namespace cbam {
namespace policy {

struct Builder {
  Streamed& k;
  int previous = -1;
  int last_stage = -1;

  // Appends the next stage of the chain; `items` a sample or, with per_unit, a unit.
  void add(int stage, int lag, int64_t items, bool per_unit) {
    Schedule& s = k.s;
    StagePlan& d = s.plan[s.plans];
    d = {};
    d.stage = stage;
    d.lag = lag;
    d.items = static_cast<int32_t>(items);
    d.per_sample = !per_unit;
    std::fill(d.tail, d.tail + kTails, -1);
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

  // Appends stages to the tail of the one added last.
  void tail(std::initializer_list<int> stages) {
    int* at = std::find(k.s.plan[previous].tail, k.s.plan[previous].tail + kTails, -1);
    std::copy(stages.begin(), stages.end(), at);
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

inline uint32_t weight_items(const Problem& p) {
  const auto tiles = [](MatrixTile t, int64_t rows, int64_t columns) {
    return ceil_div(rows, t.rows) * ceil_div(columns, t.columns);
  };
  int64_t items = 0;
  if (p.pools && p.w1.data) items += tiles(kTileW1, p.hidden, p.channels);
  if (p.pools) items += tiles(kTileW2, p.channels, p.hidden);
  if (p.spatial != kSpatialNone) items += ceil_div(2 * taps(p) + 2, kConvColumns);
  return static_cast<uint32_t>(items);
}

}  // namespace policy

// How many units are in flight: the depth of the pipeline, and the samples a unit. `close`: the backward's
// passes follow each other as soon as they can, since in the usual order L2 would lose a sample between them.
struct Depth {
  int32_t lag, unit_samples, blocks;
  bool close;
};

inline Depth choose_depth(const Problem& p, int operation, int64_t items, const Device& device) {
  const int64_t sample = p.channels * p.positions * int64_t{element_bytes(p.dtype)};
  const int64_t streams = is_backward(operation) ? 3 : 2;
  const auto fits = [&](int lag, int64_t unit) {
    const int64_t in_flight = std::min((2 * lag + 2) * unit, p.samples);
    return in_flight * streams * sample * 2 <= device.l2_bytes;
  };
  for (int blocks : {policy::kBlocks, 1}) {
    for (int lag : {2, 1}) {
      const int64_t wanted = policy::ceil_div(3 * int64_t{blocks} * device.multiprocessors, 2 * lag * items);
      const int64_t unit = std::min(std::max<int64_t>(wanted, 1), std::max<int64_t>(p.samples, 1));
      if (fits(lag, unit)) return {lag, static_cast<int32_t>(unit), blocks, false};
    }
  }
  // Fewer than would keep all blocks busy, but as many as fit: they share what is read of the MLP's weights.
  int32_t unit = 1;
  while (fits(1, unit + 1)) ++unit;
  // Four samples are in flight in the usual order, two and a half in the close one; half as much again is
  // for blocks that lag behind.
  const int64_t flow = streams * sample * 3 / 2;
  return {1, unit, 1, 4 * flow > device.l2_bytes && flow * 5 / 2 <= device.l2_bytes};
}

// As plan_streamed, with samples chained or not.
inline bool plan_order(Streamed& k, Variant variant, const Device& device, bool chain) {
  using namespace policy;
  const Problem& p = k.p;
  Schedule& s = k.s;
  s = {};
  std::fill(s.stage_plan, s.stage_plan + kStageCount, -1);
  const bool last = p.layout == kChannelsLast;
  const int vector = variant.vector;
  s.fold = variant.fold;
  s.ragged = variant.ragged;
  s.reach = variant.ragged ? vector - 1 : 0;
  s.rows = static_cast<int32_t>(last ? p.positions : p.channels / s.fold);
  s.row_elements = static_cast<int32_t>(last ? p.channels : p.positions * s.fold);
  s.row_vectors = static_cast<int32_t>(ceil_div(s.row_elements, vector));
  const bool backward = is_backward(k.operation), gate = p.pools != 0, spatial = p.spatial != kSpatialNone;
  // The backward's larger items, of which x, dy and dx of one a multiprocessor have to stay in half of L2.
  const bool large = backward && 3 * device.multiprocessors * kMaxItemBytes <= device.l2_bytes / 2;
  const auto tiling = [&](bool reduces) {
    if (last) return channels_last_tiling(p, vector, reduces, large, device.multiprocessors);
    return contiguous_tiling(p, s, vector, reduces, backward, large, device.multiprocessors);
  };
  s.reduce = tiling(true);
  s.map = tiling(false);
  plan_pool(p, s, vector);
  if (spatial) plan_conv(p, s, backward);
  s.pool_vectors = mlp_passes(p.pools);

  if (chain) {
    if (!plan_chain(p, s, vector)) return false;
  } else if (large && gate && spatial && k.operation != kScaleBackward) {
    plan_gather(p, s, device.multiprocessors);
  }

  const int64_t reduce_items = int64_t{s.reduce.tiles} * s.reduce.chunks;
  const int64_t map_items = s.gather_tiles ? s.conv_items : int64_t{s.map.tiles} * s.map.chunks;
  const Depth depth = chain ? Depth{1, 1, kBlocks, false}
                            : choose_depth(p, k.operation, std::max(reduce_items, map_items), device);
  s.unit_samples = depth.unit_samples;
  s.units = static_cast<int32_t>(ceil_div(p.samples, s.unit_samples));
  const int lag = depth.lag;
  const int64_t groups = ceil_div(s.unit_samples, kMlpSamples);

  const int64_t weights = p.w1.data ? 2 * p.hidden * p.channels : p.channels * p.channels;
  const bool inline_mlp = weights * s.pool_vectors * s.unit_samples <= kInlineMlp;
  // In the backward each thread of an item has one unit of one sample.
  s.hidden_tile = backward ? kThreads / kMlpSamples : p.w1.data ? kHiddenTile : kThreads;
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
        b.add(kPool, 0, s.pool_items, false);
        if (s.pool_chunks > 1) b.tail({kFinishPools});
        if (inline_mlp) {
          b.tail({kHidden, kGate});
        } else {
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
      const bool close = depth.close && whole && spatial && gate;
      if (chain) {
        b.add(whole ? kCross : kGateGrad, 0, 1, false);
        if (whole) b.tail({kGateGrad});
        b.tail({kHiddenGrad, kPoolGrad, kInputGrad});
        b.order({kCross, kGateGrad});
        s.plan[0].feeds_weights = s.direct_logits = 1;
        s.weight_items = weight_items(p);
        break;
      }
      int at = 0;  // lag of the stage to come
      if (whole && (spatial || gate)) {
        b.add(kCross, 0, reduce_items, false);
        at = lag;
      }
      if (spatial) {
        if (!s.gather_tiles) b.add(kConvGrad, at, s.conv_items, false);
        if (gate) {
          if (!whole && !s.gather_tiles) at += lag;
          b.add(kGateGrad, at, map_items, false);
          s.direct_logits = s.map.tiles == 1 && s.reduce.tiles == 1;
          if (!close) at += lag;
        }
      }
      if (gate) {
        const bool blocks = !inline_mlp && p.w1.data;
        if (blocks) {
          s.hidden_blocks = static_cast<int32_t>(ceil_div(p.channels, s.gate_tile));
          b.add(kLogitGrad, at, gate_items, true);
          // In a tail where it is one item's work: one stage less to wait for.
          if (s.unit_samples * p.hidden <= kThreads)
            b.tail({kHiddenGrad});
          else
            b.add(kHiddenGrad, at, hidden_items, true);
        } else if (!s.direct_logits) {
          b.add(kLogitGrad, at, logit_items, false);
        }
        if (!inline_mlp) {
          b.add(kPoolGrad, at, gate_items, true);
        } else {
          if (p.w1.data) b.tail({kHiddenGrad});
          b.tail({kPoolGrad});
        }
      }
      if (b.previous >= 0) s.plan[b.previous].feeds_weights = 1;
      b.add(kInputGrad, at + (gate && !spatial ? lag : 0), map_items, false);
      // From the first read of dy to the last, nine wide stages are drawn, or in the close order five: the
      // convolution and the MLP of a unit then have one wide stage less each to hide behind.
      if (close)
        b.order({kConvGrad, kGateGrad, kCross, kLogitGrad, kHiddenGrad, kPoolGrad, kInputGrad});
      else
        b.order({kConvGrad, kLogitGrad, kCross, kHiddenGrad, kGateGrad, kPoolGrad, kInputGrad});
      s.weight_items = weight_items(p);
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
    if (chain) s.ring = 1;  // a slot for each block
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
  int blocks = depth.blocks;
  if (chain) {
    s.slot_bytes = static_cast<int32_t>(slot_bytes(p));
    shared += s.slot_bytes;
    // Of each block CUDA takes a KiB, which a multiprocessor has beyond the most that one may ask for.
    if (2 * (shared + kStaticShared + 1024) > device.shared_bytes + 1024) blocks = 1;
  }
  k.shared_bytes = static_cast<int32_t>(std::min<int64_t>(shared, INT32_MAX));
  k.blocks_per_multiprocessor = blocks;
  k.grid = static_cast<int32_t>(
      std::min<int64_t>(main + s.weight_items, int64_t{blocks} * device.multiprocessors));
  k.shared_limit = device.shared_bytes - kStaticShared;
  return shared <= k.shared_limit;
}

// Fills in k.s and the launch shape for k.p and k.operation. False where the shape is out of reach:
// an item would need more shared memory than the device gives a block. Ragged rows, whose items have more
// positions, need more of it than single elements, which take their place in `variant` where that is too
// much.
inline bool plan_streamed(Streamed& k, Variant& variant, const Device& device) {
  const bool chain = policy::wants_chain(k.p, k.operation, device);
  if ((chain && plan_order(k, variant, device, true)) || plan_order(k, variant, device, false)) return true;
  if (!variant.ragged) return false;
  variant = {1, 1};
  return plan_streamed(k, variant, device);
}

}  // namespace cbam
