// The convolution's gradients in a cluster: dq of every position, and a block's part of the kernel's
// gradient.
#pragma once

#include "resident_conv.cuh"
#include "resident_mlp.cuh"
#include "streamed_input_grad.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// The terms of the tile's positions: an array each, so that neighbouring lanes read neighbouring banks.
template <class A>
struct Places {
  A *spatial, *mean, *maximum;
  int* mark;
  template <class Tr>
  __device__ __forceinline__ explicit Places(const Block<Tr>& b)
      : spatial(b.template at<A>(b.k.at.spatial)),
        mean(b.template at<A>(b.k.at.place_mean)),
        maximum(b.template at<A>(b.k.at.place_maximum)),
        mark(b.template at<int>(b.k.at.place_mark)) {}
  __device__ __forceinline__ PositionTerms<A> operator[](int i) const {
    return {spatial[i], mean[i], maximum[i], mark[i]};
  }
  // Of V positions from i on, as load_factors has them.
  template <int V>
  __device__ __forceinline__ void read(int i, PositionTerms<A> (&q)[V]) const {
    A of_spatial[V], of_mean[V], of_maximum[V], of_mark[V];
    load_factors<V>(spatial + i, of_spatial);
    load_factors<V>(mean + i, of_mean);
    load_factors<V>(maximum + i, of_maximum);
    load_factors<V>(reinterpret_cast<const float*>(mark) + i, of_mark);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      q[j] = {of_spatial[j], of_mean[j], of_maximum[j], static_cast<int>(ptx::float_to_bits(of_mark[j]))};
    }
  }
};

constexpr int kTaps = 8;  // taps of a kernel row whose gradients a lane sums at a time

// Sums each of 2 kTaps values over the warp: lane l ends with the sum of value l / 2. Half of the values
// change places at every step, so that all sums take as many exchanges as there are values.
template <class A>
__device__ __forceinline__ A sum_each(A (&v)[2 * kTaps], int lane) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int half = kTaps >> step, bit = 16 >> step;
    const bool upper = lane & bit;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      if (j >= half) break;
      const A given = upper ? v[j] : v[j + half], kept = upper ? v[j + half] : v[j];
      v[j] = kept + __shfl_xor_sync(kAllLanes, given, bit);
    }
  }
  return v[0] + __shfl_xor_sync(kAllLanes, v[0], 1);
}

