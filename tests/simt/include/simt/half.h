// half and bfloat16 with CUDA's names; arithmetic is done in float and rounded once, to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace simt {

inline std::uint32_t float_bits(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float bits_float(std::uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

// Adds half of the last kept place, less one unless the kept part is odd: ties go to even.
inline std::uint16_t bfloat16_bits(float v) {
  if (std::isnan(v)) return 0x7fff;
  const std::uint32_t u = float_bits(v);
  return static_cast<std::uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline std::uint16_t half_bits(float v) {
  const std::uint32_t u = float_bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000)
    return static_cast<std::uint16_t>(sign | 0x7c00);  // 65520 and above round to inf
  if (magnitude < 0x38800000) {                        // subnormal: units of 2^-24
    const float units = std::nearbyint(std::ldexp(bits_float(magnitude), 24));
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(units));
  }
  const std::uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}
inline float half_value(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31,
                      fraction = h & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) {
    const float v = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -v : v;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

}  // namespace simt

struct __half_raw {
  std::uint16_t x;
};
struct __nv_bfloat16_raw {
  std::uint16_t x;
};

#define SIMT_SMALL_FLOAT(type, encode, decode)                                 \
  struct type {                                                                \
    type() = default;                                                          \
    type(float v) : bits(encode) {}                                            \
    explicit type(double v) : type(static_cast<float>(v)) {}                   \
    explicit type(int v) : type(static_cast<float>(v)) {}                      \
    type(type##_raw r) : bits(r.x) {}                                          \
    operator float() const { return decode; }                                  \
    operator type##_raw() const { return {bits}; }                             \
    type& operator+=(type o) { return *this = type(float(*this) + float(o)); } \
    type& operator-=(type o) { return *this = type(float(*this) - float(o)); } \
    type& operator*=(type o) { return *this = type(float(*this) * float(o)); } \
    std::uint16_t bits;                                                        \
  };                                                                           \
  struct alignas(4) type##2_pair {                                             \
    type x, y;                                                                 \
  };                                                                           \
  inline type operator+(type a, type b) {                                      \
    return type(float(a) + float(b));                                          \
  }                                                                            \
  inline type operator-(type a, type b) {                                      \
    return type(float(a) - float(b));                                          \
  }                                                                            \
  inline type operator*(type a, type b) {                                      \
    return type(float(a) * float(b));                                          \
  }                                                                            \
  inline type operator/(type a, type b) {                                      \
    return type(float(a) / float(b));                                          \
  }

SIMT_SMALL_FLOAT(__half, simt::half_bits(v), simt::half_value(bits))
SIMT_SMALL_FLOAT(__nv_bfloat16, simt::bfloat16_bits(v),
                 simt::bits_float(static_cast<std::uint32_t>(bits) << 16))
#undef SIMT_SMALL_FLOAT

using half = __half;
using __half2 = __half2_pair;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = __nv_bfloat162_pair;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half(float v) {
  return __half(v);
}
inline __half __float2half_rn(float v) {
  return __half(v);
}
inline float __half2float(__half v) {
  return float(v);
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__half(x), __half(y)};
}
inline __half2 __float22half2_rn(float2 v) {
  return {__half(v.x), __half(v.y)};
}
inline float2 __half22float2(__half2 v) {
  return {float(v.x), float(v.y)};
}
inline __half2 __halves2half2(__half x, __half y) {
  return {x, y};
}
inline __half __low2half(__half2 v) {
  return v.x;
}
inline __half __high2half(__half2 v) {
  return v.y;
}
inline float __low2float(__half2 v) {
  return float(v.x);
}
inline float __high2float(__half2 v) {
  return float(v.y);
}
inline unsigned short __half_as_ushort(__half v) {
  return v.bits;
}
inline __half __ushort_as_half(unsigned short u) {
  return __half(__half_raw{u});
}

inline __nv_bfloat16 __float2bfloat16(float v) {
  return __nv_bfloat16(v);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  return __nv_bfloat16(v);
}
inline float __bfloat162float(__nv_bfloat16 v) {
  return float(v);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) {
  return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {float(v.x), float(v.y)};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
  return {x, y};
}
inline float __low2float(__nv_bfloat162 v) {
  return float(v.x);
}
inline float __high2float(__nv_bfloat162 v) {
  return float(v.y);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) {
  return v.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
  return __nv_bfloat16(__nv_bfloat16_raw{u});
}
