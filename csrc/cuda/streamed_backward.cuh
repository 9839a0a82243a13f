// The streamed tier's backward: one persistent launch from dy to dx and every weight's gradient.
// x and dy are read twice and dx is written once, 5 S; what the stages hand each other is counted by
// benchmarks/cuda_bytes.py. Items of a sample are spread over blocks or, where it is chained
// (policy_tiles.h), all done by one, from kCross to kInputGrad.
#pragma once

#include "streamed_conv.cuh"
#include "streamed_input_grad.cuh"
#include "streamed_mlp.cuh"

namespace cbam {

// ---- Weight gradients: sums over the batch in the order of the samples, a stage of them at a time. Where
// that would leave most blocks idle at the end of the launch, an item has a share of the samples, and the
// shares are added up in their order by items of their own.

// N values of shared memory, read together.
template <class A, int N>
struct alignas(N * sizeof(A)) Several {
  A of[N];
};

// One tile of sum_i left(i, r) right(i, c) for i < count, rows below `rows` and columns below `columns`.
// Tiles of the first columns also have sum_i left(i, r), the gradient of a bias. `give()`, which is asked for
// when all sums are there, takes them: give()(matrix, i, sum) for element i of the matrix, or of the rows'
// sums.
template <class A, int kRows, int kColumns, class Left, class Right, class Give>
__device__ __forceinline__ void outer_sum(int tile, int rows, int columns, int count, Shared shared,
                                          Left left, Right right, Give give) {
  // A lane has every 32nd column; a warp `kGroup` rows at a time, groups apart: few rows still are all warps'
  // work.
  constexpr int kWarps = kThreads / 32, kTurns = kColumns / 32, kGroup = 16 / kTurns;
  constexpr int kGroups = kRows / kWarps / kGroup;
  static_assert(kTurns * kGroup == 16 && kGroups * kGroup * kWarps == kRows && kRows <= kThreads);
  const int across = (columns + kColumns - 1) / kColumns;
  const int r0 = tile / across * kRows, c0 = tile % across * kColumns;
  const int height = min(kRows, rows - r0), width = min(kColumns, columns - c0);
  A* of_left = shared.take<A>(kWeightStage * kRows);
  A* of_right = shared.take<A>(kWeightStage * kColumns);
  const int thread = thread_index();
  const int lane = thread % 32, warp = thread / 32;
  A total[kGroups][kGroup][kTurns] = {}, row_total = 0;
  for (int first = 0; first < count; first += kWeightStage) {
    const int size = min(kWeightStage, count - first);
    if (first) __syncthreads();
#pragma unroll 2
    for (int i = thread; i < kWeightStage * kRows; i += kThreads) {
      const int of = i / kRows, at = i % kRows;
      of_left[i] = of < size && at < height ? left(first + of, r0 + at) : A(0);  // [1]
    }
#pragma unroll 2
    for (int i = thread; i < kWeightStage * kColumns; i += kThreads) {
      const int of = i / kColumns, at = i % kColumns;
      of_right[i] = of < size && at < width ? right(first + of, c0 + at) : A(0);  // [1]
    }
    __syncthreads();
    // A stage's sum by itself, so that rounding grows with the number of stages, not of samples.
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int top = (g * kWarps + warp) * kGroup;
      if (top >= height) break;
      A sum[kGroup][kTurns] = {};
#pragma unroll 1
      for (int i = 0; i < size; ++i) {
        const auto u = *reinterpret_cast<const Several<A, kGroup>*>(of_left + i * kRows + top);
#pragma unroll
        for (int j = 0; j < kTurns; ++j) {
          if (j * 32 >= width) break;
          const A v = of_right[i * kColumns + j * 32 + lane];
#pragma unroll
          for (int r = 0; r < kGroup; ++r) sum[r][j] += u.of[r] * v;
        }
      }
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
#pragma unroll
        for (int j = 0; j < kTurns; ++j) total[g][r][j] += sum[r][j];
      }
    }
    if (c0 == 0 && thread < kRows) {
      A sum = 0;
      for (int i = 0; i < size; ++i) sum += of_left[i * kRows + thread];
      row_total += sum;
    }
  }
  const auto out = give();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      const int at = ptx::opaque((g * kWarps + warp) * kGroup + r);
      if (at >= height) break;
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        const int c = ptx::opaque(j * 32) + lane;
        if (c >= width) break;
        out(true, int64_t{r0 + at} * columns + c0 + c, total[g][r][j]);
      }
    }
  }
  if (c0 == 0 && thread < height) out(false, r0 + thread, row_total);
}

