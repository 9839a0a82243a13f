// Vectors of the widest registers of the instruction set at hand, with loads and stores that convert.
//
// Included inside a namespace of its own by each isa_*.cpp, which defines CBAM_VECTOR_BYTES: 64 with
// AVX-512, 32 with AVX2 and F16C, else 16, and CBAM_BF16_ALONE for the kernels that use AVX-512's conversions
// to bfloat16. So there is no include guard and no include here. GCC and Clang vector types: `a > b` is a
// lane mask of -1 and 0, `mask ? a : b` selects.

constexpr int kVectorBytes = CBAM_VECTOR_BYTES;

#define CBAM_INLINE inline __attribute__((always_inline))
#define CBAM_INLINE_LAMBDA __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecFI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecFU __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecDI __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t VecWords __attribute__((vector_size(kVectorBytes)));

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using V = VecF;
  using I = VecFI;
  using Int = int32_t;
};
template <>
struct Lanes<double> {
  using V = VecD;
  using I = VecDI;
  using Int = int64_t;
};
template <class A>
using Vec = typename Lanes<A>::V;
template <class A>
using VecInt = typename Lanes<A>::I;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

// The accumulation type of a storage type.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulate<T>::type;

template <class A>
CBAM_INLINE Vec<A> splat(A v) {
  return v - Vec<A>{};  // a plain broadcast: v + 0 would have to turn -0 into 0
}
template <class A>
CBAM_INLINE VecInt<A> splat_int(int64_t v) {
  return VecInt<A>{} + typename Lanes<A>::Int(v);
}
template <class A>
CBAM_INLINE VecInt<A> iota() {
  VecInt<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i;
  return v;
}

template <class V, class U>
CBAM_INLINE V bit_cast(const U& u) {
  static_assert(sizeof(V) == sizeof(U), "same size");
  V v;
  __builtin_memcpy(&v, &u, sizeof(V));
  return v;
}

