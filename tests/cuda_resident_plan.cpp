// The resident tier's plan as a shared library, for the runner of compiled PTX; see cuda_resident_ptx.py.
#include <cstring>

#include "cuda_resident_problem.h"

using namespace cbam;

extern "C" int64_t parameter_bytes() {
  return sizeof(resident::Resident);
}

extern "C" void plan(const int64_t* sizes, int64_t cluster, int64_t* report) {
  resident::Resident k{};
  k.p = sizes_of(sizes);
  plan_resident(sizes, cluster, k, report);
}

extern "C" void fill(const int64_t* sizes, double eps, void* const* pointers, uint32_t* counters,
                     char* scratch, int64_t cluster, char* out) {
  resident::Resident k{};
  make_resident(sizes, eps, pointers, counters, scratch, cluster, k);
  std::memcpy(out, &k, sizeof(k));
}
