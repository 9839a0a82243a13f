// CUDA's vector types, with its sizes and alignments.
#pragma once
#include <cstdint>

#define SIMT_VECTOR(T, base, a1, a2, a4)              \
  struct base##1 {                                    \
    T x;                                              \
  };                                                  \
  struct alignas(a2) base##2 {                        \
    T x, y;                                           \
  };                                                  \
  struct base##3 {                                    \
    T x, y, z;                                        \
  };                                                  \
  struct alignas(a4) base##4 {                        \
    T x, y, z, w;                                     \
  };                                                  \
  inline base##1 make_##base##1(T x) {                \
    return {x};                                       \
  }                                                   \
  inline base##2 make_##base##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline base##3 make_##base##3(T x, T y, T z) {      \
    return {x, y, z};                                 \
  }                                                   \
  inline base##4 make_##base##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }

SIMT_VECTOR(signed char, char, 1, 2, 4)
SIMT_VECTOR(unsigned char, uchar, 1, 2, 4)
SIMT_VECTOR(short, short, 2, 4, 8)
SIMT_VECTOR(unsigned short, ushort, 2, 4, 8)
SIMT_VECTOR(int, int, 4, 8, 16)
SIMT_VECTOR(unsigned, uint, 4, 8, 16)
SIMT_VECTOR(float, float, 4, 8, 16)
SIMT_VECTOR(double, double, 8, 16, 16)
SIMT_VECTOR(long long, longlong, 8, 16, 16)
SIMT_VECTOR(unsigned long long, ulonglong, 8, 16, 16)
#undef SIMT_VECTOR
