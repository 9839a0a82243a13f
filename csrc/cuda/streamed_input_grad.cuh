// Stage kInputGrad: dx from dy and everything the stages before it left behind.
#pragma once

#include "streamed_gradients.cuh"

namespace cbam {

__device__ __forceinline__ bool input_grad_needs_x(const Problem& p) {
  return dx_needs_x(p);
}

// One channel's terms of dx = g dx' + average + [p is the argmax] maximum + norm x + log_sum exp(x - level).
template <class A>
struct alignas(4 * sizeof(A)) ChannelTerms {
  A gate, average, maximum;
  int mark;
};
template <class A>
struct alignas(4 * sizeof(A)) RareTerms {
  A top, norm, log_sum, level;
};

template <class A>
__device__ __forceinline__ ChannelTerms<A> channel_terms(const Streamed& k, int64_t n, int64_t c) {
  const Problem& p = k.p;
  ChannelTerms<A> terms = {A(1), A(0), A(0), -1};
  if (!p.pools) return terms;
  const int64_t grads = slot_of(k, n) * pool_count(p.pools);
  terms.gate = constant<A>(p.channel_gate, n * p.channels + c);
  if (p.pools & kAvg)
    terms.average = from_slot<A>(k.w.pool_grad, (grads + pool_row(p.pools, kAvg)) * p.channels + c);
  if (p.pools & kMax) {
    terms.maximum = from_slot<A>(k.w.pool_grad, (grads + pool_row(p.pools, kMax)) * p.channels + c);
    terms.mark = load_index<Cache::kReadOnly>(p.pool_index, n * p.channels + c, is_short_extent(p.positions));
  }
  return terms;
}
template <class A>
__device__ __forceinline__ RareTerms<A> rare_terms(const Streamed& k, int64_t n, int64_t c) {
  const Problem& p = k.p;
  RareTerms<A> terms = {A(0), A(0), A(0), A(0)};
  const int64_t pools = pool_count(p.pools), grads = slot_of(k, n) * pools;
  const auto row = [&](int64_t first, int bit) { return (first + pool_row(p.pools, bit)) * p.channels + c; };
  if (p.pools & kMax) terms.top = constant<A>(p.pooled, row(n * pools, kMax));
  if (p.pools & kLp) terms.norm = from_slot<A>(k.w.pool_grad, row(grads, kLp));
  if (p.pools & kLse) {
    terms.log_sum = from_slot<A>(k.w.pool_grad, row(grads, kLse));
    terms.level = constant<A>(p.pooled, row(n * pools, kLse));
  }
  return terms;
}

// One position's terms of dx' = dy s + mean + [c is the argmax] maximum.
template <class A>
struct PositionTerms {
  A spatial, mean, maximum;
  int mark;
};

// One element of dx where it depends on x.
template <class A>
__device__ __forceinline__ A input_grad_of_x(const Problem& p, const ChannelTerms<A>& c,
                                             const RareTerms<A>& rare, const PositionTerms<A>& q, A top, A dy,
                                             A x, int channel, int position) {
  const bool split = p.ties == kTiesSplit;
  A inner = dy * q.spatial;
  if (p.spatial) {
    inner += q.mean;
    inner +=
        split ? even_share(q.maximum, c.gate * x == top, q.mark) : first_share(q.maximum, q.mark == channel);
  }
  A dx = c.gate * inner + c.average;
  if (p.pools & kMax) {
    dx += split ? even_share(c.maximum, x == rare.top, c.mark) : first_share(c.maximum, c.mark == position);
  }
  if (p.pools & kLp) dx += rare.norm * x;
  if (p.pools & kLse) dx += rare.log_sum * exponential(x - rare.level);
  return p.residual ? dx + dy : dx;
}

// v[i] += value, where the vector has an element i.
template <int V, class A>
__device__ __forceinline__ void add_at(A (&v)[V], int i, A value) {
  if (i < 0 || i >= V) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j == i) v[j] += value;
  }
}

