// The resident tier's backward between dy and dx: the gradients of both gates, in a cluster.
#pragma once

#include "resident_conv_grad.cuh"
#include "resident_marks.cuh"
#include "resident_weights.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// What the backward reads of the forward, for this block's tile and its share of the MLP.
template <class Tr>
__device__ __forceinline__ void stage_saved(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  A* gate = b.template at<A>(k.at.gate);
  ChannelTerms<A>* terms = b.template at<ChannelTerms<A>>(k.at.terms);
  const Places<A> places(b);
  const Marks<Tr> marks(b);
  const bool needs_x = input_grad_needs_x(p);
  const int64_t pools = pool_count(p.pools);
  const auto pooled = [&](int bit, int64_t c) {
    return constant<A>(p.pooled, (b.n * pools + pool_row(p.pools, bit)) * p.channels + c);  // [1]
  };
  for (int i = b.thread; i < b.tile_channels.size(); i += b.threads) {
    const int64_t c = b.tile_channels.begin + i, at = b.n * p.channels + c;
    gate[i] = p.pools ? constant<A>(p.channel_gate, at) : A(1);  // [1]
    const int argmax =
        p.pools & kMax ? load_index<Cache::kReadOnly>(p.pool_index, at, is_short_extent(p.positions)) : -1;
    terms[i] = {gate[i], A(0), A(0), argmax};
    if (argmax >= 0) marks.add(b.tile_channels.begin + i, argmax);
    if (needs_x) {
      b.template at<RareTerms<A>>(k.at.rare)[i] = {p.pools & kMax ? pooled(kMax, c) : A(0),
                                                   p.pools & kLp ? pooled(kLp, c) : A(0), A(0),
                                                   p.pools & kLse ? pooled(kLse, c) : A(0)};
    }
  }
  for (int i = b.thread; i < b.tile_positions.size(); i += b.threads) {
    const int64_t at = b.n * p.positions + b.tile_positions.begin + i;
    places.spatial[i] = p.spatial ? constant<A>(p.spatial_gate, at) : A(1);  // [1]
    places.mean[i] = places.maximum[i] = A(0);
    places.mark[i] = p.spatial
                         ? load_index<Cache::kReadOnly>(p.spatial_index, at, is_short_extent(p.channels))
                         : -1;  // [1]
    if (p.spatial) marks.add(places.mark[i], b.tile_positions.begin + i);
    if (p.ties == kTiesSplit) {
      const int64_t map = at + b.n * p.positions;
      b.template at<A>(k.at.top)[i] = p.spatial ? constant<A>(p.spatial_pool, map) : A(0);  // [1]
    }
  }
  if (p.w1.data) {
    A* layer = b.template at<A>(k.at.hidden);
    const int size = k.inputs * static_cast<int>(p.hidden);
    for (int i = b.thread; i < size; i += b.threads) {
      layer[i] = constant<A>(p.hidden_layer, b.n * size + i);  // [1]
    }
  } else if (p.pools) {
    for (int c = b.own_channels.begin + b.thread; c < b.own_channels.end; c += b.threads) {
      A sum = 0;
      for (int j = 0; j < k.inputs; ++j) sum += mlp_input<A>(p, b.n, j, c);  // [1]
      put(k.hidden, b.n * p.channels + c, sum);
    }
  }
}

// ---- Sums over one pass of x and dy. With t = x dy: ds = sum_c g t; by positions, and then already dz; by
// channels, this block's part of ds. And sum_p s t, which is dg but for what comes through the spatial pools.

template <class Tr>
__device__ __forceinline__ void product_sums(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  const T* x = b.template at<T>(k.at.tile);
  const T* dy = b.template at<T>(k.at.tile_dy);
  const A* gates = b.template at<A>(k.at.spatial);
  const A* of_rows = Tr::kLast ? gates : b.template at<A>(k.at.gate);
  const A* of_columns = Tr::kLast ? b.template at<A>(k.at.gate) : gates;
  const int groups = k.column_groups;
  A* row_parts = b.template at<A>(k.at.scratch);                  // [strips][rows]
  A* column_parts = row_parts + Strip<Tr>::items(b, 1) * b.rows;  // [groups][columns]
  for (int item = b.warp; item < Strip<Tr>::items(b, groups); item += b.warps) {
    const Strip<Tr> s(b, item, groups);
    A factor[V];
    ColumnSums<A, V> columns;
    load_factors<V>(of_columns + s.vector * V, factor);
    const auto body = [&](int r, int offset) {
      A v[V], d[V], sum = 0;
      load_shared<Tr>(x + offset, v);
      load_shared<Tr>(dy + offset, d);
      const A of_row = of_rows[r];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A product = v[j] * d[j];
        columns.sums[j] += product * of_row;
        sum += product * factor[j];
      }
      return sum;
    };
    sum_rows(b, s, landed, row_parts, body, [&] { columns.join(); });
    put_columns(b, s, columns, column_parts);
  }
  __syncthreads();
  A* map = b.template at<A>(k.at.pooled);
  A* gate_grad = b.template at<A>(k.at.gate_grad);
  const auto put_sum = [&](bool position, int i, A sum) {
    const A s = position ? gates[i] : A(0);
    if (!position)
      gate_grad[i] = sum;
    else if (k.p.spatial)
      map[i] = Tr::kByChannel ? sum : sum * s * (A(1) - s);
  };
  for (int i = b.thread; i < b.vectors * V; i += b.threads)
    put_sum(!Tr::kLast, i, column_sum(b, column_parts, groups, i));
  for (int r = b.thread; r < b.rows; r += b.threads) put_sum(Tr::kLast, r, row_sum(b, row_parts, r));
}

