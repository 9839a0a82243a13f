// The streamed tier's launch parameters: a Problem, the order of its work items, and scratch memory.
// Plain data, filled in by policy.h on the host and read by the kernels.
#pragma once

#include "problem.h"

namespace cbam {

constexpr int kThreads = 256, kThreadsLog2 = 8;
static_assert(kThreads == 1 << kThreadsLog2);
constexpr int kMlpSamples = 4;    // samples an item of the MLP, where it is cut into items
constexpr int kBatch = 4;         // vectors that one read of the MLP's weights serves
constexpr int kMlpStage = 1024;   // elements of each that are in shared memory at a time
constexpr int kLogitTile = 32;    // channels an item of kLogitGrad
constexpr int kWeightStage = 16;  // samples of a matrix' gradient in shared memory at a time
constexpr int kWeightRows = 8, kWeightColumns = 32;  // the resident tier's tile of such a gradient
constexpr int kConvColumns = 32;                     // entries an item of the convolution's gradient
constexpr int kJoinEntries = 4 * kThreads;           // of a matrix' gradient, an item that adds up shares
constexpr int kRowSums = 4;                          // rows whose sums over lanes are added up together

// Rows and columns an item of a matrix' gradient. Each tile reads the vectors of its rows and of its columns,
// of every sample: for an edge of a layer's hidden units, tiles are as tall and as wide as registers allow.
struct MatrixTile {
  int rows, columns;
};
constexpr MatrixTile kTileW1{64, 256}, kTileW2{128, 128};

constexpr int kStaticShared = 2 << 10;  // most that a kernel declares beside its dynamic shared memory

// The kinds of work. A stage's items wait for all items of the stage before it, of the same unit.
enum Stage : int32_t {
  kPool,         // x -> channel pools
  kHidden,       // channel pools -> hidden layer, a range of hidden units of a whole unit
  kGate,         // hidden layer -> channel gate, a range of channels of a whole unit
  kSpatialPool,  // x, gate -> maximum and mean over channels
  kConv,         // spatial pools -> logits, spatial gate
  kOutput,       // x, both gates -> y
  kCross,        // x, dy -> ds, and the part sum_p dy * x * s of dg
  kConvGrad,     // ds -> dq, and partial gradients of the convolution; unless the passes over x gather dq
  kGateGrad,     // x, dq -> the rest of dg
  kLogitGrad,    // dg -> dl, a range of channels of one sample; or of a whole unit, with its part of dl w2
  kHiddenGrad,   // dl w2, hidden layer -> gradient of the layer, a range of hidden units of a whole unit
  kPoolGrad,     // hidden layer's gradient -> gradient of the pools, a range of channels of a whole unit
  kInputGrad,    // dy, everything above -> dx
  kFinishPools,  // partial channel pools of a whole unit -> channel pools; only in a tail
  kStageCount
};

// Which rounds of the chain one launch runs.
enum Operation : int32_t {
  kCbamForward,
  kAttentionForward,
  kScaleForward,
  kCbamBackward,
  kAttentionBackward,
  kScaleBackward
};

// Counters in the workspace: a ticket, finished blocks, finished weight-gradient inputs, finished parts of
// weight gradients, then a row of kCounters a unit, indexed by stage; kTailDone is raised when a stage's tail
// has run. A stage's tail are the stages that the block which finishes a unit's last item does at once, for
// the whole unit: small ones or, where a sample is chained, all that are left.
constexpr int kTicket = 0, kBlocksDone = 1, kReadyForWeights = 2, kWeightParts = 3, kUnitCounters = 32;
constexpr int kTailDone = kStageCount, kCounters = 16;
constexpr int kTails = 4;
static_assert(kTailDone < kCounters);

// A number that depends on how many samples the unit has (the last one may have fewer).
struct Count {
  int32_t per_sample, per_unit;
};

// One stage's share of a step: `items` of unit (step - lag), a multiple of which holds for each sample
// where per_sample is set.
struct StagePlan {
  int32_t stage, lag, items, per_sample;
  uint32_t first;        // the step's tickets before this stage
  int32_t wait_counter;  // -1: nothing to wait for
  Count wait_for;
  int32_t tail[kTails];   // stages, -1 after the last
  int32_t awaited;        // another stage, or a unit that takes over its scratch, waits for its items
  int32_t feeds_weights;  // raises kReadyForWeights
  Count total;            // items of one unit
};

// How a sample's matrix of channels and positions is cut into items.
// Contiguous: a tile is `columns` vectors wide (a power of two from 4 to 32), over `chunk_rows` rows. With
// fold > 1, `fold` channels make one row, so that rows are aligned to vectors, and a tile spans the row.
// Channels-last: a tile is `positions` positions; `columns` lanes (4 to 32) share one, over `chunk_rows`
// vectors of channels, a multiple of `columns` where there is more than one chunk.
// With ragged rows, a tile of s.map begins in each row where a vector does, up to s.reach positions before
// its own first; one of s.reduce has all its positions in every row, and a column of vectors more than they
// take.
struct Tiling {
  int32_t columns, columns_log2;
  int32_t positions, tiles;
  int32_t chunk_rows, chunks;
};

struct Schedule {
  StagePlan plan[8];
  int32_t plans;
  int32_t stage_plan[kStageCount];  // index into plan, or -1
  int32_t unit_samples, units;
  int32_t backwards;  // the last unit first: L2 still has the samples that another kernel touched last
  int32_t distance;   // tickets between a unit's stages, at least
  uint32_t step_items, main_items;
  // Weight gradients: items, each a tile's sum over one of `weight_splits` shares of the batch; and the items
  // that add those up, none where there is one share.
  uint32_t weight_items, join_items;
  int32_t weight_splits;
  uint32_t weights_ready;  // kReadyForWeights' final value
  int32_t ring;            // units whose scratch is alive at a time; 0: all of them
  int32_t ring_counter;    // counter that frees a slot of the ring

