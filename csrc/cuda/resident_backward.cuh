// The resident tier's backward: one cluster takes a sample from x and dy, read once, to dx.
#pragma once

#include "resident_gradients.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// dx of the tile. kNeedsX: shared ties, the p = 2 norm and log-sum-exp look at x again, and the residual is
// asked for there.
template <class Tr, bool kNeedsX, bool kResidual>
__device__ __forceinline__ void input_grads(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const T* x = b.template at<T>(k.at.tile);
  const T* dy = b.template at<T>(k.at.tile_dy);
  const ChannelTerms<A>* channels = b.template at<ChannelTerms<A>>(k.at.terms);
  const RareTerms<A>* rare = b.template at<RareTerms<A>>(k.at.rare);
  const Places<A> places(b);
  const A* tops = b.template at<A>(k.at.top);
  T* dx = as<T>(p.dx) + b.origin();
  const int64_t stride = b.stride();
  const int pitch = b.vectors * V, c0 = b.tile_channels.begin, p0 = b.tile_positions.begin;
  const bool split = kRareOptions && p.ties == kTiesSplit;
  landed.wait(b.rows - 1);
  for (int item = b.warp; item < Strip<Tr>::items(b, k.map_groups); item += b.warps) {
    const Strip<Tr> s(b, item, k.map_groups);
    if (!s.inside) continue;
    const int column = s.vector * V;
    ChannelTerms<A> of_channel[V];
    PositionTerms<A> of_place[V];
    if constexpr (Tr::kLast) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        of_channel[j] = kNeedsX ? channels[column + j] : with_average(channels[column + j]);
    } else {
      places.read(column, of_place);
#pragma unroll
      for (int j = 0; j < V; ++j) of_place[j] = kNeedsX ? of_place[j] : with_mean(of_place[j]);
    }
#pragma unroll 2
    for (int r = s.first; r < b.rows; r += s.step) {
      A d[V], v[V];
      load_shared<Tr>(dy + r * pitch + column, d);
      if constexpr (kNeedsX) load_shared<Tr>(x + r * pitch + column, v);
      if constexpr (Tr::kLast)
        of_place[0] = kNeedsX ? places[r] : with_mean(places[r]);
      else
        of_channel[0] = kNeedsX ? channels[r] : with_average(channels[r]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int c = Tr::kLast ? column + j : r, at = Tr::kLast ? r : column + j;
        const ChannelTerms<A>& channel = of_channel[Tr::kLast ? j : 0];
        const PositionTerms<A>& place = of_place[Tr::kLast ? 0 : j];
        if constexpr (kNeedsX) {
          d[j] = input_grad_of_x(p, channel, rare[c], place, split ? tops[at] : A(0), d[j], v[j], c0 + c,
                                 p0 + at);
        } else {
          const A inner = inner_grad<A, false>(place, d[j], A(1), A(0), A(0), c0 + c);
          const A grad = channel.gate * inner + (channel.mark == p0 + at ? channel.maximum : channel.average);
          d[j] = kResidual ? grad + d[j] : grad;
        }
      }
      store_vector<Tr>(dx + r * stride + column, d);  // [V]
    }
  }
}

template <class Tr>
__device__ __forceinline__ void backward(const Resident& k, unsigned char* memory) {
  const Block<Tr> b(k, memory);
  const Problem& p = k.p;
  cluster_started(k, b.rank);
  start_barriers(b, 2);
  load_tile(b, k.at.tile, p.x);
  load_tile(b, k.at.tile_dy, p.dy);
  stage_kernel(b);
  stage_saved(b);
  __syncthreads();
  Landed landed(b);
  if (p.spatial) {
    spatial_grads(b, landed);
    ptx::cluster_sync();
    conv_grads(b);
  }
  if (p.pools) {
    if (kRareOptions && p.ties == kTiesSplit)
      gate_grads<Tr, true>(b, landed);
    else
      gate_grads<Tr, false>(b, landed);
    pool_grads(b);
  }
  __syncthreads();
  weights_ready(k);
  if (input_grad_needs_x(p))
    input_grads<Tr, true, false>(b, landed);
  else if (p.residual)
    input_grads<Tr, false, true>(b, landed);
  else
    input_grads<Tr, false, false>(b, landed);
  if (Tr::kByChannel && p.pools) ptx::cluster_wait();
  __syncthreads();
  finish_weights(b);
}

#endif  // CBAM_HAS_CLUSTERS

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, 1)
    resident_backward_kernel(const __grid_constant__ Resident k) {
#if CBAM_HAS_CLUSTERS
  CBAM_DYNAMIC_SHARED(memory);
  backward<Tr>(k, memory);
#endif
}

}  // namespace resident
}  // namespace cbam
