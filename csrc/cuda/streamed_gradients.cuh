// Stages kCross, kGateGrad and kInputGrad: the backward passes over x and dy.
#pragma once

#include "streamed_logit_grad.cuh"
#include "streamed_tile.cuh"

namespace cbam {

// ds of one position and, where an item has all channels of it, dz.
template <class A>
__device__ __forceinline__ void put_spatial_grad(const Streamed& k, int64_t n, int chunk, int position,
                                                 A ds) {
  const Problem& p = k.p;
  const int64_t chunks = k.s.reduce.chunks, at = n * p.positions + position;
  if (chunks == 1) {
    const A gate = constant<A>(p.spatial_gate, at);
    ds *= gate * (A(1) - gate);
    if (k.operation == kScaleBackward) return put(p.dz_out, at, ds);
  }
  put(k.w.spatial_grad, (slot_of(k, n) * chunks + chunk) * p.positions + position, ds);
}

// ---- kCross: ds = sum_c dy g x, and for each tile sum_p dy x s.

template <class Tr>
__device__ __forceinline__ void cross_rows(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kRowSums;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.reduce;
  const RowTile<Tr> me(k, t, item.index, item.n);
  const int base = me.first * s.fold, positions = static_cast<int>(p.positions);
  A* gates = shared.take<A>(int64_t{t.chunk_rows} * s.fold);
  A* spatial = shared.take<A>(t.positions);
  shared.take<A>(t.positions);
  stage_values<A>(gates, p.channel_gate, item.n * p.channels + base, (me.end - me.first) * s.fold, A(1));
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + me.left, me.width, A(1));
  __syncthreads();
  Sum<A> ds[V];
  A gate_s[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    ds[j].sum = 0;
    gate_s[j] = me.valid(j) ? spatial[me.in_tile(j, positions)] : A(0);
  }
  const int64_t step = me.lanes * int64_t{s.row_elements};
  const int64_t parts = (slot_of(k, item.n) * t.tiles + me.tile) * p.channels;
  FoldSums<Tr> sums(shared.take<A>(0), t);
  const int pass = Tr::kFold ? sums.capacity : me.end - me.first;
  for (int top = me.first; top < me.end; top += pass) {
    const int bottom = min(me.end, top + pass), last = me.inside ? bottom : 0;
    const int64_t start = me.start(k, item.n, top + me.row);
    const T* x = as<T>(p.x) + start;
    const T* dy = as<T>(p.dy) + start;
    for (int r = top; r < bottom; r += kAhead * me.lanes, x += kAhead * step, dy += kAhead * step) {
      Packed<T, V> packed_x[kAhead], packed_dy[kAhead];
      me.template load<Cache::kReadOnly>(x, step, r + me.row, last, packed_x);
      me.template load<Cache::kReadOnly>(dy, step, r + me.row, last, packed_dy);
      A here[kAhead], after[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = r + me.row + u * me.lanes;
        const bool valid = at < last;
        here[u] = after[u] = A(0);
        const PerChannel<Tr, A> gate(gates, me.channel(s, at) - base, me, valid);
        A vx[V], vd[V];
        packed_x[u].unpack(vx);
        packed_dy[u].unpack(vd);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A product = vx[j] * vd[j];
          ds[j].sum += gate(me, j) * product;
          if (me.next(j))
            after[u] += product * gate_s[j];
          else
            here[u] += product * gate_s[j];
        }
        if (Tr::kFold && valid) sums.leave(me, at - top, here[u], after[u]);
      }
      // In the place of the row's gate, which only these lanes have read.
      if constexpr (!Tr::kFold) me.leave_sums(here, r, bottom, t.columns, gates);
    }
    if constexpr (Tr::kFold) {
      sums.finish(k, bottom - top, [&](int c, A sum) {
        if (p.pools) put(k.w.cross_parts, parts + top * s.fold + c, sum);
      });
    }
  }
  __syncthreads();
  if (!Tr::kFold && p.pools) {
    for (int r = me.first + thread_index(); r < me.end; r += kThreads)
      put(k.w.cross_parts, parts + r, gates[r - me.first]);
  }
  if (!p.spatial) return;
  merge_tile<Tr>(
      k, t, me, item.n, ds, reinterpret_cast<Sum<A>*>(sums.pairs),
      [&](int position, const Sum<A>& total) { put_spatial_grad(k, item.n, me.chunk, position, total.sum); });
}

