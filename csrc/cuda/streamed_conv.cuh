// Stages kConv and kConvGrad: the spatial gate's convolution over a range of positions of one sample.
#pragma once

#include "streamed_engine.cuh"

namespace cbam {

struct Coordinates {
  int d, h, w;
};
__device__ __forceinline__ Coordinates coordinates(const Problem& p, int position) {
  const int row = position / p.width, w = position - row * p.width;
  if (p.depth == 1) return {0, row, w};
  const int d = row / p.height;
  return {d, row - d * p.height, w};
}

// `steps` positions on, to `position`: rows that are not shorter take no division.
__device__ __forceinline__ void advance(const Problem& p, Coordinates& at, int position, int steps) {
  if (p.width < steps) {
    at = coordinates(p, position);
    return;
  }
  at.w += steps;
  if (at.w < p.width) return;
  at.w -= p.width;
  if (++at.h < p.height) return;
  at.h = 0;
  ++at.d;
}

// The kernel's weight for the maximum's plane (0) or the mean's (1), whatever order it is stored in.
template <class T>
__device__ __forceinline__ Accumulate<T> kernel_weight(const Problem& p, int plane, int64_t tap) {
  if (p.spatial == kSpatialBlend) return Accumulate<T>(0.5) * load_weight<T>(p.conv_weight, tap);
  const int stored = p.spatial == kMaxMean ? plane : 1 - plane;
  return load_weight<T>(p.conv_weight, stored * taps(p) + tap);
}

// z' = (z - mean) * slope + offset, the norm in eval mode.
template <class A>
struct Norm {
  A mean, slope, offset, inverse_deviation;
};
template <class T>
__device__ __forceinline__ Norm<Accumulate<T>> load_norm(const Problem& p) {
  using A = Accumulate<T>;
  if (!p.bn_mean.data) return {A(0), A(1), A(0), A(1)};
  const A inverse = A(1) / square_root(load_weight<T>(p.bn_var, 0) + A(p.bn_eps));
  const A weight = p.bn_weight.data ? load_weight<T>(p.bn_weight, 0) : A(1);
  const A offset = p.bn_bias.data ? load_weight<T>(p.bn_bias, 0) : A(0);
  return {load_weight<T>(p.bn_mean, 0), weight * inverse, offset, inverse};
}

// What belongs to the maximum's plane and to the mean's, side by side: one access reads both.
template <class A>
struct alignas(2 * sizeof(A)) PlanePair {
  A maximum, mean;
};

// Whether the maps' windows and the kernel are in shared memory, which only very large kernels are too large
// for.
__device__ __forceinline__ bool conv_is_staged(const Schedule& s) {
  return s.conv_staged && s.kernel_staged;
}

// One item's view: its own positions [begin, end), those its convolution reads [low, high), and both
// kernel planes. Where not all is staged, each access looks what is.
template <class T, bool kStaged>
struct ConvItem {
  using A = Accumulate<T>;
  const Problem& p;
  int begin, end, low, high;
  const PlanePair<A>* kernel;

