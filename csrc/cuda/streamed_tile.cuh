// How a thread of the streamed tier finds its vectors in a tile of x, and what it reads beside x.
#pragma once

#include "streamed_engine.cuh"

namespace cbam {

constexpr int kUnroll = 4;  // loads in flight a thread

// Vectors of kRows rows at, at + lanes, ...: from p on, `step` elements apart. Zeros from row `end` on, which
// costs nothing where all rows are there.
template <Cache kCache, int kRows, class T, int V>
__device__ __forceinline__ void load_rows(const T* p, int64_t step, int at, int lanes, int end,
                                          Packed<T, V> (&packed)[kRows]) {
  if (at + (kRows - 1) * lanes < end) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) load_packed<kCache>(p + u * step, packed[u]);  // [V]
    return;
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    packed[u] = {};
    if (at + u * lanes < end) load_packed<kCache>(p + u * step, packed[u]);  // [V]
  }
}

// A contiguous tile: rows [first, end) of `columns` vectors. Thread (row, column) takes every `lanes`-th
// row. In a folded row the vector may span two channels: its first `split` elements belong to channel
// `offset` of the row, the others to the next, at position 0.
template <class Tr>
struct RowTile {
  static constexpr int V = Tr::V;
  int tile, chunk;
  int column, row, lanes;
  int first, end;
  int vector, position, offset, split;
  bool inside;

  __device__ __forceinline__ RowTile(const Streamed& k, const Tiling& t, int index) {
    const Schedule& s = k.s;
    tile = index / t.chunks;
    chunk = index % t.chunks;
    first = chunk * t.chunk_rows;
    end = min(s.rows, first + t.chunk_rows);
    if constexpr (Tr::kFold) {
      const int positions = static_cast<int>(k.p.positions);
      column = threadIdx.x % t.columns;
      row = threadIdx.x / t.columns;
      lanes = kThreads / t.columns;
      vector = column;
      inside = row < lanes;
      offset = column * V / positions;
      position = column * V - offset * positions;
      split = min(V, positions - position);
    } else {
      column = threadIdx.x & (t.columns - 1);
      row = threadIdx.x >> t.columns_log2;
      lanes = kThreads >> t.columns_log2;
      vector = tile * t.columns + column;
      inside = vector < s.row_vectors;
      offset = 0;
      position = vector * V;
      split = V;
    }
  }
  // Element j's position in the tile, and its channel in row r.
  __device__ __forceinline__ int in_tile(int j, int positions) const {
    if constexpr (Tr::kFold) return position + j - (j >= split ? positions : 0);
    return column * V + j;
  }
  __device__ __forceinline__ int absolute(int j, int positions) const {
    if constexpr (Tr::kFold) return in_tile(j, positions);
    return position + j;
  }
  __device__ __forceinline__ int channel(const Schedule& s, int r) const {
    return Tr::kFold ? r * s.fold + offset : r;
  }
  __device__ __forceinline__ bool next(int j) const { return Tr::kFold && j >= split; }
  // Where this thread's vector of row r of sample n begins.
  __device__ __forceinline__ int64_t start(const Streamed& k, int64_t n, int r) const {
    return (n * k.s.rows + r) * k.s.row_elements + int64_t{vector} * V;
  }
  // sums[r - first] = the sum over lanes of value[u], for the rows r = top + row + u * lanes before `bottom`.
  template <int kRows, class A>
  __device__ __forceinline__ void leave_sums(const A (&value)[kRows], int top, int bottom, int columns,
                                             A* sums) const {
    Sum<A> mine[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) mine[u].sum = value[u];
    const A sum = merge_in_row(mine, columns).sum;
    const int r = top + row + column * lanes;
    __syncwarp();
    if (column < kRows && r < bottom) sums[r - first] = sum;
  }
};

// A channels-last tile of the backward: positions [first, first + count), vectors [begin, end) of channels.
struct ColumnTile {
  int tile, chunk;
  int first, count, begin, end;

  __device__ __forceinline__ ColumnTile(const Schedule& s, const Tiling& t, int index) {
    tile = index / t.chunks;
    chunk = index % t.chunks;
    first = tile * t.positions;
    count = min(s.rows - first, t.positions);
    begin = chunk * t.chunk_rows;
    end = min(s.row_vectors, begin + t.chunk_rows);
  }
};