CBAM_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
CBAM_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
CBAM_INLINE VecFI load(const int32_t* p) {
  VecFI v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
CBAM_INLINE VecDI load(const int64_t* p) {
  VecDI v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
#if CBAM_VECTOR_BYTES == 64
// For a permutation of words: lane i's upper half from word i; word i from lane i's upper half.
CBAM_INLINE __m512i upper_halves() {
  return _mm512_slli_epi32(bit_cast<__m512i>(iota<float>()), 16);
}
CBAM_INLINE __m512i odd_words() {
  VecWords w;
  for (int i = 0; i < 32; ++i) w[i] = uint16_t(2 * (i % 16) + 1);
  return bit_cast<__m512i>(w);
}
#endif
CBAM_INLINE VecF load(const bf16* p) {
#if CBAM_VECTOR_BYTES == 64  // in one instruction
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<VecF>(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, upper_halves(), _mm512_castsi256_si512(v)));
#elif CBAM_VECTOR_BYTES == 32  // in two, where GCC makes five of a convertvector
  VecFU v = bit_cast<VecFU>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  return bit_cast<VecF>(v << 16);
#else
  VecU16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast<VecF>(__builtin_convertvector(bits, VecFU) << 16);
#endif
}
CBAM_INLINE VecF load(const half* p) {
#if CBAM_VECTOR_BYTES == 64
  return bit_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif CBAM_VECTOR_BYTES == 32
  return bit_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecU16 v;
  __builtin_memcpy(&v, p, sizeof(v));
  VecFU u = __builtin_convertvector(v, VecFU);
  VecFU magnitude = u & 0x7fffu;
  // Exponents differ by 112; the product is exact and brings subnormals into place.
  VecFU bits = bit_cast<VecFU>(bit_cast<VecF>(magnitude << 13) * 0x1p112f);
  bits = magnitude >= 0x7c00u ? (bits | 0x7f800000u) : bits;
  return bit_cast<VecF>(bits | ((u & 0x8000u) << 16));
#endif
}

template <class V, class T>
CBAM_INLINE void store_bytes(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
CBAM_INLINE VecU16 to_bf16(VecF f) {
#if defined(CBAM_BF16_ALONE)
  // One instruction, but for subnormal numbers, of which it would make zeros.
  if (__builtin_expect(!_mm512_fpclass_ps_mask(bit_cast<__m512>(f), 0x20), 1))
    return bit_cast<VecU16>(_mm512_cvtneps_pbh(bit_cast<__m512>(f)));
#endif
  // Round to nearest even, in the upper halves; a NaN keeps its top bits and stays quiet.
  VecFU u = bit_cast<VecFU>(f);
  VecFU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  VecFU bits = f != f ? u | 0x400000u : rounded;
#if CBAM_VECTOR_BYTES == 64
  const __m512i odd = _mm512_maskz_permutexvar_epi16(0xffffu, odd_words(), bit_cast<__m512i>(bits));
  return bit_cast<VecU16>(_mm512_castsi512_si256(odd));
#else
  return __builtin_convertvector(bits >> 16, VecU16);
#endif
}
CBAM_INLINE VecU16 to_half(VecF f) {
#if CBAM_VECTOR_BYTES == 64
  return bit_cast<VecU16>(_mm512_cvtps_ph(bit_cast<__m512>(f), _MM_FROUND_TO_NEAREST_INT));
#elif CBAM_VECTOR_BYTES == 32
  return bit_cast<VecU16>(_mm256_cvtps_ph(bit_cast<__m256>(f), _MM_FROUND_TO_NEAREST_INT));
#else
  VecFU u = bit_cast<VecFU>(f);
  VecFU sign = (u >> 16) & 0x8000u;
  VecFU a = u & 0x7fffffffu;
  // Normal results: rebias and round to nearest even. Subnormal results: adding 0.5 lets the
  // addition itself round at 2^-24, the last place of a subnormal half.
  VecFU normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  VecFU tiny = bit_cast<VecFU>(bit_cast<VecF>(a) + 0.5f) - 0x3f000000u;
  VecFU h = a < 0x38800000u ? tiny : normal;
  h = a >= 0x477ff000u ? VecFU{} + 0x7c00u : h;
  h = a > 0x7f800000u ? VecFU{} + 0x7e00u : h;
  return __builtin_convertvector(h | sign, VecU16);
#endif
}
CBAM_INLINE void store(float* p, VecF v) {
  store_bytes(p, v);
}
CBAM_INLINE void store(double* p, VecD v) {
  store_bytes(p, v);
}
CBAM_INLINE void store(int32_t* p, VecFI v) {
  store_bytes(p, v);
}
CBAM_INLINE void store(int64_t* p, VecDI v) {
  store_bytes(p, v);
}
CBAM_INLINE void store(bf16* p, VecF v) {
  store_bytes(p, to_bf16(v));
}
CBAM_INLINE void store(half* p, VecF v) {
  store_bytes(p, to_half(v));
}

// Bypasses the caches; p is aligned to the stored width.
template <class V, class T>
CBAM_INLINE void stream_bytes(T* p, const V& v) {
#if CBAM_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
#if CBAM_VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
#endif
  store_bytes(p, v);
}
CBAM_INLINE void stream(float* p, VecF v) {
  stream_bytes(p, v);
}
CBAM_INLINE void stream(double* p, VecD v) {
  stream_bytes(p, v);
}
CBAM_INLINE void stream(bf16* p, VecF v) {
  stream_bytes(p, to_bf16(v));
}
CBAM_INLINE void stream(half* p, VecF v) {
  stream_bytes(p, to_half(v));
}
CBAM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
CBAM_INLINE Vec<Acc<T>> load_first(const T* p, int count) {
  T buffer[kLanes<Acc<T>>] = {};
  __builtin_memcpy(buffer, p, size_t(count) * sizeof(T));
  return load(buffer);
}
template <class T>
CBAM_INLINE void store_first(T* p, Vec<Acc<T>> v, int count) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, size_t(count) * sizeof(T));
}