// total[c] = sum_i value(i, c) for one tile of columns.
template <class A, class Value, class Out>
__device__ __forceinline__ void column_sum(int64_t tile, int64_t columns, int64_t count, Shared shared,
                                           Value value, Out out) {
  const int thread = thread_index();
  const int64_t c = tile * kConvColumns + thread % kConvColumns;
  const int group = thread / kConvColumns, groups = kThreads / kConvColumns;
  A* parts = shared.take<A>(kThreads);
  LongSum<A> total;
  if (c < columns) {
#pragma unroll 8
    for (int64_t i = group; i < count; i += groups) total.add(value(i, c));  // [1]
  }
  A sum = total.sum;
  parts[thread] = sum;
  __syncthreads();
  if (group == 0 && c < columns) {
    for (int g = 1; g < groups; ++g) sum += parts[g * kConvColumns + thread];
    out(c, sum);
  }
}

__device__ __forceinline__ int matrix_tiles(MatrixTile t, int rows, int columns) {
  return (rows + t.rows - 1) / t.rows * ((columns + t.columns - 1) / t.columns);
}

// Entry e of a row of conv_parts, summed over the batch: where it goes. Of a blend the first plane's entries
// are the sums of both planes'.
template <class T>
__device__ __forceinline__ void put_conv_grad(const Problem& p, int64_t e, Accumulate<T> sum) {
  using A = Accumulate<T>;
  const Norm<A> norm = load_norm<T>(p);
  const int64_t count = taps(p);
  if (e < 2 * count) {
    if (p.spatial == kSpatialBlend && e >= count) return;
    const bool stored_first = p.spatial != kMeanMax;
    const int64_t at = stored_first ? e : (e + count) % (2 * count);
    if (p.dconv_weight.data) store_weight<T>(p.dconv_weight, at, norm.slope * sum);
  } else if (e == 2 * count) {
    if (p.dconv_bias.data) store_weight<T>(p.dconv_bias, 0, norm.slope * sum);
    if (p.dbn_bias.data) store_weight<T>(p.dbn_bias, 0, sum);
  }
}

// The norm's weight needs two sums: sum dz (z - mean) / deviation, with z = conv + bias.
template <class T>
__device__ __forceinline__ void put_norm_weight_grad(const Problem& p, Accumulate<T> dz,
                                                     Accumulate<T> dz_conv) {
  using A = Accumulate<T>;
  const Norm<A> norm = load_norm<T>(p);
  const A bias = p.conv_bias.data ? load_weight<T>(p.conv_bias, 0) : A(0);
  store_weight<T>(p.dbn_weight, 0, norm.inverse_deviation * (dz_conv + (bias - norm.mean) * dz));
}

// Element i of a layer's matrix or, not of the `matrix`, of its bias.
template <class T>
__device__ __forceinline__ void put_layer_grad(const Streamed& k, bool second, bool matrix, int64_t i,
                                               Accumulate<T> sum) {
  const Problem& p = k.p;
  const WeightGrad& to = matrix ? (second ? p.dw2 : p.dw1) : second ? p.db2 : p.db1;
  // Each pool's output has the second layer's bias.
  if (to.data) store_weight<T>(to, i, second && !matrix ? Accumulate<T>(k.s.pool_vectors) * sum : sum);
}

// Entry e of a row of weight_parts, summed over the batch.
template <class T>
__device__ __forceinline__ void put_grad(const Streamed& k, const GradLayout& g, int64_t e,
                                         Accumulate<T> sum) {
  if (e >= g.conv) return put_conv_grad<T>(k.p, e - g.conv, sum);
  const bool second = e < g.w1, matrix = second ? e < g.b2 : e < g.b1;
  put_layer_grad<T>(k, second, matrix, e - (second ? (matrix ? 0 : g.b2) : matrix ? g.w1 : g.b1), sum);
}

