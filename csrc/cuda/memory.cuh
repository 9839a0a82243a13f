// Global memory: the one place where kernels touch it, with dtype conversion and 128-bit vectors.
#pragma once

#include <type_traits>

#include "problem.h"
#include "ptx.cuh"

namespace cbam {

// Storage of the 16-bit floating-point types; arithmetic is done in Accumulate<T>.
struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// Elements of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// How a load treats the caches; see the functions of ptx.cuh.
enum class Cache { kReadOnly, kLastUse, kCoherent, kGeneric };

template <Cache kCache, class W>
__device__ __forceinline__ W load_word(const W* p) {
  if constexpr (kCache == Cache::kReadOnly) return ptx::load_read_only(p);
  if constexpr (kCache == Cache::kLastUse) return ptx::load_last_use(p);
  if constexpr (kCache == Cache::kCoherent) return ptx::load_coherent(p);
  if constexpr (kCache == Cache::kGeneric) return ptx::load_generic(p);
}
template <bool kStreaming, class W>
__device__ __forceinline__ void store_word(W* p, W v) {
  if constexpr (kStreaming)
    ptx::store_streaming(p, v);
  else
    ptx::store(p, v);
}

// Words of 2, 4, 8 and 16 bytes.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = unsigned long long;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

__device__ __forceinline__ float unpack(BFloat16 v) {
  return ptx::bits_to_float(unsigned(v.bits) << 16);
}
__device__ __forceinline__ float unpack(Half v) {
  return ptx::unpack_half(v.bits);
}
template <class T>
__device__ __forceinline__ T pack(float v);
template <>
__device__ __forceinline__ BFloat16 pack<BFloat16>(float v) {
  return {static_cast<unsigned short>(ptx::pack_bfloat16(v, 0.f))};
}
template <>
__device__ __forceinline__ Half pack<Half>(float v) {
  return {static_cast<unsigned short>(ptx::pack_half(v, 0.f))};
}
template <class T>
__device__ __forceinline__ unsigned pack_pair(float low, float high);
template <>
__device__ __forceinline__ unsigned pack_pair<BFloat16>(float low, float high) {
  return ptx::pack_bfloat16(low, high);
}
template <>
__device__ __forceinline__ unsigned pack_pair<Half>(float low, float high) {
  return ptx::pack_half(low, high);
}

// One element of T as a word and back, in the accumulation type.
template <class T>
struct Element {  // the 16-bit types
  using Word = unsigned short;
  static __device__ __forceinline__ float decode(Word w) { return unpack(T{w}); }
  static __device__ __forceinline__ Word encode(float v) { return pack<T>(v).bits; }
};
template <>
struct Element<float> {
  using Word = unsigned;
  static __device__ __forceinline__ float decode(Word w) { return ptx::bits_to_float(w); }
  static __device__ __forceinline__ Word encode(float v) { return ptx::float_to_bits(v); }
};
template <>
struct Element<double> {
  using Word = unsigned long long;
  static __device__ __forceinline__ double decode(Word w) { return ptx::bits_to_double(w); }
  static __device__ __forceinline__ Word encode(double v) { return ptx::double_to_bits(v); }
};

// 16 bytes as kVector<T> values of the accumulation type, and back.
template <class T>
__device__ __forceinline__ void unpack_vector(uint4 w, Accumulate<T> (&v)[kVector<T>]) {
  const unsigned words[4] = {w.x, w.y, w.z, w.w};
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = unpack(T{static_cast<unsigned short>(words[i])});
      v[2 * i + 1] = unpack(T{static_cast<unsigned short>(words[i] >> 16)});
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = ptx::bits_to_float(words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i] = ptx::bits_to_double(words[2 * i] | static_cast<unsigned long long>(words[2 * i + 1]) << 32);
    }
  }
}
template <class T>
__device__ __forceinline__ uint4 pack_vector(const Accumulate<T> (&v)[kVector<T>]) {
  unsigned words[4];
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_pair<T>(v[2 * i], v[2 * i + 1]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = ptx::float_to_bits(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned long long bits = ptx::double_to_bits(v[i]);
      words[2 * i] = static_cast<unsigned>(bits);
      words[2 * i + 1] = static_cast<unsigned>(bits >> 32);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// V elements as they lie in memory. A load stays one of these until its values are used: 16-bit values take
// half the registers, and left to itself the compiler unpacks each as soon as it is there.
template <class T, int V>
struct Packed {
  using Word = typename Element<T>::Word;
  static constexpr bool kOne = V == kVector<T>;  // one 16-byte word
  std::conditional_t<kOne, uint4, Word> words[kOne ? 1 : V];

  __device__ __forceinline__ void unpack(Accumulate<T> (&v)[V]) const {
    if constexpr (kOne) {
      unpack_vector<T>(words[0], v);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = Element<T>::decode(words[k]);
    }
  }
  // Zeros where the mask has them; of a 16-byte word.
  __device__ __forceinline__ void keep(const unsigned (&mask)[4]) {
    uint4& w = words[0];
    w = make_uint4(w.x & mask[0], w.y & mask[1], w.z & mask[2], w.w & mask[3]);
  }
};

// V elements at p: one 16-byte access where V fills 16 bytes (p is then aligned to it), else one each.
template <Cache kCache, class T, int V>
__device__ __forceinline__ void load_packed(const T* p, Packed<T, V>& packed) {
  using Word = std::remove_reference_t<decltype(packed.words[0])>;
#pragma unroll
  for (int k = 0; k < (packed.kOne ? 1 : V); ++k) {
    packed.words[k] = load_word<kCache>(reinterpret_cast<const Word*>(p) + k);
  }
}
template <Cache kCache, class T, int V>
__device__ __forceinline__ void load_global(const T* p, Accumulate<T> (&v)[V]) {
  Packed<T, V> packed;
  load_packed<kCache>(p, packed);
  packed.unpack(v);
}
// A vector's first `count` elements, one by one, and zeros after them.
template <Cache kCache, class T, int V>
__device__ __forceinline__ void load_first(const T* p, int count, Packed<T, V>& packed) {
  static_assert(packed.kOne && sizeof(T) <= 4);
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  unsigned words[4] = {};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k >= count) break;
    const unsigned word = load_word<kCache>(reinterpret_cast<const typename Element<T>::Word*>(p) + k);
    words[k / kPerWord] |= word << (k % kPerWord * 16);
  }
  packed.words[0] = make_uint4(words[0], words[1], words[2], words[3]);
}
template <bool kStreaming, class T, int V>
__device__ __forceinline__ void store_global(T* p, const Accumulate<T> (&v)[V]) {
  if constexpr (V == kVector<T>) {
    store_word<kStreaming>(reinterpret_cast<uint4*>(p), pack_vector<T>(v));
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      store_word<kStreaming>(reinterpret_cast<typename Element<T>::Word*>(p) + k, Element<T>::encode(v[k]));
    }
  }
}