CBAM_INLINE float load_one(const float* p) {
  return *p;
}
CBAM_INLINE double load_one(const double* p) {
  return *p;
}
CBAM_INLINE float load_one(const bf16* p) {
  return bit_cast<float>(uint32_t(p->bits) << 16);
}
CBAM_INLINE float load_one(const half* p) {
#if CBAM_VECTOR_BYTES >= 32
  return _cvtsh_ss(p->bits);
#else
  return load_first(p, 1)[0];
#endif
}
template <class T>
CBAM_INLINE void store_one(T* p, Acc<T> v) {
  if constexpr (sizeof(T) == 2) {
    store_first(p, splat<Acc<T>>(v), 1);
  } else {
    *p = v;
  }
}

template <int kBy, class V, class I>
CBAM_INLINE V rotate(V v, I) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
#if defined(__clang__)
  V r;
  for (int i = 0; i < n; ++i) r[i] = v[(i + kBy) % n];
  return r;
#else
  I index;
  for (int i = 0; i < n; ++i) index[i] = (i + kBy) % n;
  return __builtin_shuffle(v, index);
#endif
}

// v where it is greater than m, else m, also where either is NaN. (Spelt as an instruction, since GCC makes
// two in a row of the comparison beside it.)
CBAM_INLINE VecF greater_of(VecF v, VecF m) {
#if CBAM_VECTOR_BYTES == 64
  return bit_cast<VecF>(_mm512_max_ps(bit_cast<__m512>(v), bit_cast<__m512>(m)));
#elif CBAM_VECTOR_BYTES == 32
  return bit_cast<VecF>(_mm256_max_ps(bit_cast<__m256>(v), bit_cast<__m256>(m)));
#elif defined(__SSE2__)
  return bit_cast<VecF>(_mm_max_ps(bit_cast<__m128>(v), bit_cast<__m128>(m)));
#else
  return v > m ? v : m;
#endif
}
CBAM_INLINE VecD greater_of(VecD v, VecD m) {
#if CBAM_VECTOR_BYTES == 64
  return bit_cast<VecD>(_mm512_max_pd(bit_cast<__m512d>(v), bit_cast<__m512d>(m)));
#elif CBAM_VECTOR_BYTES == 32
  return bit_cast<VecD>(_mm256_max_pd(bit_cast<__m256d>(v), bit_cast<__m256d>(m)));
#elif defined(__SSE2__)
  return bit_cast<VecD>(_mm_max_pd(bit_cast<__m128d>(v), bit_cast<__m128d>(m)));
#else
  return v > m ? v : m;
#endif
}

// a + b, next to maxima: on AMD's processors these take the adders, and leave the multipliers idle.
// (Measured on Zen 4: a sum and a maximum a vector, 2.0 cycles with an addition, 1.15 with this.)
CBAM_INLINE VecF add_beside_max(VecF a, VecF b) {
#if CBAM_VECTOR_BYTES == 64
  return bit_cast<VecF>(_mm512_fmadd_ps(bit_cast<__m512>(a), _mm512_set1_ps(1.0f), bit_cast<__m512>(b)));
#elif CBAM_VECTOR_BYTES == 32
  return bit_cast<VecF>(_mm256_fmadd_ps(bit_cast<__m256>(a), _mm256_set1_ps(1.0f), bit_cast<__m256>(b)));
#else
  return a + b;
#endif
}
CBAM_INLINE VecD add_beside_max(VecD a, VecD b) {
  return a + b;
}

// v, in a register from here on. A compiler takes what is in memory for cheap and reads it anew for each use;
// a read that crosses a line costs as much as two multiplications.
template <class V>
CBAM_INLINE V in_register(V v) {
#if CBAM_VECTOR_BYTES >= 32
  asm("" : "+v"(v));
#endif
  return v;
}