template <class Tr>
__device__ __forceinline__ void cross_columns(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kRowSums;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.reduce;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2;
  const ColumnTile me(s, t, item.index);
  const int first = me.first, count = me.count, left = me.begin * V;
  A* gates = shared.take<A>(p.channels);
  A* spatial = shared.take<A>(t.positions);
  A* ds = shared.take<A>(t.positions);  // each element belongs to one thread
  Sum<A>* merged = shared.take<Sum<A>>(0);
  const int channels = min(me.end * V, static_cast<int>(p.channels)) - left;
  stage_values<A>(gates, p.channel_gate, item.n * p.channels + left, channels, A(1));
  stage_values<A>(spatial, p.spatial_gate, item.n * p.positions + first, count, A(1));
  for (int i = thread_index(); i < count; i += kThreads) ds[i] = A(0);
  __syncthreads();
  const int64_t start = (item.n * p.positions + first + row) * p.channels, step = rows * p.channels;
  const int64_t parts = (slot_of(k, item.n) * t.tiles + me.tile) * p.channels;
  for (int slice = me.begin; slice < me.end; slice += t.columns) {
    const int i = slice + column, last = i < me.end ? count : 0;
    const T* x = as<T>(p.x) + start + int64_t{i} * V;
    const T* dy = as<T>(p.dy) + start + int64_t{i} * V;
    A gate[V];
    Sum<A> acc[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      gate[j] = last ? gates[i * V + j - left] : A(0);
      acc[j].sum = A(0);
    }
    for (int base = 0; base < count; base += kAhead * rows, x += kAhead * step, dy += kAhead * step) {
      Packed<T, V> packed_x[kAhead], packed_dy[kAhead];
      load_rows<Cache::kReadOnly>(x, step, base + row, rows, last, packed_x);
      load_rows<Cache::kReadOnly>(dy, step, base + row, rows, last, packed_dy);
      Sum<A> sums[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = base + row + u * rows;
        const A gate_s = at < last ? spatial[at] : A(0);
        sums[u].sum = A(0);
        A vx[V], vd[V];
        packed_x[u].unpack(vx);
        packed_dy[u].unpack(vd);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A product = vx[j] * vd[j];
          sums[u].sum += gate[j] * product;
          acc[j].sum += product * gate_s;
        }
      }
      const A sum = merge_in_row(sums, t.columns).sum;
      const int at = base + row + column * rows;
      if (column < kAhead && at < count) ds[at] += sum;
    }
    if (p.pools) {
      const int groups = merge_rows<V>(acc, t.columns, merged), width = t.columns * V;
      for (int c = thread_index(); c < width; c += kThreads) {
        if (int64_t{slice} * V + c >= p.channels) continue;
        const Sum<A> total = merged_sum<V>(merged, groups, t.columns, c);
        put(k.w.cross_parts, parts + int64_t{slice} * V + c, total.sum);
      }
      __syncthreads();
    }
  }
  if (!p.spatial) return;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) put_spatial_grad(k, item.n, me.chunk, first + i, ds[i]);
}

// ---- What a position brings to dx': its part of dq, and where the maximum's goes.