// One element.
template <Cache kCache, class T>
__device__ __forceinline__ Accumulate<T> load_one(const T* p) {
  using Word = typename Element<T>::Word;
  return Element<T>::decode(load_word<kCache>(reinterpret_cast<const Word*>(p)));
}
template <class T>
__device__ __forceinline__ void store_one(T* p, Accumulate<T> v) {
  using Word = typename Element<T>::Word;
  ptx::store(reinterpret_cast<Word*>(p), Element<T>::encode(v));
}

// Element i of a learnt tensor of dtype T or float.
template <class T>
__device__ __forceinline__ Accumulate<T> load_weight(const Weight& w, int64_t i) {
  if (sizeof(T) == 2 && w.wide) return load_one<Cache::kReadOnly>(static_cast<const float*>(w.data) + i);
  return load_one<Cache::kReadOnly>(static_cast<const T*>(w.data) + i);
}
template <class T>
__device__ __forceinline__ void store_weight(const WeightGrad& w, int64_t i, Accumulate<T> v) {
  if (sizeof(T) == 2 && w.wide)
    store_one(static_cast<float*>(w.data) + i, static_cast<float>(v));
  else
    store_one(static_cast<T*>(w.data) + i, v);
}

// Element i of an index array: int16 where its extent fits, else int32.
template <Cache kCache>
__device__ __forceinline__ int load_index(const void* indices, int64_t i, bool is_short) {
  if (is_short) return load_word<kCache>(static_cast<const unsigned short*>(indices) + i);
  return static_cast<int>(load_word<kCache>(static_cast<const unsigned*>(indices) + i));
}
__device__ __forceinline__ void store_index(void* indices, int64_t i, bool is_short, int v) {
  if (is_short)
    ptx::store(static_cast<unsigned short*>(indices) + i, static_cast<unsigned short>(v));
  else
    ptx::store(static_cast<unsigned*>(indices) + i, static_cast<unsigned>(v));
}

}  // namespace cbam