// ---- What the spatial pools add to dg = sum_p x dx': sum_p x (dq_mean / C + dq_max [c is the argmax]).

template <class Tr, bool kSplit>
__device__ __forceinline__ void pool_sums(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  const T* x = b.template at<T>(k.at.tile);
  const A* gate = b.template at<A>(k.at.gate);
  const A* top = b.template at<A>(k.at.top);
  const Places<A> places(b);
  const Marks<Tr> marks(b);
  const int c0 = b.tile_channels.begin, groups = Tr::kLast ? k.column_groups : k.map_groups;
  A* parts = b.template at<A>(k.at.scratch);            // [strips][rows] or, channels-last, [groups][columns]
  A* maxima = parts + Strip<Tr>::items(b, 1) * b.rows;  // contiguous, of marked vectors
  // Shared ties compare every element; else only the mean's part is everywhere, and maxima are added apart.
  const auto grad = [&](const PositionTerms<A>& q, A highest, int c, A v) {
    return kSplit ? q.mean + even_share(q.maximum, gate[c] * v == highest, q.mark) : q.mean;
  };
  if constexpr (!kSplit && !Tr::kLast) {
    marks.for_each([&](int i, int row, int vector) {
      A v[V], sum = 0;
      load_shared<Tr>(x + (row * b.vectors + vector) * V, v);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int at = vector * V + j;
        if (places.mark[at] == c0 + row) sum += v[j] * places.maximum[at];
      }
      maxima[i] = sum;
    });
  }
  for (int item = b.warp; item < Strip<Tr>::items(b, groups); item += b.warps) {
    const Strip<Tr> s(b, item, groups);
    const int column = s.vector * V;
    if constexpr (Tr::kLast) {
      ColumnSums<A, V> columns;
      for (int first = s.first; first < b.rows; first += kJoined * s.step) {
        if (first != s.first) columns.join();
        const int end = min(first + kJoined * s.step, b.rows);
#pragma unroll 4
        for (int r = first; r < end; r += s.step) {
          A v[V];
          load_shared<Tr>(x + r * b.vectors * V + column, v);
          const PositionTerms<A> q = places[r];
          const A highest = kSplit ? top[r] : A(0);
#pragma unroll
          for (int j = 0; j < V; ++j) columns.sums[j] += v[j] * grad(q, highest, column + j, v[j]);
          const int at = q.mark - column;
          if (!kSplit && at >= 0 && at < V) {
#pragma unroll
            for (int j = 0; j < V; ++j) columns.sums[j] += j == at ? v[j] * q.maximum : A(0);
          }
        }
      }
      put_columns(b, s, columns, parts);
    } else {
      PositionTerms<A> q[V];
      A highest[V] = {};
      places.read(column, q);
      if constexpr (kSplit) load_factors<V>(top + column, highest);
      const auto body = [&](int r, int offset) {
        A v[V], sum = 0;
        load_shared<Tr>(x + offset, v);
#pragma unroll
        for (int j = 0; j < V; ++j) sum += v[j] * grad(q[j], highest[j], r, v[j]);
        return sum;
      };
      sum_rows(b, s, landed, parts, body, [] {});
    }
  }
  __syncthreads();
  A* out = b.template at<A>(k.at.gate_grad);
  for (int c = b.thread; c < b.tile_channels.size(); c += b.threads) {
    A sum = out[c];
    if constexpr (Tr::kLast) {
      sum += column_sum(b, parts, groups, c);
    } else {
      sum += row_sum(b, parts, c);
      if constexpr (!kSplit) {
        const int first = marks.first[c], end = marks.first[c + 1];
        sum += long_sum<A>(first, end, 1, [&](int i) { return maxima[i]; });
      }
    }
    out[c] = sum;
  }
}