template <class A>
struct PositionFields {
  const A* mean;     // dq of the mean, divided by C
  const A* maximum;  // dq of the maximum
  const A* top;      // with ties shared: the maximum itself
  const int* mark;   // its channel, or how many channels equal it
};
template <class A>
__device__ __forceinline__ PositionFields<A> stage_positions(const Streamed& k, int64_t n, int first,
                                                             int count, int size, Shared& shared) {
  const Problem& p = k.p;
  const Schedule& s = k.s;
  A* maximum = shared.take<A>(s.gather_tiles ? 0 : size);
  A* mean = shared.take<A>(s.gather_tiles ? 0 : size);
  A* top = shared.take<A>(size);
  int* mark = shared.take<int>(size);
  const bool split = p.ties == kTiesSplit;
  if (s.gather_tiles) {
    maximum = gathered_grads<A>(k, shared) + first % s.conv_positions;
    mean = maximum + s.conv_positions;
  } else {
    const int64_t at = slot_of(k, n) * 2 * p.positions + first;
    stage_values<A>(maximum, k.w.pooled_grad, at, count, A(0));
    stage_values<A>(mean, k.w.pooled_grad, at + p.positions, count, A(0));
  }
  if (split)
    stage_values<A>(top, p.spatial ? p.spatial_pool : nullptr, n * 2 * p.positions + first, count, A(0));
  stage_marks(mark, p.spatial ? p.spatial_index : nullptr, n * p.positions + first, count,
              is_short_extent(p.channels));
  return {mean, maximum, top, mark};
}

// The maximum's share for one element: all to the first index, or as torch.amax shares it, which makes
// NaN of a maximum that is NaN.
template <class A>
__device__ __forceinline__ A first_share(A grad, bool is_mark) {
  return is_mark ? grad : A(0);
}
template <class A>
__device__ __forceinline__ A even_share(A grad, bool equal, int count) {
  return (equal ? grad : grad * A(0)) / A(count);
}

// ---- kGateGrad: for each tile, sum_p x (dq_mean / C + dq_max [c is the argmax]).

template <class Tr, bool kSplit>
__device__ __forceinline__ void gate_grad_rows(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kSplit && (Tr::kFold || V > 4) ? 1 : kRowSums;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const RowTile<Tr> me(k, t, map_tile(k.s, item), item.n);
  const int base = me.first * s.fold, positions = static_cast<int>(p.positions);
  A* gates = shared.take<A>(int64_t{t.chunk_rows} * s.fold);
  if (kSplit)
    stage_values<A>(gates, p.channel_gate, item.n * p.channels + base, (me.end - me.first) * s.fold, A(1));
  const PositionFields<A> fields =
      stage_positions<A>(k, item.n, me.left, me.width, t.positions + s.reach, shared);
  __syncthreads();
  // What an element is weighted by, and a maximum; with ties shared, what a maximum shares.
  A mean[V], maximum[V], top[V];
  int mark[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const bool valid = me.valid(j);
    const int at = valid ? me.in_tile(j, positions) : 0;
    mean[j] = valid ? fields.mean[at] : A(0);
    maximum[j] = valid ? fields.maximum[at] + (kSplit ? A(0) : mean[j]) : A(0);
    top[j] = kSplit ? fields.top[at] : A(0);
    mark[j] = Tr::kRows == kRagged && !valid ? 1 : fields.mark[at];
  }
  const int64_t step = me.lanes * int64_t{s.row_elements};
  const GateGradPlace place(k, item.n, me.tile);
  FoldSums<Tr> sums(shared.take<A>(0), t);
  const int pass = Tr::kFold ? sums.capacity : me.end - me.first;
  for (int start = me.first; start < me.end; start += pass) {
    const int bottom = min(me.end, start + pass), last = me.inside ? bottom : 0;
    const T* x = as<T>(p.x) + me.start(k, item.n, start + me.row);
    for (int r = start; r < bottom; r += kAhead * me.lanes, x += kAhead * step) {
      Packed<T, V> packed[kAhead];
      me.template load<Cache::kLastUse>(x, step, r + me.row, last, packed);
      A here[kAhead], after[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = r + me.row + u * me.lanes;
        const bool valid = at < last;
        const int c = me.channel(s, at);
        here[u] = after[u] = A(0);
        A v[V];
        packed[u].unpack(v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          A weight = mean[j];
          if constexpr (kSplit) {
            const A gate = valid ? gates[c - base + me.next(j)] : A(0);
            weight += even_share(maximum[j], gate * v[j] == top[j], mark[j]);
          } else {
            weight = mark[j] == c + me.next(j) ? maximum[j] : weight;
          }
          if (me.next(j))
            after[u] += v[j] * weight;
          else
            here[u] += v[j] * weight;
        }
        if (Tr::kFold && valid) sums.leave(me, at - start, here[u], after[u]);
      }
      if constexpr (!Tr::kFold) me.leave_sums(here, r, bottom, t.columns, gates);
    }
    if constexpr (Tr::kFold) {
      sums.finish(k, bottom - start, [&](int c, A sum) { put_gate_grad(k, place, start * s.fold + c, sum); });
    }
  }
  if constexpr (!Tr::kFold) {
    __syncthreads();
    for (int r = me.first + thread_index(); r < me.end; r += kThreads)
      put_gate_grad(k, place, r, gates[r - me.first]);
  }
}

