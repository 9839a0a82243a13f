// The streamed tier's forward: one persistent launch from x to y, or to the logits, or from them to y.
#pragma once

#include "streamed_conv.cuh"
#include "streamed_mlp.cuh"
#include "streamed_pool.cuh"
#include "streamed_tile.cuh"

namespace cbam {

template <class A, bool kSplit>
__device__ __forceinline__ void put_spatial(const Streamed& k, int64_t n, int chunk, int position,
                                            const MeanMax<A, kSplit>& pool) {
  const int64_t chunks = k.s.reduce.chunks, positions = k.p.positions;
  if (chunks == 1) return put_spatial_pool(k, n, position, pool);
  const int64_t at = (n * chunks + chunk) * positions + position;
  put(k.w.spatial_parts, at, pool.peak.value);
  put(k.w.spatial_parts, k.p.samples * chunks * positions + at, pool.sum);
  store_index(k.w.spatial_marks, at, false, pool.peak.mark);
}

template <class Tr, bool kSplit>
__device__ __forceinline__ void spatial_pool_rows(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  using S = MeanMax<A, kSplit>;
  constexpr int V = Tr::V;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.reduce;
  const RowTile<Tr> me(k, t, item.index, item.n);
  A* gates = shared.take<A>(int64_t{t.chunk_rows} * s.fold);
  S* merged = shared.take<S>(0);
  const int base = me.first * s.fold;
  stage_values<A>(gates, p.channel_gate, item.n * p.channels + base, (me.end - me.first) * s.fold, A(1));
  __syncthreads();
  S acc[V];
#pragma unroll
  for (int j = 0; j < V; ++j) acc[j] = S::empty(me.channel(s, me.first + me.row) + me.next(j));
  if (me.inside) {
    const T* x = as<T>(p.x) + me.start(k, item.n, 0);
    int r = me.first + me.row;
    for (; r + (kUnroll - 1) * me.lanes < me.end; r += kUnroll * me.lanes) {
      Packed<T, V> ahead[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = r + u * me.lanes;
        me.template load<Cache::kReadOnly>(x + int64_t{at} * s.row_elements, at, ahead[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int c = me.channel(s, r + u * me.lanes);
        const PerChannel<Tr, A> gate(gates, c - base, me);
        A v[V];
        ahead[u].unpack(v);
#pragma unroll
        for (int j = 0; j < V; ++j) acc[j].add_number(gate(me, j) * v[j], c + me.next(j));
      }
    }
    for (; r < me.end; r += me.lanes) {
      Packed<T, V> packed;
      me.template load<Cache::kReadOnly>(x + int64_t{r} * s.row_elements, r, packed);
      const int c = me.channel(s, r);
      const PerChannel<Tr, A> gate(gates, c - base, me);
      A v[V];
      packed.unpack(v);
#pragma unroll
      for (int j = 0; j < V; ++j) acc[j].add_number(gate(me, j) * v[j], c + me.next(j));
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (!acc[j].may_have_nan() || !me.valid(j)) continue;
      for (r = me.first + me.row; r < me.end; r += me.lanes) {
        const int c = me.channel(s, r) + me.next(j);
        const A v = gates[c - base] * load_one<Cache::kReadOnly>(x + int64_t{r} * s.row_elements + j);
        if (v == v) continue;
        acc[j].peak = {v, c};
        break;
      }
    }
  }
  merge_tile<Tr>(k, t, me, item.n, acc, merged,
                 [&](int position, const S& total) { put_spatial(k, item.n, me.chunk, position, total); });
}

template <class Tr, bool kSplit>
__device__ __forceinline__ void spatial_pool_columns(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  using S = MeanMax<A, kSplit>;
  constexpr int V = Tr::V;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.reduce;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2;
  const int first = item.index * t.positions, end = min(s.rows, first + t.positions);
  A* gates = shared.take<A>(p.channels);
  stage_values<A>(gates, p.channel_gate, item.n * p.channels, static_cast<int>(p.channels), A(1));
  __syncthreads();
  const int64_t step = rows * p.channels;
  const T* line = as<T>(p.x) + (item.n * p.positions + first + row) * p.channels + int64_t{column} * V;
  for (int base = first + row; base - row < end; base += kRowSums * rows, line += kRowSums * step) {
    S acc[kRowSums];
#pragma unroll
    for (int u = 0; u < kRowSums; ++u) acc[u] = S::empty(column * V);
    const T* x = line;
    for (int i = column; i < s.row_vectors; i += t.columns, x += t.columns * V) {
      Packed<T, V> ahead[kRowSums];
      load_rows<Cache::kReadOnly>(x, step, base, rows, end, ahead);
#pragma unroll
      for (int u = 0; u < kRowSums; ++u) {
        A v[V];
        ahead[u].unpack(v);
#pragma unroll
        for (int j = 0; j < V; ++j) acc[u].add_number(gates[i * V + j] * v[j], i * V + j);
      }
    }
#pragma unroll
    for (int u = 0; u < kRowSums; ++u) {
      if (!acc[u].may_have_nan() || base + u * rows >= end) continue;
      for (int c = column * V; c < p.channels; c += c % V < V - 1 ? 1 : (t.columns - 1) * V + 1) {
        const A v = gates[c] * load_one<Cache::kReadOnly>(line + u * step + c - column * V);
        if (v == v) continue;
        acc[u].peak = {v, c};
        break;
      }
    }
    const S pool = merge_in_row(acc, t.columns);
    const int at = base + column * rows;
    if (column < kRowSums && at < end) put_spatial(k, item.n, 0, at, pool);
  }
}

template <class A>
__device__ __forceinline__ A gated(A x, A channel, A spatial, bool residual) {
  const A y = x * channel * spatial;
  return residual ? y + x : y;
}

// The spatial gate of `count` positions; scale_forward computes it from the logits, and stores it from the
// `owned`-th on.
template <class A>
__device__ __forceinline__ void stage_spatial_gate(const Streamed& k, int64_t n, int first, int count,
                                                   int owned, A* shared) {
  const int64_t at = n * k.p.positions + first;
  if (k.operation != kScaleForward) return stage_values<A>(shared, k.p.spatial_gate, at, count, A(1));
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const A gate = sigmoid(constant<A>(k.p.z, at + i));
    shared[i] = gate;
    if (i >= owned) put(k.p.spatial_gate, at + i, gate);
  }
}

template <class Tr>
__device__ __forceinline__ void output_rows(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const RowTile<Tr> me(k, t, item.index, item.n);
  const int base = me.first * s.fold, positions = static_cast<int>(p.positions);
  A* gates = shared.take<A>(int64_t{t.chunk_rows} * s.fold);
  A* spatial = shared.take<A>(t.positions + s.reach);
  stage_values<A>(gates, p.channel_gate, item.n * p.channels + base, (me.end - me.first) * s.fold, A(1));
  // Once, where tiles overlap or chunks share a tile.
  const int owned = me.chunk ? me.width : me.tile * t.positions - me.left;
  stage_spatial_gate(k, item.n, me.left, me.width, owned, spatial);
  __syncthreads();
  if (!me.inside) return;
  A gate_s[V];
#pragma unroll
  for (int j = 0; j < V; ++j) gate_s[j] = spatial[me.in_tile(j, positions)];
  const int64_t start = me.start(k, item.n, me.first + me.row), step = me.lanes * int64_t{s.row_elements};
  const T* x = as<T>(p.x) + start;
  T* y = as<T>(p.y) + start;
  const bool residual = p.residual;
  for (int r = me.first + me.row; r < me.end;
       r += kUnroll * me.lanes, x += kUnroll * step, y += kUnroll * step) {
    Packed<T, V> ahead[kUnroll];
    me.template load<Cache::kLastUse>(x, step, r, me.end, ahead);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = r + u * me.lanes;
      if (at >= me.end) break;
      const PerChannel<Tr, A> gate(gates, me.channel(s, at) - base, me);
      A v[V];
      ahead[u].unpack(v);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = gated(v[j], gate(me, j), gate_s[j], residual);
      me.store(y + u * step, v);
    }
  }
}

template <class Tr>
__device__ __forceinline__ void output_columns(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2;
  const int first = item.index * t.positions, end = min(s.rows, first + t.positions);
  A* gates = shared.take<A>(p.channels);
  A* spatial = shared.take<A>(t.positions);
  stage_values<A>(gates, p.channel_gate, item.n * p.channels, static_cast<int>(p.channels), A(1));
  stage_spatial_gate(k, item.n, first, end - first, 0, spatial);
  __syncthreads();
  const int64_t start = (item.n * p.positions + first + row) * p.channels, step = rows * p.channels;
  const bool residual = p.residual;
  for (int i = column; i < s.row_vectors; i += t.columns) {
    const T* x = as<T>(p.x) + start + int64_t{i} * V;
    T* y = as<T>(p.y) + start + int64_t{i} * V;
    A gate[V];
#pragma unroll
    for (int j = 0; j < V; ++j) gate[j] = gates[i * V + j];
    for (int at = first + row; at < end; at += kUnroll * rows, x += kUnroll * step, y += kUnroll * step) {
      Packed<T, V> ahead[kUnroll];
      load_rows<Cache::kLastUse>(x, step, at, rows, end, ahead);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (at + u * rows >= end) break;
        const A gate_s = spatial[at + u * rows - first];
        A v[V];
        ahead[u].unpack(v);
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = gated(v[j], gate[j], gate_s, residual);
        store_global<true>(y + u * step, v);  // [V]
      }
    }
  }
}