  __device__ __forceinline__ ConvItem(const Streamed& k, const Item& item, Shared& shared) : p(k.p) {
    const Schedule& s = k.s;
    const int positions = static_cast<int>(p.positions), count = static_cast<int>(taps(p));
    begin = item.index * s.conv_positions;
    end = min(positions, begin + s.conv_positions);
    low = max(0, begin - s.conv_halo);
    high = static_cast<int>(min(int64_t{positions}, int64_t{end} + s.conv_halo));
    const bool staging = kStaged || s.kernel_staged;
    PlanePair<A>* staged = shared.take<PlanePair<A>>(staging ? count : 0);
    kernel = staging ? staged : nullptr;
    for (int i = thread_index(); staging && i < count; i += kThreads) staged[i] = read_weights(i);
  }
  __device__ __forceinline__ PlanePair<A> read_weights(int tap) const {
    return {kernel_weight<T>(p, 0, tap), kernel_weight<T>(p, 1, tap)};  // [1]
  }
  __device__ __forceinline__ PlanePair<A> weights(int tap) const {
    return kStaged || kernel ? PlanePair<A>(kernel[tap]) : read_weights(tap);
  }
};

// A window of a map, or of two, or what is read where it is.
template <bool kStaged, class A, class Read>
struct MapWindow {
  const A* staged;
  int low;
  Read read;
  __device__ __forceinline__ A operator()(int position) const {
    return kStaged || staged ? staged[position - low] : read(position);
  }
};
template <bool kStaged, class A, class Read>
__device__ __forceinline__ MapWindow<kStaged, A, Read> map_window(const Schedule& s, Shared& shared, int low,
                                                                  int high, int64_t size, Read read) {
  const bool staging = kStaged || s.conv_staged;
  A* staged = shared.take<A>(staging ? size : 0);
  if (!staging) return {nullptr, low, read};
  for (int i = low + thread_index(); i < high; i += kThreads) staged[i - low] = read(i);  // [1]
  return {staged, low, read};
}
__device__ __forceinline__ int64_t window_size(const Streamed& k) {
  return min(k.p.positions, k.s.conv_positions + 2 * int64_t{k.s.conv_halo});
}

constexpr int kTapBlock = 7;  // taps of a kernel row that are unrolled: all of CBAM's

// Calls f(tap, neighbour) for each tap whose neighbour at + sign * (tap - centre) lies inside the map.
template <class F>
__device__ __forceinline__ void for_taps(const Problem& p, Coordinates at, int sign, F f) {
  const int centre = p.kernel_w / 2, before = at.w, after = p.width - 1 - at.w;
  const int from = max(0, centre - (sign > 0 ? before : after));
  const unsigned span = min(p.kernel_w, centre + 1 + (sign > 0 ? after : before)) - from;
  int tap = 0;
  for (int kd = 0; kd < p.kernel_d; ++kd) {
    const int d = at.d + sign * (kd - p.kernel_d / 2);
    for (int kh = 0; kh < p.kernel_h; ++kh, tap += p.kernel_w) {
      const int h = at.h + sign * (kh - p.kernel_h / 2);
      if (d < 0 || d >= p.depth || h < 0 || h >= p.height) continue;
      const int row = (d * p.height + h) * p.width + at.w;
#pragma unroll 1
      for (int first = 0; first < p.kernel_w; first += kTapBlock) {
#pragma unroll
        for (int j = 0; j < kTapBlock; ++j) {
          const int kw = first + j;
          if (static_cast<unsigned>(kw - from) < span) f(tap + kw, row + sign * (kw - centre));
        }
      }
    }
  }
}

// Spatial pools of a sample whose channels were reduced in several chunks: one result a position.
template <class A, bool kSplit>
__device__ __forceinline__ MeanMax<A, kSplit> merged_chunks(const Streamed& k, int64_t n, int position) {
  const int64_t chunks = k.s.reduce.chunks, positions = k.p.positions;
  MeanMax<A, kSplit> total = MeanMax<A, kSplit>::empty(kNoIndex);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t at = (n * chunks + chunk) * positions + position;
    total.merge(
        {fresh<A>(k.w.spatial_parts, k.p.samples * chunks * positions + at),
         {fresh<A>(k.w.spatial_parts, at), load_index<Cache::kCoherent>(k.w.spatial_marks, at, false)}});
  }
  return total;
}

template <class A, bool kSplit>
__device__ __forceinline__ void put_spatial_pool(const Streamed& k, int64_t n, int position,
                                                 const MeanMax<A, kSplit>& pool) {
  const Problem& p = k.p;
  put(p.spatial_pool, n * 2 * p.positions + position, pool.peak.value);
  put(p.spatial_pool, (n * 2 + 1) * p.positions + position, pool.sum / A(p.channels));
  if (p.spatial_index) {
    store_index(p.spatial_index, n * p.positions + position, is_short_extent(p.channels), pool.peak.mark);
  }
}