// dx without x. What a position brings is in registers, what a channel brings is read once a row; a channel's
// maximum is in one of many vectors.
template <class Tr>
__device__ __forceinline__ void input_grad_rows(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kUnroll;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const RowTile<Tr> me(k, t, map_tile(k.s, item), item.n);
  const int base = me.first * s.fold, positions = static_cast<int>(p.positions);
  ChannelTerms<A>* channels = shared.take<ChannelTerms<A>>(int64_t{t.chunk_rows} * s.fold);
  A* spatial = shared.take<A>(t.positions + s.reach);
  const PositionFields<A> fields =
      stage_positions<A>(k, item.n, me.left, me.width, t.positions + s.reach, shared);
#pragma unroll 1
  for (int i = threadIdx.x; i < (me.end - me.first) * s.fold; i += kThreads)
    channels[i] = channel_terms<A>(k, item.n, base + i);
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + me.left, me.width, A(1));
  __syncthreads();
  if (!me.inside) return;
  A gate_s[V], mean[V], maximum[V];  // dx' = dy gate_s + mean, or maximum where it is
  int mark[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int at = me.in_tile(j, positions);
    gate_s[j] = spatial[at];
    mean[j] = fields.mean[at];
    maximum[j] = fields.maximum[at] + mean[j];
    mark[j] = fields.mark[at] - me.next(j);
  }
  const int64_t step = me.lanes * int64_t{s.row_elements};
  const int64_t start = me.start(k, item.n, me.first + me.row);
  const T* dy = as<T>(p.dy) + start;
  T* dx = as<T>(p.dx) + start;
  const bool residual = p.residual;
  for (int r = me.first + me.row; r < me.end;
       r += kAhead * me.lanes, dy += kAhead * step, dx += kAhead * step) {
    Packed<T, V> packed[kAhead];
    me.template load<Cache::kLastUse>(dy, step, r, me.end, packed);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = r + u * me.lanes;
      if (at >= me.end) break;
      const int c = me.channel(s, at);
      const PerChannel<Tr, ChannelTerms<A>> terms(channels, c - base, me);
      A v[V], out[V];
      packed[u].unpack(v);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A inner = v[j] * gate_s[j] + (mark[j] == c ? maximum[j] : mean[j]);
        out[j] = terms(me, j).gate * inner + terms(me, j).average;
      }
      add_at(out, terms.here.mark - me.position, terms.here.maximum);
      if (Tr::kFold && me.split < V) add_at(out, terms.after.mark + me.split, terms.after.maximum);
      if (residual) {
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] += v[j];
      }
      me.store(dx + u * step, out);
    }
  }
}

// dx where it depends on x. With x as well, the terms stay in shared memory.
template <class Tr>
__device__ __forceinline__ void input_grad_rows_of_x(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  RowTile<Tr> me(k, t, map_tile(k.s, item), item.n);
  const int base = me.first * s.fold, positions = static_cast<int>(p.positions);
  const int64_t size = int64_t{t.chunk_rows} * s.fold;
  ChannelTerms<A>* channels = shared.take<ChannelTerms<A>>(size);
  RareTerms<A>* rare = shared.take<RareTerms<A>>(size);
  A* spatial = shared.take<A>(t.positions + s.reach);
  const PositionFields<A> fields =
      stage_positions<A>(k, item.n, me.left, me.width, t.positions + s.reach, shared);
#pragma unroll 1
  for (int i = threadIdx.x; i < (me.end - me.first) * s.fold; i += kThreads) {
    channels[i] = channel_terms<A>(k, item.n, base + i);
    rare[i] = rare_terms<A>(k, item.n, base + i);
  }
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + me.left, me.width, A(1));
  __syncthreads();
  if (!me.inside) return;
  const int64_t start = me.start(k, item.n, 0), stride = s.row_elements;
  const T* x = as<T>(p.x) + start;
  const T* dy = as<T>(p.dy) + start;
  T* dx = as<T>(p.dx) + start;
  for (int r = me.first + me.row; r < me.end; r += me.lanes) {
    ptx::forget_registers();
    if constexpr (Tr::kFold) me.split = ptx::opaque(me.split);
    Packed<T, V> packed_dy, packed_x;
    me.template load<Cache::kLastUse>(dy + r * stride, r, packed_dy);
    me.template load<Cache::kLastUse>(x + r * stride, r, packed_x);
    A v[V], vx[V];
    packed_dy.unpack(v);
    packed_x.unpack(vx);
    const int c = me.channel(s, r), i = c - base;
    const PerChannel<Tr, ChannelTerms<A>> terms(channels, i, me);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int at = me.in_tile(j, positions);
      const PositionTerms<A> q = {spatial[at], fields.mean[at], fields.maximum[at], fields.mark[at]};
      const A top = p.ties == kTiesSplit ? fields.top[at] : A(0);
      v[j] = input_grad_of_x(p, terms(me, j), rare[i + me.next(j)], q, top, v[j], vx[j], c + me.next(j),
                             me.absolute(j, positions));
    }
    me.store(dx + r * stride, v);
  }
}

