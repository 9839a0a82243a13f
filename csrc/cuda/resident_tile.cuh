// The resident tier's tile: which part of a sample a block holds, how it is loaded, and how warps walk it.
#pragma once

#include "resident.h"
#include "streamed_engine.cuh"

// Clusters and bulk copies begin with sm_90; for older devices the kernels are empty and never launched.
#if defined(CBAM_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CBAM_HAS_CLUSTERS 1
#else
#define CBAM_HAS_CLUSTERS 0
#endif

namespace cbam {
namespace resident {

template <class T_, int kVector_, Layout kLayout_, Split kSplit_>
struct Traits {
  using T = T_;
  using A = Accumulate<T>;
  static constexpr int V = kVector_;
  static constexpr bool kLast = kLayout_ == kChannelsLast;
  static constexpr bool kByChannel = kSplit_ == kByChannels;
  // A warp's strip: kAcross vectors of a row, in kDown rows.
  static constexpr int kAccess = V * static_cast<int>(sizeof(T));
  static constexpr int kAcross = strip_bytes(kLayout_, kSplit_, kAccess) / kAccess;
  static constexpr int kDown = 32 / kAcross;
  // Narrower rows do not begin where an access of 16 bytes may: y and dx take the tile's place in shared
  // memory, and leave it by bulk copies.
  static constexpr bool kStaged = kAccess < 16;
  static_assert(kAccess == 16 || kAccess == 8 || V == 1, "an access is 8 or 16 bytes, or an element");
  static_assert(!kStaged || kByChannel, "a bulk copy takes whole rows");
  static_assert(!(kLast && kByChannel), "channels-last samples are cut by positions");
  static_assert(kAcross * kDown == 32);
};

#if CBAM_HAS_CLUSTERS

template <class A>
struct alignas(2 * sizeof(A)) Pair {
  A maximum, mean;
};

struct Range {
  int begin, end;
  __device__ __forceinline__ int size() const { return end - begin; }
};
// Part `rank` of `total` elements in units, as even as can be.
__device__ __forceinline__ Range part_of(int total, int unit, int rank, int parts) {
  const int units = total / unit, each = units / parts, more = units % parts;
  const int begin = rank * each + min(rank, more);
  return {begin * unit, (begin + each + (rank < more)) * unit};
}
// The part that element i is in.
__device__ __forceinline__ int owner_of(int i, int total, int unit, int parts) {
  const int units = total / unit, each = units / parts, more = units % parts, u = i / unit;
  const int longer = more * (each + 1);
  return u < longer ? u / (each + 1) : more + (u - longer) / each;
}

// This block's place in the cluster, and its tile: `rows` rows of `vectors` vectors, from row 0 on.
template <class Tr>
struct Block {
  using T = typename Tr::T;
  using A = typename Tr::A;
  const Resident& k;
  unsigned char* memory;
  int64_t n;
  int rank, blocks;
  int channels, positions;  // of the sample
  Range own_channels;       // whose share of the MLP is this block's
  Range own_positions;      // whose convolution is
  Range tile_channels, tile_positions;
  int rows, vectors;
  int thread, threads, warp, lane, warps;

