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

template <class T_, int kVector_, Layout kLayout_, Split kSplit_> struct Traits {
  using T = T_;
  using A = Accumulate<T>;
  static constexpr int V = kVector_;
  static constexpr bool kLast = kLayout_ == kChannelsLast;
  static constexpr bool kByChannel = kSplit_ == kByChannels;
  // A warp's strip: kAcross vectors of a row, in kDown rows.
  static constexpr int kAccess = V * static_cast<int>(sizeof(T));
  static constexpr int kAcross = strip_bytes(kLayout_, kSplit_, kAccess) / kAccess;
  static constexpr int kDown = 32 / kAcross;
  static_assert(kAccess == 16 || kAccess == 8, "an access is 8 or 16 bytes");
  static_assert(!(kLast && kByChannel), "channels-last samples are cut by positions");
  static_assert(kAcross * kDown == 32);
};

#if CBAM_HAS_CLUSTERS

template <class A> struct alignas(2 * sizeof(A)) Pair {
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
template <class Tr> struct Block {
  using T = typename Tr::T;
  using A = typename Tr::A;
  const Resident& k;
  unsigned char* memory;
  int64_t n;
  int rank, blocks;
  int channels, positions;   // of the sample
  Range own_channels;        // whose share of the MLP is this block's
  Range own_positions;       // whose convolution is
  Range tile_channels, tile_positions;
  int rows, vectors;
  int thread, threads, warp, lane, warps;

  __device__ __forceinline__ Block(const Resident& launch, unsigned char* shared) : k(launch), memory(shared) {
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
  template <class X> __device__ __forceinline__ X* at(int32_t offset) const {
    return reinterpret_cast<X*>(memory + offset);
  }
  // The same object in the block of another rank.
  template <class X> __device__ __forceinline__ X* remote(X* mine, int of) const {
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

// ---- Loads. The tile lies in shared memory without gaps.

template <class Tr> __device__ __forceinline__ void start_barriers(const Block<Tr>& b, int tiles) {
  uint64_t* barriers = b.template at<uint64_t>(b.k.at.barriers);
  if (b.thread < kLoads) {
    const int each = b.rows_a_load();
    const int rows = max(0, min(b.rows - b.thread * each, each));
    ptx::barrier_init(barriers + b.thread, 1);
    ptx::barrier_init_fence();
    const uint32_t row_bytes = static_cast<uint32_t>(b.vectors * Tr::V * static_cast<int>(sizeof(typename Tr::T)));
    ptx::barrier_arrive_expect(barriers + b.thread, static_cast<uint32_t>(tiles * rows) * row_bytes);
  }
  __syncthreads();
}

template <class Tr> __device__ __forceinline__ void load_tile(const Block<Tr>& b, int32_t tile, const void* from) {
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
      ptx::bulk_load(to + r * row, source + r * b.stride(), static_cast<uint32_t>(row * static_cast<int>(sizeof(T))),
                     barriers + r / each);
    }
  }
}

// Rows of the tile that have landed; a warp asks for rows in any order, and waits for each load once.
struct Landed {
  uint64_t* barriers;
  int each, next, rows;
  template <class Tr> __device__ __forceinline__ explicit Landed(const Block<Tr>& b)
      : barriers(b.template at<uint64_t>(b.k.at.barriers)), each(b.rows_a_load()), next(0), rows(0) {}
  __device__ __forceinline__ void wait(int row) {
    while (row >= rows && next < kLoads) {
      ptx::barrier_wait(barriers + next, 0);
      ++next;
      rows += each;
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
template <class T, int V> __device__ __forceinline__ void unpack_words(const unsigned* w, Accumulate<T> (&v)[V]) {
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
  if constexpr (Tr::V * sizeof(typename Tr::T) == 16) {
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
__device__ __forceinline__ void store_vector(typename Tr::T* p, const typename Tr::A (&v)[Tr::V]) {
  using T = typename Tr::T;
  if constexpr (Tr::V * sizeof(T) == 16) {
    store_global<true>(p, v);
  } else {
    ptx::store_streaming(reinterpret_cast<uint2*>(p), make_uint2(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3])));
  }
}

// V values of shared memory, a multiple of 4 from a multiple of 4 on.
template <int V> __device__ __forceinline__ void load_factors(const float* from, float (&v)[V]) {
  static_assert(V % 4 == 0);
#pragma unroll
  for (int j = 0; j < V; j += 4) {
    const float4 w = *reinterpret_cast<const float4*>(from + j);
    v[j] = w.x;
    v[j + 1] = w.y;
    v[j + 2] = w.z;
    v[j + 3] = w.w;
  }
}

// ---- Walks.

template <bool kValue> struct Flag { static constexpr bool value = kValue; };

// A warp's share of a strip of columns: lane (down, across) takes rows first, first + step, ... of one vector.
template <class Tr> struct Strip {
  int index, group;      // strip, and which of the groups that share it
  int vector;            // within the row, of a vector that is there
  int down, first, step; // the lane's row of the first kDown
  bool inside;           // false: this lane repeats another one's vector

  __device__ __forceinline__ Strip(const Block<Tr>& b, int item, int groups) {
    const int strips = (b.vectors + Tr::kAcross - 1) / Tr::kAcross;
    index = item % strips;
    group = item / strips;
    vector = index * Tr::kAcross + b.lane % Tr::kAcross;
    inside = vector < b.vectors;
    vector = min(vector, b.vectors - 1);
    down = b.lane / Tr::kAcross;
    if constexpr (Tr::kAcross == 4) {
      // Lanes 0..7 read two rows at a time, which are in different banks where the distance of these rows is
      // half of 128 bytes off a multiple of it: 4, 2 or 1 rows apart.
      if (b.vectors % 2) down = down / 2 + down % 2 * 4;
      else if (b.vectors % 4) down = down % 2 * 2 + down / 2 % 2 + down / 4 * 4;
    }
    first = group * Tr::kDown + down;
    step = groups * Tr::kDown;
  }
  static __device__ __forceinline__ int items(const Block<Tr>& b, int groups) {
    return (b.vectors + Tr::kAcross - 1) / Tr::kAcross * groups;
  }
};

// Merges a strip's rows over its lanes; the lanes `down == 0` have the result.
template <class Tr, class S> __device__ __forceinline__ void merge_down(S& s) { merge_lanes(s, Tr::kAcross, 32); }

// The maximum and sum of a vector, the usual pools: the index of the maximum is found later.
template <class A, int V> __device__ __forceinline__ A largest_of(const A (&v)[V]) {
  A m = v[0];
#pragma unroll
  for (int j = 1; j < V; ++j) m = ptx::max_nan(m, v[j]);
  return m;
}
template <class A, int V> __device__ __forceinline__ A sum_of(const A (&v)[V]) {
  A s[V];
#pragma unroll
  for (int j = 0; j < V; ++j) s[j] = v[j];
#pragma unroll
  for (int half = V / 2; half; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) s[j] += s[j + half];
  }
  return s[0];
}

template <class S> struct IsUsual : Flag<false> {};
template <> struct IsUsual<MeanMax<float, false>> : Flag<true> {};

// Where a running maximum moves: also once it is NaN, which is put right at the end of a walk. One
// comparison an element instead of three.
template <class A> __device__ __forceinline__ bool moves(A v, A peak) { return !(v <= peak); }

// One statistic for each row of the tile: value(row, vector, v) brings V elements, whose indices begin at
// vector * V; out(row, S) is called in one lane. `landed` is waited on where a tile may still be loading.
template <class S, class Tr, class Value, class Out>
__device__ __forceinline__ void reduce_rows(const Block<Tr>& b, Landed& landed, Value value, Out out) {
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  constexpr int kTeam = 8;  // lanes a row
  const int lane = b.lane % kTeam, team = b.lane / kTeam;
  for (int base = b.warp * (32 / kTeam); base < b.rows; base += b.warps * (32 / kTeam)) {
    const bool inside = base + team < b.rows;
    const int row = inside ? base + team : b.rows - 1;
    landed.wait(row);
    S acc = S::empty(lane < b.vectors ? lane * V : kNoIndex);
    if constexpr (IsUsual<S>::value) {
      A sum = 0, peak = acc.peak.value;
      int best = min(lane, b.vectors - 1);
#pragma unroll 2
      for (int j = lane; j < b.vectors; j += kTeam) {
        A v[V];
        value(row, j, v);
        const A m = largest_of(v);
        sum += sum_of(v);
        if (moves(m, peak)) best = j;
        peak = ptx::max_nan(peak, m);
      }
      acc.sum = sum;
      acc.peak.value = peak;
      if (lane < b.vectors) {
        A v[V];
        if (peak == peak) {
          value(row, best, v);
#pragma unroll
          for (int j = V - 1; j >= 0; --j) {
            if (v[j] == peak) acc.peak.mark = best * V + j;
          }
        } else {  // `best` went on moving: back to the first vector with a NaN
          best = lane;
          value(row, best, v);
          while (largest_of(v) == largest_of(v)) {
            best += kTeam;
            value(row, best, v);
          }
#pragma unroll
          for (int j = V - 1; j >= 0; --j) {
            if (v[j] != v[j]) acc.peak.mark = best * V + j;
          }
        }
      }
    } else {
      for (int j = lane; j < b.vectors; j += kTeam) {
        A v[V];
        value(row, j, v);
#pragma unroll
        for (int u = 0; u < V; ++u) acc.add(v[u], j * V + u);
      }
    }
    merge_lanes(acc, 1, kTeam);
    if (inside && lane == 0) out(row, acc);
  }
}

// One statistic for each column: value(strip, row, v) brings V elements of index `row`; out(column, S) once
// each, after a barrier. `parts` holds column_groups x columns of them.
template <class S, class Tr, class Value, class Out>
__device__ __forceinline__ void reduce_columns(const Block<Tr>& b, Landed& landed, S* parts, Value value, Out out) {
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const int groups = b.k.column_groups, columns = b.vectors * V;
  for (int item = b.warp; item < Strip<Tr>::items(b, groups); item += b.warps) {
    const Strip<Tr> strip(b, item, groups);
    S acc[V];
#pragma unroll
    for (int j = 0; j < V; ++j) acc[j] = S::empty(strip.first < b.rows ? strip.first : kNoIndex);
    const auto walk = [&](auto wait_too) {
#pragma unroll 4
      for (int r = strip.first; r < b.rows; r += strip.step) {
        if constexpr (decltype(wait_too)::value) landed.wait(r);
        A v[V];
        value(strip, r, v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if constexpr (IsUsual<S>::value) {
            acc[j].sum += v[j];
            if (moves(v[j], acc[j].peak.value)) acc[j].peak.mark = r;
            acc[j].peak.value = ptx::max_nan(acc[j].peak.value, v[j]);
          } else {
            acc[j].add(v[j], r);
          }
        }
      }
    };
    if (landed.rows < b.rows) walk(Flag<true>{});
    else walk(Flag<false>{});
    if constexpr (IsUsual<S>::value) {
      A top = acc[0].peak.value;
#pragma unroll
      for (int j = 1; j < V; ++j) top = ptx::max_nan(top, acc[j].peak.value);
      if (top != top) {  // marks of NaN went on moving: back to the first
#pragma unroll 1
        for (int r = b.rows - 1 - (b.rows - 1 - strip.first) % strip.step; r >= strip.first; r -= strip.step) {
          A v[V];
          value(strip, r, v);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (v[j] != v[j]) acc[j].peak.mark = r;
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      merge_down<Tr>(acc[j]);
      if (b.lane < Tr::kAcross && strip.inside) parts[strip.group * columns + strip.vector * V + j] = acc[j];
    }
  }
  __syncthreads();
  for (int i = b.thread; i < columns; i += b.threads) {
    S total = parts[i];
    for (int g = 1; g < groups; ++g) total.merge(parts[g * columns + i]);
    out(i, total);
  }
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