// This block's part of the kernel's gradient, before the norm's slope: each warp sums one row of the kernel
// over some of the positions, and the parts are added in a fixed order.
template <class Tr>
__device__ __forceinline__ void kernel_grads(const Block<Tr>& b, const Window& w,
                                             const Pair<typename Tr::A>* pools, const typename Tr::A* dz) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const int lines = p.kernel_d * p.kernel_h, count = static_cast<int>(taps(p)), pieces = k.kernel_pieces;
  A* parts = b.template at<A>(k.at.kernel_grad);  // [pieces][2][taps]
  const int64_t row = (b.n * b.blocks + b.rank) * conv_stride(p);
  const auto centre = [&](int i, Coordinates at) {
    return (i / p.width - w.first) * w.width + at.w + w.margin;
  };
  for (int job = b.warp; job <= lines * pieces; job += b.warps) {
    if (job == lines * pieces) {
      const A sum = warp_sum(long_sum<A>(b.own_positions.begin + b.lane, b.own_positions.end, 32,
                                         [&](int i) { return dz[centre(i, coordinates(p, i))]; }));
      if (b.lane == 0) put(k.conv_parts, row + 2 * count, sum);
      continue;
    }
    const int line = job % lines, piece = job / lines;
    const int kd = line / p.kernel_h - p.kernel_d / 2, kh = line % p.kernel_h - p.kernel_h / 2;
    for (int first = 0; first < p.kernel_w; first += kTaps) {
      LongSum<A> whole;
      const int step = pieces * 32;
      for (int begin = b.own_positions.begin + piece * 32; begin < b.own_positions.end;
           begin += kJoined * step) {
        A sums[2 * kTaps] = {};  // of the maximum's plane, then of the mean's
        const int end = min(begin + kJoined * step, b.own_positions.end);
        for (int i = begin + b.lane; i < end; i += step) {
          const Coordinates at = coordinates(p, i);
          const int d = at.d + kd, h = at.h + kh;
          if (d < 0 || d >= p.depth || h < 0 || h >= p.height) continue;
          const A v = dz[centre(i, at)];
          const int start = (d * p.height + h - w.first) * w.width + at.w + first;
#pragma unroll
          for (int j = 0; j < kTaps; ++j) {
            if (first + j < p.kernel_w) {
              const Pair<A> q = pools[start + j];
              sums[j] += v * q.maximum;
              sums[kTaps + j] += v * q.mean;
            }
          }
        }
        whole.add(sum_each(sums, b.lane));
      }
      const int plane = b.lane / (2 * kTaps), j = first + b.lane / 2 % kTaps;
      if (b.lane % 2 == 0 && j < p.kernel_w)
        parts[(piece * 2 + plane) * count + line * p.kernel_w + j] = whole.sum;
    }
  }
  __syncthreads();
  for (int i = b.thread; i < 2 * count; i += b.threads) {
    A sum = parts[i];
    for (int piece = 1; piece < pieces; ++piece) sum += parts[piece * 2 * count + i];
    put(k.conv_parts, row + i, sum);
  }
  // The norm's weight: sum dz conv is linear in the kernel. By the last warp, which has least else to do.
  if (p.dbn_weight.data && b.warp == b.warps - 1) {
    const Pair<A>* kernel = b.template at<Pair<A>>(k.at.kernel);
    const A sum = warp_sum(long_sum<A>(b.lane, count * pieces, 32, [&](int i) {
      const A* part = parts + i / count * 2 * count + i % count;
      const Pair<A> weight = kernel[i % count];
      return weight.maximum * part[0] + weight.mean * part[count];
    }));
    if (b.lane == 0) put(k.conv_parts, row + 2 * count + 1, sum);
  }
}

// dq of the tile's positions, from dz of the whole cluster, and this block's part of the kernel's gradient.
template <class Tr>
__device__ __forceinline__ void conv_grads(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Resident& k = b.k;
  const Problem& p = k.p;
  Pair<A>* pools = b.template at<Pair<A>>(k.at.window);
  A* grads = b.template at<A>(k.at.window_grad);
  A* map = b.template at<A>(k.at.pooled);
  const Places<A> places(b);
  const Pair<A>* kernel = b.template at<Pair<A>>(k.at.kernel);
  const Window w(k, b.own_positions);
  w.fill(b, [&](int i, int position) {
    A dz = 0;
    Pair<A> q = {A(0), A(0)};
    if (position >= 0) {
      const int64_t at = b.n * 2 * p.positions + position;
      q = {constant<A>(p.spatial_pool, at), constant<A>(p.spatial_pool, at + p.positions)};  // [1]
      if constexpr (Tr::kByChannel) {
        const A s = places.spatial[position];
        dz = cluster_sum(b, map + position) * s * (A(1) - s);
      } else {
        const int owner = owner_of(position, b.positions, k.position_unit, b.blocks);
        dz =
            *b.remote(map + (position - part_of(b.positions, k.position_unit, owner, b.blocks).begin), owner);
      }
    }
    pools[i] = q;
    grads[i] = dz;
  });
  const A slope = load_norm<typename Tr::T>(p).slope;
  if constexpr (!Tr::kByChannel) ptx::cluster_arrive();
  __syncthreads();
  for (int i = b.own_positions.begin + b.thread; i < b.own_positions.end; i += b.threads) {
    A maximum = 0, mean = 0;
    for_window(p, w, i, -1, [&](int tap, int at) {
      const Pair<A> weight = kernel[tap];
      const A v = grads[at];
      maximum += weight.maximum * v;
      mean += weight.mean * v;
    });
    maximum *= slope;
    mean = slope * mean / A(p.channels);
    share_position(b, places.maximum, i, maximum);
    share_position(b, places.mean, i, mean);
  }
  kernel_grads(b, w, pools, grads);
  if constexpr (Tr::kByChannel) ptx::cluster_arrive();
  // By positions, until all blocks have read this one's dz; by channels, until dq has come from all.
  ptx::cluster_wait();
  __syncthreads();
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