// dx without x. What a channel brings is in registers, what a position brings is read once a row. A channel's
// maximum is in one of many rows: each thread keeps a bit for each of those that its channels may have it in.
template <class Tr>
__device__ __forceinline__ void input_grad_columns(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kUnroll;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2, rows_log2 = kThreadsLog2 - t.columns_log2;
  const ColumnTile me(s, t, map_tile(s, item));
  const int first = me.first, count = me.count;
  ChannelTerms<A>* channels = shared.take<ChannelTerms<A>>(t.columns * V);
  A* spatial = shared.take<A>(t.positions);
  const PositionFields<A> fields = stage_positions<A>(k, item.n, first, count, t.positions, shared);
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + first, count, A(1));
  __syncthreads();
  const int64_t step = rows * p.channels;
  const bool residual = p.residual;
  for (int slice = me.begin; slice < me.end; slice += t.columns) {
#pragma unroll 1
    for (int c = threadIdx.x; c < t.columns * V && slice * V + c < p.channels; c += kThreads)
      channels[c] = channel_terms<A>(k, item.n, slice * V + c);
    __syncthreads();
    const int i = slice + column;
    if (i < me.end) {
      const int64_t start = (item.n * p.positions + first + row) * p.channels + int64_t{i} * V;
      const T* dy = as<T>(p.dy) + start;
      T* dx = as<T>(p.dx) + start;
      const ChannelTerms<A>* terms = channels + column * V;
      A gate[V], average[V];
      unsigned maxima = 0;  // bit m: among this thread's rows m, m + 32, ...
#pragma unroll
      for (int j = 0; j < V; ++j) {
        gate[j] = terms[j].gate;
        average[j] = terms[j].average;
        maxima |= 1u << ((terms[j].mark - first) >> rows_log2 & 31);
      }
      for (int base = row; base < count; base += kAhead * rows, dy += kAhead * step, dx += kAhead * step) {
        Packed<T, V> packed[kAhead];
        load_rows<Cache::kLastUse>(dy, step, base, rows, count, packed);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int at = base + u * rows;
          if (at >= count) break;
          const A gate_s = spatial[at], mean = fields.mean[at], maximum = fields.maximum[at] + mean;
          const int mark = fields.mark[at] - i * V;
          A v[V], out[V];
          packed[u].unpack(v);
#pragma unroll
          for (int j = 0; j < V; ++j)
            out[j] = gate[j] * (v[j] * gate_s + (mark == j ? maximum : mean)) + average[j];
          if (maxima >> (at >> rows_log2 & 31) & 1) {
#pragma unroll
            for (int j = 0; j < V; ++j) out[j] += first_share(terms[j].maximum, terms[j].mark == first + at);
          }
          if (residual) {
#pragma unroll
            for (int j = 0; j < V; ++j) out[j] += v[j];
          }
          store_global<true>(dx + u * step, out);  // [V]
        }
      }
    }
    __syncthreads();
  }
}

// dx where it depends on x.
template <class Tr>
__device__ __forceinline__ void input_grad_columns_of_x(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2;
  const ColumnTile me(s, t, map_tile(s, item));
  const int first = me.first, count = me.count;
  ChannelTerms<A>* channels = shared.take<ChannelTerms<A>>(t.columns * V);
  RareTerms<A>* rare = shared.take<RareTerms<A>>(t.columns * V);
  A* spatial = shared.take<A>(t.positions);
  const PositionFields<A> fields = stage_positions<A>(k, item.n, first, count, t.positions, shared);
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + first, count, A(1));
  __syncthreads();
  const int64_t stride = p.channels;
  for (int slice = me.begin; slice < me.end; slice += t.columns) {
#pragma unroll 1
    for (int c = threadIdx.x; c < t.columns * V && slice * V + c < p.channels; c += kThreads) {
      channels[c] = channel_terms<A>(k, item.n, slice * V + c);
      rare[c] = rare_terms<A>(k, item.n, slice * V + c);
    }
    __syncthreads();
    const int i = slice + column;
    if (i < me.end) {
      const int64_t start = (item.n * p.positions + first) * stride + int64_t{i} * V;
      const T* x = as<T>(p.x) + start;
      const T* dy = as<T>(p.dy) + start;
      T* dx = as<T>(p.dx) + start;
      for (int at = row; at < count; at += rows) {
        ptx::forget_registers();
        const PositionTerms<A> q = {spatial[at], fields.mean[at], fields.maximum[at], fields.mark[at]};
        const A top = p.ties == kTiesSplit ? fields.top[at] : A(0);
        A v[V], vx[V];
        load_global<Cache::kLastUse>(dy + at * stride, v);  // [V]
        load_global<Cache::kLastUse>(x + at * stride, vx);  // [V]
#pragma unroll
        for (int j = 0; j < V; ++j) {
          v[j] = input_grad_of_x(p, channels[column * V + j], rare[column * V + j], q, top, v[j], vx[j],
                                 i * V + j, first + at);
        }
        store_global<true>(dx + at * stride, v);  // [V]
      }
    }
    __syncthreads();
  }
}

template <class Tr>
__device__ __forceinline__ void input_grad_stage(const Streamed& k, const Item& item, Shared shared) {
  if constexpr (Tr::kLayout == kChannelsLast) {
    if (input_grad_needs_x(k.p))
      input_grad_columns_of_x<Tr>(k, item, shared);
    else
      input_grad_columns<Tr>(k, item, shared);
  } else {
    if (input_grad_needs_x(k.p))
      input_grad_rows_of_x<Tr>(k, item, shared);
    else
      input_grad_rows<Tr>(k, item, shared);
  }
}

}  // namespace cbam
