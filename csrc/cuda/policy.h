// The streamed tier's policy for order: in which order a call's items are drawn, how far the stages run
// apart, and on how many blocks. With policy_tiles.h a plain function of shape, dtype and device.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <iterator>

#include "streamed_memory.h"

namespace cbam {
namespace policy {

// How a step may draw its stages: in the order in which they read each other, so that all gaps are whole
// steps; or with the narrow ones between the wide ones, which takes fewer steps where a step has many more
// tickets than the stages are to be apart.
constexpr int kInterleaved[] = {kConv,        kHidden,   kPool,      kGate,  kOutput,
                                kSpatialPool, kConvGrad, kLogitGrad, kCross, kHiddenGrad,
                                kGateGrad,    kPoolGrad, kInputGrad};

struct Builder {
  Streamed& k;
  int chain[8] = {};  // the stages in the order in which each reads what the one before it left

  int64_t items(const StagePlan& d) const { return int64_t{d.items} * (d.per_sample ? k.s.unit_samples : 1); }

  // Appends the next stage, which reads what the one before it left; `items` a sample or, with per_unit, a
  // unit.
  void add(int stage, int64_t items, bool per_unit) {
    Schedule& s = k.s;
    StagePlan& d = s.plan[s.plans];
    d = {};
    d.stage = stage;
    d.items = static_cast<int32_t>(items);
    d.per_sample = !per_unit;
    std::fill(d.tail, d.tail + kTails, -1);
    d.total = per_unit ? Count{0, d.items} : Count{d.items, 0};
    d.wait_counter = -1;
    if (s.plans) {
      StagePlan& before = s.plan[s.plans - 1];
      const bool tailed = before.tail[0] >= 0;
      d.wait_counter = tailed ? kTailDone : before.stage;
      d.wait_for = tailed ? Count{0, 1} : before.total;
      before.awaited = 1;
    }
    chain[s.plans] = stage;
    s.stage_plan[stage] = s.plans++;
  }

  // Appends stages to the tail of the one added last.
  void tail(std::initializer_list<int> stages) {
    int* tail = k.s.plan[k.s.plans - 1].tail;
    std::copy(stages.begin(), stages.end(), std::find(tail, tail + kTails, -1));
  }

  // Gives the stages their tickets of a step, in the order of `stages`; what the call has not is left out.
  void order(const int* stages, int count) {
    Schedule& s = k.s;
    StagePlan sorted[8];
    int n = 0;
    s.step_items = 0;
    for (int i = 0; i < count; ++i) {
      const int at = s.stage_plan[stages[i]];
      if (at < 0) continue;
      sorted[n] = s.plan[at];
      sorted[n++].first = s.step_items;
      s.step_items += static_cast<uint32_t>(items(s.plan[at]));
    }
    std::copy(sorted, sorted + n, s.plan);
    for (int i = 0; i < n; ++i) s.stage_plan[s.plan[i].stage] = i;
  }

