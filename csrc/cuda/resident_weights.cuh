// The resident tier's weight gradients: sums over the batch in a fixed order, by the blocks of the last wave.
#pragma once

#include "resident_conv.cuh"
#include "resident_mlp.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// What each sample leaves in global memory:
//   logit_grad   A (N, C)             dl
//   hidden       A (N, h)             hidden layer behind the ReLU, summed over inputs
//   hidden_grad  A (N, inputs, h)     its gradient, before the ReLU
//   conv_parts   A (N, blocks, conv_stride)  sums over a block's positions of dz q_max, dz q_mean, dz and,
//                for the norm's weight, dz conv

// tile[r][c] = sum_i left[i][r] right(i, c), `tile` counting kWeightRows x kWeightColumns pieces. `left`: A
// (count, rows), in global memory; kQuads: where its rows are a multiple of a quad.
template <bool kQuads, class A, class Right, class Out>
__device__ __forceinline__ void outer_sum(int tile, int rows, int columns, int64_t count, A* parts,
                                          const void* left, Right right, Out out) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int tiles = (columns + kWeightColumns - 1) / kWeightColumns;
  const int groups = static_cast<int>(min(int64_t{threads / kWeightColumns}, count));
  const int r0 = tile / tiles * kWeightRows, c = tile % tiles * kWeightColumns + thread % kWeightColumns;
  const int group = thread / kWeightColumns;
  A acc[kWeightRows] = {};
  LongSum<A> whole[kWeightRows];
  for (int64_t first = group; c < columns && group < groups && first < count; first += kJoined * groups) {
    if (first != group) {
#pragma unroll
      for (int r = 0; r < kWeightRows; ++r) {
        whole[r].add(acc[r]);
        acc[r] = 0;
      }
    }
    const int64_t end = min(first + kJoined * groups, count);
#pragma unroll 2
    for (int64_t i = first; i < end; i += groups) {
      const A of_right = right(i, c);  // [1]
      const int64_t row = i * rows + r0;
#pragma unroll
      for (int r = 0; r < kWeightRows; r += kQuad) {
        if (r0 + r >= rows) break;
        A of_left[kQuad];
        if constexpr (kQuads) {
          load_global<Cache::kCoherent>(as<A>(left) + row + r, of_left);  // [kQuad]
        } else {
#pragma unroll
          for (int j = 0; j < kQuad; ++j)
            of_left[j] = r0 + r + j < rows ? fresh<A>(left, row + r + j) : A(0);  // [1]
        }
#pragma unroll
        for (int j = 0; j < kQuad; ++j) acc[r + j] += of_left[j] * of_right;
      }
    }
  }
  if (group < groups) {
#pragma unroll
    for (int r = 0; r < kWeightRows; ++r) parts[r * threads + thread] = whole[r].sum + acc[r];
  }
  __syncthreads();
  if (group < kWeightRows && c < columns && r0 + group < rows) {
    const A* row = parts + group * threads + thread % kWeightColumns;
    A total = row[0];
    for (int g = 1; g < groups; ++g) total += row[g * kWeightColumns];
    out(r0 + group, c, total);
  }
}

// total[c] = sum_i value(i, c) for one tile of kColumns columns.
template <int kColumns, class A, class Value, class Out>
__device__ __forceinline__ void column_sum(int tile, int columns, int64_t count, A* parts, Value value,
                                           Out out) {
  static_assert(32 % kColumns == 0);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int c = tile * kColumns + thread % kColumns, group = thread / kColumns;
  A sum = 0;
  if (c < columns) {
    sum = long_sum<A>(int64_t{group}, count, int64_t{threads / kColumns},
                      [&](int64_t i) { return value(i, c); });  // [1]
  }
  sum = lane_sum<kColumns, 32>(sum);
  if (thread % 32 < kColumns) parts[thread / 32 * kColumns + thread % kColumns] = sum;
  __syncthreads();
  if (group == 0 && c < columns) {
    for (int w = 1; w < threads / 32; ++w) sum += parts[w * kColumns + thread];
    out(c, sum);
  }
}

// Entries of the gradients of the convolution and of the norm in eval mode: a tile of them.
template <class T, class A>
__device__ __forceinline__ void conv_weights(const Resident& k, int tile, A* parts, A* totals) {
  const Problem& p = k.p;
  const int count = static_cast<int>(taps(p)), stride = static_cast<int>(conv_stride(p));
  const int entries = 2 * count + (p.dbn_weight.data ? 2 : 1);
  const bool blend = p.spatial == kSpatialBlend;
  const Norm<A> norm = load_norm<T>(p);
  const auto part = [&](int64_t row, int e) { return fresh<A>(k.conv_parts, row * stride + e); };
  column_sum<kConvEntries>(
      tile, entries, p.samples * k.cluster, parts,
      [&](int64_t row, int e) {
        // A blend's planes are both 0.5 times the one kernel.
        return blend && e < count ? A(0.5) * (part(row, e) + part(row, count + e)) : part(row, e);
      },
      [&](int e, A sum) {
        if (e >= 2 * count) {
          totals[e - 2 * count] = sum;
        } else if (p.dconv_weight.data && !(blend && e >= count)) {
          // The other orders store the planes in one.
          const int plane = p.spatial == kMeanMax ? 1 - e / count : e / count;
          store_weight<T>(p.dconv_weight, plane * count + e % count, norm.slope * sum);
        }
      });
  if (tile != 2 * count / kConvEntries) return;
  // An even entry and the next are in one tile.
  __syncthreads();
  if (threadIdx.x) return;
  const A dz = totals[0];
  if (p.dconv_bias.data) store_weight<T>(p.dconv_bias, 0, norm.slope * dz);
  if (p.dbn_bias.data) store_weight<T>(p.dbn_bias, 0, dz);
  if (p.dbn_weight.data) {
    // sum dz (z - mean) / deviation, where z = conv + bias.
    const A offset = bias<T>(p.conv_bias, 0);
    store_weight<T>(p.dbn_weight, 0, norm.inverse_deviation * (totals[1] + (offset - norm.mean) * dz));
  }
}

