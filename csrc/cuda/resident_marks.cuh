// Which vectors of a tile hold an element that a maximum was taken from: the only ones whose gradients need
// comparisons, one in some forty. Kept as bits and as a list. Contiguous tiles take sums from it, whose rows
// are channels: there it is in the order of rows.
#pragma once

#include "resident_walk.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

template <class Tr>
struct Marks {
  const Block<Tr>& b;
  unsigned* bits;         // [rows][words]
  unsigned short* first;  // [rows + 1], where a row's part of the list begins; not channels-last
  unsigned short* list;   // row * vectors + vector; the plan sees to it that 16 bits do
  int* entries;           // of the list, channels-last
  int words;

  __device__ __forceinline__ explicit Marks(const Block<Tr>& block)
      : b(block),
        bits(b.template at<unsigned>(b.k.at.mark_bits)),
        first(b.template at<unsigned short>(b.k.at.mark_first)),
        list(b.template at<unsigned short>(b.k.at.mark_list)),
        entries(b.template at<int>(b.k.at.item) + 1),
        words(b.k.mark_words) {}

  __device__ __forceinline__ void clear() const {
    for (int i = b.thread; i < b.rows * words; i += b.threads) bits[i] = 0;
    if (Tr::kLast && b.thread == 0) *entries = 0;
  }
  // After a barrier behind `clear`. Elements that are not the tile's are left out.
  __device__ __forceinline__ void add(int channel, int position) const {
    const int c = channel - b.tile_channels.begin, p = position - b.tile_positions.begin;
    if (c < 0 || c >= b.tile_channels.size() || p < 0 || p >= b.tile_positions.size()) return;
    const int row = Tr::kLast ? p : c, vector = (Tr::kLast ? c : p) / Tr::V;
    atomicOr(bits + row * words + vector / 32, 1u << vector % 32);
  }
  // The list, between two barriers.
  __device__ __forceinline__ void make_list() const {
    if (!Tr::kLast && b.warp == 0) {
      int total = 0;
      if (b.lane == 0) first[0] = 0;
      for (int base = 0; base < b.rows; base += 32) {
        const int row = base + b.lane;
        int sum = 0;
        for (int w = 0; row < b.rows && w < words; ++w) sum += __popc(bits[row * words + w]);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int before = __shfl_up_sync(kAllLanes, sum, step);
          if (b.lane >= step) sum += before;
        }
        if (row < b.rows) first[row + 1] = static_cast<unsigned short>(total + sum);
        total += __shfl_sync(kAllLanes, sum, 31);
      }
    }
    if constexpr (!Tr::kLast) __syncthreads();
    for (int i = b.thread; i < b.rows * words; i += b.threads) {
      const int row = i / words, word = i - row * words;
      int at = 0;
      if constexpr (Tr::kLast) {
        if (bits[i]) at = atomicAdd(entries, __popc(bits[i]));
      } else {
        at = first[row];
        for (int w = 0; w < word; ++w) at += __popc(bits[row * words + w]);
      }
      for (unsigned left = bits[i]; left; left &= left - 1, ++at) {
        list[at] =
            static_cast<unsigned short>(row * b.vectors + word * 32 + __ffs(static_cast<int>(left)) - 1);
      }
    }
  }
  __device__ __forceinline__ int count() const { return Tr::kLast ? *entries : first[b.rows]; }
  // f(i, row, vector) for entry i of the list. From the last thread on: the last warps have the fewest
  // strips.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = b.threads - 1 - b.thread; i < count(); i += b.threads) {
      const int row = list[i] / b.vectors;
      f(i, row, list[i] - row * b.vectors);
    }
  }
};

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
