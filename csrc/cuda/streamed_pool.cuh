// Stage kPool of the streamed tier: average, maximum, p = 2 norm and log-sum-exp of each channel.
#pragma once

#include <type_traits>

#include "streamed_tile.cuh"

namespace cbam {

// Adds a vector whose first element has this index. Its own sum comes first: of a large map a lane adds up
// thousands of elements.
// In float only the vector's maximum is found, and its mark is the vector's index until find_in_vector has
// looked where in the vector it is, once a channel: almost every vector beats what some lane of a warp has.
template <class A, bool kSplit, int V>
__device__ __forceinline__ void add_vector(MeanMax<A, kSplit>& s, const A (&v)[V], int index) {
  A part[V];
#pragma unroll
  for (int k = 0; k < V; ++k) part[k] = v[k];
  s.sum += sum_by_halves(part);
  if constexpr (!kSplit && sizeof(A) == sizeof(float)) {
    A top = v[0];
#pragma unroll
    for (int k = 1; k < V; ++k) top = ptx::max_nan(top, v[k]);
    add_to_peak<false>(s.peak, top, index);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) add_to_peak<kSplit>(s.peak, v[k], index + k);
  }
}
template <class A, int V>
__device__ __forceinline__ void add_vector(Squares<A>& s, const A (&v)[V], int) {
  A part[V];
#pragma unroll
  for (int k = 0; k < V; ++k) part[k] = v[k] * v[k];
  s.sum += sum_by_halves(part);
}
template <class A, int V>
__device__ __forceinline__ void add_vector(Exponentials<A>& s, const A (&v)[V], int) {
  A part[V], top = v[0];
#pragma unroll
  for (int k = 1; k < V; ++k) top = v[k] > top || top != top ? v[k] : top;
  raise_log_sum(s.log_sum, top);
  const A shift = log_shift(s.log_sum.peak);
#pragma unroll
  for (int k = 0; k < V; ++k) part[k] = exponential(v[k] - shift);
  s.log_sum.sum += sum_by_halves(part);
}

// The sums of a lane, joined once in kJoined vectors; the maximum goes on.
constexpr int kJoined = 32;
template <class S>
struct Joined {
  LongSum<typename S::A> sum;
  __device__ __forceinline__ void take(S& s) {
    sum.add(s.sum);
    s.sum = 0;
  }
  __device__ __forceinline__ void finish(S& s) {
    take(s);
    s.sum = sum.sum;
  }
};
template <class A>
struct Joined<Exponentials<A>> {
  A peak = negative_infinity<A>();
  LongSum<A> sum;
  __device__ __forceinline__ void take(Exponentials<A>& s) {
    if (s.log_sum.peak > peak) {
      if (sum.sum != A(0)) sum.scale(exponential(log_shift(peak) - log_shift(s.log_sum.peak)));
      peak = s.log_sum.peak;
    }
    const A scale = exponential(log_shift(s.log_sum.peak) - log_shift(peak));
    sum.add(s.log_sum.sum == A(0) ? A(0) : s.log_sum.sum * scale);
    s.log_sum.sum = A(0);
  }
  __device__ __forceinline__ void finish(Exponentials<A>& s) {
    take(s);
    s.log_sum = {peak, sum.sum};
  }
};
template <class Tr, class S>
__device__ __forceinline__ void find_in_vector(S& s, const typename Tr::T* row, int positions) {
  constexpr int V = Tr::V;
  if constexpr (V > 1 && std::is_same_v<S, MeanMax<float, false>>) {
    float v[V];
    if constexpr (Tr::kRows == kRagged) {
      // Of an element that had no vector, the mark is its index, and it is found first.
#pragma unroll
      for (int k = 0; k < V; ++k)
        v[k] = load_one<Cache::kReadOnly>(row + min(s.peak.mark + k, positions - 1));
    } else {
      load_global<Cache::kReadOnly>(row + s.peak.mark, v);  // [V]
    }
    const bool nan = s.peak.value != s.peak.value;
    int at = 0;
#pragma unroll
    for (int k = V - 1; k >= 0; --k) {
      if (nan ? v[k] != v[k] : v[k] == s.peak.value) at = k;
    }
    s.peak.mark += at;
  }
}

// ---- Results: a channel's pools, or a part of them where several items share a channel.

constexpr int kAllChunks = -1;

struct PoolTarget {
  int64_t n;
  int chunk;
};

template <class A>
__device__ __forceinline__ int64_t pool_part(const Streamed& k, int which, PoolTarget t, int64_t c) {
  const int64_t rows = k.p.samples * k.s.pool_chunks;
  return (which * rows + t.n * k.s.pool_chunks + t.chunk) * k.p.channels + c;
}
template <class A>
__device__ __forceinline__ void put_pool(const Streamed& k, int64_t n, int bit, int64_t c, A v) {
  const Problem& p = k.p;
  put(p.pooled, (n * pool_count(p.pools) + pool_row(p.pools, bit)) * p.channels + c, v);  // [1]
}

