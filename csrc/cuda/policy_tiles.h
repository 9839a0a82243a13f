// The streamed tier's policy for sizes: how a call is cut into tiles, and how many items each stage has of
// them.
#pragma once

#include <algorithm>

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
constexpr int kHiddenTile = 8, kGateTile = 128;
constexpr int64_t kConvPositions = 1024;
constexpr int64_t kStagedBytes = 40 << 10;  // most shared memory for the maps of a convolution's item
constexpr int64_t kKernelBytes = 8 << 10;   // most shared memory for the convolution's weights
constexpr int64_t kGatherBytes = 96 << 10;  // what an item reads of x that convolves dz for its positions
constexpr int64_t kFoldPoolBytes = 32 << 10;
constexpr int kRaggedColumns = 8;  // at least: each row lane leaves sums of its own in shared memory
constexpr int64_t kMostRagged = (int64_t{1} << 31) - 4096;
constexpr int64_t kChainPositions = 64;    // most of a map whose samples are chained
constexpr int64_t kChainBytes = 64 << 10;  // most of a sample, where not every multiprocessor has one
constexpr int64_t kChainWeights = 3;   // most of the MLP's weights, which each sample then reads, in samples
constexpr int64_t kChainTerms = 1024;  // channels whose terms an item of a chained sample keeps at a time
constexpr int kBlocks = 2;             // a multiprocessor, where shared memory holds them
// Tickets between a unit's stages, in eighths of the blocks. With twice all blocks hardly an item finds its
// inputs unfinished (benchmarks/cuda_timeline.py); a quarter at least, whatever L2 holds.
constexpr int kFarthest = 16, kNearest = 2;
// Sixteenths of L2 that x and dy may take between a tile's first and last read: half of it, since an A100's
// or H100's two halves may each keep what multiprocessors of both read, less what scratch memory and outputs
// take.
constexpr int64_t kHeldPart = 7;
// A unit has a row of counters: so many of x's bytes at least, and a step so many tickets that at most this
// many steps have one for each block.
constexpr int64_t kLeastUnit = 4 << 10;
constexpr int kLeastSteps = 32;
// Samples of a weight gradient's item, at least: a stage of the first layer's, which has a row for each pool.
constexpr int64_t kLeastShare = 8;

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

// Which instantiation runs: elements a vector, channels folded into one row (1: none), and whether rows are
// ragged.
struct Variant {
  int32_t vector, fold;
  bool ragged = false;
};

// `aligned`: every tensor of x's size starts at a multiple of 16 bytes.
inline Variant choose_variant(const Problem& p, bool aligned) {
  const int full = 16 / element_bytes(p.dtype);
  if (!aligned) return {1, 1};
  if (p.layout == kChannelsLast) return {p.channels % full == 0 ? full : 1, 1};
  if (p.positions % full == 0) return {full, 1};
  const int fold = static_cast<int>(full / policy::gcd(full, p.positions));
  const bool fits = p.positions >= full && fold * p.positions / full <= kThreads;
  if (p.dtype == kFloat64) return {1, 1};
  if (fits && p.channels % fold == 0) return {full, fold};
  // A ragged tile's last vector may end some tiles behind the map, at a position that must have a number.
  const bool ragged = p.positions >= 2 * full && p.positions < policy::kMostRagged;
  return ragged ? Variant{full, 1, true} : Variant{1, 1};
}

