// The resident tier's forward: one cluster takes a sample from x to y, which it reads once.
#pragma once

#include "resident_conv.cuh"
#include "resident_mlp.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// ---- Channel pools: a statistic of each of the tile's channels over the tile's positions.

template <class Tr, class S>
__device__ __forceinline__ void channel_statistic(const Block<Tr>& b, Landed& landed, S* out) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  const T* tile = b.template at<T>(b.k.at.tile);
  const int pitch = b.vectors * Tr::V;
  if constexpr (Tr::kLast) {
    reduce_columns<S>(
        b, landed, b.template at<S>(b.k.at.scratch),
        [&](const Strip<Tr>& s, int r, A(&v)[Tr::V]) {
          load_shared<Tr>(tile + r * pitch + s.vector * Tr::V, v);
        },
        [&](int c, const S& total) { out[c] = total; });
    __syncthreads();
  } else {
    reduce_rows<S>(
        b, landed, [&](int r, int i, A(&v)[Tr::V]) { load_shared<Tr>(tile + r * pitch + i * Tr::V, v); },
        [&](int r, const S& total) { out[r] = total; });
  }
}

template <class Tr>
__device__ __forceinline__ void channel_statistics(const Block<Tr>& b, Landed& landed) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const int pools = k.p.pools;
  const bool split = k.p.ties == kTiesSplit;
  if (pools & (kAvg | kMax)) {
    if (split)
      channel_statistic(b, landed, b.template at<MeanMax<A, true>>(k.at.base));
    else
      channel_statistic(b, landed, b.template at<MeanMax<A, false>>(k.at.base));
  }
  if (pools & kLp) channel_statistic(b, landed, b.template at<Squares<A>>(k.at.squares));
  if (pools & kLse) channel_statistic(b, landed, b.template at<Exponentials<A>>(k.at.exponentials));
}

// A statistic of one of the block's own channels over the whole sample.
template <class Tr, class S, class Renumber>
__device__ __forceinline__ S whole_statistic(const Block<Tr>& b, S* mine, int channel, Renumber renumber) {
  if constexpr (Tr::kByChannel) {
    return mine[channel - b.own_channels.begin];
  } else {
    S total;
    for_ranks(b, mine + channel, [&](int r, S& other) {
      renumber(other, part_of(b.positions, b.k.position_unit, r, b.blocks).begin);
      if (r)
        total.merge(other);
      else
        total = other;
    });
    return total;
  }
}

template <class Tr, bool kSplit>
__device__ __forceinline__ void own_mean_max(const Block<Tr>& b, int c, int i) {
  using A = typename Tr::A;
  using S = MeanMax<A, kSplit>;
  const Problem& p = b.k.p;
  const S v = whole_statistic(b, b.template at<S>(b.k.at.base), c, [](S& part, int first) {
    if (!kSplit && part.peak.mark != kNoIndex) part.peak.mark += first;
  });
  A* input = b.template at<A>(b.k.at.input);
  const int pitch = quads_of(b.own_channels.size()) * kQuad, count = pool_count(p.pools);
  const bool blend = p.pools & kBlend;
  const A mean = v.sum / A(p.positions);
  if (p.pools & kAvg) {
    input[i] = mean;
    if (b.k.save) put(p.pooled, b.n * count * p.channels + c, mean);
  }
  if (p.pools & kMax) {
    const int row = pool_row(p.pools, kMax);
    if (blend)
      input[i] = A(0.5) * mean + A(0.5) * v.peak.value;
    else
      input[row * pitch + i] = v.peak.value;
    if (b.k.save) {
      put(p.pooled, (b.n * count + row) * p.channels + c, v.peak.value);
      store_index(p.pool_index, b.n * p.channels + c, is_short_extent(p.positions), v.peak.mark);
    }
  }
}

// The pools of this block's own channels: what the MLP reads, and what is saved.
template <class Tr>
__device__ __forceinline__ void own_pools(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  A* input = b.template at<A>(k.at.input);
  const int own = b.own_channels.size(), pitch = quads_of(own) * kQuad, count = pool_count(p.pools);
  for (int i = b.thread; i < k.inputs * (pitch - own); i += b.threads) {
    input[i / (pitch - own) * pitch + own + i % (pitch - own)] = A(0);
  }
  const auto put_pool = [&](int bit, int i, A value) {
    const int row = pool_row(p.pools, bit);
    input[row * pitch + i] = value;
    if (k.save) put(p.pooled, (b.n * count + row) * p.channels + b.own_channels.begin + i, value);
  };
  const auto keep = [](auto&, int) {};
  for (int i = b.thread; i < own; i += b.threads) {
    const int c = b.own_channels.begin + i;
    if (p.pools & (kAvg | kMax)) {
      if (p.ties == kTiesSplit)
        own_mean_max<Tr, true>(b, c, i);
      else
        own_mean_max<Tr, false>(b, c, i);
    }
    if (p.pools & kLp) {
      put_pool(kLp, i, square_root(whole_statistic(b, b.template at<Squares<A>>(k.at.squares), c, keep).sum));
    }
    if (p.pools & kLse) {
      put_pool(kLse, i,
               log_sum_value(
                   whole_statistic(b, b.template at<Exponentials<A>>(k.at.exponentials), c, keep).log_sum));
    }
  }
}