// ---- The MLP's backward.

// The gradient of one input at one of this block's channels, as the pools hand it on to x.
template <class Tr>
__device__ __forceinline__ void take_pool_grad(const Block<Tr>& b, int channel, int input,
                                               typename Tr::A grad) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const int at = channel - b.tile_channels.begin;
  ChannelTerms<A>& terms = b.template at<ChannelTerms<A>>(k.at.terms)[at];
  const bool blend = p.pools & kBlend;
  const auto is = [&](int bit) { return p.pools & bit && (blend || pool_row(p.pools, bit) == input); };
  const A share = blend ? A(0.5) * grad : grad;
  if (is(kAvg)) terms.average = share / A(p.positions);
  if (is(kMax)) terms.maximum = share;
  if (is(kLp)) {
    A& norm = b.template at<RareTerms<A>>(k.at.rare)[at].norm;
    norm = norm == A(0) ? A(0) : share / norm;
  }
  if (is(kLse)) b.template at<RareTerms<A>>(k.at.rare)[at].log_sum = share;
}

template <class Tr>
__device__ __forceinline__ void pool_grads(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const int hidden = static_cast<int>(p.hidden), inputs = k.inputs, own = b.own_channels.size();
  const A* gate = b.template at<A>(k.at.gate);
  A* gate_grad = b.template at<A>(k.at.gate_grad);
  A* logit_grad = b.template at<A>(k.at.logit_grad);
  A* part = b.template at<A>(k.at.hidden_part);
  A* layer = b.template at<A>(k.at.hidden);
  A* scratch = b.template at<A>(k.at.scratch);
  if constexpr (Tr::kByChannel)
    __syncthreads();
  else
    ptx::cluster_sync();
  for (int i = b.thread; i < own; i += b.threads) {
    const int c = b.own_channels.begin + i, at = c - b.tile_channels.begin;
    const A grad = Tr::kByChannel ? gate_grad[at] : cluster_sum(b, gate_grad + at);
    const A dl = grad * gate[at] * (A(1) - gate[at]);
    logit_grad[i] = dl;
    put(k.logit_grad, b.n * p.channels + c, dl);
  }
  __syncthreads();
  columns_dot<1>(
      b, p.w2, b.own_channels, Range{0, hidden}, hidden, 1, scratch,
      [&](int, int c) { return logit_grad[c - b.own_channels.begin]; },
      [&](int i, int, A sum) { part[i] = sum; });
  ptx::cluster_sync();
  if (p.w1.data) {
    for (int i = b.thread; i < hidden; i += b.threads) {
      const A grad = cluster_sum(b, part + i);
      A sum = 0;
      for (int j = 0; j < inputs; ++j) {
        const A before = layer[j * hidden + i];
        const A behind = before <= A(0) ? A(0) : grad;
        sum += relu(before);
        layer[j * hidden + i] = behind;
        if (b.rank == 0) put(k.hidden_grad, (b.n * inputs + j) * hidden + i, behind);
      }
      if (b.rank == 0) put(k.hidden, b.n * hidden + i, sum);
    }
    __syncthreads();
    const auto vector = [&](int j, int i) { return layer[j * hidden + i]; };
    const auto take = [&](int c, int j, A sum) { take_pool_grad(b, c, j, sum); };
    const Range all = {0, hidden};
    if (inputs <= 2)
      columns_dot<2>(b, p.w1, all, b.own_channels, p.channels, inputs, scratch, vector, take);
    else
      columns_dot<kMaxInputs>(b, p.w1, all, b.own_channels, p.channels, inputs, scratch, vector, take);
  } else {
    for (int i = b.thread; i < own; i += b.threads) {
      const int c = b.own_channels.begin + i;
      const A sum = cluster_sum(b, part + c);
      for (int j = 0; j < inputs; ++j) take_pool_grad(b, c, j, sum);
    }
    __syncthreads();
  }
  if constexpr (!Tr::kByChannel) {
    ChannelTerms<A>* terms = b.template at<ChannelTerms<A>>(k.at.terms) + b.own_channels.begin;
    RareTerms<A>* rare = b.template at<RareTerms<A>>(k.at.rare) + b.own_channels.begin;
    const bool needs_x = input_grad_needs_x(p);
    for (int i = b.thread; i < own * b.blocks; i += b.threads) {
      const int c = i % own, r = i / own;
      if (r == b.rank) continue;
      *b.remote(terms + c, r) = terms[c];
      if (needs_x) *b.remote(rare + c, r) = rare[c];
    }
    ptx::cluster_sync();
  } else {
    // Other blocks may still read this one's part of the layer's gradient: backward waits before it ends.
    ptx::cluster_arrive();
  }
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