  int32_t fold;    // channels a row
  int32_t ragged;  // rows begin and end within vectors
  int32_t reach;
  int32_t rows, row_elements, row_vectors;
  Tiling reduce;  // kSpatialPool, kCross: stages that reduce over channels
  Tiling map;     // kOutput, kGateGrad, kInputGrad

  int32_t pool_lanes;   // contiguous: lanes a row; channels-last: lanes a position
  int32_t pool_rows;    // contiguous: rows an item; channels-last: positions an item
  int32_t pool_items;   // a sample
  int32_t pool_chunks;  // partial pools a channel (channels-last)

  int32_t conv_positions, conv_items;
  int32_t gather_tiles;  // map tiles an item of the passes over x, which then convolve dz themselves; or 0
  int32_t chained;  // a block takes a sample through the whole backward: an item a sample, the rest its tail
  int32_t slot_bytes;   // what it keeps of scratch at the end of its shared memory
  int32_t conv_halo;    // positions before and after a range that its convolution reads
  int32_t conv_staged;  // maps in shared memory, else read where they are
  int32_t kernel_staged;

  int32_t pool_vectors;            // pools after blending
  int32_t hidden_tile, gate_tile;  // hidden units, channels an item of the MLP, forward and backward
  int32_t direct_logits;           // kGateGrad writes dl itself: one tile has all positions
  int32_t hidden_blocks;           // blocks of channels that kLogitGrad takes a unit by; 0: it has samples
  int32_t logits_grad_items;       // scale_backward: items that sum ds over chunks, after those of kLogitGrad
};

// Scratch memory, of the accumulation type unless said otherwise; null where an operation needs none. Where
// samples are chained, a block's one slot is in its shared memory: of cross_parts (which then hands dl on,
// too), pool_grad, spatial_grad and hidden_parts.
struct Scratch {
  uint32_t* counters;      // zero at the start and again at the end of every launch
  void* pool_parts;        // (5, N, pool_chunks, C): sum, maximum, squares, and log-sum's peak and sum
  int32_t* pool_marks;     // (N, pool_chunks, C)
  void* hidden;            // (N, h): summed over pools, after ReLU
  void* spatial_parts;     // (2, N, chunks, P): maximum, sum
  int32_t* spatial_marks;  // (N, chunks, P)
  void* spatial_grad;      // ds (slots, reduce chunks, P), or dz where there is one chunk
  void* pooled_grad;       // dq (slots, 2, P), [max, mean], the mean's divided by C
  void* cross_parts;       // (slots, reduce tiles, C)
  void* gate_parts;        // (slots, map tiles, C)
  void* logit_grad;        // dl (N, C)
  void* hidden_parts;      // (slots, hidden_blocks or 1, h): dl w2, of each block of channels
  void* hidden_grad;       // (N, pool_vectors, h)
  void* pool_grad;         // (slots, K, C): gradient of each pool, as the input's gradient uses it
  void* conv_parts;        // (N * conv_items, 2 * taps + 2): kernel, sum of dz, sum of dz * conv
  void* weight_parts;      // (weight_splits, entries of all gradients), in the order of GradLayout
};

// Where each gradient begins in a row of weight_parts: w2's, b2's, w1's, b1's, and a row like conv_parts'.
struct GradLayout {
  int64_t b2, w1, b1, conv, entries;
};
CBAM_HOST_DEVICE inline GradLayout grad_layout(const Problem& p) {
  GradLayout g{};
  if (p.pools) {
    g.b2 = p.channels * p.hidden;
    g.w1 = g.b1 = g.conv = g.b2 + p.channels;
    if (p.w1.data) {
      g.b1 = g.w1 + p.hidden * p.channels;
      g.conv = g.b1 + p.hidden;
    }
  }
  g.entries = g.conv + (p.spatial == kSpatialNone ? 0 : 2 * taps(p) + 2);
  return g;
}

struct Streamed {
  Problem p;
  Schedule s;
  Scratch w;
  int32_t operation;
  int32_t grid, blocks_per_multiprocessor;
  int32_t shared_bytes, shared_limit;  // dynamic shared memory of a block: this launch's, the device's
};

}  // namespace cbam