template <class A, bool kSplit>
__device__ __forceinline__ void put_statistic(const Streamed& k, PoolTarget t, int64_t c,
                                              MeanMax<A, kSplit> v) {
  const Problem& p = k.p;
  if (t.chunk != kAllChunks) {
    put(k.w.pool_parts, pool_part<A>(k, 0, t, c), v.sum);         // [1]
    put(k.w.pool_parts, pool_part<A>(k, 1, t, c), v.peak.value);  // [1]
    store_index(k.w.pool_marks, pool_part<A>(k, 0, t, c), false, v.peak.mark);
    return;
  }
  if (p.pools & kAvg) put_pool<A>(k, t.n, kAvg, c, v.sum / A(p.positions));
  if (p.pools & kMax) {
    put_pool<A>(k, t.n, kMax, c, v.peak.value);
    if (p.pool_index) {
      store_index(p.pool_index, t.n * p.channels + c, is_short_extent(p.positions), v.peak.mark);
    }
  }
}
template <class A>
__device__ __forceinline__ void put_statistic(const Streamed& k, PoolTarget t, int64_t c, Squares<A> v) {
  if (t.chunk != kAllChunks)
    put(k.w.pool_parts, pool_part<A>(k, 2, t, c), v.sum);  // [1]
  else
    put_pool<A>(k, t.n, kLp, c, square_root(v.sum));
}
template <class A>
__device__ __forceinline__ void put_statistic(const Streamed& k, PoolTarget t, int64_t c, Exponentials<A> v) {
  if (t.chunk != kAllChunks) {
    put(k.w.pool_parts, pool_part<A>(k, 3, t, c), v.log_sum.peak);  // [1]
    put(k.w.pool_parts, pool_part<A>(k, 4, t, c), v.log_sum.sum);   // [1]
  } else {
    put_pool<A>(k, t.n, kLse, c, log_sum_value(v.log_sum));
  }
}

// All of a unit's parts into its pools, by one block, in the order of the chunks.
template <class A, bool kSplit>
__device__ __forceinline__ void finish_pools(const Streamed& k, const Item& item) {
  const int chunks = k.s.pool_chunks;
  for (int64_t i = threadIdx.x; i < item.count * k.p.channels; i += kThreads) {
    const int64_t n = item.first + i / k.p.channels, c = i % k.p.channels;
    MeanMax<A, kSplit> base = MeanMax<A, kSplit>::empty(kNoIndex);
    Squares<A> squares = Squares<A>::empty(0);
    Exponentials<A> exponentials = Exponentials<A>::empty(0);
    Joined<MeanMax<A, kSplit>> sum;
    Joined<Squares<A>> sum_of_squares;
    Joined<Exponentials<A>> sum_of_exponentials;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const PoolTarget t{n, chunk};
      if (k.p.pools & (kAvg | kMax)) {
        const int mark = load_index<Cache::kCoherent>(k.w.pool_marks, pool_part<A>(k, 0, t, c), false);
        base.merge({fresh<A>(k.w.pool_parts, pool_part<A>(k, 0, t, c)),
                    {fresh<A>(k.w.pool_parts, pool_part<A>(k, 1, t, c)), mark}});
        sum.take(base);
      }
      if (k.p.pools & kLp) {
        squares = {fresh<A>(k.w.pool_parts, pool_part<A>(k, 2, t, c))};
        sum_of_squares.take(squares);
      }
      if (k.p.pools & kLse) {
        exponentials = {{fresh<A>(k.w.pool_parts, pool_part<A>(k, 3, t, c)),
                         fresh<A>(k.w.pool_parts, pool_part<A>(k, 4, t, c))}};
        sum_of_exponentials.take(exponentials);
      }
    }
    sum.finish(base);
    sum_of_squares.finish(squares);
    sum_of_exponentials.finish(exponentials);
    const PoolTarget t{n, kAllChunks};
    if (k.p.pools & (kAvg | kMax)) put_statistic<A>(k, t, c, base);
    if (k.p.pools & kLp) put_statistic<A>(k, t, c, squares);
    if (k.p.pools & kLse) put_statistic<A>(k, t, c, exponentials);
  }
}

// ---- Contiguous: a row is a channel; `pool_lanes` lanes share it. What a ragged one has before its first
// whole vector and after its last is taken element by element.

