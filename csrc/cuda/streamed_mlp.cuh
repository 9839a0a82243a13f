// The channel gate's MLP and its backward, for ranges of samples and of weight rows or columns.
#pragma once

#include "streamed_engine.cuh"

namespace cbam {

// Copies elements [first, first + count) of vectors [v, v + valid) into shared memory: every thread of the
// block needs them, and they are past L1.
template <class A, class Vector>
__device__ __forceinline__ void stage_vectors(A* staged, int64_t v, int valid, int64_t first, int count,
                                              Vector vector) {
#pragma unroll 1
  for (int u = 0; u < valid; ++u) {
#pragma unroll 4
    for (int i = thread_index(); i < count; i += kThreads)
      staged[u * kMlpStage + i] = vector(v + u, first + i);
  }
}

// V elements of a learnt matrix from element i on: a vector of W, or one of either dtype.
template <class T, class W, int V>
struct MatrixVector {
  Packed<W, V> packed;
  __device__ __forceinline__ void load(const Weight& m, int64_t i) {
    load_packed<Cache::kReadOnly>(static_cast<const W*>(m.data) + i, packed);  // [V]
  }
  __device__ __forceinline__ void unpack(Accumulate<T> (&v)[V]) const { packed.unpack(v); }
};
template <class T>
struct MatrixVector<T, void, 1> {
  Accumulate<T> value;
  __device__ __forceinline__ void load(const Weight& m, int64_t i) { value = load_weight<T>(m, i); }  // [1]
  __device__ __forceinline__ void unpack(Accumulate<T> (&v)[1]) const { v[0] = value; }
};

// dot(row r of m, vector v) for rows [r0, r1) and `count` vectors of `length`. `vector(v, i)` is an
// element; `out(r, v, valid, dots)` gets up to `batch` of them at once, in one lane. A lane has V elements of
// a row at a time, one vector W of memory; without W, V is 1, and m's elements are of either dtype.
template <class T, class W, int V, class Vector, class Out>
__device__ __forceinline__ void row_dot_by(MatrixVector<T, W, V>, const Weight& m, int r0, int r1, int length,
                                           int count, int batch, Shared shared, Vector vector, Out out) {
  using A = Accumulate<T>;
  constexpr int kAhead = 4;
  A* staged = shared.take<A>(kBatch * kMlpStage);
  int lanes = 1;
  while (lanes < 32 && lanes * 16 <= length) lanes *= 2;
  const int lane = thread_index() & (lanes - 1), team = thread_index() / lanes;
  for (int v = 0; v < count; v += batch) {
    const int valid = min(batch, count - v);
    for (int base = r0; base < r1; base += kThreads / lanes) {
      const int r = base + team;
      A acc[kBatch] = {};
      for (int first = 0; first < length; first += kMlpStage) {
        const int size = min(kMlpStage, length - first);
        if (base == r0 || length > kMlpStage) {
          __syncthreads();
          stage_vectors(staged, v, valid, first, size, vector);
          __syncthreads();
        }
        if (r >= r1) continue;
#pragma unroll 1
        for (int i = lane * V; i < size; i += kAhead * lanes * V) {
          MatrixVector<T, W, V> ahead[kAhead] = {};
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const int at = i + u * lanes * V;
            if (at < size) ahead[u].load(m, int64_t{r} * length + first + at);  // [V]
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const int at = i + u * lanes * V;
            if (at >= size) break;
            A w[V];
            ahead[u].unpack(w);
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
              if (n >= valid) break;
#pragma unroll
              for (int j = 0; j < V; ++j) acc[n] += w[j] * staged[n * kMlpStage + at + j];
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) acc[n] = lanes_sum(acc[n], lanes);
      if (r < r1 && lane == 0) out(r, v, valid, acc);
    }
  }
}

// A range of rows and of columns of a learnt matrix.
struct MatrixRange {
  int r0, r1, c0, c1;
  int stride;  // columns of the whole matrix
};

// sum_r m[r][c] * vector(v, r) over the range's rows for its columns; out(c, v, sum). A thread has V columns,
// one vector W of memory; without W, V is 1, and m's elements are of either dtype.
template <class T, class W, int V, class Vector, class Out>
__device__ __forceinline__ void column_dot_by(MatrixVector<T, W, V>, const Weight& m,
                                              const MatrixRange& range, int count, Shared shared,
                                              Vector vector, Out out) {
  using A = Accumulate<T>;
  constexpr int kAhead = 4;
  constexpr int kPitch = kThreads + 32 / V;  // parts are read in the order of columns: no conflicts
  A* staged = shared.take<A>(kBatch * kMlpStage);
  A* parts = shared.take<A>(V * kPitch);
  int lanes = 1;
  while (lanes < kThreads && lanes * V < range.c1 - range.c0) lanes *= 2;
  const int lane = thread_index() & (lanes - 1), group = thread_index() / lanes, groups = kThreads / lanes;
  for (int v = 0; v < count; v += kBatch) {
    const int valid = min(kBatch, count - v);
    for (int base = range.c0; base < range.c1; base += lanes * V) {
      const int c = base + lane * V;
      A acc[kBatch][V] = {};
      for (int first = range.r0; first < range.r1; first += kMlpStage) {
        const int size = min(kMlpStage, range.r1 - first);
        if (base == range.c0 || range.r1 - range.r0 > kMlpStage) {
          __syncthreads();
          stage_vectors(staged, v, valid, first, size, vector);
          __syncthreads();
        }
        if (c >= range.c1) continue;
#pragma unroll 1
        for (int r = group; r < size; r += kAhead * groups) {
          MatrixVector<T, W, V> ahead[kAhead] = {};
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const int at = r + u * groups;
            if (at < size) ahead[u].load(m, int64_t{first + at} * range.stride + c);  // [V]
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const int at = r + u * groups;
            if (at >= size) break;
            A w[V];
            ahead[u].unpack(w);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              if (i >= valid) break;
              const A factor = staged[i * kMlpStage + at];
#pragma unroll
              for (int j = 0; j < V; ++j) acc[i][j] += w[j] * factor;
            }
          }
        }
      }
#pragma unroll 1
      for (int turn = 0; turn < valid; ++turn) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (i != turn) continue;
#pragma unroll
          for (int j = 0; j < V; ++j) parts[j * kPitch + thread_index()] = acc[i][j];
        }
        __syncthreads();
        for (int at = thread_index(); at < lanes * V && base + at < range.c1; at += kThreads) {
          const A* mine = parts + at % V * kPitch + at / V;
          A total = mine[0];
          for (int g = 1; g < groups; ++g) total += mine[g * lanes];
          out(base + at, v + turn, total);
        }
        __syncthreads();
      }
    }
  }
}

