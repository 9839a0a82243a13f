// What the kernel headers need of the standard library, outside any instruction set's attributes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
// No vector crosses the border of a file here, whose passing this is about.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC's own header leaves a variable unset on purpose, and warns of it at each use.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#if defined(__clang__)
// As above; and of loops whose counters a lambda that they call moves on.
#pragma clang diagnostic ignored "-Wpsabi"
#pragma clang diagnostic ignored "-Wfor-loop-analysis"
#endif

#include "problem.h"
#include "team.h"

namespace cbam_fused {
// What is fetched ahead by hand beside what the processor sees coming (matrix.h says what each is worth).
struct Fetch {
  bool far;       // blocks of rows: twice as far, and into the second-level cache
  bool pieces;    // pieces of rows, where outputs are written
  bool run;       // rows that are read one by one
  bool matrices;  // the MLP's matrices (nets.h)
};
#if defined(__x86_64__)
inline const bool kAmd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
inline const bool kIntel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
inline const bool kAmd = false, kIntel = false;
#endif
inline const Fetch kFetch = {kAmd, kAmd || kIntel, kIntel, kIntel};
}  // namespace cbam_fused