  // Sets how many steps each stage runs behind the first one: as few as leave `distance` tickets between a
  // unit's last item of a stage and its first of the next, and half as much again where a tail comes between.
  // Returns the bytes of x and dy that L2 has to hold for it: what lies between a tile's first and last read,
  // and what the blocks of `grid` have in hand. Last reads and outputs leave L2 first (load_last_use,
  // store_streaming) and are not counted; but where another launch is to find x there, as much again stays.
  int64_t spread(int64_t distance, int64_t grid) {
    Schedule& s = k.s;
    Reads of_x, of_dy;
    for (int i = 0; i < s.plans; ++i) {
      StagePlan& d = s.plan[s.stage_plan[chain[i]]];
      if (i) {
        const StagePlan& before = s.plan[s.stage_plan[chain[i - 1]]];
        const int64_t wanted = before.tail[0] >= 0 ? distance * 3 / 2 : distance;
        const int64_t missing = wanted + before.first + items(before) - d.first;
        d.lag = before.lag + static_cast<int32_t>(std::max<int64_t>(0, ceil_div(missing, s.step_items)));
      }
      const int64_t at = int64_t{d.lag} * s.step_items + d.first;
      if (reads_x(d.stage)) of_x.add(at);
      if (d.stage == kCross || d.stage == kInputGrad) of_dy.add(at);
    }
    // With one gate x is read once, and not marked: it stays as long as the dy that came with it.
    if (of_x.first == of_dy.first && of_x.last == of_x.first) of_x.last = of_dy.last;
    const int64_t tensor = k.p.channels * k.p.positions * int64_t{element_bytes(k.p.dtype)};
    int64_t held = 0;
    for (const Reads& of : {of_x, of_dy}) {
      if (of.last == of.first) continue;
      const int64_t unit = tensor * s.unit_samples;
      const int64_t stay = (of.last - of.first) * (k.operation == kAttentionForward ? 2 : 1);
      held += std::min((stay + grid) * unit / s.step_items, tensor * k.p.samples);
    }
    return held;
  }

  // The tickets of a unit's first and last read of a tensor, in steps of its first stage.
  struct Reads {
    int64_t first = -1, last = -1;
    void add(int64_t at) {
      if (first < 0) first = at;
      last = at;
    }
  };

  bool reads_x(int stage) const {
    switch (stage) {
      case kPool:
      case kSpatialPool:
      case kOutput:
      case kCross:
      case kGateGrad:
        return true;
      case kInputGrad:
        return dx_needs_x(k.p);
      default:
        return false;
    }
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

// Shares of the batch: as many as give each block an item, of enough samples for a stage of one, at least.
inline void plan_weights(const Problem& p, Schedule& s, int64_t grid) {
  const int64_t tiles = weight_items(p);
  const int64_t wanted = tiles ? grid / tiles : 1, most = p.samples / kLeastShare;
  s.weight_splits = static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, most)));
  s.weight_items = static_cast<uint32_t>(tiles * s.weight_splits);
  s.join_items =
      s.weight_splits > 1 ? static_cast<uint32_t>(ceil_div(grad_layout(p).entries, kJoinEntries)) : 0;
}

}  // namespace policy

// What plan_streamed tries: samples chained or not; the backward's larger items or not; blocks a
// multiprocessor.
struct Choice {
  bool chain, large;
  int32_t blocks;
};

// Samples a unit: as many as make it and a step worth their counters and, unless one block is to do a unit's
// MLP, as share a read of its weights.
inline int32_t choose_unit(const Problem& p, int64_t products, int64_t items, int64_t grid) {
  const int64_t sample = p.channels * p.positions * int64_t{element_bytes(p.dtype)};
  int64_t unit = 1;
  while (unit < p.samples &&
         (unit * items * policy::kLeastSteps < grid || unit * sample < policy::kLeastUnit))
    unit *= 2;
  if (products * unit > policy::kInlineMlp) unit = std::max<int64_t>(unit, kMlpSamples);
  return static_cast<int32_t>(std::min(unit, std::max<int64_t>(p.samples, 1)));
}

