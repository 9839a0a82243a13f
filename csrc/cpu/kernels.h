// What the kernel headers need of the standard library, outside any instruction set's attributes.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header leaves a variable unset on purpose and is warned of it at each use; and no vector
// crosses the border of a file here, whose passing the other warning is about.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"