template <class T>
__device__ __forceinline__ void conv_weight_item(const Streamed& k, int64_t tile, int64_t first, int64_t rows,
                                                 Shared shared, Accumulate<T>* parts) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const int64_t count = taps(p), entries = 2 * count + 2;
  const auto part = [&](int64_t i, int64_t e) { return fresh<A>(k.w.conv_parts, (first + i) * entries + e); };
  column_sum<A>(
      tile, entries, rows, shared,
      [&](int64_t i, int64_t e) {
        // Both planes of a blend are 0.5 times the one kernel.
        if (p.spatial == kSpatialBlend && e < count) return A(0.5) * (part(i, e) + part(i, count + e));
        return part(i, e);
      },
      [&](int64_t e, A sum) {
        if (parts)
          store_one(parts + e, sum);  // [1]
        else
          put_conv_grad<T>(p, e, sum);
      });
  if (!parts && p.dbn_weight.data && tile == (entries - 1) / kConvColumns) {
    __syncthreads();
    if (thread_index() < 32) {
      LongSum<A> of_dz, of_dz_conv;
      for (int64_t i = thread_index(); i < rows; i += 32) {
        of_dz.add(part(i, 2 * count));
        of_dz_conv.add(part(i, 2 * count + 1));
      }
      const A dz = warp_sum(of_dz.sum), dz_conv = warp_sum(of_dz_conv.sum);
      if (thread_index() == 0) put_norm_weight_grad<T>(p, dz, dz_conv);
    }
  }
}

// The row of weight_parts that an item's sums go to, or null where they are already all.
template <class A>
__device__ __forceinline__ A* share_of(const Streamed& k, int split, const GradLayout& g) {
  return k.s.join_items ? as<A>(k.w.weight_parts) + split * g.entries : nullptr;
}

template <class T>
__device__ __forceinline__ void weight_item(const Streamed& k, int index, Shared shared) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const int channels = static_cast<int>(p.channels), hidden = static_cast<int>(p.hidden);
  const int splits = k.s.weight_splits, tiles = static_cast<int>(k.s.weight_items) / splits;
  const int split = index / tiles, vectors = k.s.pool_vectors;
  const int count = static_cast<int>(p.samples * (split + 1) / splits - p.samples * split / splits);
  index %= tiles;
  // In shared memory: the tiles' sums leave no registers for them.
  int* share =
      shared.take<int>(8);  // the share's number, its first sample; doubles behind it are read by four
  if (thread_index() == 0) share[0] = split, share[1] = static_cast<int>(p.samples * split / splits);
  __syncthreads();
  if (p.pools) {
    // Found out late, when the loop over the samples needs its registers no longer.
    const auto give = [&](bool second) {
      const GradLayout g = grad_layout(k.p);
      A* parts = share_of<A>(k, share[0], g);
      A *to_matrix = parts + (second ? 0 : g.w1), *to_bias = parts + (second ? g.b2 : g.b1);
      return [&k, second, parts, to_matrix, to_bias](bool matrix, int64_t i, A sum) {
        if (parts)
          store_one((matrix ? to_matrix : to_bias) + i, sum);  // [1]
        else
          put_layer_grad<T>(k, second, matrix, i, sum);
      };
    };
    const int of_w2 = matrix_tiles(kTileW2, channels, hidden);
    if (index < of_w2) {
      outer_sum<A, kTileW2.rows, kTileW2.columns>(
          index, channels, hidden, count, shared,
          [&](int n, int c) { return fresh<A>(k.w.logit_grad, (share[1] + n) * p.channels + c); },
          [&](int n, int j) { return fresh<A>(k.w.hidden, (share[1] + n) * p.hidden + j); },
          [&] { return give(true); });
      return;
    }
    index -= of_w2;
    const int of_w1 = p.w1.data ? matrix_tiles(kTileW1, hidden, channels) : 0;
    if (index < of_w1) {
      outer_sum<A, kTileW1.rows, kTileW1.columns>(
          index, hidden, channels, count * vectors, shared,
          [&](int i, int j) {
            return fresh<A>(k.w.hidden_grad, (int64_t{share[1]} * vectors + i) * p.hidden + j);
          },
          [&](int i, int c) { return mlp_input<A>(p, share[1] + i / vectors, i % vectors, c); },
          [&] { return give(false); });
      return;
    }
    index -= of_w1;
  }
  if (p.spatial) {
    const GradLayout g = grad_layout(p);
    A* parts = share_of<A>(k, split, g);
    conv_weight_item<T>(k, index, int64_t{share[1]} * k.s.conv_items, int64_t{count} * k.s.conv_items, shared,
                        parts ? parts + g.conv : nullptr);
  }
}

