// Stage kInputGrad: dx from dy and everything the stages before it left behind.
#pragma once

#include "streamed_gradients.cuh"

namespace cbam {

// Whether dx depends on x itself: shared ties compare it, the p = 2 norm and log-sum-exp scale by it.
__device__ __forceinline__ bool input_grad_needs_x(const Problem& p) {
  const bool has_maximum = (p.pools & kMax) || p.spatial;
  return (p.ties == kTiesSplit && has_maximum) || (p.pools & (kLp | kLse));
}

// One channel's terms of dx = g dx' + average + [p is the argmax] maximum + norm x + log_sum exp(x - level).
template <class A> struct ChannelTerms {
  A gate, average, maximum, top, norm, log_sum, level;
  int mark;
};

template <class A>
__device__ __forceinline__ ChannelTerms<A> channel_terms(const Streamed& k, int64_t n, int64_t c, bool needs_x) {
  const Problem& p = k.p;
  ChannelTerms<A> terms = {A(1), A(0), A(0), A(0), A(0), A(0), A(0), -1};
  if (!p.pools) return terms;
  const int pools = pool_count(p.pools);
  const int64_t grads = slot_of(k, n) * pools, pooled = n * pools;
  const auto row = [&](int64_t first, int bit) { return (first + pool_row(p.pools, bit)) * p.channels + c; };
  terms.gate = constant<A>(p.channel_gate, n * p.channels + c);
  if (p.pools & kAvg) terms.average = fresh<A>(k.w.pool_grad, row(grads, kAvg));
  if (p.pools & kMax) {
    terms.maximum = fresh<A>(k.w.pool_grad, row(grads, kMax));
    terms.mark = load_index<Cache::kReadOnly>(p.pool_index, n * p.channels + c, is_short_extent(p.positions));
    if (needs_x) terms.top = constant<A>(p.pooled, row(pooled, kMax));
  }
  if (p.pools & kLp) terms.norm = fresh<A>(k.w.pool_grad, row(grads, kLp));
  if (p.pools & kLse) {
    terms.log_sum = fresh<A>(k.w.pool_grad, row(grads, kLse));
    terms.level = constant<A>(p.pooled, row(pooled, kLse));
  }
  return terms;
}

// One element of dx. `split` is constant false where dx does not need x.
template <class A>
__device__ __forceinline__ A input_grad(const Problem& p, const ChannelTerms<A>& c, A dy, A x, A spatial, A mean,
                                        A maximum, A top, int channel_mark, int channel, int position, bool split,
                                        bool needs_x) {
  A inner = dy * spatial;
  if (p.spatial) {
    inner += mean;
    inner += split ? even_share(maximum, c.gate * x == top, channel_mark) : first_share(maximum, channel_mark == channel);
  }
  A dx = c.gate * inner + c.average;
  if (split) {
    if (p.pools & kMax) dx += even_share(c.maximum, x == c.top, c.mark);
  } else {
    dx += first_share(c.maximum, c.mark == position);
  }
  if (needs_x) {
    if (p.pools & kLp) dx += c.norm * x;
    if (p.pools & kLse) dx += c.log_sum * exponential(x - c.level);
  }
  return p.residual ? dx + dy : dx;
}

template <class Tr, bool kNeedsX>
__device__ __forceinline__ void input_grad_rows(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kNeedsX ? 1 : V > 4 ? 2 : kUnroll;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const RowTile<Tr> me(k, t, item.index);
  const int base = me.first * s.fold, positions = static_cast<int>(p.positions);
  const int left = me.tile * t.positions, width = min(t.positions, positions - left);
  const int channels = (me.end - me.first) * s.fold;
  const int64_t size = int64_t{t.chunk_rows} * s.fold;
  A* gates = shared.take<A>(size);
  A* averages = shared.take<A>(size);
  A* maxima = shared.take<A>(size);
  A* tops = shared.take<A>(size);
  A* norms = shared.take<A>(size);
  A* log_sums = shared.take<A>(size);
  A* levels = shared.take<A>(size);
  int* marks = shared.take<int>(size);
  A* spatial = shared.take<A>(t.positions);
  const PositionFields<A> fields = stage_positions<A>(k, item.n, left, width, t.positions, shared);
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    const ChannelTerms<A> terms = channel_terms<A>(k, item.n, base + i, kNeedsX);
    gates[i] = terms.gate;
    averages[i] = terms.average;
    maxima[i] = terms.maximum;
    marks[i] = terms.mark;
    if (kNeedsX) {
      tops[i] = terms.top;
      norms[i] = terms.norm;
      log_sums[i] = terms.log_sum;
      levels[i] = terms.level;
    }
  }
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + left, width, A(1));
  __syncthreads();
  if (!me.inside) return;
  A gate_s[V], mean[V], maximum[V], top[V];
  int mark[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int at = me.in_tile(j, positions);
    gate_s[j] = spatial[at];
    mean[j] = fields.mean[at];
    maximum[j] = fields.maximum[at];
    mark[j] = fields.mark[at];
    top[j] = kNeedsX && p.ties == kTiesSplit ? fields.top[at] : A(0);
  }
  const bool split = kNeedsX && p.ties == kTiesSplit;
  const int64_t start = item.n * s.rows * s.row_elements + int64_t{me.vector} * V;
  const T* x = as<T>(p.x) + start;
  const T* dy = as<T>(p.dy) + start;
  T* dx = as<T>(p.dx) + start;
  for (int r = me.first + me.row; r < me.end; r += kAhead * me.lanes) {
    A v[kAhead][V], vx[kAhead][V];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = r + u * me.lanes;
      if (at < me.end) {
        load_global<Cache::kLastUse>(dy + int64_t{at} * s.row_elements, v[u]);  // [V]
        if constexpr (kNeedsX) load_global<Cache::kLastUse>(x + int64_t{at} * s.row_elements, vx[u]);  // [V]
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = r + u * me.lanes;
      if (at >= me.end) break;
      const int c = me.channel(s, at), i = c - base;
      const PerChannel<Tr, A> gate(gates, i, me), average(averages, i, me), peak(maxima, i, me);
      const PerChannel<Tr, int> where(marks, i, me);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        ChannelTerms<A> terms = {gate(me, j), average(me, j), peak(me, j), A(0), A(0), A(0), A(0), where(me, j)};
        if constexpr (kNeedsX) {
          terms.top = tops[i + me.next(j)];
          terms.norm = norms[i + me.next(j)];
          terms.log_sum = log_sums[i + me.next(j)];
          terms.level = levels[i + me.next(j)];
        }
        v[u][j] = input_grad(p, terms, v[u][j], kNeedsX ? vx[u][j] : A(0), gate_s[j], mean[j], maximum[j], top[j],
                             mark[j], c + me.next(j), me.absolute(j, positions), split, kNeedsX);
      }
      store_global<true>(dx + int64_t{at} * s.row_elements, v[u]);  // [V]
    }
  }
}