// One value for each channel that a vector meets: one, or two in a folded row.
template <class Tr, class X>
struct PerChannel {
  X here, after;
  __device__ __forceinline__ PerChannel(const X* values, int at, const RowTile<Tr>& t) {
    here = values[at];
    after = Tr::kFold && t.split < Tr::V ? values[at + 1] : here;
  }
  // Zeros where the row is not valid, so that values of x that are zero there stay so.
  __device__ __forceinline__ PerChannel(const X* values, int at, const RowTile<Tr>& t, bool valid) {
    here = after = X(0);
    if (valid) *this = PerChannel(values, at, t);
  }
  __device__ __forceinline__ X operator()(const RowTile<Tr>& t, int j) const {
    return t.next(j) ? after : here;
  }
};

// V values of the accumulation type, at an index that is a multiple of V.
template <int V, class A>
__device__ __forceinline__ void fresh_vector(const void* p, int64_t i, A (&v)[V]) {
  constexpr int kWide = kVector<A>;
  if constexpr (V % kWide == 0) {
#pragma unroll
    for (int j = 0; j < V; j += kWide) {
      A piece[kWide];
      load_global<Cache::kCoherent>(as<A>(p) + i + j, piece);
#pragma unroll
      for (int u = 0; u < kWide; ++u) v[j + u] = piece[u];
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = fresh<A>(p, i + j);
  }
}

// shared[i] = source[at + i], or `otherwise` where there is no source.
template <class A>
__device__ __forceinline__ void stage_values(A* shared, const void* source, int64_t at, int count,
                                             A otherwise) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads)
    shared[i] = source ? fresh<A>(source, at + i) : otherwise;
}
__device__ __forceinline__ void stage_marks(int* shared, const void* source, int64_t at, int count,
                                            bool is_short) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    shared[i] = source ? load_index<Cache::kCoherent>(source, at + i, is_short) : 0;
  }
}

// Sums of a folded tile's channels: every vector leaves one or two numbers, which are added in the order
// of the columns. `capacity` rows are dealt with at a time.
template <class Tr>
struct FoldSums {
  using A = typename Tr::A;
  A* pairs;
  int columns, capacity;

  __device__ __forceinline__ FoldSums(A* memory, const Tiling& t) : pairs(memory), columns(t.columns) {
    const int lanes = kThreads / columns, bytes = columns * 2 * static_cast<int>(sizeof(A));
    capacity = max(lanes, (16 << 10) / bytes / lanes * lanes);
  }
  __device__ __forceinline__ void leave(const RowTile<Tr>& t, int r, A here, A after) {
    pairs[(r * columns + t.column) * 2] = here;
    pairs[(r * columns + t.column) * 2 + 1] = after;
  }
  // Calls out(channel in these rows, sum) for `rows` rows that all threads have left, then is free again.
  template <class Out>
  __device__ __forceinline__ void finish(const Streamed& k, int rows, Out out) {
    const int fold = k.s.fold, positions = static_cast<int>(k.p.positions);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * fold; i += kThreads) {
      const int r = i / fold, first = (i - r * fold) * positions;
      const int from = first / Tr::V, to = (first + positions - 1) / Tr::V;
      const A* row = pairs + r * columns * 2;
      A sum = row[from * 2 + (from * Tr::V < first)];  // the first vector may begin in the channel before
      for (int c = from + 1; c <= to; ++c) sum += row[c * 2];
      out(i, sum);
    }
    __syncthreads();
  }
};

// Sums over channels of a contiguous tile: out(position in the map, sum).
template <class Tr, class S, class Out>
__device__ __forceinline__ void merge_tile(const Streamed& k, const Tiling& t, const RowTile<Tr>& me,
                                           S (&acc)[Tr::V], S* merged, Out out) {
  constexpr int V = Tr::V;
  const int positions = static_cast<int>(k.p.positions), width = t.columns * V;
  if constexpr (Tr::kFold) {
    if (me.inside) {
#pragma unroll
      for (int j = 0; j < V; ++j) merged[me.row * width + me.column * V + j] = acc[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < positions; i += kThreads) {
      S total = merged[i];
      for (int r = 0; r < me.lanes; ++r) {
        for (int f = 0; f < k.s.fold; ++f) {
          if (r + f) total.merge(merged[r * width + f * positions + i]);
        }
      }
      out(i, total);
    }
  } else {
    const int groups = merge_rows<V>(acc, t.columns, merged);
    for (int i = threadIdx.x; i < width; i += kThreads) {
      if (me.tile * t.positions + i >= positions) continue;
      out(me.tile * t.positions + i, merged_sum<V>(merged, groups, t.columns, i));
    }
  }
}

}  // namespace cbam