namespace policy {

// Positions of the backward's tiles of `item` bytes. The wider a tile, the fewer sums are left for each
// channel, and the fewer channels it has, so that more are left for each position: twice the width where that
// makes fewer, and keeps all multiprocessors busy.
inline int64_t grad_positions(const Problem& p, int64_t item, int sms) {
  const int64_t narrow = kGradTileBytes / element_bytes(p.dtype);
  const auto tiles = [&](int64_t width) { return ceil_div(p.positions, width); };
  const auto chunks = [&](int64_t width) {
    return ceil_div(p.channels * width * element_bytes(p.dtype), item);
  };
  const auto sums = [&](int64_t width) { return tiles(width) * p.channels + chunks(width) * p.positions; };
  const bool busy = p.samples * tiles(2 * narrow) * chunks(2 * narrow) >= 2 * sms;
  return busy && sums(2 * narrow) < sums(narrow) ? 2 * narrow : narrow;
}

// `grad_item`: what an item of the backward reads of x, about; 0 in the forward.
inline Tiling contiguous_tiling(const Problem& p, const Schedule& s, int vector, bool reduces,
                                int64_t grad_item, int sms) {
  const bool backward = grad_item, large = grad_item > kItemBytes;
  Tiling t{};
  const int64_t vector_bytes = int64_t{vector} * element_bytes(p.dtype);
  const int64_t row_bytes = s.row_elements * int64_t{element_bytes(p.dtype)};
  if (s.fold > 1) {
    t.columns = s.row_vectors;
    t.positions = static_cast<int32_t>(p.positions);
    t.tiles = 1;
    int64_t rows = std::max<int64_t>(1, kItemBytes / row_bytes);
    // Each chunk of a reduction leaves sums a position, and each of the backward's passes reads gradients a
    // position: few chunks where there are many samples, unless a backward's would take L2 too long.
    const bool few = large || !backward;
    if (reduces || (large && p.samples * ceil_div(s.rows, rows) > sms))
      rows = std::max<int64_t>(rows, (few ? 512 : 256) / element_bytes(p.dtype) / s.fold);
    if (((few && reduces) || large) && p.samples * ceil_div(s.rows, rows) > 4 * sms) rows *= 2;
    t.chunks = static_cast<int32_t>(ceil_div(s.rows, rows));
    t.chunk_rows = static_cast<int32_t>(ceil_div(s.rows, t.chunks));
    t.chunks = static_cast<int32_t>(ceil_div(s.rows, t.chunk_rows));
    return t;
  }
  if (s.ragged) {
    // As wide as a warp: each tile of a reduction has a column of vectors more than its positions take.
    t.columns = std::max(kRaggedColumns, std::min(32, ceil_power(s.row_vectors + 1)));
    t.columns_log2 = log2_of(t.columns);
    t.positions = (reduces ? t.columns - 1 : t.columns) * vector;
    t.tiles = static_cast<int32_t>(ceil_div(reduces ? p.positions : p.positions + s.reach, t.positions));
    const int64_t bytes = backward || !reduces ? kMaxItemBytes : 2 * kMaxItemBytes;
    int64_t rows = std::min<int64_t>(bytes / (t.columns * vector_bytes), kMaxTermRows);
    // The convolution merges the forward's chunks of the window that it stages.
    if (reduces && !backward && 2 * p.positions * accumulate_bytes(p.dtype) > kStagedBytes) rows = s.rows;
    t.chunk_rows = static_cast<int32_t>(ceil_div(s.rows, ceil_div(s.rows, rows)));
    t.chunks = static_cast<int32_t>(ceil_div(s.rows, t.chunk_rows));
    return t;
  }
  const bool wide = backward && (!reduces || s.rows * int64_t{kTileBytes} >= kItemBytes / 2);
  int width = kTileBytes;
  if (wide) width = static_cast<int>(grad_positions(p, grad_item, sms) * element_bytes(p.dtype));
  if (!wide && s.rows * int64_t{width} > kMaxItemBytes) width = kMinTileBytes;
  while (s.rows * int64_t{width} * 2 <= (large ? kItemBytes : kItemBytes / 2)) width *= 2;
  t.columns = static_cast<int32_t>(std::min<int64_t>(32, ceil_power(ceil_div(width, vector_bytes))));
  t.columns = std::max(kRowSums, std::min(t.columns, ceil_power(s.row_vectors)));
  t.columns_log2 = log2_of(t.columns);
  t.positions = t.columns * vector;
  t.tiles = static_cast<int32_t>(ceil_div(s.row_vectors, t.columns));
  t.chunk_rows = s.rows;
  if (wide || !reduces) {
    int64_t rows = (wide ? grad_item : kItemBytes) / (t.columns * vector_bytes);
    if (!reduces) rows = std::min<int64_t>(rows, kMaxTermRows);
    t.chunk_rows = static_cast<int32_t>(ceil_div(s.rows, ceil_div(s.rows, rows)));
  }
  t.chunks = static_cast<int32_t>(ceil_div(s.rows, t.chunk_rows));
  return t;
}

inline Tiling channels_last_tiling(const Problem& p, int vector, bool reduces, int64_t grad_item, int sms) {
  Tiling t{};
  const int64_t row_bytes = p.channels * int64_t{element_bytes(p.dtype)};
  const int64_t row_vectors = ceil_div(p.channels, vector);
  t.columns = std::max(kRowSums, std::min(32, ceil_power(row_vectors)));
  t.columns_log2 = log2_of(t.columns);
  int64_t positions = kTileBytes / element_bytes(p.dtype);
  const bool wide = grad_item && (!reduces || positions * row_bytes >= kItemBytes / 2);
  if (wide)
    positions = grad_positions(p, grad_item, sms);
  else if (positions * row_bytes > kMaxItemBytes)
    positions /= 2;
  const int64_t least = std::max(grad_item, kItemBytes) / 2;
  positions = std::max(positions, std::min<int64_t>(least / row_bytes, kThreads));
  // One tile leaves no partial sums of channels; two would halve what an item has to do.
  if (wide && 2 * p.samples * ceil_div(row_vectors, t.columns) >= sms &&
      p.positions <= 2 * kGradTileBytes / element_bytes(p.dtype))
    positions = p.positions;
  t.tiles = static_cast<int32_t>(ceil_div(p.positions, std::min(positions, p.positions)));
  t.positions = static_cast<int32_t>(ceil_div(p.positions, t.tiles));
  t.tiles = static_cast<int32_t>(ceil_div(p.positions, t.positions));
  t.chunk_rows = static_cast<int32_t>(row_vectors);
  if (wide) {
    const int64_t column_bytes = int64_t{t.positions} * vector * element_bytes(p.dtype);
    if (t.positions < p.positions && t.columns > kRowSums && t.columns * column_bytes > grad_item)
      --t.columns_log2;
    t.columns = 1 << t.columns_log2;
    const int64_t slices = std::max<int64_t>(1, grad_item / (t.columns * column_bytes));
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

// With few channels, a position's dq weighs as much as its x. Where an item of the passes over x has all
// channels of many positions, it convolves dz for them, in shared memory: one map read twice, with its halo,
// for two maps written once and read twice. Only where a pass over x is more work than the convolution.
inline void plan_gather(const Problem& p, Schedule& s, int sms) {
  if (s.ragged || s.map.chunks > 1 || s.reduce.chunks > 1 || taps(p) > p.channels) return;
  if (p.samples * s.map.tiles <= sms) return;
  const int64_t tile_bytes = s.map.positions * p.channels * element_bytes(p.dtype);
  const int64_t halo = 2 * int64_t{s.conv_halo};
  // So many positions that a halo adds less than half of them, where shared memory holds them and enough
  // items are left.
  const int64_t room = (kStagedBytes / (3 * accumulate_bytes(p.dtype)) - halo) / s.map.positions;
  const int64_t busy = p.samples * s.map.tiles / (2 * sms);
  int64_t tiles = std::min({ceil_div(5 * halo / 2, s.map.positions), room, busy});
  tiles = std::max({tiles, kGatherBytes / tile_bytes, int64_t{1}});
  tiles = ceil_div(s.map.tiles, ceil_div(s.map.tiles, tiles));
  const int64_t items = ceil_div(s.map.tiles, tiles), positions = tiles * s.map.positions;
  const int64_t window = std::min(p.positions, positions + halo);
  if ((items - 1) * halo > p.positions) return;
  if (3 * window * accumulate_bytes(p.dtype) > kStagedBytes) return;
  s.gather_tiles = static_cast<int32_t>(tiles);
  s.conv_staged = 1;
  s.conv_items = static_cast<int32_t>(items);
  s.conv_positions = static_cast<int32_t>(positions);
}

// Whether a block takes a sample through all stages of the backward, and keeps in shared memory what blocks
// would hand each other: on tiny maps that weighs up to half of x, and waiting for each other as much as the
// work. Where samples keep half of the multiprocessors busy, or all if they are large, and L2 holds x, dy and
// dx of all of them; and not with a large MLP, whose weights samples would no longer share: (2048, 7, 7)
// would ask L2 for 0.49 S less of scratch and, with float weights, for 6.5 S more of them.
inline bool wants_chain(const Problem& p, int operation, const Device& device) {
  if (operation != kCbamBackward && operation != kAttentionBackward) return false;
  if (!p.pools || p.spatial == kSpatialNone || !p.w1.data || p.positions > kChainPositions) return false;
  const int64_t sample = p.channels * p.positions * int64_t{element_bytes(p.dtype)};
  const int64_t weight = p.w1.wide ? std::max(4, element_bytes(p.dtype)) : element_bytes(p.dtype);
  if (2 * p.hidden * p.channels * weight > kChainWeights * sample) return false;
  const int64_t enough = device.multiprocessors / (sample > kChainBytes ? 1 : 2);
  return p.samples >= enough && 3 * p.samples * sample <= device.l2_bytes;
}

// Tiles of all positions, for such a sample. False where rows have too many vectors for one.
inline bool plan_chain(const Problem& p, Schedule& s, int vector) {
  if (s.ragged) return false;
  const auto whole = [&](Tiling& t, int64_t most) {
    if (p.layout == kChannelsLast) {
      t.positions = static_cast<int32_t>(p.positions);
    } else if (s.fold == 1) {
      t.columns = std::max(kRowSums, std::min(32, ceil_power(s.row_vectors)));
      t.columns_log2 = log2_of(t.columns);
      t.positions = t.columns * vector;
      if (t.columns < s.row_vectors) return false;
    }
    t.tiles = 1;
    t.chunks = static_cast<int32_t>(ceil_div(p.channels, most));
    const int64_t lines = p.layout == kChannelsLast ? s.row_vectors : s.rows;
    t.chunk_rows = static_cast<int32_t>(ceil_div(lines, t.chunks));
    if (p.layout == kChannelsLast && t.chunks > 1)
      t.chunk_rows = static_cast<int32_t>(round_up(t.chunk_rows, t.columns));
    t.chunks = static_cast<int32_t>(ceil_div(lines, t.chunk_rows));
    return true;
  };
  Tiling reduce = s.reduce, map = s.map;
  if (!whole(reduce, p.channels) || !whole(map, p.layout == kChannelsLast ? p.channels : kChainTerms))
    return false;
  s.reduce = reduce;
  s.map = map;
  s.chained = 1;
  s.gather_tiles = map.chunks;
  s.conv_staged = 1;
  s.conv_items = 1;
  s.conv_positions = static_cast<int32_t>(p.positions);
  return true;
}

}  // namespace policy
}  // namespace cbam