// body(MatrixVector) with the widest vector W of m's memory, V elements, that begins at all multiples of
// `extents`, a bitwise or of them; with a single element where that is none.
template <class T, class Body>
__device__ __forceinline__ void with_matrix_vector(const Weight& m, int extents, Body body) {
  constexpr int kNarrow = kVector<T>, kWide = kVector<float>;
  const bool wide = sizeof(T) == 2 && m.wide;
  if (reinterpret_cast<uintptr_t>(m.data) % 16 || extents % (wide ? kWide : kNarrow)) {
    body(MatrixVector<T, void, 1>{});
  } else if (!wide) {
    body(MatrixVector<T, T, kNarrow>{});
  } else if constexpr (sizeof(T) == 2) {
    body(MatrixVector<T, float, kWide>{});
  }
}

template <class T, class Vector, class Out>
__device__ __forceinline__ void row_dot(const Weight& m, int r0, int r1, int length, int count, int batch,
                                        Shared shared, Vector vector, Out out) {
  with_matrix_vector<T>(
      m, length, [&](auto by) { row_dot_by<T>(by, m, r0, r1, length, count, batch, shared, vector, out); });
}

template <class T, class Vector, class Out>
__device__ __forceinline__ void column_dot(const Weight& m, const MatrixRange& range, int count,
                                           Shared shared, Vector vector, Out out) {
  with_matrix_vector<T>(m, range.c0 | range.c1 | range.stride,
                        [&](auto by) { column_dot_by<T>(by, m, range, count, shared, vector, out); });
}

