// The resident tier's backward between dy and dx: the gradients of both gates, in a cluster.
#pragma once

#include "resident_conv_grad.cuh"
#include "resident_weights.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

template <class A_>
struct Total {
  using A = A_;
  A sum;
  static __device__ __forceinline__ Total empty(int) { return {A(0)}; }
  __device__ __forceinline__ void add(A v, int) { sum += v; }
  __device__ __forceinline__ void merge(const Total& other) { sum += other.sum; }
  __device__ __forceinline__ Total exchange(int bit) const { return {__shfl_xor_sync(kAllLanes, sum, bit)}; }
};

// What the backward reads of the forward, for this block's tile and its share of the MLP.
template <class Tr>
__device__ __forceinline__ void stage_saved(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  A* gate = b.template at<A>(k.at.gate);
  ChannelTerms<A>* terms = b.template at<ChannelTerms<A>>(k.at.terms);
  const Places<A> places(b);
  const bool needs_x = input_grad_needs_x(p);
  const int64_t pools = pool_count(p.pools);
  const auto pooled = [&](int bit, int64_t c) {
    return constant<A>(p.pooled, (b.n * pools + pool_row(p.pools, bit)) * p.channels + c);  // [1]
  };
  for (int i = b.thread; i < b.tile_channels.size(); i += b.threads) {
    const int64_t c = b.tile_channels.begin + i, at = b.n * p.channels + c;
    gate[i] = p.pools ? constant<A>(p.channel_gate, at) : A(1);  // [1]
    const int mark =
        p.pools & kMax ? load_index<Cache::kReadOnly>(p.pool_index, at, is_short_extent(p.positions)) : -1;
    terms[i] = {gate[i], A(0), A(0), mark};
    if (needs_x) {
      b.template at<RareTerms<A>>(k.at.rare)[i] = {p.pools & kMax ? pooled(kMax, c) : A(0), A(0), A(0),
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
    if (p.ties == kTiesSplit) {
      const int64_t map = at + b.n * p.positions;
      b.template at<A>(k.at.top)[i] = p.spatial ? constant<A>(p.spatial_pool, map) : A(0);  // [1]
    }
  }
  A* input = b.template at<A>(k.at.input);
  const int own = b.own_channels.size();
  for (int i = b.thread; i < k.inputs * own; i += b.threads) {
    input[i] = mlp_input<A>(p, b.n, i / own, b.own_channels.begin + i % own);  // [1]
  }
}

// ---- ds = sum_c dy g x; by positions, and then already dz; by channels, this block's part of ds.

template <class Tr>
__device__ __forceinline__ void spatial_grads(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  const T* x = b.template at<T>(k.at.tile);
  const T* dy = b.template at<T>(k.at.tile_dy);
  const A* gate = b.template at<A>(k.at.gate);
  A* map = b.template at<A>(k.at.pooled);
  const A* gates = b.template at<A>(k.at.spatial);
  const int pitch = b.vectors * V;
  const auto out = [&](int i, const Total<A>& total) {
    const A s = gates[i];
    map[i] = Tr::kByChannel ? total.sum : total.sum * s * (A(1) - s);
  };
  const auto product = [&](int at, A(&v)[V]) {
    A d[V];
    load_shared<Tr>(x + at, v);
    load_shared<Tr>(dy + at, d);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] *= d[j];
  };
  if constexpr (Tr::kLast) {
    reduce_rows<Total<A>>(
        b, landed,
        [&](int r, int i, A(&v)[V]) {
          product(r * pitch + i * V, v);
          A g[V];
          load_factors<V>(gate + i * V, g);
#pragma unroll
          for (int j = 0; j < V; ++j) v[j] *= g[j];
        },
        out);
  } else {
    reduce_columns<Total<A>>(
        b, landed, b.template at<Total<A>>(k.at.scratch),
        [&](const Strip<Tr>& s, int r, A(&v)[V]) {
          product(r * pitch + s.vector * V, v);
          const A g = gate[r];
#pragma unroll
          for (int j = 0; j < V; ++j) v[j] *= g;
        },
        out);
  }
}

// ---- dg = sum_p x (dy s + dq_mean / C + dq_max [c is the argmax]) of the tile's channels.

// dx' of one element. Without shared ties `maximum` already holds the mean's share too: see with_mean.
template <class A, bool kSplit>
__device__ __forceinline__ A inner_grad(const PositionTerms<A>& q, A dy, A gate, A x, A top, int channel) {
  if constexpr (kSplit)
    return dy * q.spatial + q.mean + even_share(q.maximum, gate * x == top, q.mark);
  else
    return dy * q.spatial + (q.mark == channel ? q.maximum : q.mean);
}
// One selection an element, in place of a selection and an addition.
template <class A>
__device__ __forceinline__ PositionTerms<A> with_mean(const PositionTerms<A>& q) {
  return {q.spatial, q.mean, q.maximum + q.mean, q.mark};
}
template <class A>
__device__ __forceinline__ ChannelTerms<A> with_average(const ChannelTerms<A>& c) {
  return {c.gate, c.average, c.maximum + c.average, c.mark};
}

template <class Tr, bool kSplit>
__device__ __forceinline__ void gate_grads(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  const T* x = b.template at<T>(k.at.tile);
  const T* dy = b.template at<T>(k.at.tile_dy);
  const A* gate = b.template at<A>(k.at.gate);
  const A* top = b.template at<A>(k.at.top);
  const Places<A> places(b);
  A* out = b.template at<A>(k.at.gate_grad);
  const int pitch = b.vectors * V;
  if constexpr (Tr::kLast) {
    reduce_columns<Total<A>>(
        b, landed, b.template at<Total<A>>(k.at.scratch),
        [&](const Strip<Tr>& s, int r, A(&v)[V]) {
          A d[V];
          load_shared<Tr>(x + r * pitch + s.vector * V, v);
          load_shared<Tr>(dy + r * pitch + s.vector * V, d);
          const PositionTerms<A> q = kSplit ? places[r] : with_mean(places[r]);
          const A highest = kSplit ? top[r] : A(0);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const int c = s.vector * V + j;
            v[j] *= inner_grad<A, kSplit>(q, d[j], kSplit ? gate[c] : A(1), v[j], highest, c);
          }
        },
        [&](int c, const Total<A>& total) { out[c] = total.sum; });
  } else {
    A* parts = b.template at<A>(k.at.scratch);  // [strips][tile channels]
    landed.wait(b.rows - 1);                    // without a spatial gate, this is the first pass
    const int strips = Strip<Tr>::items(b, 1);
    for (int item = b.warp; item < strips * k.map_groups; item += b.warps) {
      const Strip<Tr> s(b, item, k.map_groups);
      PositionTerms<A> q[V];
      A highest[V];
      places.read(s.vector * V, q);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        highest[j] = kSplit ? top[s.vector * V + j] : A(0);
        if (!kSplit) q[j] = with_mean(q[j]);
      }
      // All lanes of a warp take part in every sum, whether their row is there or not.
#pragma unroll 2
      for (int base = s.group * Tr::kDown; base < b.rows; base += s.step) {
        const int r = min(base + s.down, b.rows - 1);
        A v[V], d[V], sum = 0;
        load_shared<Tr>(x + r * pitch + s.vector * V, v);
        load_shared<Tr>(dy + r * pitch + s.vector * V, d);
        const A g = kSplit ? gate[r] : A(1);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sum += v[j] * inner_grad<A, kSplit>(q[j], d[j], g, v[j], highest[j], b.tile_channels.begin + r);
        }
        sum = lane_sum<1, Tr::kAcross>(s.inside ? sum : A(0));
        if (b.lane % Tr::kAcross == 0 && base + s.down < b.rows) parts[s.index * b.rows + r] = sum;
      }
    }
    __syncthreads();
    for (int c = b.thread; c < b.rows; c += b.threads) {
      A sum = 0;
      for (int i = 0; i < strips; ++i) sum += parts[i * b.rows + c];
      out[c] = sum;
    }
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
  if (kRareOptions && is(kLp)) {
    const A norm =
        b.template at<A>(k.at.input)[input * b.own_channels.size() + channel - b.own_channels.begin];
    b.template at<RareTerms<A>>(k.at.rare)[at].norm = norm == A(0) ? A(0) : share / norm;
  }
  if (kRareOptions && is(kLse)) b.template at<RareTerms<A>>(k.at.rare)[at].log_sum = share;
}