// Reductions over lanes in a fixed tree: lane i with lane i + n / 2, and so on.
template <class A, int kBy = kLanes<A> / 2>
CBAM_INLINE A sum_lanes(Vec<A> v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    return sum_lanes<A, kBy / 2>(v + rotate<kBy>(v, VecInt<A>{}));
  }
}
template <class A, int kBy = kLanes<A> / 2>
CBAM_INLINE typename Lanes<A>::Int min_lanes(VecInt<A> v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    VecInt<A> r = rotate<kBy>(v, VecInt<A>{});
    return min_lanes<A, kBy / 2>(r < v ? r : v);
  }
}

// Lanes of two vectors: lane i of the result is lane at(i) of a and b, one after the other.
template <class I, class V, class At>
CBAM_INLINE V gather_lanes(V a, V b, At at) {
  constexpr int n = int(sizeof(V) / sizeof(a[0]));
#if defined(__clang__)
  V r;
  for (int i = 0; i < n; ++i) r[i] = at(i) < n ? a[at(i)] : b[at(i) - n];
  return r;
#else
  I index;
  for (int i = 0; i < n; ++i) index[i] = at(i);
  return __builtin_shuffle(a, b, index);
#endif
}

// The sums of four vectors at a time, to out[4]: the same tree in fewer steps, since a vector that is folded
// in half leaves room for another.
template <class A>
CBAM_INLINE void sum_lanes(const Vec<A> (&v)[4], A (&out)[4]) {
  constexpr int n = kLanes<A>, half = n / 2, quarter = n / 4;
  using I = VecInt<A>;
  if constexpr (n >= 4) {
    Vec<A> pair[2];
    for (int k = 0; k < 2; ++k) {
      pair[k] = gather_lanes<I>(v[2 * k], v[2 * k + 1], [](int i) { return i < half ? i : i + half; }) +
                gather_lanes<I>(v[2 * k], v[2 * k + 1], [](int i) { return i < half ? i + half : i + n; });
    }
    auto at = [](int i) { return i / quarter * half + i % quarter; };
    Vec<A> all = gather_lanes<I>(pair[0], pair[1], at) +
                 gather_lanes<I>(pair[0], pair[1], [at](int i) { return at(i) + quarter; });
    if constexpr (quarter >= 4) all += rotate<2>(all, I{});
    if constexpr (quarter >= 2) all += rotate<1>(all, I{});
    static_assert(quarter <= 4, "one more step");
    for (int u = 0; u < 4; ++u) out[u] = all[u * quarter];
  } else {
    for (int u = 0; u < 4; ++u) out[u] = sum_lanes<A>(v[u]);
  }
}
template <class A>
CBAM_INLINE void sum_lanes(const Vec<A> (&v)[1], A (&out)[1]) {
  out[0] = sum_lanes<A>(v[0]);
}
// One vector of n totals from n = kLanes vectors: lane u is the reduction of v[u], by the same trees but
// for the order of op's two arguments.
template <class A, int kSegment = kLanes<A>, class V, int kCount, class Op>
CBAM_INLINE V fold_to_lanes(const V (&v)[kCount], Op op) {
  using I = VecInt<A>;
  if constexpr (kCount == 1) {
    return v[0];
  } else if constexpr (kCount == 8 && kLanes<A> == 8) {
    // Within halves of a vector after the first step, which is cheaper with 32-byte vectors, and put in order
    // at the end.
    V two[4], four[2];
    for (int k = 0; k < 4; ++k) {
      const V a = v[2 * k], b = v[2 * k + 1];
      two[k] = op(iota<A>() < 4 ? a : b,
                  gather_lanes<I>(a, b, [](int i) { return i + 4; }));  // four lanes left of each: a's, b's
    }
    for (int k = 0; k < 2; ++k) {
      const V a = two[2 * k], b = two[2 * k + 1];
      four[k] = op(gather_lanes<I>(a, b, [](int i) { return i / 4 * 4 + i % 2 + i / 2 % 2 * 8; }),
                   gather_lanes<I>(a, b, [](int i) { return i / 4 * 4 + i % 2 + 2 + i / 2 % 2 * 8; }));
    }
    auto even = [](int i) { return i / 4 * 4 + i % 2 * 2 + i / 2 % 2 * 8; };
    const V all = op(gather_lanes<I>(four[0], four[1], even),
                     gather_lanes<I>(four[0], four[1], [even](int i) { return even(i) + 1; }));
    return gather_lanes<I>(all, all, [](int i) { return i % 2 * 4 + i / 2; });
  } else {
    // Each vector holds whole segments, one a row; two vectors' segments fold in half into one vector.
    V next[kCount / 2];
    constexpr int half = kSegment / 2;
    auto low = [](int i) { return i / half * kSegment + i % half; };
    for (int k = 0; k < kCount / 2; ++k) {
      next[k] = op(gather_lanes<I>(v[2 * k], v[2 * k + 1], low),
                   gather_lanes<I>(v[2 * k], v[2 * k + 1], [low](int i) { return low(i) + half; }));
    }
    return fold_to_lanes<A, half>(next, op);
  }
}