// ---- Spatial pools: maximum and mean of gated x over channels, for each of the tile's positions.

template <class A, bool kSplit>
__device__ __forceinline__ void save_position(const Resident& k, int64_t n, int position,
                                              const MeanMax<A, kSplit>& v) {
  const Problem& p = k.p;
  put(p.spatial_pool, n * 2 * p.positions + position, v.peak.value);
  put(p.spatial_pool, (n * 2 + 1) * p.positions + position, v.sum / A(p.channels));
  store_index(p.spatial_index, n * p.positions + position, is_short_extent(p.channels), v.peak.mark);
}

// By positions a position's pools are final, as Pairs; by channels each block has a MeanMax of its own.
template <class Tr, bool kSplit>
__device__ __forceinline__ void spatial_pools(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  using S = MeanMax<A, kSplit>;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  const T* tile = b.template at<T>(k.at.tile);
  const A* gate = b.template at<A>(k.at.gate);
  const int pitch = b.vectors * V;
  const auto out = [&](int i, const S& total) {
    if constexpr (Tr::kByChannel) {
      S moved = total;
      if (!kSplit && moved.peak.mark != kNoIndex) moved.peak.mark += b.own_channels.begin;
      b.template at<S>(k.at.pooled)[i] = moved;
    } else {
      b.template at<Pair<A>>(k.at.pooled)[i] = {total.peak.value, total.sum / A(k.p.channels)};
      if (k.save) save_position(k, b.n, b.own_positions.begin + i, total);
    }
  };
  if constexpr (Tr::kLast) {
    reduce_rows<S>(
        b, landed,
        [&](int r, int i, A(&v)[V]) {
          load_shared<Tr>(tile + r * pitch + i * V, v);
          A g[V];
          load_factors<V>(gate + i * V, g);
#pragma unroll
          for (int j = 0; j < V; ++j) v[j] *= g[j];
        },
        out);
  } else {
    reduce_columns<S>(
        b, landed, b.template at<S>(k.at.scratch),
        [&](const Strip<Tr>& s, int r, A(&v)[V]) {
          load_shared<Tr>(tile + r * pitch + s.vector * V, v);
          const A g = gate[r];
#pragma unroll
          for (int j = 0; j < V; ++j) v[j] *= g;
        },
        out);
  }
}

template <class Tr, bool kSplit>
__device__ __forceinline__ Pair<typename Tr::A> pooled_at(const Block<Tr>& b, int position) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  if constexpr (Tr::kByChannel) {
    using S = MeanMax<A, kSplit>;
    S* mine = b.template at<S>(k.at.pooled) + position;
    S total;
    for_ranks(b, mine, [&](int r, const S& other) {
      if (r)
        total.merge(other);
      else
        total = other;
    });
    if (k.save && position >= b.own_positions.begin && position < b.own_positions.end) {
      save_position(k, b.n, position, total);
    }
    return {total.peak.value, total.sum / A(k.p.channels)};
  } else {
    const int owner = owner_of(position, b.positions, k.position_unit, b.blocks);
    const int first = part_of(b.positions, k.position_unit, owner, b.blocks).begin;
    return *b.remote(b.template at<Pair<A>>(k.at.pooled) + (position - first), owner);
  }
}