// Adds up the shares of one range of entries.
template <class T>
__device__ __forceinline__ void join_item(const Streamed& k, int index) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const GradLayout g = grad_layout(p);
  const auto joined = [&](int64_t e) {
    LongSum<A> total;
#pragma unroll 8
    for (int i = 0; i < k.s.weight_splits; ++i)
      total.add(fresh<A>(k.w.weight_parts, i * g.entries + e));  // [1]
    return total.sum;
  };
  const int64_t first = int64_t{index} * kJoinEntries, last = min(first + kJoinEntries, g.entries);
  for (int64_t e = first + thread_index(); e < last; e += kThreads) {
    const A sum = joined(e);
    put_grad<T>(k, g, e, sum);
    if (e == g.entries - 1 && p.spatial && p.dbn_weight.data) put_norm_weight_grad<T>(p, joined(e - 1), sum);
  }
}

template <class Tr>
__device__ __forceinline__ void backward_item(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  constexpr bool kLast = Tr::kLayout == kChannelsLast;
  const bool split = k.p.ties == kTiesSplit;
  if (item.stage == kConvGrad || (gathers(k.s, item) && item.part == 0)) {
    conv_grad_stage<T>(k, item, shared);
    __syncthreads();
  }
  // dl w2, of a block of channels, or in the tail of a unit that is not cut into them, of all; or the pools'
  // gradients.
  const bool blocks = item.stage == kLogitGrad && k.s.hidden_blocks;
  const bool to_hidden = blocks || (item.stage == kHiddenGrad && !k.s.hidden_blocks);
  if (to_hidden || item.stage == kPoolGrad) {
    const MlpRange r = mlp_range(item, k.p.channels, k.s.gate_tile);
    typename Tr::A* near = nullptr;
    if (blocks) {
      near = shared.take<typename Tr::A>(kMlpSamples * k.s.gate_tile);
      logit_grad_block(k, r, near);
    }
    mlp_backward_stage<T>(k, r, to_hidden, near, shared);
  }
  switch (item.stage) {
    case kCross:
      if constexpr (kLast)
        cross_columns<Tr>(k, item, shared);
      else
        cross_rows<Tr>(k, item, shared);
      break;
    case kConvGrad:
      break;
    case kGateGrad:
      if constexpr (kLast) {
        if (split)
          gate_grad_columns<Tr, true>(k, item, shared);
        else
          gate_grad_columns<Tr, false>(k, item, shared);
      } else {
        if (split)
          gate_grad_rows<Tr, true>(k, item, shared);
        else
          gate_grad_rows<Tr, false>(k, item, shared);
      }
      break;
    case kLogitGrad:
      if (!blocks) logit_grad_stage<T>(k, item, shared);
      break;
    case kHiddenGrad:
      hidden_grad_stage<typename Tr::A>(k, mlp_range(item, k.p.hidden, k.s.hidden_tile));
      break;
    case kPoolGrad:
      break;
    default:
      input_grad_stage<Tr>(k, item, shared);
  }
}

template <class Tr>
__global__ void __launch_bounds__(kThreads, Tr::kBlocks) streamed_backward_kernel(const Streamed launch) {
  CBAM_DYNAMIC_SHARED(memory);
  CBAM_SHARED(k, Streamed);
  const Shared shared{memory, memory};
  share_parameters(launch, &k);
  take_slot<typename Tr::A>(&k, memory);
  run_items(
      k, [&](const Item& item) { backward_item<Tr>(k, item, shared); },
      [&](int index, bool join) {
        if (join)
          join_item<typename Tr::T>(k, index);
        else
          weight_item<typename Tr::T>(k, index, shared);
      });
}

}  // namespace cbam