#if CBAM_VECTOR_BYTES == 64
CBAM_INLINE bool any_nan(VecF v) {
  return _mm512_cmp_ps_mask(bit_cast<__m512>(v), bit_cast<__m512>(v), _CMP_UNORD_Q) != 0;
}
CBAM_INLINE bool any_nan(VecD v) {
  return _mm512_cmp_pd_mask(bit_cast<__m512d>(v), bit_cast<__m512d>(v), _CMP_UNORD_Q) != 0;
}
CBAM_INLINE bool any_equal(VecF a, VecF b) {
  return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_EQ_OQ) != 0;
}
CBAM_INLINE bool any_equal(VecD a, VecD b) {
  return _mm512_cmp_pd_mask(bit_cast<__m512d>(a), bit_cast<__m512d>(b), _CMP_EQ_OQ) != 0;
}
#else
// Whether any lane of a comparison holds.
template <class A>
CBAM_INLINE bool any_lane(VecInt<A> mask) {
#if CBAM_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(bit_cast<__m256i>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(bit_cast<__m128i>(mask)) != 0;
#else
  return min_lanes<A>(mask) != 0;
#endif
}
CBAM_INLINE bool any_nan(VecF v) {
  return any_lane<float>(v != v);
}
CBAM_INLINE bool any_nan(VecD v) {
  return any_lane<double>(v != v);
}
CBAM_INLINE bool any_equal(VecF a, VecF b) {
  return any_lane<float>(a == b);
}
CBAM_INLINE bool any_equal(VecD a, VecD b) {
  return any_lane<double>(a == b);
}
#endif

// exp to about one unit in the last place; NaN stays, overflow gives infinity, underflow zero.
CBAM_INLINE VecF exp(VecF x) {
  VecF clamped = x > 88.7f ? splat<float>(88.7f) : x;
  clamped = clamped < -87.3f ? splat<float>(-87.3f) : clamped;
  const VecF magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  VecF shifted = clamped * 1.44269504088896341f + magic;
  VecF n = shifted - magic;
  VecF r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  VecF p = splat<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  VecFI exponent = (bit_cast<VecFI>(shifted) - bit_cast<VecFI>(magic)) << 23;
  VecF y = bit_cast<VecF>(bit_cast<VecFI>(p) + exponent);
  y = x > 88.7f ? splat<float>(__builtin_inff()) : y;
  y = x < -87.3f ? VecF{} : y;
  return x != x ? x : y;
}
CBAM_INLINE VecD exp(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
template <class A>
CBAM_INLINE Vec<A> sigmoid(Vec<A> z) {
  return A(1) / (A(1) + exp(-z));
}