// Item `index` of weight_item_count(p).
template <class T, bool kQuads, class A>
__device__ __forceinline__ void weight_item(const Resident& k, int index, A* parts, A* totals) {
  const Problem& p = k.p;
  const int channels = static_cast<int>(p.channels), hidden = static_cast<int>(p.hidden), inputs = k.inputs;
  const auto tiles = [](int rows, int columns) {
    return (rows + kWeightRows - 1) / kWeightRows * ((columns + kWeightColumns - 1) / kWeightColumns);
  };
  // First what has most rows to read.
  if (p.spatial) {
    const int of_conv = static_cast<int>(conv_stride(p)) / kConvEntries;
    if (index < of_conv) {
      conv_weights<T>(k, index, parts, totals);
      return;
    }
    index -= of_conv;
  }
  const auto logit = [&](int64_t n, int c) { return fresh<A>(k.logit_grad, n * channels + c); };
  if (p.pools) {
    if (index < tiles(channels, hidden)) {
      outer_sum<kQuads>(
          index, channels, hidden, p.samples, parts, k.logit_grad,
          [&](int64_t n, int j) { return fresh<A>(k.hidden, n * hidden + j); },
          [&](int c, int j, A sum) {
            if (p.dw2.data) store_weight<T>(p.dw2, int64_t{c} * hidden + j, sum);
          });
      return;
    }
    index -= tiles(channels, hidden);
    if (index < tiles(1, channels)) {
      column_sum<kWeightColumns>(index, channels, p.samples, parts, logit, [&](int c, A sum) {
        if (p.db2.data) store_weight<T>(p.db2, c, A(inputs) * sum);
      });
      return;
    }
    index -= tiles(1, channels);
    if (p.w1.data) {
      if (index < tiles(hidden, channels)) {
        outer_sum<kQuads>(
            index, hidden, channels, p.samples * inputs, parts, k.hidden_grad,
            [&](int64_t i, int c) { return mlp_input<A>(p, i / inputs, i % inputs, c); },
            [&](int j, int c, A sum) {
              if (p.dw1.data) store_weight<T>(p.dw1, int64_t{j} * channels + c, sum);
            });
        return;
      }
      index -= tiles(hidden, channels);
      if (index < tiles(1, hidden)) {
        column_sum<kWeightColumns>(
            index, hidden, p.samples * inputs, parts,
            [&](int64_t i, int j) { return fresh<A>(k.hidden_grad, i * hidden + j); },
            [&](int j, A sum) {
              if (p.db1.data) store_weight<T>(p.db1, j, sum);
            });
        return;
      }
    }
  }
}

__device__ __forceinline__ void cluster_started(const Resident& k, int rank) {
  if (rank == 0 && threadIdx.x == 0) ptx::add_release(k.counters + kStarted, 1);
}

// After a barrier behind everything that this block leaves for the weight gradients.
__device__ __forceinline__ void weights_ready(const Resident& k) {
  if (threadIdx.x == 0) ptx::add_release(k.counters + kReady, 1);
}

// Blocks that see all clusters started draw items: whom they wait for is running, so that it will end. The
// cluster that started last always does. Leaves all counters zero.
template <class Tr>
__device__ __forceinline__ void finish_weights(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  A* parts = b.template at<A>(k.at.tile);
  A* totals = b.template at<A>(k.at.kernel_grad);
  uint32_t& shared_item = *b.template at<uint32_t>(k.at.item);
  const bool leader = threadIdx.x == 0;
  const uint32_t items = static_cast<uint32_t>(k.weight_items);
  if (leader) {
    const uint32_t clusters = gridDim.x / static_cast<unsigned>(k.cluster);
    const bool helps = ptx::load_acquire(k.counters + kStarted) == clusters;
    if (helps) wait_for(k.counters + kReady, gridDim.x);
    shared_item = helps ? ptx::add_relaxed(k.counters + kTicket, 1) : items;
  }
  __syncthreads();
  while (true) {
    const uint32_t item = shared_item;
    if (item >= items) break;
    const uint32_t next =
        leader ? ptx::add_relaxed(k.counters + kTicket, 1) : 0;  // while this one is computed
    if (k.p.channels % kQuad == 0 && k.p.hidden % kQuad == 0)
      weight_item<typename Tr::T, true>(k, static_cast<int>(item), parts, totals);
    else
      weight_item<typename Tr::T, false>(k, static_cast<int>(item), parts, totals);
    __syncthreads();
    if (leader) shared_item = next;
    __syncthreads();
  }
  if (leader && ptx::increment_acquire_release(k.counters + kEnded, gridDim.x - 1) == gridDim.x - 1) {
    ptx::store(k.counters + kStarted, 0u);
    ptx::store(k.counters + kReady, 0u);
    ptx::store(k.counters + kTicket, 0u);
  }
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
