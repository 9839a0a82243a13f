// The resident tier's launch parameters and its policy: what it covers, how a sample is split over a
// cluster, and what lies where in shared memory. Plain functions of shape, dtype and device.
#pragma once

#include <algorithm>

#include "policy.h"
#include "problem.h"

namespace cbam {
namespace resident {

// How a cluster shares a sample. Contiguous rows that are long enough are cut at positions; all other
// contiguous maps by channels, where a block's part is one piece of memory for any P. Channels-last is cut
// by positions, with the same reason.
enum Split : int32_t { kByPositions, kByChannels };

constexpr int kLoads = 8;         // mbarriers of a tile: its rows can be used in as many steps
constexpr int kMaxThreads = 512;  // a block: 128 registers a thread
constexpr int kMaxInputs = 4;     // vectors that the MLP sees
constexpr int kConvEntries = 8;   // an item's, of the convolution's gradient: of a row, a sector of 32 bytes
constexpr int kQuad = 4;  // elements of the MLP's matrices, and of what meets them, that an access takes

// Offsets into a block's shared memory, the same in every block of a cluster: blocks read each other's.
struct SharedMap {
  int32_t tile, tile_dy;                // T rows x pitch
  int32_t barriers;                     // kLoads mbarriers
  int32_t item;                         // backward: the weight item drawn; channels-last, marked vectors
  int32_t gate;                         // A [tile channels]
  int32_t spatial;                      // A [tile positions]
  int32_t base, squares, exponentials;  // forward, statistics of [tile channels]
  int32_t input;                        // A [inputs][own channels, rounded up to quads], forward
  int32_t hidden_part;  // A [inputs][h], backward one [h]: this block's share of sums over channels
  int32_t hidden;       // A [inputs][h], the layer and then its gradient; forward: [h], rounded up to quads
  int32_t pooled;       // forward: the spatial pools of [tile positions]; backward: ds, or dz
  int32_t place_mean, place_maximum;  // backward: A [tile positions], dq; the mean's divided by C
  int32_t place_mark;   // backward: int [tile positions], the maximum's channel or how many equal it
  int32_t top;          // A [tile positions], with shared ties
  int32_t kernel_grad;  // A [pieces][2][taps]; then [2], of the batch
  int32_t gate_grad;    // A [tile channels]
  int32_t logit_grad;   // A [own channels]
  int32_t terms, rare;  // ChannelTerms, RareTerms [tile channels]
  // Backward, see resident_marks.cuh: uint32 [tile rows][mark_words], uint16 [tile rows + 1], uint16
  // [places].
  int32_t mark_bits, mark_first, mark_list;
  int32_t kernel;       // (A, A) [taps]
  int32_t window;       // (A, A) [window]; backward: the pools'
  int32_t window_grad;  // A [window], backward
  int32_t scratch;      // partial results of one pass; shares memory with the windows
  int32_t total;
};

// What a launch needs beside the problem. Everything here is the same for all blocks.
struct Resident {
  Problem p;
  SharedMap at;
  int32_t operation, split, cluster, threads;
  int32_t shared_limit;  // most shared memory that the device gives a block
  int32_t vector;        // elements of one access
  int32_t channel_unit;  // own channels come in multiples of this many
  int32_t position_unit;
  int32_t own_channels, own_positions;    // most that a block has
  int32_t tile_channels, tile_positions;  // most that a tile has
  int32_t column_groups, map_groups;      // groups of rows that warps share a strip of columns in
  int32_t window_width, window_rows;
  int32_t mark_words;
  int32_t kernel_pieces;  // parts of the positions whose kernel gradients are summed apart
  int32_t inputs;         // vectors that the MLP sees, after blending
  int32_t weight_quads;   // its matrices are read in quads
  int32_t save;
  // Backward: what sums over the batch read, in global memory.
  uint32_t* counters;
  void *logit_grad, *hidden, *hidden_grad, *conv_parts;
  int32_t weight_items;
};

// Zeroed 32-bit words of `counters`.
constexpr int kStarted = 0, kReady = 1, kTicket = 2, kEnded = 3, kCounterWords = 4;

struct Machine {
  int32_t capability;  // 90 for compute capability 9.0
  int32_t multiprocessors;
  int32_t shared_bytes;  // most dynamic shared memory that a block may ask for
};

// ---- Policy, as data.

constexpr int64_t kRowBytes = 256;            // least part of a contiguous row that a block takes by choice
constexpr int64_t kSmallTile = 100 << 10;     // below, half the threads take fewer instructions; modelled
constexpr int64_t kReserved = 1 << 10;        // of a block's shared memory, CUDA's own
constexpr int kMergeRows = 6, kTermRows = 2;  // what merging a strip, or reading its terms, costs in rows
constexpr int kClusters[] = {8, 16};          // portable first
// Lanes that share a row where an access is an element: rows of 49 fill 77% of them, and are two ways in
// conflict.
constexpr int kElementLanes = 16;
constexpr int kMostMarks = (1 << 16) - 1;  // vectors of a backward tile, which 16 bits number
// Blocks against places on the device, over the waves that they run in: a wave that is mostly empty costs
// as much as a full one. Modelled, to be measured.
constexpr double kLeastOccupancy = 0.6;
// Where clusters run in several waves: the MLP's weights, over a sample. Each cluster reads them from L2,
// where samples share them in the streamed tier, which however has x come from L2 twice more. And the least
// bytes of a sample, below which a wave is barriers and small tensors for the most part. By bytes, to be
// measured.
constexpr int64_t kMostWeights = 2;
constexpr int64_t kLeastSample = 32 << 10;

inline int vector_of(const Problem& p) {
  const int full = 16 / element_bytes(p.dtype);
  if (p.layout == kChannelsLast) return p.channels % full == 0 ? full : 0;
  if (p.positions % full == 0) return full;
  return full == 8 && p.positions % 4 == 0 ? 4 : 1;
}

// What this tier computes, if `choose_cluster` finds a way to split it that fits; the rest is the streamed
// tier's. `aligned`: every tensor of x's size starts at a multiple of 16 bytes.
inline bool covers(const Problem& p, Operation operation, const Machine& m, bool aligned) {
  if (operation != kCbamForward && operation != kCbamBackward) return false;
  if (m.capability < 90 || !aligned || p.dtype == kFloat64) return false;
  if (!p.pools && !p.spatial) return false;
  return vector_of(p) > 0;
}

inline int64_t part(int64_t total, int64_t unit, int64_t parts) {
  return policy::ceil_div(policy::ceil_div(total, unit), parts) * unit;
}

// Groups of rows that share a strip of columns: more keep all warps busy, and each costs `setup` more, in
// rows of one lane.
inline int groups_for(int64_t strips, int64_t lane_rows, int warps, int setup, int limit) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int groups = 1; groups <= limit; ++groups) {
    const int64_t each = setup + policy::ceil_div(lane_rows, groups);
    const int64_t cost = policy::ceil_div(strips * groups, warps) * each;
    if (cost < least) {
      least = cost;
      best = groups;
    }
  }
  return best;
}