// What the MLP reads: channel c of input j of sample n.
template <class A>
__device__ __forceinline__ A mlp_input(const Problem& p, int64_t n, int64_t j, int64_t c) {
  if (p.pools & kBlend) {
    return A(0.5) * fresh<A>(p.pooled, n * 2 * p.channels + c) +
           A(0.5) * fresh<A>(p.pooled, (n * 2 + 1) * p.channels + c);
  }
  return fresh<A>(p.pooled, (n * pool_count(p.pools) + j) * p.channels + c);
}
template <class A>
__device__ __forceinline__ A summed_input(const Streamed& k, int64_t n, int64_t c) {
  A sum = 0;
  for (int j = 0; j < k.s.pool_vectors; ++j) sum += mlp_input<A>(k.p, n, j, c);
  return sum;
}
template <class T>
__device__ __forceinline__ Accumulate<T> bias(const Weight& b, int64_t i) {
  return b.data ? load_weight<T>(b, i) : Accumulate<T>(0);
}

// A range of samples and of rows or columns, of a unit whose work one or several items do.
struct MlpRange {
  int64_t sample;
  int samples, begin, end;
};

__device__ __forceinline__ MlpRange mlp_range(const Item& item, int64_t extent, int tile) {
  const int all = static_cast<int>(extent), count = static_cast<int>(item.count);
  if (item.whole) return {item.first, count, 0, all};
  const int tiles = (all + tile - 1) / tile;
  const int sample = item.index / tiles * kMlpSamples, begin = item.index % tiles * tile;
  return {item.first + sample, min(max(count - sample, 0), kMlpSamples), begin, min(begin + tile, all)};
}

__device__ __forceinline__ int whole_samples(int vectors) {
  return kBatch / vectors * vectors;
}

// For a single layer, hidden[n][c] is just the inputs' sum.
template <class A>
__device__ __forceinline__ void put_summed_inputs(const Streamed& k, const MlpRange& r) {
  const int64_t width = r.end - r.begin;
  for (int64_t i = thread_index(); i < r.samples * width; i += kThreads) {
    const int64_t n = r.sample + i / width, c = r.begin + i % width;
    put(k.w.hidden, n * k.p.channels + c, summed_input<A>(k, n, c));
  }
}

// Products with the rows of a matrix, one piece of code for both layers, as it is large. With `to_hidden`
// hidden[n][j] = sum over the inputs of relu(w1 u + b1), and for backward what the ReLU sees; else the
// channel gate.
template <class T>
__device__ __forceinline__ void mlp_stage(const Streamed& k, const MlpRange& r, bool to_hidden,
                                          Shared shared) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const int vectors = k.s.pool_vectors;
  if (to_hidden && !p.w1.data) return put_summed_inputs<A>(k, r);
  row_dot<T>(
      to_hidden ? p.w1 : p.w2, r.begin, r.end, static_cast<int>(to_hidden ? p.channels : p.hidden),
      to_hidden ? r.samples * vectors : r.samples, to_hidden ? whole_samples(vectors) : kBatch, shared,
      [&](int v, int i) {
        return to_hidden ? mlp_input<A>(p, r.sample + v / vectors, v % vectors, i)
                         : fresh<A>(k.w.hidden, (r.sample + v) * p.hidden + i);
      },
      [&](int i, int v, int valid, const A(&dots)[kBatch]) {
        const A b = to_hidden ? bias<T>(p.b1, i) : A(vectors) * bias<T>(p.b2, i);
        A sum = 0;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (u >= valid) break;
          const A before = dots[u] + b;
          if (!to_hidden) {
            put(p.channel_gate, (r.sample + v + u) * p.channels + i, sigmoid(before));
            continue;
          }
          if (p.hidden_layer) put(p.hidden_layer, (r.sample * vectors + v + u) * p.hidden + i, before);
          sum += relu(before);
          if ((u + 1) % vectors == 0) {
            put(k.w.hidden, (r.sample + (v + u) / vectors) * p.hidden + i, sum);
            sum = 0;
          }
        }
      });
}

