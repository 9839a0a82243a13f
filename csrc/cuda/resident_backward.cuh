// The resident tier's backward: one cluster takes a sample from x and dy, read once, to dx.
#pragma once

#include "resident_gradients.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// dx of the tile. kNeedsX: shared ties, the p = 2 norm and log-sum-exp look at x again, and the residual is
// asked for there. Else all vectors but the marked ones are computed without comparisons.
template <class Tr, bool kNeedsX, bool kResidual>
__device__ __forceinline__ void input_grads(const Block<Tr>& b, Landed& landed) {
  using T = typename Tr::T;
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  // With x, the terms of V positions are kept too: sm_120 has no register left to unroll with.
  constexpr int kUnroll = kNeedsX ? 1 : 4;
  const Resident& k = b.k;
  const Problem& p = k.p;
  const T* x = b.template at<T>(k.at.tile);
  T* dy = b.template at<T>(k.at.tile_dy);
  const ChannelTerms<A>* channels = b.template at<ChannelTerms<A>>(k.at.terms);
  const RareTerms<A>* rare = b.template at<RareTerms<A>>(k.at.rare);
  const A* tops = b.template at<A>(k.at.top);
  const Places<A> places(b);
  const Marks<Tr> marks(b);
  const int pitch = b.vectors * V;
  T* dx = Tr::kStaged ? dy : as<T>(p.dx) + b.origin();
  const int64_t stride = Tr::kStaged ? pitch : b.stride();
  const int c0 = b.tile_channels.begin, p0 = b.tile_positions.begin;
  const bool split = p.ties == kTiesSplit;
  landed.wait(b.rows - 1);
  for (int item = b.warp; item < Strip<Tr>::items(b, k.map_groups); item += b.warps) {
    const Strip<Tr> s(b, item, k.map_groups);
    if (!s.inside) continue;
    const int column = s.vector * V;
    const unsigned* bits = marks.bits + s.vector / 32;
    const unsigned bit = 1u << s.vector % 32;
    // Of the columns: gate and average of channels, or spatial gate and mean of positions.
    A factor[V], offset[V];
    if constexpr (!kNeedsX && Tr::kLast) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        factor[j] = channels[column + j].gate;
        offset[j] = channels[column + j].average;
      }
    } else if constexpr (!kNeedsX) {
      load_factors<V>(places.spatial + column, factor);
      load_factors<V>(places.mean + column, offset);
    }
    PositionTerms<A> of_place[V];
    if constexpr (kNeedsX && !Tr::kLast) places.read(column, of_place);
    const auto load = [&](int r) { return shared_vector<Tr>(dy + r * pitch + column); };
    for_rows<Tr, kUnroll>(b, s, load, [&](int r, const Vector<Tr>& d) {
      A grad[V];
      if constexpr (kNeedsX) {
        A v[V];
        load_shared<Tr>(x + r * pitch + column, v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const int c = Tr::kLast ? column + j : r, at = Tr::kLast ? r : column + j;
          grad[j] = input_grad_of_x(p, channels[c], rare[c], Tr::kLast ? places[r] : of_place[j],
                                    split ? tops[at] : A(0), d.of[j], v[j], c0 + c, p0 + at);
        }
      } else {
        const A row_factor = Tr::kLast ? places.spatial[r] : channels[r].gate;
        const A row_offset = Tr::kLast ? places.mean[r] : channels[r].average;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          grad[j] = Tr::kLast ? factor[j] * (d.of[j] * row_factor + row_offset) + offset[j]
                              : row_factor * (d.of[j] * factor[j] + offset[j]) + row_offset;
          if (kResidual) grad[j] += d.of[j];
        }
      }
      if (kNeedsX || !(bits[r * marks.words] & bit)) store_vector<Tr>(dx + r * stride + column, grad);  // [V]
    });
  }
  if constexpr (kNeedsX) return;
  if constexpr (Tr::kStaged)
    __syncthreads();  // all have read the marked vectors of dy, which dx now replaces
  marks.for_each([&](int, int r, int vector) {
    const int column = vector * V;
    A d[V];
    load_shared<Tr>(dy + r * pitch + column, d);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int c = Tr::kLast ? column + j : r, at = Tr::kLast ? r : column + j;
      const ChannelTerms<A> channel = channels[c];
      const A pooled = places.mean[at] + (places.mark[at] == c0 + c ? places.maximum[at] : A(0));
      const A average = channel.average + (channel.mark == p0 + at ? channel.maximum : A(0));
      const A grad = channel.gate * (d[j] * places.spatial[at] + pooled) + average;
      d[j] = kResidual ? grad + d[j] : grad;
    }
    store_vector<Tr>(dx + r * stride + column, d);  // [V]
  });
}

template <class Tr>
__device__ __forceinline__ void backward(const Resident& k, unsigned char* memory) {
  const Block<Tr> b(k, memory);
  const Problem& p = k.p;
  cluster_started(k, b.rank);
  const Marks<Tr> marks(b);
  marks.clear();
  start_barriers(b, 2);
  load_tile(b, k.at.tile, p.x);
  load_tile(b, k.at.tile_dy, p.dy);
  stage_kernel(b);
  stage_saved(b);
  __syncthreads();
  marks.make_list();
  Landed landed(b);
  product_sums(b, landed);
  if (p.spatial) {
    ptx::cluster_sync();
    conv_grads(b);
  }
  if (p.pools) {
    if (p.spatial) {
      if (p.ties == kTiesSplit)
        pool_sums<Tr, true>(b, landed);
      else
        pool_sums<Tr, false>(b, landed);
    }
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
  if constexpr (Tr::kStaged) store_tile(b, k.at.tile_dy, p.dx);
  if (Tr::kByChannel && p.pools) ptx::cluster_wait();
  __syncthreads();
  finish_weights(b);
  if constexpr (Tr::kStaged) tile_stored(b);
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