// Bytes of a row that a warp reads at a time, by accesses of so many. Where rows are short and many, 64 waste
// less of a row's end; else 128 leave less to merge.
constexpr int strip_bytes(int layout, int split, int access) {
  return access < 8                                                       ? kElementLanes * access
         : layout == kContiguous && split == kByPositions && access == 16 ? 64
                                                                          : 128;
}

struct MapBuilder {
  int64_t used = 0;
  int32_t take(int64_t bytes) {
    const int64_t at = used;
    used += policy::round_up(bytes, 16);
    return static_cast<int32_t>(at);
  }
};

inline bool can_split(const Problem& p, Split split) {
  const int full = 16 / element_bytes(p.dtype);
  if (split == kByPositions) return p.layout == kChannelsLast || p.positions % full == 0;
  return p.layout == kContiguous && p.channels % (full / policy::gcd(full, p.positions)) == 0;
}

// Whether the rows of the MLP's matrices, and what of them is a block's, begin at multiples of a quad.
inline bool weight_quads(const Resident& k) {
  const Problem& p = k.p;
  for (const Weight* w : {&p.w1, &p.w2}) {
    const int64_t bytes = kQuad * (w->wide ? 4 : element_bytes(p.dtype));
    if (reinterpret_cast<uintptr_t>(w->data) % bytes) return false;
  }
  const int64_t units = p.channels / k.channel_unit;
  const bool even = k.channel_unit % kQuad == 0 ||
                    (units % k.cluster == 0 && units / k.cluster * k.channel_unit % kQuad == 0);
  return even && p.channels % kQuad == 0 && p.hidden % kQuad == 0;
}