template <class T, bool kStaged>
__device__ __forceinline__ void conv_positions(const Streamed& k, const Item& item, Shared shared) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const ConvItem<T, kStaged> c(k, item, shared);
  const int64_t maps = item.n * 2 * p.positions, size = window_size(k);
  const auto merge = [&](int i, auto pool) -> PlanePair<A> {
    if (i >= c.begin && i < c.end) put_spatial_pool(k, item.n, i, pool);
    return {pool.peak.value, pool.sum / A(p.channels)};
  };
  // Chunks come with maps only whose window is staged: each part is read once.
  const auto read_pools = [&](int i) -> PlanePair<A> {
    if (k.s.reduce.chunks > 1) {
      if (p.ties == kTiesSplit) return merge(i, merged_chunks<A, true>(k, item.n, i));
      return merge(i, merged_chunks<A, false>(k, item.n, i));
    }
    return {fresh<A>(p.spatial_pool, maps + i), fresh<A>(p.spatial_pool, maps + p.positions + i)};
  };
  const auto pools = map_window<kStaged, PlanePair<A>>(k.s, shared, c.low, c.high, size, read_pools);
  const Norm<A> norm = load_norm<T>(p);
  const A bias = p.conv_bias.data ? load_weight<T>(p.conv_bias, 0) : A(0);
  __syncthreads();
  for (int i = c.begin + thread_index(); i < c.end; i += kThreads) {
    A z = 0;
    for_taps(p, coordinates(p, i), 1, [&](int tap, int at) {
      const PlanePair<A> w = c.weights(tap), q = pools(at);
      z += w.maximum * q.maximum;
      z += w.mean * q.mean;
    });
    z += bias;
    if (k.operation == kAttentionForward) {
      put(p.z, item.n * p.positions + i, z);
    } else {
      if (p.bn_mean.data) z = (z - norm.mean) * norm.slope + norm.offset;
      put(p.spatial_gate, item.n * p.positions + i, sigmoid(z));
    }
  }
}

template <class T>
__device__ __forceinline__ void conv_stage(const Streamed& k, const Item& item, Shared shared) {
  if (conv_is_staged(k.s))
    conv_positions<T, true>(k, item, shared);
  else
    conv_positions<T, false>(k, item, shared);
}