// As plan_streamed, for one choice.
inline bool plan_order(Streamed& k, Variant variant, const Device& device, Choice choice) {
  using namespace policy;
  const bool chain = choice.chain, large = choice.large;
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
  const int64_t grid = int64_t{choice.blocks} * device.multiprocessors;
  const bool backward = is_backward(k.operation), gate = p.pools != 0, spatial = p.spatial != kSpatialNone;
  const int64_t grad_item = large ? kMaxItemBytes : backward ? kItemBytes : 0;
  const auto tiling = [&](bool reduces) {
    if (last) return channels_last_tiling(p, vector, reduces, grad_item, device.multiprocessors);
    return contiguous_tiling(p, s, vector, reduces, grad_item, device.multiprocessors);
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
  const int64_t products = (p.w1.data ? 2 * p.hidden : p.channels) * p.channels * s.pool_vectors;
  s.unit_samples = chain ? 1 : choose_unit(p, products, reduce_items + 2 * map_items, grid);
  s.units = static_cast<int32_t>(ceil_div(p.samples, s.unit_samples));
  // What made x or dy went from the first sample to the last, as kernels do; what follows an operation of
  // this tier finds the first samples in L2.
  s.backwards = k.operation != kScaleForward && k.operation != kAttentionBackward;
  const int64_t groups = ceil_div(s.unit_samples, kMlpSamples);
  const bool inline_mlp = products * s.unit_samples <= kInlineMlp;
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
      if (gate) {
        b.add(kPool, s.pool_items, false);
        if (s.pool_chunks > 1) b.tail({kFinishPools});
        if (inline_mlp) {
          b.tail({kHidden, kGate});
        } else {
          b.add(kHidden, hidden_items, true);
          b.add(kGate, gate_items, true);
        }
      }
      if (spatial) {
        b.add(kSpatialPool, reduce_items, false);
        b.add(kConv, s.conv_items, false);
      }
      if (k.operation == kCbamForward) b.add(kOutput, map_items, false);
      break;
    }
    case kScaleForward:
      b.add(kOutput, map_items, false);
      break;
    case kScaleBackward:
      b.add(kCross, reduce_items, false);
      s.logits_grad_items =
          s.reduce.chunks > 1 ? static_cast<int32_t>(ceil_div(p.positions, kThreads * 4)) : 0;
      if (gate || s.logits_grad_items)
        b.add(kLogitGrad, (gate ? logit_items : 0) + s.logits_grad_items, false);
      break;
    default: {
      const bool whole = k.operation == kCbamBackward;
      plan_weights(p, s, grid);
      if (chain) {
        b.add(whole ? kCross : kGateGrad, 1, false);
        if (whole) b.tail({kGateGrad});
        b.tail({kHiddenGrad, kPoolGrad, kInputGrad});
        s.plan[0].feeds_weights = s.direct_logits = 1;
        break;
      }
      if (whole && (spatial || gate)) b.add(kCross, reduce_items, false);
      if (spatial) {
        if (!s.gather_tiles) b.add(kConvGrad, s.conv_items, false);
        if (gate) {
          b.add(kGateGrad, map_items, false);
          s.direct_logits = s.map.tiles == 1 && s.reduce.tiles == 1;
        }
      }
      if (gate) {
        const bool blocks = !inline_mlp && p.w1.data;
        if (blocks) {
          s.hidden_blocks = static_cast<int32_t>(ceil_div(p.channels, s.gate_tile));
          b.add(kLogitGrad, gate_items, true);
          // In a tail where it is one item's work: one stage less to wait for.
          if (s.unit_samples * p.hidden <= kThreads)
            b.tail({kHiddenGrad});
          else
            b.add(kHiddenGrad, hidden_items, true);
        } else if (!s.direct_logits) {
          b.add(kLogitGrad, logit_items, false);
        }
        if (!inline_mlp) {
          b.add(kPoolGrad, gate_items, true);
        } else {
          if (p.w1.data) b.tail({kHiddenGrad});
          b.tail({kPoolGrad});
        }
      }
      if (s.plans) s.plan[s.plans - 1].feeds_weights = 1;
      b.add(kInputGrad, map_items, false);
    }
  }

  b.order(b.chain, s.plans);
  // As far apart as keeps blocks from waiting, or as L2 allows. A single unit has nothing to do in between.
  if (s.units > 1 && !chain) {
    const auto farthest = [&] {
      int eighths = kFarthest;
      while (eighths > kNearest && b.spread(grid * eighths / 8, grid) > device.l2_bytes / 16 * kHeldPart)
        --eighths;
      return grid * eighths / 8;
    };
    const int64_t in_chain = farthest(), held = b.spread(in_chain, grid);
    b.order(kInterleaved, static_cast<int>(std::size(kInterleaved)));
    int64_t distance = farthest();
    if (distance < in_chain || (distance == in_chain && b.spread(distance, grid) >= held)) {
      b.order(b.chain, s.plans);
      distance = in_chain;
    }
    s.distance = static_cast<int32_t>(distance);
    b.spread(distance, grid);
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
    s.ring =
        static_cast<int32_t>(std::min(deepest + 1 + std::max<int64_t>(1, ceil_div(s.distance, s.step_items)),
                                      int64_t{std::max(s.units, 1)}));
    if (s.ring == s.units) s.ring = 0;
    if (chain) s.ring = 1;  // a slot for each block
    s.ring_counter = b.chain[s.plans - 1];
    if (s.ring && !chain) s.plan[s.stage_plan[s.ring_counter]].awaited = 1;
  }
  const int64_t main = int64_t{s.step_items} * (s.units + deepest);
  const int64_t weights = int64_t{s.weight_items} + s.join_items;
  if (main + weights >= (int64_t{1} << 32) - kThreads * device.multiprocessors) return false;
  s.main_items = static_cast<uint32_t>(main);

  int64_t shared = s.weight_items ? stage_shared(k, kStageCount, vector) : 0;
  for (int i = 0; i < s.plans; ++i) {
    shared = std::max(shared, stage_shared(k, s.plan[i].stage, vector));
    for (int stage : s.plan[i].tail) {
      if (stage >= 0) shared = std::max(shared, stage_shared(k, stage, vector));
    }
  }
  if (chain) {
    s.slot_bytes = static_cast<int32_t>(slot_bytes(p));
    shared += s.slot_bytes;
  }
  // Of each block CUDA takes a KiB, which a multiprocessor has beyond the most that one may ask for.
  const bool fit = choice.blocks * (shared + kStaticShared + 1024) <= device.shared_bytes + 1024;
  const int blocks = fit ? choice.blocks : 1;
  k.shared_bytes = static_cast<int32_t>(std::min<int64_t>(shared, INT32_MAX));
  k.blocks_per_multiprocessor = blocks;
  k.grid = static_cast<int32_t>(std::min<int64_t>(main + weights, int64_t{blocks} * device.multiprocessors));
  k.shared_limit = device.shared_bytes - kStaticShared;
  return shared <= k.shared_limit;
}