// Fills in k for k.p and k.operation with this cluster and block; false where a block's memory is too small.
inline bool plan_block(Resident& k, const Machine& m, int cluster, Split split, int threads_a_block) {
  using policy::ceil_div;
  const Problem& p = k.p;
  const bool backward = is_backward(k.operation), last = p.layout == kChannelsLast;
  const int64_t element = element_bytes(p.dtype), a = accumulate_bytes(p.dtype);
  k.cluster = cluster;
  k.shared_limit = m.shared_bytes;
  k.vector = vector_of(p);
  k.inputs = mlp_passes(p.pools);
  k.save = p.spatial ? p.spatial_index != nullptr : !(p.pools & kMax) || p.pool_index != nullptr;

  const int64_t full = 16 / element;
  k.split = split;
  k.position_unit = !last && k.split == kByPositions ? static_cast<int32_t>(full) : 1;
  k.channel_unit = k.split == kByChannels ? static_cast<int32_t>(full / policy::gcd(full, p.positions)) : 1;
  // Where many are shared, in multiples of what an access of weights takes.
  if (p.channels % kQuad == 0 && p.channels >= 16 * cluster) k.channel_unit = std::max(k.channel_unit, kQuad);
  k.weight_quads = weight_quads(k);
  // The walks of a row take it that there is a vector.
  if (!last && k.split == kByPositions && p.positions < int64_t{k.position_unit} * cluster) return false;
  k.own_channels = static_cast<int32_t>(part(p.channels, k.channel_unit, cluster));
  k.own_positions = static_cast<int32_t>(part(p.positions, k.position_unit, cluster));
  k.tile_channels = static_cast<int32_t>(k.split == kByPositions ? p.channels : k.own_channels);
  k.tile_positions = static_cast<int32_t>(k.split == kByPositions ? k.own_positions : p.positions);
  const int64_t tc = k.tile_channels, tp = k.tile_positions;
  const int64_t tile = tc * tp * element;
  k.threads = threads_a_block;

  const int64_t columns = last ? tc : tp;  // of the tile
  const int64_t across =
      strip_bytes(p.layout, split, static_cast<int>(k.vector * element)) / (k.vector * element);
  const int64_t strips = ceil_div(columns, k.vector * across);
  const int warps = k.threads / 32;
  const int64_t lane_rows = ceil_div(last ? tp : tc, 32 / across);
  k.column_groups = groups_for(strips, lane_rows, warps, kMergeRows, columns > 1024 ? 1 : 4);
  k.map_groups = groups_for(strips, lane_rows, warps, kTermRows, 16);

  const int64_t height = int64_t{p.depth} * p.height;
  const int64_t halo = int64_t{p.kernel_d / 2} * p.height + p.kernel_h / 2;
  k.window_width = p.width + p.kernel_w - 1;
  k.window_rows =
      static_cast<int32_t>(std::min(height, (k.own_positions + p.width - 2) / p.width + 1 + 2 * halo));
  const int64_t window = p.spatial ? int64_t{k.window_width} * k.window_rows : 0;
  if (window > (int64_t{1} << 20)) return false;

  const int64_t mean_max = a == 8 ? 24 : 12;
  const bool split_ties = p.ties == kTiesSplit;
  MapBuilder b;
  SharedMap& at = k.at;
  at = {};
  const int64_t threads = k.threads;
  // The weight gradients' partial sums take the tile's place when it is no longer needed.
  at.tile = b.take(backward ? std::max(tile, threads * kWeightRows * a) : tile);
  if (backward) at.tile_dy = b.take(tile);
  at.barriers = b.take(kLoads * 8);
  at.item = b.take(backward ? 8 : 0);
  at.gate = b.take(tc * a);
  at.spatial = b.take(tp * a);
  at.input = b.take(backward ? 0 : k.inputs * policy::round_up(k.own_channels, kQuad) * a);
  at.hidden_part = b.take((backward ? 1 : k.inputs) * p.hidden * a * (p.pools ? 1 : 0));
  at.hidden =
      b.take((backward ? k.inputs * p.hidden : policy::round_up(p.hidden, kQuad)) * a * (p.pools ? 1 : 0));
  at.kernel = b.take(p.spatial ? 2 * taps(p) * a : 0);
  if (!backward) {
    at.base = b.take(p.pools & (kAvg | kMax) ? tc * mean_max : 0);
    at.squares = b.take(p.pools & kLp ? tc * a : 0);
    at.exponentials = b.take(p.pools & kLse ? tc * 2 * a : 0);
    at.pooled = b.take(p.spatial ? tp * (k.split == kByChannels ? mean_max : 2 * a) : 0);
    at.scratch = at.window = b.take(std::max(window * 2 * a, k.column_groups * columns * mean_max));
  } else {
    at.pooled = b.take(p.spatial ? tp * a : 0);
    at.place_mean = b.take(tp * a);
    at.place_maximum = b.take(tp * a);
    at.place_mark = b.take(tp * 4);
    at.top = b.take(split_ties ? tp * a : 0);
    k.kernel_pieces = std::max(1, warps / (p.kernel_d * p.kernel_h));
    at.kernel_grad = b.take(p.spatial ? 2 * taps(p) * k.kernel_pieces * a : 0);
    at.gate_grad = b.take(tc * a);
    at.logit_grad = b.take(k.own_channels * a);
    at.terms = b.take(tc * 4 * a);
    const bool needs_x = (split_ties && (p.spatial || p.pools & kMax)) || p.pools & (kLp | kLse);
    at.rare = b.take(needs_x ? tc * 4 * a : 0);
    const int64_t rows = last ? tp : tc;
    if (rows * ceil_div(columns, k.vector) > kMostMarks || tc + tp > kMostMarks) return false;
    k.mark_words = static_cast<int32_t>(ceil_div(ceil_div(columns, k.vector), 32));
    at.mark_bits = b.take(rows * k.mark_words * 4);
    at.mark_first = b.take(last ? 0 : (rows + 1) * 2);
    at.mark_list = b.take((tc + tp) * 2);
    const int64_t sums = strips * rows + std::max(k.column_groups * columns, last ? 0 : tc + tp);
    at.scratch = at.window = b.take(std::max({window * 3 * a, sums * a, threads * kQuad * a}));
    at.window_grad = at.window + static_cast<int32_t>(policy::round_up(window * 2 * a, 16));
  }
  at.total = static_cast<int32_t>(std::min<int64_t>(b.used, INT32_MAX));
  return b.used <= m.shared_bytes;
}

