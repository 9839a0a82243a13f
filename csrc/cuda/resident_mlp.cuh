// The channel gate's MLP in a cluster: each block with its own columns of w1 and its own rows of w2.
#pragma once

#include "resident_walk.cuh"
#include "streamed_mlp.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// ---- Weights, kQuad at a time: one access where the plan found rows and parts of them to begin at such.

__device__ __forceinline__ int quads_of(int length) {
  return (length + kQuad - 1) / kQuad;
}

// load(i, count, v): elements i to i + kQuad of the matrix, of which `count` are the row's; zeros after them.
template <class T>
struct QuadWeights {
  const T* data;
  __device__ __forceinline__ void load(int64_t i, int, float (&v)[kQuad]) const {
    if constexpr (sizeof(T) == 4) {
      load_global<Cache::kReadOnly>(data + i, v);  // [kQuad]
    } else {
      const auto w =
          load_word<Cache::kReadOnly>(reinterpret_cast<const WordOf<8>::type*>(data + i));  // [kQuad]
      const unsigned words[] = {static_cast<unsigned>(w), static_cast<unsigned>(w >> 32)};
      unpack_words<T>(words, v);
    }
  }
};
template <class T>
struct SingleWeights {
  const Weight& weight;
  __device__ __forceinline__ void load(int64_t i, int count, float (&v)[kQuad]) const {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) v[j] = j < count ? load_weight<T>(weight, i + j) : 0.f;  // [1]
  }
};
template <class T, class F>
__device__ __forceinline__ void with_weights(const Weight& w, bool quads, F f) {
  if (!quads) return f(SingleWeights<T>{w});
  if constexpr (sizeof(T) == 2) {
    if (!w.wide) return f(QuadWeights<T>{static_cast<const T*>(w.data)});
  }
  f(QuadWeights<float>{static_cast<const float*>(w.data)});
}

template <class A>
__device__ __forceinline__ A dot(const A (&a)[kQuad], const A (&b)[kQuad], A sum) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j) sum += a[j] * b[j];
  return sum;
}

// Lanes that share a dot product of this length, a power of two: few sums over lanes, all lanes at work.
__device__ __forceinline__ int dot_lanes(int length) {
  int lanes = 4;
  while (lanes < 32 && lanes * 16 <= length) lanes *= 2;
  return lanes;
}