template <class Tr, bool kNeedsX>
__device__ __forceinline__ void input_grad_columns(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kNeedsX ? 1 : 2;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2;
  const int first = item.index * t.positions, count = min(s.rows - first, t.positions);
  A* spatial = shared.take<A>(t.positions);
  const PositionFields<A> fields = stage_positions<A>(k, item.n, first, count, t.positions, shared);
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + first, count, A(1));
  __syncthreads();
  const bool split = kNeedsX && p.ties == kTiesSplit;
  for (int i = column; i < s.row_vectors; i += t.columns) {
    const int64_t start = (item.n * p.positions + first) * p.channels + int64_t{i} * V;
    const T* x = as<T>(p.x) + start;
    const T* dy = as<T>(p.dy) + start;
    T* dx = as<T>(p.dx) + start;
    ChannelTerms<A> terms[V];
#pragma unroll
    for (int j = 0; j < V; ++j) terms[j] = channel_terms<A>(k, item.n, int64_t{i} * V + j, kNeedsX && V <= 4);
    for (int base = row; base < count; base += kAhead * rows) {
      A v[kAhead][V], vx[kAhead][V];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (base + u * rows < count) {
          load_global<Cache::kLastUse>(dy + (base + u * rows) * p.channels, v[u]);  // [V]
          if constexpr (kNeedsX) load_global<Cache::kLastUse>(x + (base + u * rows) * p.channels, vx[u]);  // [V]
        }
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = base + u * rows;
        if (at >= count) break;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          ChannelTerms<A> mine = terms[j];
          // Eight channels' rarer terms do not fit in registers: they are read again, from L2.
          if constexpr (kNeedsX && V > 4) {
            mine = channel_terms<A>(k, item.n, int64_t{i} * V + j, true);
          }
          v[u][j] = input_grad(p, mine, v[u][j], kNeedsX ? vx[u][j] : A(0), spatial[at], fields.mean[at],
                               fields.maximum[at], split ? fields.top[at] : A(0), fields.mark[at], i * V + j,
                               first + at, split, kNeedsX);
        }
        store_global<true>(dx + at * p.channels, v[u]);  // [V]
      }
    }
  }
}

template <class Tr> __device__ __forceinline__ void input_grad_stage(const Streamed& k, const Item& item, Shared shared) {
  if constexpr (Tr::kLayout == kChannelsLast) {
    if (input_grad_needs_x(k.p)) input_grad_columns<Tr, true>(k, item, shared);
    else input_grad_columns<Tr, false>(k, item, shared);
  } else {
    if (input_grad_needs_x(k.p)) input_grad_rows<Tr, true>(k, item, shared);
    else input_grad_rows<Tr, false>(k, item, shared);
  }
}

}  // namespace cbam