template <class Tr>
__device__ __forceinline__ void forward_item(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  constexpr bool kLast = Tr::kLayout == kChannelsLast;
  const bool split = k.p.ties == kTiesSplit;
  switch (item.stage) {
    case kPool:
      pool_stage<Tr>(k, item, shared);
      break;
    case kHidden:
    case kGate: {
      const bool to_hidden = item.stage == kHidden;
      const int64_t rows = to_hidden ? k.p.hidden : k.p.channels;
      mlp_stage<T>(k, mlp_range(item, rows, to_hidden ? k.s.hidden_tile : k.s.gate_tile), to_hidden, shared);
      break;
    }
    case kSpatialPool:
      if constexpr (kLast) {
        if (split)
          spatial_pool_columns<Tr, true>(k, item, shared);
        else
          spatial_pool_columns<Tr, false>(k, item, shared);
      } else {
        if (split)
          spatial_pool_rows<Tr, true>(k, item, shared);
        else
          spatial_pool_rows<Tr, false>(k, item, shared);
      }
      break;
    case kConv:
      conv_stage<T>(k, item, shared);
      break;
    case kFinishPools:
      if (split)
        finish_pools<typename Tr::A, true>(k, item);
      else
        finish_pools<typename Tr::A, false>(k, item);
      break;
    default:
      if constexpr (kLast)
        output_columns<Tr>(k, item, shared);
      else
        output_rows<Tr>(k, item, shared);
  }
}

template <class Tr>
__global__ void __launch_bounds__(kThreads, Tr::kBlocks) streamed_forward_kernel(const Streamed launch) {
  CBAM_DYNAMIC_SHARED(memory);
  CBAM_SHARED(k, Streamed);
  const Shared shared{memory, memory};
  share_parameters(launch, &k);
  run_items(k, [&](const Item& item) { forward_item<Tr>(k, item, shared); }, [](int, bool) {});
}

}  // namespace cbam
