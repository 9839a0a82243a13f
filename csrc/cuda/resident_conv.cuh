// The spatial gate's convolution in a cluster: windows of a map around a block's own positions.
#pragma once

#include "resident_walk.cuh"
#include "streamed_conv.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// Rows of the map (of all depths) that the convolution of positions [begin, end) reaches, in shared
// memory with zeros at both sides, so that only rows need a check.
struct Window {
  int first, rows;    // rows of the map
  int width, margin;  // of a row in the window; zeros at each side

  __device__ __forceinline__ Window(const Resident& k, Range own) {
    const Problem& p = k.p;
    const int halo = p.kernel_d / 2 * p.height + p.kernel_h / 2;
    margin = p.kernel_w / 2;
    width = k.window_width;
    first = max(0, own.begin / p.width - halo);
    const int last = min(p.depth * p.height, (own.end - 1) / p.width + halo + 1);
    rows = own.size() > 0 ? last - first : 0;
  }
  // store(index in the window, position or -1) for every element.
  template <class Tr, class Store>
  __device__ __forceinline__ void fill(const Block<Tr>& b, Store store) const {
    const int map_width = b.k.p.width;
    for (int i = b.thread; i < rows * width; i += b.threads) {
      const int row = i / width, w = i - row * width - margin;
      store(i, w >= 0 && w < map_width ? (first + row) * map_width + w : -1);
    }
  }
};

// Calls f(tap, index in the window) for the taps of the position whose row and column are given; sign -1
// turns the kernel around. kWidth is the kernel's width, or 0 for any.
template <int kWidth, class F>
__device__ __forceinline__ void window_taps(const Problem& p, const Window& window, int position, int sign,
                                            F f) {
  const Coordinates at = coordinates(p, position);
  const int width = kWidth ? kWidth : p.kernel_w;
  int tap = 0;
#pragma unroll 1
  for (int kd = 0; kd < p.kernel_d; ++kd) {
    const int d = at.d + sign * (kd - p.kernel_d / 2);
#pragma unroll 1
    for (int kh = 0; kh < p.kernel_h; ++kh, tap += width) {
      const int h = at.h + sign * (kh - p.kernel_h / 2);
      if (d < 0 || d >= p.depth || h < 0 || h >= p.height) continue;
      const int start =
          (d * p.height + h - window.first) * window.width + at.w + window.margin - sign * (width / 2);
      if constexpr (kWidth > 0) {
#pragma unroll
        for (int kw = 0; kw < kWidth; ++kw) f(tap + kw, start + sign * kw);
      } else {
        for (int kw = 0; kw < width; ++kw) f(tap + kw, start + sign * kw);
      }
    }
  }
}
template <class F>
__device__ __forceinline__ void for_window(const Problem& p, const Window& window, int position, int sign,
                                           F f) {
  if (p.kernel_w == 7)
    window_taps<7>(p, window, position, sign, f);
  else
    window_taps<0>(p, window, position, sign, f);
}

template <class Tr>
__device__ __forceinline__ void stage_kernel(const Block<Tr>& b) {
  using A = typename Tr::A;
  const Problem& p = b.k.p;
  if (!p.spatial) return;
  Pair<A>* kernel = b.template at<Pair<A>>(b.k.at.kernel);
  for (int i = b.thread; i < static_cast<int>(taps(p)); i += b.threads) {
    kernel[i] = {kernel_weight<typename Tr::T>(p, 0, i), kernel_weight<typename Tr::T>(p, 1, i)};  // [1]
  }
}

// Writes a value of a position into every block whose tile has it.
template <class Tr, class X>
__device__ __forceinline__ void share_position(const Block<Tr>& b, X* map, int position, const X& value) {
  if constexpr (Tr::kByChannel) {
#pragma unroll 1
    for (int r = 0; r < b.blocks; ++r) *b.remote(map + position, r) = value;
  } else {
    map[position - b.tile_positions.begin] = value;
  }
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
