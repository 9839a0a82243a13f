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

// How far before the start of sample n's row r, elements into it, a vector begins.
template <int V>
__device__ __forceinline__ int start_in_vector(const Streamed& k, int64_t n, int r) {
  return static_cast<int>((n * k.s.rows + r) * k.s.row_elements & (V - 1));
}

// What a thread knows of the ends of ragged rows; the others have none.
template <class Tr, bool kHas = Tr::kRows == kRagged>
struct Ends {};
template <class Tr>
struct Ends<Tr, true> {
  int begin, end;    // this tile's own positions, or where an output is cut by rows, those of the row
  int vector_rows;   // rows of which this thread may read its vector in one piece: of the last, it may end
                     // behind the tensor
  unsigned mask[4];  // what of a vector is between begin and end
};

// A contiguous tile: rows [first, end) of `columns` vectors. Thread (row, column) takes every `lanes`-th
// row. In a folded row the vector may span two channels: its first `split` elements belong to channel
// `offset` of the row, the others to the next, at position 0.
// Of ragged rows, a thread takes vectors that begin at one position in all its rows, as `lanes` is a multiple
// of V: a reduction's tile has all of its own positions in every row, and what else is in its vectors counts
// as zero; an output's ends in each row where the next tile's first vector begins.
template <class Tr>
struct RowTile {
  static constexpr int V = Tr::V;
  static constexpr bool kHasEnds = Tr::kRows == kRagged;
  using T = typename Tr::T;
  int tile, chunk;
  int column, row, lanes;
  int first, end;
  int position, offset, split;
  int left, width;  // positions that the tile's vectors may reach
  bool inside;
  Ends<Tr> ends;

  __device__ __forceinline__ RowTile(const Streamed& k, const Tiling& t, int index, int64_t n) {
    const Schedule& s = k.s;
    const int positions = static_cast<int>(k.p.positions);
    tile = index / t.chunks;
    chunk = index % t.chunks;
    first = chunk * t.chunk_rows;
    end = min(s.rows, first + t.chunk_rows);
    left = tile * t.positions;
    width = min(t.positions, positions - left);
    if constexpr (Tr::kFold) {
      column = threadIdx.x % t.columns;
      row = threadIdx.x / t.columns;
      lanes = kThreads / t.columns;
      inside = row < lanes;
      offset = column * V / positions;
      position = column * V - offset * positions;
      split = min(V, positions - position);
    } else {
      column = threadIdx.x & (t.columns - 1);
      row = threadIdx.x >> t.columns_log2;
      lanes = kThreads >> t.columns_log2;
      offset = 0;
      position = left + column * V;
      split = V;
      inside = position < positions;
    }
    if constexpr (kHasEnds) {
      static_assert(kThreads / 32 % V == 0);
      position -= start_in_vector<V>(k, n, first + row);
      const bool own = t.positions < t.columns * V;
      ends.begin = own ? left : 0;
      ends.end = own ? left + width : positions;
      if (!own) {
        const int reached = min(left + t.positions, positions);
        left = max(0, left - (V - 1));
        width = reached - left;
      }
      inside = position < ends.end && position + V > ends.begin;
      ends.vector_rows = n == k.p.samples - 1 && position + V > positions ? s.rows - 1 : s.rows;
      constexpr int kPerWord = V / 4;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        ends.mask[w] = 0;
#pragma unroll
        for (int j = w * kPerWord; j < (w + 1) * kPerWord; ++j)
          ends.mask[w] |= valid(j) ? ~0u >> (32 - 32 / kPerWord) << (j % kPerWord * 16) : 0u;
      }
    }
  }
  // Whether element j is one of the tile's, or of the row's.
  __device__ __forceinline__ bool valid(int j) const {
    if constexpr (kHasEnds) return position + j >= ends.begin && position + j < ends.end;
    return inside;
  }
  // Element j's position among those that the tile reaches, and its channel in row r.
  __device__ __forceinline__ int in_tile(int j, int positions) const {
    if constexpr (Tr::kFold) return position + j - (j >= split ? positions : 0);
    if constexpr (kHasEnds) return min(max(position + j - left, 0), width - 1);
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
    return (n * k.s.rows + r) * k.s.row_elements + (Tr::kFold ? column * V : position);
  }
  // This thread's vector of row r, at p.
  template <Cache kCache>
  __device__ __forceinline__ void load(const T* p, int r, Packed<T, V>& packed) const {
    if constexpr (kHasEnds) {
      if (r >= ends.vector_rows) return load_first<kCache>(p, ends.end - position, packed);  // [V]
    }
    load_packed<kCache>(p, packed);  // [V]
  }
  // As load_rows; zeros for what is not valid, too.
  template <Cache kCache, int kRows>
  __device__ __forceinline__ void load(const T* p, int64_t step, int at, int last,
                                       Packed<T, V> (&packed)[kRows]) const {
    if constexpr (kHasEnds) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        packed[u] = {};
        if (at + u * lanes < last) load<kCache>(p + u * step, at + u * lanes, packed[u]);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) packed[u].keep(ends.mask);
    } else {
      load_rows<kCache>(p, step, at, lanes, last, packed);
    }
  }
  // Of this thread's vector at p, what is valid.
  __device__ __forceinline__ void store(T* p, const Accumulate<T> (&v)[V]) const {
    if constexpr (kHasEnds) {
      if (position < ends.begin || position + V > ends.end) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (valid(j)) store_global<true, T, 1>(p + j, {v[j]});
        }
        return;
      }
    }
    store_global<true>(p, v);  // [V]
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
                                           int64_t n, S (&acc)[Tr::V], S* merged, Out out) {
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
  } else if constexpr (Tr::kRows == kRagged) {
    // Row lanes differ in where their vectors begin.
    const int pitch = merged_pitch<V>(t.columns);
#pragma unroll
    for (int j = 0; j < V; ++j) merged[(me.row * V + j) * pitch + me.column] = acc[j];
    __syncthreads();
    for (int i = threadIdx.x; i < me.width; i += kThreads) {
      const auto sum_of = [&](int lane) {
        const int at = i + start_in_vector<V>(k, n, me.first + lane);
        return merged[(lane * V + at % V) * pitch + at / V];
      };
      S total = sum_of(0);
      for (int lane = 1; lane < me.lanes; ++lane) total.merge(sum_of(lane));
      out(me.left + i, total);
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