template <class Tr>
__device__ __forceinline__ void pool_grads(const Block<Tr>& b) {
  using A = typename Tr::A;
  using T = typename Tr::T;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const int hidden = static_cast<int>(p.hidden), inputs = k.inputs, own = b.own_channels.size();
  const A* gate = b.template at<A>(k.at.gate);
  A* gate_grad = b.template at<A>(k.at.gate_grad);
  A* logit_grad = b.template at<A>(k.at.logit_grad);
  A* part = b.template at<A>(k.at.hidden_part);
  A* layer = b.template at<A>(k.at.hidden);
  A* scratch = b.template at<A>(k.at.scratch);
  const A* input = b.template at<A>(k.at.input);
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
  // [h] of w2^T dl, then for each input [h] of w1 u
  columns_dot<1>(
      b, p.w2, b.own_channels, Range{0, hidden}, hidden, 1, scratch,
      [&](int, int c) { return logit_grad[c - b.own_channels.begin]; },
      [&](int i, int, A sum) { part[i] = sum; });
  if (p.w1.data) {
    hidden_part(b, input, part + hidden);
  } else {
    for (int i = b.thread; i < own; i += b.threads) {
      A sum = 0;
      for (int j = 0; j < inputs; ++j) sum += input[j * own + i];
      put(k.hidden, b.n * p.channels + b.own_channels.begin + i, sum);
    }
  }
  ptx::cluster_sync();
  if (p.w1.data) {
    for (int i = b.thread; i < hidden; i += b.threads) {
      const A grad = cluster_sum(b, part + i), offset = bias<T>(p.b1, i);
      A sum = 0;
      for (int j = 0; j < inputs; ++j) {
        const A before = cluster_sum(b, part + (j + 1) * hidden + i) + offset;
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
    // Other blocks may still read this one's part of the hidden layer: backward waits before it ends.
    ptx::cluster_arrive();
  }
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