// Half the threads also where a multiprocessor's memory holds two such blocks.
inline bool plan(Resident& k, const Machine& m, int cluster, Split split) {
  if (plan_block(k, m, cluster, split, kMaxThreads / 2)) {
    const int64_t tiles = int64_t{k.tile_channels} * k.tile_positions * element_bytes(k.p.dtype) *
                          (is_backward(k.operation) ? 2 : 1);
    if (tiles < kSmallTile || 2 * (k.at.total + kReserved) <= m.shared_bytes + kReserved) return true;
  }
  return plan_block(k, m, cluster, split, kMaxThreads);
}

// The smallest cluster that holds a sample and that `allowed(k)`, the device, can run; false without one.
template <class Allowed>
bool choose_cluster(Resident& k, const Machine& m, Allowed allowed) {
  for (int cluster : kClusters) {
    const bool long_rows = k.p.positions * element_bytes(k.p.dtype) >= kRowBytes * cluster;
    for (Split split : {long_rows ? kByPositions : kByChannels, long_rows ? kByChannels : kByPositions}) {
      if (can_split(k.p, split) && plan(k, m, cluster, split) && allowed(k)) return true;
    }
  }
  return false;
}

// Calls f(Traits of the instantiation that runs k), which takes an element type and k's choices.
template <class T, template <class, int, Layout, Split> class Of, class F>
auto with_traits(const Resident& k, F f) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  if (k.p.layout == kChannelsLast) return f(Of<T, kFull, kChannelsLast, kByPositions>{});
  if (k.split == kByPositions) return f(Of<T, kFull, kContiguous, kByPositions>{});
  if (k.vector == 1) return f(Of<T, 1, kContiguous, kByChannels>{});
  if constexpr (sizeof(T) == 2) {
    if (k.vector < kFull) return f(Of<T, kFull / 2, kContiguous, kByChannels>{});
  }
  return f(Of<T, kFull, kContiguous, kByChannels>{});
}