  __device__ __forceinline__ Block(const Resident& launch, unsigned char* shared)
      : k(launch), memory(shared) {
    rank = static_cast<int>(ptx::cluster_rank());
    blocks = k.cluster;
    n = blockIdx.x / static_cast<unsigned>(blocks);
    channels = static_cast<int>(k.p.channels);
    positions = static_cast<int>(k.p.positions);
    own_channels = part_of(channels, k.channel_unit, rank, blocks);
    own_positions = part_of(positions, k.position_unit, rank, blocks);
    tile_channels = Tr::kByChannel ? own_channels : Range{0, channels};
    tile_positions = Tr::kByChannel ? Range{0, positions} : own_positions;
    rows = Tr::kLast ? tile_positions.size() : tile_channels.size();
    vectors = (Tr::kLast ? tile_channels.size() : tile_positions.size()) / Tr::V;
    thread = static_cast<int>(threadIdx.x);
    threads = static_cast<int>(blockDim.x);
    warp = thread / 32;
    lane = thread % 32;
    warps = threads / 32;
  }
  template <class X>
  __device__ __forceinline__ X* at(int32_t offset) const {
    return reinterpret_cast<X*>(memory + offset);
  }
  // The same object in the block of another rank.
  template <class X>
  __device__ __forceinline__ X* remote(X* mine, int of) const {
    return ptx::map_shared(mine, static_cast<unsigned>(of));
  }
  // Offset of the tile's first element in x, and elements between its rows there.
  __device__ __forceinline__ int64_t origin() const {
    const int64_t sample = n * k.p.channels * k.p.positions;
    if constexpr (Tr::kLast) return sample + int64_t{tile_positions.begin} * channels;
    return sample + int64_t{tile_channels.begin} * positions + tile_positions.begin;
  }
  __device__ __forceinline__ int64_t stride() const { return Tr::kLast ? channels : positions; }
  // A multiple of what begins at 16 bytes.
  __device__ __forceinline__ int rows_a_load() const {
    const int each = (rows + kLoads - 1) / kLoads, unit = Tr::kByChannel ? k.channel_unit : 1;
    return (each + unit - 1) / unit * unit;
  }
};

// use(rank, value) for what lies here in each block of the cluster, in the order of the ranks. All that have
// room are on their way before the first is used: one trip to another block's memory, not one a rank.
template <class Tr, class X, class Use>
__device__ __forceinline__ void for_ranks(const Block<Tr>& b, X* mine, Use use) {
  constexpr int kAtOnce = 8;
  static_assert(kClusters[0] % kAtOnce == 0 && kClusters[1] % kAtOnce == 0);
#pragma unroll 1
  for (int first = 0; first < b.blocks; first += kAtOnce) {
    X v[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) v[u] = *b.remote(mine, first + u);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) use(first + u, v[u]);
  }
}

// ---- Loads. The tile lies in shared memory without gaps.

template <class Tr>
__device__ __forceinline__ void start_barriers(const Block<Tr>& b, int tiles) {
  uint64_t* barriers = b.template at<uint64_t>(b.k.at.barriers);
  if (b.thread < kLoads) {
    const int each = b.rows_a_load();
    const int rows = max(0, min(b.rows - b.thread * each, each));
    ptx::barrier_init(barriers + b.thread, 1);
    ptx::barrier_init_fence();
    const uint32_t row_bytes =
        static_cast<uint32_t>(b.vectors * Tr::V * static_cast<int>(sizeof(typename Tr::T)));
    ptx::barrier_arrive_expect(barriers + b.thread, static_cast<uint32_t>(tiles * rows) * row_bytes);
  }
  __syncthreads();
}

template <class Tr>
__device__ __forceinline__ void load_tile(const Block<Tr>& b, int32_t tile, const void* from) {
  using T = typename Tr::T;
  uint64_t* barriers = b.template at<uint64_t>(b.k.at.barriers);
  const int each = b.rows_a_load(), row = b.vectors * Tr::V;
  T* to = b.template at<T>(tile);
  const T* source = static_cast<const T*>(from) + b.origin();
  if constexpr (Tr::kLast || Tr::kByChannel) {  // one piece of memory: [rows of this load][row]
    const int first = b.thread * each, rows = min(b.rows - first, each);
    if (b.thread < kLoads && rows > 0 && row > 0) {
      ptx::bulk_load(to + first * row, source + int64_t{first} * row,
                     static_cast<uint32_t>(rows * row * static_cast<int>(sizeof(T))), barriers + b.thread);
    }
  } else if (row > 0) {
    for (int r = b.thread; r < b.rows; r += b.threads) {  // [row]
      ptx::bulk_load(to + r * row, source + r * b.stride(),
                     static_cast<uint32_t>(row * static_cast<int>(sizeof(T))), barriers + r / each);
    }
  }
}

// Of a staged tile, after the block has written it: one bulk copy for the rows of each load. The threads that
// issue them wait for them before they end, by `tile_stored`.
template <class Tr>
__device__ __forceinline__ void store_tile(const Block<Tr>& b, int32_t tile, void* to) {
  static_assert(Tr::kStaged);
  using T = typename Tr::T;
  ptx::fence_proxy_async();
  __syncthreads();
  const int each = b.rows_a_load(), row = b.vectors * Tr::V;
  const int first = b.thread * each, rows = min(b.rows - first, each);
  if (b.thread < kLoads && rows > 0) {
    ptx::bulk_store(static_cast<T*>(to) + b.origin() + int64_t{first} * row,
                    b.template at<T>(tile) + first * row,
                    static_cast<uint32_t>(rows * row * static_cast<int>(sizeof(T))));
    ptx::bulk_commit();
  }
}
template <class Tr>
__device__ __forceinline__ void tile_stored(const Block<Tr>& b) {
  if (b.thread < kLoads) ptx::bulk_wait_read<0>();
}

// Rows of the tile that have landed; a warp asks for rows in any order, and waits for each load once.
struct Landed {
  static constexpr int kAllRows = 0x7fffffff;  // one comparison a row, once all loads have landed
  uint64_t* barriers;
  int each, next, rows;
  template <class Tr>
  __device__ __forceinline__ explicit Landed(const Block<Tr>& b)
      : barriers(b.template at<uint64_t>(b.k.at.barriers)), each(b.rows_a_load()), next(0), rows(0) {}
  __device__ __forceinline__ void wait(int row) {
    while (row >= rows) {
      ptx::barrier_wait(barriers + next, 0);
      ++next;
      rows = next < kLoads ? rows + each : kAllRows;
    }
  }
};

// ---- Vectors of V elements.

// Both halves of a word, by one instruction each where the format allows it.
__device__ __forceinline__ void unpack_pair(BFloat16, unsigned w, float& low, float& high) {
  low = ptx::bits_to_float(w << 16);
  high = ptx::bits_to_float(w & 0xffff0000u);
}
__device__ __forceinline__ void unpack_pair(Half, unsigned w, float& low, float& high) {
  low = ptx::unpack_half(static_cast<unsigned short>(w));
  high = ptx::unpack_half(static_cast<unsigned short>(w >> 16));
}
template <class T, int V>
__device__ __forceinline__ void unpack_words(const unsigned* w, Accumulate<T> (&v)[V]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) unpack_pair(T{}, w[i], v[2 * i], v[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = ptx::bits_to_float(w[i]);
  }
}
template <class Tr>
__device__ __forceinline__ void load_shared(const typename Tr::T* p, typename Tr::A (&v)[Tr::V]) {
  if constexpr (Tr::V == 1) {
    using Element = cbam::Element<typename Tr::T>;
    v[0] = Element::decode(*reinterpret_cast<const typename Element::Word*>(p));
  } else if constexpr (Tr::V * sizeof(typename Tr::T) == 16) {
    const uint4 w = *reinterpret_cast<const uint4*>(p);
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
    unpack_words<typename Tr::T>(words, v);
  } else {
    const uint2 w = *reinterpret_cast<const uint2*>(p);
    const unsigned words[2] = {w.x, w.y};
    unpack_words<typename Tr::T>(words, v);
  }
}
template <class Tr>
struct Vector {
  typename Tr::A of[Tr::V];
};
template <class Tr>
__device__ __forceinline__ Vector<Tr> shared_vector(const typename Tr::T* p) {
  Vector<Tr> v;
  load_shared<Tr>(p, v.of);
  return v;
}
// To p in global memory, or where the tile is staged in shared memory.
template <class Tr>
__device__ __forceinline__ void store_vector(typename Tr::T* p, const typename Tr::A (&v)[Tr::V]) {
  using T = typename Tr::T;
  if constexpr (!Tr::kStaged) {
    store_global<true>(p, v);
  } else if constexpr (Tr::V == 1) {
    *reinterpret_cast<typename Element<T>::Word*>(p) = Element<T>::encode(v[0]);
  } else {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]));
  }
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