// hidden_grad[n][input][j], behind the ReLU, and hidden[n][j] for the gradient of w2.
template <class A>
__device__ __forceinline__ void hidden_grad_stage(const Streamed& k, const MlpRange& r) {
  const Problem& p = k.p;
  const int vectors = k.s.pool_vectors, blocks = max(1, k.s.hidden_blocks);
  const int64_t width = r.end - r.begin;
  for (int64_t i = thread_index(); i < r.samples * width; i += kThreads) {
    const int64_t n = r.sample + i / width, j = r.begin + i % width, parts = slot_of(k, n) * blocks;
    A grad = 0, sum = 0;
#pragma unroll 8
    for (int b = 0; b < blocks; ++b)
      grad += from_slot<A>(k.w.hidden_parts, (parts + b) * p.hidden + j);  // [1]
    for (int64_t v = n * vectors; v < (n + 1) * vectors; ++v) {
      const A before = constant<A>(p.hidden_layer, v * p.hidden + j);  // [1]
      sum += relu(before);
      put(k.w.hidden_grad, v * p.hidden + j, before <= A(0) ? A(0) : grad);  // [1]
    }
    put(k.w.hidden, n * p.hidden + j, sum);
  }
}

// The gradient of one input, as the pools that it consists of hand it on to x.
template <class A>
__device__ __forceinline__ void put_pool_grads(const Streamed& k, int64_t n, int input, int64_t c, A grad) {
  const Problem& p = k.p;
  const int pools = pool_count(p.pools);
  const A share = p.pools & kBlend ? A(0.5) : A(1);
  int row = 0;
  for (int bit = kAvg; bit <= kLse; bit *= 2) {
    if (!(p.pools & bit)) continue;
    if (p.pools & kBlend || row == input) {
      A value = share * grad;
      if (bit == kAvg) value /= A(p.positions);
      if (bit == kLp) {
        const A norm = constant<A>(p.pooled, (n * pools + row) * p.channels + c);
        value = norm == A(0) ? A(0) : value / norm;
      }
      put(k.w.pool_grad, (slot_of(k, n) * pools + row) * p.channels + c, value);
    }
    ++row;
  }
}

// Products with the columns of a matrix, one piece of code for all, as it is large. With `to_hidden` a part
// of dl w2: its sum over channels [r.begin, r.end); `near` is their dl, where it is in shared memory. Else
// the gradients of the pools of these channels: the hidden layer's gradient by w1, or dl by the single layer.
template <class T>
__device__ __forceinline__ void mlp_backward_stage(const Streamed& k, const MlpRange& r, bool to_hidden,
                                                   const Accumulate<T>* near, Shared shared) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const int vectors = k.s.pool_vectors, channels = static_cast<int>(p.channels),
            hidden = static_cast<int>(p.hidden);
  const bool logits = to_hidden || !p.w1.data;
  if (logits && !to_hidden) put_summed_inputs<A>(k, r);
  column_dot<T>(
      logits ? p.w2 : p.w1,
      to_hidden ? MatrixRange{r.begin, r.end, 0, hidden, hidden}
                : MatrixRange{0, hidden, r.begin, r.end, channels},
      r.samples * (logits ? 1 : vectors), shared,
      [&](int v, int i) {
        if (!logits) return fresh<A>(k.w.hidden_grad, (r.sample * vectors + v) * p.hidden + i);
        if (near) return near[v * (r.end - r.begin) + i - r.begin];
        if (k.s.chained) return from_slot<A>(k.w.cross_parts, i);
        return fresh<A>(k.w.logit_grad, (r.sample + v) * p.channels + i);
      },
      [&](int i, int v, A sum) {
        if (to_hidden) {
          const int blocks = max(1, k.s.hidden_blocks), block = r.begin / k.s.gate_tile;
          put(k.w.hidden_parts, (slot_of(k, r.sample + v) * blocks + block) * p.hidden + i, sum);
        } else if (logits) {
          for (int j = 0; j < vectors; ++j) put_pool_grads<A>(k, r.sample + v, j, i, sum);
        } else {
          put_pool_grads<A>(k, r.sample + v / vectors, v % vectors, i, sum);
        }
      });
}

}  // namespace cbam