template <class Tr, class S>
__device__ __forceinline__ void pool_rows(const Streamed& k, int64_t n, int index, Shared shared) {
  using T = typename Tr::T;
  constexpr int V = Tr::V;
  const Schedule& s = k.s;
  const int lanes = s.pool_lanes, lane = threadIdx.x & (lanes - 1), row = threadIdx.x / lanes;
  const int first = index * s.pool_rows, end = min(s.rows, first + s.pool_rows);
  S* warps = shared.take<S>(kThreads / 32);
  const int positions = static_cast<int>(k.p.positions);
  const T* x = as<T>(k.p.x) + n * s.rows * k.p.positions;
  for (int base = first; base < end; base += kThreads / lanes) {
    const bool inside = base + row < end;
    S acc = S::empty(lane * V);
    const T* p_row = x + int64_t{base + row} * k.p.positions;
    if (inside) {
      int head = 0, vectors = s.row_vectors;
      if constexpr (Tr::kRows == kRagged) {
        head = -start_in_vector<V>(k, n, base + row) & (V - 1);
        vectors = (positions - head) / V;
        for (int e = lane; e < head; e += lanes) acc.add(load_one<Cache::kReadOnly>(p_row + e), e);
      }
      const T* whole = p_row + head;
      Joined<S> joined;
      int i = lane, groups = 0;
      for (; i + 3 * lanes < vectors; i += 4 * lanes) {
        Packed<T, V> ahead[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          load_packed<Cache::kReadOnly>(whole + int64_t{i + u * lanes} * V, ahead[u]);  // [V]
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          typename Tr::A v[V];
          ahead[u].unpack(v);
          add_vector(acc, v, head + (i + u * lanes) * V);
        }
        if (++groups % (kJoined / 4) == 0) joined.take(acc);
      }
      for (; i < vectors; i += lanes) {
        typename Tr::A v[V];
        load_global<Cache::kReadOnly>(whole + int64_t{i} * V, v);  // [V]
        add_vector(acc, v, head + i * V);
      }
      if constexpr (Tr::kRows == kRagged) {
        for (int e = head + vectors * V + lane; e < positions; e += lanes)
          acc.add(load_one<Cache::kReadOnly>(p_row + e), e);
      }
      joined.finish(acc);
    }
    merge_lanes(acc, 1, min(lanes, 32));
    if (lanes > 32) {
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = acc;
      __syncthreads();
      for (int w = 1; lane == 0 && w < lanes / 32; ++w) acc.merge(warps[threadIdx.x / 32 + w]);
      __syncthreads();
    }
    if (inside && lane == 0) {
      find_in_vector<Tr>(acc, p_row, positions);
      put_statistic<typename Tr::A>(k, {n, kAllChunks}, base + row, acc);
    }
  }
}

// ---- Folded: rows are staged in shared memory, where their channels lie one after another.

template <class Tr, class S>
__device__ __forceinline__ void pool_staged(const Streamed& k, int64_t n, int64_t channel, int channels,
                                            const typename Tr::A* staged) {
  const int lanes = k.s.pool_lanes, lane = threadIdx.x & (lanes - 1), row = threadIdx.x / lanes;
  const int positions = static_cast<int>(k.p.positions);
  for (int base = 0; base < channels; base += kThreads / lanes) {
    const bool inside = base + row < channels;
    S acc = S::empty(lane);
    if (inside) {
      for (int i = lane; i < positions; i += lanes) acc.add(staged[(base + row) * positions + i], i);
    }
    merge_lanes(acc, 1, lanes);
    if (inside && lane == 0) put_statistic<typename Tr::A>(k, {n, kAllChunks}, channel + base + row, acc);
  }
}

template <class Tr>
__device__ __forceinline__ const typename Tr::A* stage_rows(const Streamed& k, int64_t n, int first, int rows,
                                                            Shared shared) {
  using T = typename Tr::T;
  constexpr int V = Tr::V;
  using A = typename Tr::A;
  const Schedule& s = k.s;
  A* staged = shared.take<A>(int64_t{s.pool_rows} * s.row_elements);
  const T* x = as<T>(k.p.x) + (n * s.rows + first) * s.row_elements;
  for (int i = threadIdx.x; i < rows * s.row_vectors; i += kThreads) {
    A v[V];
    load_global<Cache::kReadOnly>(x + int64_t{i} * V, v);  // [V]
#pragma unroll
    for (int j = 0; j < V; ++j) staged[i * V + j] = v[j];
  }
  __syncthreads();
  return staged;
}

// ---- Channels-last: a tile of positions and `pool_lanes` vectors of channels.