// The spatial gate of the tile's positions, from the pools of the whole cluster. Leaves the cluster
// between arrival and wait where blocks only read each other's pools: see finish.
template <class Tr>
__device__ __forceinline__ void spatial_gate(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  Pair<A>* window = b.template at<Pair<A>>(k.at.window);
  const Pair<A>* kernel = b.template at<Pair<A>>(k.at.kernel);
  A* spatial = b.template at<A>(k.at.spatial);
  const Window w(k, b.own_positions);
  const bool split = p.ties == kTiesSplit;
  w.fill(b, [&](int i, int position) {
    Pair<A> v = {A(0), A(0)};
    if (position >= 0) v = split ? pooled_at<Tr, true>(b, position) : pooled_at<Tr, false>(b, position);
    window[i] = v;
  });
  const Norm<A> norm = load_norm<typename Tr::T>(p);
  const A offset = bias<typename Tr::T>(p.conv_bias, 0);
  if constexpr (!Tr::kByChannel) ptx::cluster_arrive();
  __syncthreads();
  for (int i = b.own_positions.begin + b.thread; i < b.own_positions.end; i += b.threads) {
    A z = 0;
    for_window(p, w, i, 1, [&](int tap, int at) {
      const Pair<A> weight = kernel[tap], q = window[at];
      z += weight.maximum * q.maximum;
      z += weight.mean * q.mean;
    });
    z += offset;
    if (p.bn_mean.data) z = (z - norm.mean) * norm.slope + norm.offset;
    const A s = sigmoid(z);
    share_position(b, spatial, i, s);
    if (k.save) put(p.spatial_gate, b.n * p.positions + i, s);
  }
  if constexpr (Tr::kByChannel)
    ptx::cluster_sync();
  else
    __syncthreads();
}

// ---- y = x g s (+ x).

template <class Tr, bool kResidual>
__device__ __forceinline__ void output(const Block<Tr>& b) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  T* tile = b.template at<T>(k.at.tile);
  const A* of_rows = b.template at<A>(Tr::kLast ? k.at.spatial : k.at.gate);
  const A* of_columns = b.template at<A>(Tr::kLast ? k.at.gate : k.at.spatial);
  const int pitch = b.vectors * V;
  T* y = Tr::kStaged ? tile : as<T>(k.p.y) + b.origin();
  const int64_t stride = Tr::kStaged ? pitch : b.stride();
  for (int item = b.warp; item < Strip<Tr>::items(b, k.map_groups); item += b.warps) {
    const Strip<Tr> s(b, item, k.map_groups);
    if (!s.inside) continue;
    A factor[V];
    load_factors<V>(of_columns + s.vector * V, factor);
    const auto load = [&](int r) { return shared_vector<Tr>(tile + r * pitch + s.vector * V); };
    for_rows<Tr, 4>(b, s, load, [&](int r, Vector<Tr>& v) {
      const A row = of_rows[r];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        // The channel's gate first, as the reference has it.
        const A gated = Tr::kLast ? v.of[j] * factor[j] : v.of[j] * row;
        const A both = Tr::kLast ? gated * row : gated * factor[j];
        v.of[j] = kResidual ? both + v.of[j] : both;
      }
      store_vector<Tr>(y + r * stride + s.vector * V, v.of);  // [V]
    });
  }
  if constexpr (Tr::kStaged) store_tile(b, k.at.tile, k.p.y);
}

template <class Tr>
__device__ __forceinline__ void forward(const Resident& k, unsigned char* memory) {
  using A = typename Tr::A;
  const Block<Tr> b(k, memory);
  const Problem& p = k.p;
  start_barriers(b, 1);
  load_tile(b, k.at.tile, p.x);
  stage_kernel(b);
  A* gate = b.template at<A>(k.at.gate);
  A* spatial = b.template at<A>(k.at.spatial);
  if (!p.pools) {
    for (int i = b.thread; i < b.tile_channels.size(); i += b.threads) gate[i] = A(1);
  }
  if (!p.spatial) {
    for (int i = b.thread; i < b.tile_positions.size(); i += b.threads) spatial[i] = A(1);
  }
  Landed landed(b);
  if (p.pools) {
    channel_statistics(b, landed);
    if constexpr (Tr::kByChannel)
      __syncthreads();
    else
      ptx::cluster_sync();
    own_pools(b);
    __syncthreads();
    channel_gate(b);
  } else {
    __syncthreads();
  }
  if (p.spatial) {
    if (p.ties == kTiesSplit)
      spatial_pools<Tr, true>(b, landed);
    else
      spatial_pools<Tr, false>(b, landed);
    ptx::cluster_sync();
    spatial_gate(b);
  }
  if (p.residual)
    output<Tr, true>(b);
  else
    output<Tr, false>(b);
  // No block may leave while another reads its pools, or its share of the hidden layer.
  if (!Tr::kByChannel && p.spatial) ptx::cluster_wait();
  if (Tr::kByChannel && !p.spatial) ptx::cluster_sync();
  if constexpr (Tr::kStaged) tile_stored(b);
}

#endif  // CBAM_HAS_CLUSTERS

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, 1)
    resident_forward_kernel(const __grid_constant__ Resident k) {
#if CBAM_HAS_CLUSTERS
  CBAM_DYNAMIC_SHARED(memory);
  forward<Tr>(k, memory);
#endif
}

}  // namespace resident
}  // namespace cbam