template <class Tr, bool kSplit>
__device__ __forceinline__ void gate_grad_columns(const Streamed& k, const Item& item, Shared shared) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kAhead = kSplit && V > 4 ? 1 : kUnroll;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const Tiling& t = s.map;
  const int column = threadIdx.x & (t.columns - 1), row = threadIdx.x >> t.columns_log2;
  const int rows = kThreads >> t.columns_log2;
  const ColumnTile me(s, t, map_tile(k.s, item));
  const int first = me.first, count = me.count;
  const PositionFields<A> fields = stage_positions<A>(k, item.n, first, count, t.positions, shared);
  const GateGradPlace place(k, item.n, me.tile);
  Sum<A>* merged = shared.take<Sum<A>>(0);
  __syncthreads();
  const int64_t start = (item.n * p.positions + first + row) * p.channels, step = rows * p.channels;
  for (int slice = me.begin; slice < me.end; slice += t.columns) {
    const int i = slice + column, last = i < me.end ? count : 0;
    const T* x = as<T>(p.x) + start + int64_t{i} * V;
    Sum<A> acc[V];
    A gate[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      acc[j].sum = A(0);
      gate[j] = A(1);
    }
    if (kSplit && last && p.channel_gate)
      fresh_vector<V>(p.channel_gate, item.n * p.channels + int64_t{i} * V, gate);  // [V]
    for (int base = row; base < last; base += kAhead * rows, x += kAhead * step) {
      Packed<T, V> packed[kAhead];
      load_rows<Cache::kLastUse>(x, step, base, rows, last, packed);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = base + u * rows;
        if (at >= count) break;
        // What an element is weighted by, and a maximum; with ties shared, what a maximum shares.
        const A mean = fields.mean[at], maximum = fields.maximum[at] + (kSplit ? A(0) : mean);
        const int mark = kSplit ? fields.mark[at] : fields.mark[at] - i * V;
        A v[V];
        packed[u].unpack(v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          A weight = mean;
          if constexpr (kSplit)
            weight += even_share(maximum, gate[j] * v[j] == fields.top[at], mark);
          else
            weight = mark == j ? maximum : weight;
          acc[j].sum += v[j] * weight;
        }
      }
    }
    const int groups = merge_rows<V>(acc, t.columns, merged), width = t.columns * V;
    for (int c = thread_index(); c < width; c += kThreads) {
      if (int64_t{slice} * V + c >= p.channels) continue;
      const Sum<A> total = merged_sum<V>(merged, groups, t.columns, c);
      put_gate_grad(k, place, slice * V + c, total.sum);
    }
    __syncthreads();
  }
}

}  // namespace cbam