// Elements from a row of conv_parts to the next: 2 taps + 2 entries, in whole items.
CBAM_HOST_DEVICE inline int64_t conv_stride(const Problem& p) {
  return (2 * taps(p) + 2 + kConvEntries - 1) / kConvEntries * kConvEntries;
}

// Items of the weight gradients.
inline int64_t weight_item_count(const Problem& p) {
  using policy::ceil_div;
  int64_t items = p.spatial ? conv_stride(p) / kConvEntries : 0;
  if (p.pools) {
    const auto tiles = [](int64_t rows, int64_t columns) {
      return ceil_div(rows, kWeightRows) * ceil_div(columns, kWeightColumns);
    };
    items += tiles(p.channels, p.hidden) + ceil_div(p.channels, kWeightColumns);
    if (p.w1.data) items += tiles(p.hidden, p.channels) + ceil_div(p.hidden, kWeightColumns);
  }
  return items;
}

// Bytes of global scratch; with a base, also points k into it (all but the counters).
inline int64_t lay_out(Resident& k, char* base) {
  if (!is_backward(k.operation)) return 0;
  const Problem& p = k.p;
  const int64_t a = accumulate_bytes(p.dtype), n = p.samples;
  int64_t used = 0;
  const auto take = [&](int64_t count) -> void* {
    const int64_t at = used;
    used += policy::round_up(count * a, 256);
    return base ? base + at : nullptr;
  };
  k.logit_grad = take(p.pools ? n * p.channels : 0);
  k.hidden = take(p.pools ? n * p.hidden : 0);
  k.hidden_grad = take(p.pools && p.w1.data ? n * k.inputs * p.hidden : 0);
  k.conv_parts = take(p.spatial ? n * k.cluster * conv_stride(p) : 0);
  k.weight_items = static_cast<int32_t>(weight_item_count(p));
  return used;
}

// Whether the resident tier is the better one, given how many clusters the device runs at a time.
inline bool preferred(const Problem& p, int64_t active_clusters) {
  if (active_clusters <= 0) return false;
  const int64_t waves = policy::ceil_div(p.samples, active_clusters);
  const auto bytes_of = [&](const Weight& w, int64_t elements) {
    return w.data ? elements * (w.wide ? 4 : element_bytes(p.dtype)) : 0;
  };
  const int64_t matrix = p.channels * p.hidden, weights = bytes_of(p.w1, matrix) + bytes_of(p.w2, matrix);
  const int64_t sample = p.channels * p.positions * element_bytes(p.dtype);
  if (waves > 1 && (weights > kMostWeights * sample || sample < kLeastSample)) return false;
  return double(p.samples) >= kLeastOccupancy * double(waves * active_clusters);
}

}  // namespace resident
}  // namespace cbam