// Elements without looking for NaN one by one, where that is a thing to look for.
template <class A, bool kSplit>
__device__ __forceinline__ void add_number(MeanMax<A, kSplit>& s, A v, int index) {
  s.add_number(v, index);
}
template <class S>
__device__ __forceinline__ void add_number(S& s, typename S::A v, int index) {
  s.add(v, index);
}
// The first NaN of element(i), for i from `first` in steps up to `end`, if the sum says that there may be
// one.
template <class A, bool kSplit, class Element>
__device__ __forceinline__ void find_nan(MeanMax<A, kSplit>& s, int first, int end, int step,
                                         Element element) {
  if (!s.may_have_nan()) return;
  for (int i = first; i < end; i += step) {
    const A v = element(i);
    if (v == v) continue;
    s.peak = {v, i};
    return;
  }
}
template <class S, class Element>
__device__ __forceinline__ void find_nan(S&, int, int, int, Element) {}

template <class Tr, class S>
__device__ __forceinline__ void pool_columns(const Streamed& k, int64_t n, int index, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Schedule& s = k.s;
  const int columns = s.pool_lanes, column = threadIdx.x & (columns - 1), row = threadIdx.x / columns;
  const int rows = kThreads / columns, slices = (s.row_vectors + columns - 1) / columns;
  const int slice = index % slices, chunk = index / slices;
  const int first = chunk * s.pool_rows, end = min(s.rows, first + s.pool_rows);
  S* merged = shared.take<S>(kThreads * (V + 1));
  const int vector = slice * columns + column;
  S acc[V];
#pragma unroll
  for (int j = 0; j < V; ++j) acc[j] = S::empty(first + row);
  if (vector < s.row_vectors) {
    const T* x = as<T>(k.p.x) + n * k.p.positions * k.p.channels + int64_t{vector} * V;
    int i = first + row;
    for (; i + 3 * rows < end; i += 4 * rows) {
      Packed<T, V> ahead[4];
#pragma unroll
      for (int u = 0; u < 4; ++u)
        load_packed<Cache::kReadOnly>(x + (i + u * rows) * k.p.channels, ahead[u]);  // [V]
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        A v[V];
        ahead[u].unpack(v);
#pragma unroll
        for (int j = 0; j < V; ++j) add_number(acc[j], v[j], i + u * rows);
      }
    }
    for (; i < end; i += rows) {
      A v[V];
      load_global<Cache::kReadOnly>(x + i * k.p.channels, v);  // [V]
#pragma unroll
      for (int j = 0; j < V; ++j) add_number(acc[j], v[j], i);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      find_nan(acc[j], first + row, end, rows,
               [&](int at) { return load_one<Cache::kReadOnly>(x + at * k.p.channels + j); });
    }
  }
  const int groups = merge_rows<V>(acc, columns, merged);
  for (int i = thread_index(); i < columns * V; i += kThreads) {
    const int64_t c = int64_t{slice} * columns * V + i;
    if (c >= k.p.channels) continue;
    const S total = merged_sum<V>(merged, groups, columns, i);
    put_statistic<A>(k, {n, s.pool_chunks > 1 ? chunk : kAllChunks}, c, total);
  }
  __syncthreads();
}

template <class Tr, class S>
__device__ __forceinline__ void pool_one(const Streamed& k, int64_t n, int index, Shared shared) {
  if constexpr (Tr::kLayout == kChannelsLast)
    pool_columns<Tr, S>(k, n, index, shared);
  else
    pool_rows<Tr, S>(k, n, index, shared);
}

// A pool beyond average and maximum reads the item once more: its tile is in L1 or L2 by then.
template <class Tr>
__device__ __forceinline__ void pool_stage(const Streamed& k, const Item& item, Shared shared) {
  using A = typename Tr::A;
  const int pools = k.p.pools;
  const bool split = k.p.ties == kTiesSplit;
  if constexpr (Tr::kFold) {
    const int first = item.index * k.s.pool_rows, rows = min(k.s.rows - first, k.s.pool_rows);
    const A* staged = stage_rows<Tr>(k, item.n, first, rows, shared);
    const int64_t channel = int64_t{first} * k.s.fold;
    const int channels = rows * k.s.fold;
    if (pools & (kAvg | kMax)) {
      if (split)
        pool_staged<Tr, MeanMax<A, true>>(k, item.n, channel, channels, staged);
      else
        pool_staged<Tr, MeanMax<A, false>>(k, item.n, channel, channels, staged);
    }
    if (pools & kLp) pool_staged<Tr, Squares<A>>(k, item.n, channel, channels, staged);
    if (pools & kLse) pool_staged<Tr, Exponentials<A>>(k, item.n, channel, channels, staged);
  } else {
    if (pools & (kAvg | kMax)) {
      if (split)
        pool_one<Tr, MeanMax<A, true>>(k, item.n, item.index, shared);
      else
        pool_one<Tr, MeanMax<A, false>>(k, item.n, item.index, shared);
    }
    if (pools & kLp) pool_one<Tr, Squares<A>>(k, item.n, item.index, shared);
    if (pools & kLse) pool_one<Tr, Exponentials<A>>(k, item.n, item.index, shared);
  }
}

}  // namespace cbam