// part[j][i] = sum over this block's channels of w1[i][c] input[j][c], whose rows end in zeros up to a quad.
// kMost: room for so many inputs; with the usual two, half the work of four.
template <int kMost, class Tr>
__device__ __forceinline__ void hidden_dots(const Block<Tr>& b, const typename Tr::A* input,
                                            typename Tr::A* part) {
  using A = typename Tr::A;
  using T = typename Tr::T;
  const Problem& p = b.k.p;
  const int inputs = b.k.inputs, own = b.own_channels.size(), hidden = static_cast<int>(p.hidden);
  const int quads = quads_of(own), pitch = quads * kQuad;
  const int lanes = dot_lanes(own), lane = b.lane & (lanes - 1), teams = b.threads / lanes;
  with_weights<T>(p.w1, b.k.weight_quads, [&](auto weights) {
    for (int base = 0; base < hidden; base += teams) {
      const int i = base + b.thread / lanes;
      A acc[kMost] = {};
      if (i < hidden) {
        const int64_t row = int64_t{i} * p.channels + b.own_channels.begin;
#pragma unroll 4
        for (int q = lane; q < quads; q += lanes) {
          const int c = q * kQuad;
          A w[kQuad];
          weights.load(row + c, own - c, w);
#pragma unroll
          for (int j = 0; j < kMost; ++j) {
            if (j >= inputs) break;
            A in[kQuad];
            load_factors<kQuad>(input + j * pitch + c, in);
            acc[j] = dot(w, in, acc[j]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        if (j >= inputs) break;
        const A sum = lanes_sum(acc[j], lanes);
        if (lane == 0 && i < hidden) part[j * hidden + i] = sum;
      }
    }
  });
}

// What the hidden layer sums over the cluster; without w1, the inputs' sum at the block's own channels and 0
// elsewhere.
template <class Tr>
__device__ __forceinline__ void hidden_part(const Block<Tr>& b, const typename Tr::A* input,
                                            typename Tr::A* part) {
  const Problem& p = b.k.p;
  const int inputs = b.k.inputs, own = b.own_channels.size(), pitch = quads_of(own) * kQuad;
  if (p.w1.data) {
    if (inputs <= 2)
      hidden_dots<2>(b, input, part);
    else
      hidden_dots<kMaxInputs>(b, input, part);
    return;
  }
  for (int i = b.thread; i < static_cast<int>(p.hidden); i += b.threads) {
    const int c = i - b.own_channels.begin;
    typename Tr::A sum = 0;
    for (int j = 0; c >= 0 && c < own && j < inputs; ++j) sum += input[j * pitch + c];
    part[i] = sum;
  }
}

// A value that every block holds a share of, summed in the order of the ranks.
template <class Tr, class A>
__device__ __forceinline__ A cluster_sum(const Block<Tr>& b, A* mine) {
  A sum = 0;
  for_ranks(b, mine, [&](int r, A v) { sum = r ? sum + v : v; });
  return sum;
}

// sum_r m[r][c] vector(v, r) for rows and columns of a matrix with `stride` columns; out(c, v, sum).
// `parts` holds kQuad values a thread, count is at most kMost. Entered and left after a barrier.
template <int kMost, class Tr, class Vector, class Out>
__device__ __forceinline__ void columns_dot(const Block<Tr>& b, const Weight& m, Range rows, Range columns,
                                            int64_t stride, int count, typename Tr::A* parts, Vector vector,
                                            Out out) {
  using A = typename Tr::A;
  using T = typename Tr::T;
  int lanes = 1;
  while (lanes < b.threads && lanes * kQuad < columns.size()) lanes *= 2;
  const int lane = b.thread & (lanes - 1), group = b.thread / lanes, groups = b.threads / lanes;
  const int across = lanes * kQuad;
  with_weights<T>(m, b.k.weight_quads, [&](auto weights) {
    for (int base = columns.begin; base < columns.end; base += across) {
      const int c = base + lane * kQuad;
      A acc[kMost][kQuad] = {};
      if (c < columns.end) {
#pragma unroll 4
        for (int r = rows.begin + group; r < rows.end; r += groups) {
          A w[kQuad];
          weights.load(r * stride + c, columns.end - c, w);
#pragma unroll
          for (int v = 0; v < kMost; ++v) {
            if (v >= count) break;
            const A factor = vector(v, r);
#pragma unroll
            for (int j = 0; j < kQuad; ++j) acc[v][j] += w[j] * factor;
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kMost; ++v) {
        if (v >= count) break;
        *reinterpret_cast<float4*>(parts + b.thread * kQuad) =
            make_float4(acc[v][0], acc[v][1], acc[v][2], acc[v][3]);
        __syncthreads();
        for (int i = b.thread; i < across && base + i < columns.end; i += b.threads) {
          A total = parts[i];
          for (int g = 1; g < groups; ++g) total += parts[g * across + i];
          out(base + i, v, total);
        }
        __syncthreads();
      }
    }
  });
}

// The gate of this block's channels from its inputs: into `gate` of every block whose tile has them.
template <class Tr>
__device__ __forceinline__ void channel_gate(const Block<Tr>& b) {
  using A = typename Tr::A;
  using T = typename Tr::T;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const int hidden = static_cast<int>(p.hidden), inputs = k.inputs;
  A* input = b.template at<A>(k.at.input);
  A* part = b.template at<A>(k.at.hidden_part);
  A* summed = b.template at<A>(k.at.hidden);
  A* gate = b.template at<A>(k.at.gate);
  hidden_part(b, input, part);
  ptx::cluster_sync();
  for (int i = b.thread; i < hidden; i += b.threads) {
    A sum = 0;
    if (p.w1.data) {
      const A offset = bias<T>(p.b1, i);
      for (int j = 0; j < inputs; ++j) {
        const A before = cluster_sum(b, part + j * hidden + i) + offset;
        if (p.hidden_layer && b.rank == 0) put(p.hidden_layer, (b.n * inputs + j) * hidden + i, before);
        sum += relu(before);
      }
    } else {
      sum = cluster_sum(b, part + i);
    }
    summed[i] = sum;
  }
  const int quads = quads_of(hidden);
  if (b.thread < quads * kQuad - hidden) summed[hidden + b.thread] = A(0);
  __syncthreads();
  const int lanes = dot_lanes(hidden), lane = b.lane & (lanes - 1), teams = b.threads / lanes;
  with_weights<T>(p.w2, k.weight_quads, [&](auto weights) {
    for (int base = b.own_channels.begin; base < b.own_channels.end; base += teams) {
      const int c = base + b.thread / lanes;
      const bool inside = c < b.own_channels.end;
      A sum = 0;
      if (inside) {
        const int64_t row = int64_t{c} * hidden;
#pragma unroll 4
        for (int q = lane; q < quads; q += lanes) {
          A w[kQuad], behind[kQuad];
          weights.load(row + q * kQuad, hidden - q * kQuad, w);
          load_factors<kQuad>(summed + q * kQuad, behind);
          sum = dot(w, behind, sum);
        }
      }
      sum = lanes_sum(sum, lanes);
      if (!inside) continue;
      const A value = sigmoid(sum + A(inputs) * bias<T>(p.b2, c));
      if constexpr (Tr::kByChannel) {
        if (lane == 0) gate[c - b.own_channels.begin] = value;
      } else {
        for (int r = lane; r < b.blocks; r += lanes) *b.remote(gate + c, r) = value;
      }
      if (k.save && lane == 0) put(p.channel_gate, b.n * p.channels + c, value);
    }
  });
  if constexpr (Tr::kByChannel)
    __syncthreads();
  else
    ptx::cluster_sync();
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