// dq of the item's positions: in scratch or, where the pass over x that follows gathers it, in shared memory.
// And, in one of two such passes, the item's parts of the kernel's gradient: sums over its positions of dz q,
// dz, and dz conv, all before the norm's slope.
template <class T, bool kStaged>
__device__ __forceinline__ void conv_grad_positions(const Streamed& k, const Item& item, Shared shared) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const ConvItem<T, kStaged> c(k, item, shared);
  const int64_t map = item.n * p.positions, size = window_size(k), slot = slot_of(k, item.n);
  const bool again = item.stage == kInputGrad;
  const auto read_dz = [&](int i) -> A {
    if (k.operation == kAttentionBackward) return constant<A>(p.dz, map + i);
    A ds = from_slot<A>(k.w.spatial_grad, slot * s.reduce.chunks * p.positions + i);
    if (s.reduce.chunks == 1) return ds;
    for (int chunk = 1; chunk < s.reduce.chunks; ++chunk) {
      ds += from_slot<A>(k.w.spatial_grad, (slot * s.reduce.chunks + chunk) * p.positions + i);
    }
    const A gate = constant<A>(p.spatial_gate, map + i);
    return ds * gate * (A(1) - gate);
  };
  const auto read_pools = [&](int i) -> PlanePair<A> {
    return {constant<A>(p.spatial_pool, 2 * map + i), constant<A>(p.spatial_pool, 2 * map + p.positions + i)};
  };
  const auto dz = map_window<kStaged, A>(s, shared, c.low, c.high, size, read_dz);
  const auto pools =
      map_window<kStaged, PlanePair<A>>(s, shared, c.low, again ? c.low : c.high, size, read_pools);
  A* warps = shared.take<A>(kThreads / 32 * 2);
  const A slope = load_norm<T>(p).slope;
  __syncthreads();

  for (int i = c.begin + thread_index(); i < c.end; i += kThreads) {
    A max_grad = 0, mean_grad = 0;
    for_taps(p, coordinates(p, i), -1, [&](int tap, int at) {
      const A v = dz(at);
      const PlanePair<A> w = c.weights(tap);
      max_grad += w.maximum * v;
      mean_grad += w.mean * v;
    });
    max_grad *= slope;
    mean_grad = slope * mean_grad / A(p.channels);
    if (s.gather_tiles) {
      A* gathered = gathered_grads<A>(k, shared) + (i - c.begin);
      gathered[0] = max_grad;
      gathered[s.conv_positions] = mean_grad;
    } else {
      put(k.w.pooled_grad, slot * 2 * p.positions + i, max_grad);
      put(k.w.pooled_grad, (slot * 2 + 1) * p.positions + i, mean_grad);
    }
  }
  if (again) return;

  const int count = static_cast<int>(taps(p)), lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t row = (item.n * s.conv_items + item.index) * (2 * int64_t{count} + 2);
  A dz_conv = 0;  // in lane 0
  for (int line = warp; line < p.kernel_d * p.kernel_h; line += kThreads / 32) {
    const int kd = line / p.kernel_h - p.kernel_d / 2, kh = line % p.kernel_h - p.kernel_h / 2;
    for (int first = 0; first < p.kernel_w; first += kTapBlock) {
      A max_sum[kTapBlock] = {}, mean_sum[kTapBlock] = {};
      Coordinates at = coordinates(p, c.begin + lane);
      for (int i = c.begin + lane; i < c.end; i += 32, advance(p, at, i, 32)) {
        const int d = at.d + kd, h = at.h + kh;
        if (d < 0 || d >= p.depth || h < 0 || h >= p.height) continue;
        const A v = dz(i);
        const int w = at.w + first - p.kernel_w / 2, start = (d * p.height + h) * p.width + w;
#pragma unroll
        for (int j = 0; j < kTapBlock; ++j) {
          if (first + j < p.kernel_w && static_cast<unsigned>(w + j) < static_cast<unsigned>(p.width)) {
            const PlanePair<A> q = pools(start + j);
            max_sum[j] += v * q.maximum;
            mean_sum[j] += v * q.mean;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTapBlock; ++j) {
        if (first + j >= p.kernel_w) break;
        const A of_max = warp_sum(max_sum[j]), of_mean = warp_sum(mean_sum[j]);
        const int tap = line * p.kernel_w + first + j;
        if (lane == 0) {
          put(k.w.conv_parts, row + tap, of_max);
          put(k.w.conv_parts, row + count + tap, of_mean);
          const PlanePair<A> w = c.weights(tap);
          dz_conv += w.maximum * of_max + w.mean * of_mean;
        }
      }
    }
  }
  A dz_sum = 0;
  for (int i = c.begin + thread_index(); i < c.end; i += kThreads) dz_sum += dz(i);
  dz_sum = warp_sum(dz_sum);
  if (lane == 0) {
    warps[2 * warp] = dz_sum;
    warps[2 * warp + 1] = dz_conv;
  }
  __syncthreads();
  if (thread_index() < 2) {
    A total = 0;
    for (int i = 0; i < kThreads / 32; ++i) total += warps[2 * i + thread_index()];
    put(k.w.conv_parts, row + 2 * count + thread_index(), total);
  }
}

template <class T>
__device__ __forceinline__ void conv_grad_stage(const Streamed& k, const Item& item, Shared shared) {
  if (conv_is_staged(k.s))
    conv_grad_positions<T, true>(k, item, shared);
  else
    conv_grad_positions<T, false>(k, item, shared);
}

}  // namespace cbam
