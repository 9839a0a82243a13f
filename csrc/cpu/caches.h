// What the kernels need to know of the processor's caches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <istream>
#include <string>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "problem.h"

namespace cbam_fused {

// Bytes of the second level for each thread that shares it, and of the last one as a core sees it. sysconf
// can give the sum over all of a processor's caches (an EPYC: 320 MiB where each core sees 32), so Linux's
// own table comes first.
struct Caches {
  int64_t second = 0, last = 0;

#if defined(__linux__)
  // How many processors a list such as "0-1,64" names.
  static int64_t count(std::istream& list) {
    int64_t total = 0, first = 0;
    while (list >> first) {
      int64_t end = first;
      if (list.peek() == '-') list.ignore() >> end;
      total += end - first + 1;
      if (list.peek() == ',') list.ignore();
    }
    return std::max<int64_t>(total, 1);
  }
#endif

  Caches() {
#if defined(__linux__)
    for (int index = 0; index < 8; ++index) {
      const std::string at = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
      std::ifstream size_file(at + "size"), level_file(at + "level"), sharers(at + "shared_cpu_list");
      int64_t number = 0, level = 0;
      char unit = 0;
      if (!(size_file >> number >> unit)) continue;
      const int64_t size = number << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0);
      last = std::max(last, size);
      if (level_file >> level && level == 2) second = size / count(sharers);
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (second <= 0) second = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (last <= 0) last = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (last <= 0) last = second;
#endif
#endif
    if (second <= 0) second = int64_t(1) << 20;
    if (last <= 0) last = int64_t(8) << 20;
  }
};

// Whether the last level is so slow that an output is better in memory than there. It is on Intel's
// processors with a mesh of cores: those with AVX-512 and 1 MiB or more of a second level, which two threads
// may share. A store that misses the second level waits for the line, which comes from the last one, and
// another goes there to make room. (Measured on two cores of a Xeon of the fifth generation, 3 to 6 MiB of x:
// y takes 0.4 to 0.7 of the time streamed; whoever reads it next from memory takes up to 1.3 times as long,
// 1.9 at 7x7; both together 0.85 to 1.)
inline bool slow_last_level(int64_t second_level) {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f") && second_level >= int64_t(1) << 19;
#else
  return false;
#endif
}

inline void set_caches(Problem& p, int64_t threads) {
  static const Caches caches;
  // A core's share, since the rest of a large cache serves other cores, in a virtual machine of strangers.
  // (Measured on two cores of a Xeon that says 260 MiB: reads and writes slow down to memory's speed at 80.)
  p.cache_bytes = std::min(caches.last, std::max<int64_t>(32, 4 * threads) << 20);
  p.second_level = caches.second;
  p.slow_last_level = slow_last_level(caches.second);
}

}  // namespace cbam_fused