// Fills in k.s and the launch shape for k.p and k.operation. False where the shape is out of reach:
// an item would need more shared memory than the device gives a block. Ragged rows, whose items have more
// positions, need more of it than single elements, which take their place in `variant` where that is too
// much.
inline bool plan_streamed(Streamed& k, Variant& variant, const Device& device) {
  // Doubles take more registers than two blocks have.
  const int32_t blocks = k.p.dtype == kFloat64 ? 1 : policy::kBlocks;
  const auto plan = [&](bool chain, bool large) {
    if (!plan_order(k, variant, device, {chain, large, blocks})) return false;
    // Where shared memory has no room for as many, the plan is for those that it has room for.
    return k.blocks_per_multiprocessor == blocks ||
           plan_order(k, variant, device, {chain, large, k.blocks_per_multiprocessor});
  };
  const bool backward = is_backward(k.operation);
  if (policy::wants_chain(k.p, k.operation, device) && plan(true, backward)) return true;
  // The backward's items are larger where x, dy and dx of one a block stay in half of L2, unless L2 then
  // keeps the stages too close.
  const int64_t grid = int64_t{blocks} * device.multiprocessors;
  const bool large = backward && 3 * grid * policy::kMaxItemBytes <= device.l2_bytes / 2;
  if (large && plan(false, true) && (k.s.units == 1 || k.s.distance >= grid)) return true;
  if (plan(false, false)) return true;
  if (!variant.ragged) return false;
  variant = {1, 1};
  return plan_streamed(k, variant, device);
}

}  // namespace cbam
