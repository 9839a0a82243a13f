// From the parts of dg that the passes over x leave, in the order of their tiles, to dl = dg g (1 - g).
#pragma once

#include "streamed_mlp.cuh"

namespace cbam {

// Every `step`-th part of dg from `first` on.
template <class A>
__device__ __forceinline__ A gate_grad(const Streamed& k, int64_t n, int64_t c, int first, int step) {
  const Schedule& s = k.s;
  const int64_t slot = slot_of(k, n), channels = k.p.channels;
  const int cross = k.w.cross_parts ? s.reduce.tiles : 0, gate = k.w.gate_parts ? s.map.tiles : 0;
  LongSum<A> sum;
#pragma unroll 8
  for (int t = first; t < cross; t += step) {
    sum.add(fresh<A>(k.w.cross_parts, (slot * s.reduce.tiles + t) * channels + c));  // [1]
  }
#pragma unroll 8
  for (int t = first; t < gate; t += step) {
    sum.add(fresh<A>(k.w.gate_parts, (slot * s.map.tiles + t) * channels + c));  // [1]
  }
  return sum.sum;
}

// dl at n * C + c from all that came through x.
template <class A>
__device__ __forceinline__ A logit_grad(const Streamed& k, int64_t at, A dg) {
  if (k.operation == kAttentionBackward) dg += constant<A>(k.p.dchannel_gate, at);
  const A g = constant<A>(k.p.channel_gate, at);
  return dg * g * (A(1) - g);
}

// Where kGateGrad's sums of one tile go, derived once an item: a slot's index takes a division.
struct GateGradPlace {
  int64_t logits, parts;  // of channel 0
  __device__ __forceinline__ GateGradPlace(const Streamed& k, int64_t n, int tile) {
    const int64_t slot = slot_of(k, n), channels = k.p.channels;
    logits = n * channels;
    parts = (k.s.direct_logits ? slot : slot * k.s.map.tiles + tile) * channels;
  }
};

// A part of dg or, where the tile has all positions, the last one. A chained sample's dl takes the place of
// its first part, for the stages to come.
template <class A>
__device__ __forceinline__ void put_gate_grad(const Streamed& k, const GateGradPlace& to, int c, A sum) {
  if (k.s.direct_logits) {
    if (k.operation == kCbamBackward) sum += from_slot<A>(k.w.cross_parts, to.parts + c);
    const A dl = logit_grad(k, to.logits + c, sum);
    put(k.w.logit_grad, to.logits + c, dl);
    if (k.s.chained) put(k.w.cross_parts, c, dl);
  } else {
    put(k.w.gate_parts, to.parts + c, sum);
  }
}

// dl of a block of channels of several samples, which the block's part of dl w2 finds at `near`.
template <class A>
__device__ __forceinline__ void logit_grad_block(const Streamed& k, const MlpRange& r, A* near) {
  const int64_t width = r.end - r.begin;
  for (int64_t i = thread_index(); i < r.samples * width; i += kThreads) {
    const int64_t n = r.sample + i / width, c = r.begin + i % width, at = n * k.p.channels + c;
    if (k.s.direct_logits) {
      near[i] = fresh<A>(k.w.logit_grad, at);
    } else {
      near[i] = logit_grad(k, at, gate_grad<A>(k, n, c, 0, 1));
      put(k.w.logit_grad, at, near[i]);
    }
  }
}

// dl of 32 channels of one sample. scale_backward stops at dg, and also sums ds over its chunks here.
template <class T>
__device__ __forceinline__ void logit_grad_stage(const Streamed& k, const Item& item, Shared shared) {
  using A = Accumulate<T>;
  const Problem& p = k.p;
  const Schedule& s = k.s;
  const int gate_items = p.pools ? static_cast<int>((p.channels + kLogitTile - 1) / kLogitTile) : 0;
  const int64_t slot = slot_of(k, item.n);
  if (item.index >= gate_items) {
    const int64_t begin = int64_t{item.index - gate_items} * kThreads * 4;
    const int64_t end = min(p.positions, begin + kThreads * 4);
    for (int64_t i = begin + thread_index(); i < end; i += kThreads) {
      A ds = 0;
      for (int chunk = 0; chunk < s.reduce.chunks; ++chunk) {
        ds += fresh<A>(k.w.spatial_grad, (slot * s.reduce.chunks + chunk) * p.positions + i);  // [1]
      }
      const A gate = constant<A>(p.spatial_gate, item.n * p.positions + i);
      put(p.dz_out, item.n * p.positions + i, ds * gate * (A(1) - gate));
    }
    return;
  }
  A* parts = shared.take<A>(kThreads);
  const int lane = thread_index() % kLogitTile, group = thread_index() / kLogitTile;
  const int64_t c = int64_t{item.index} * kLogitTile + lane;
  constexpr int kGroups = kThreads / kLogitTile;
  A sum = c < p.channels ? gate_grad<A>(k, item.n, c, group, kGroups) : A(0);
  parts[thread_index()] = sum;
  __syncthreads();
  if (group == 0 && c < p.channels) {
    for (int g = 1; g < kGroups; ++g) sum += parts[g * kLogitTile + lane];
    const int64_t at = item.n * p.channels + c;
    if (k.operation == kScaleBackward)
      put(p.dchannel_gate, at, sum);
    else
      put(k.w.logit_grad, at, logit_grad(k, at, sum));
  }
}

}  // namespace cbam
