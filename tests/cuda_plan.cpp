// The policies of both tiers as one shared library, for the runner of compiled PTX; see cuda_ptx.py.
#include <cstring>

#include "cuda_resident_problem.h"

using namespace cbam;

// Names without a tier are the streamed tier's. `cluster` 0 leaves the resident tier's choice to its policy.
extern "C" int64_t parameter_bytes() {
  return sizeof(Streamed);
}

extern "C" void plan(const int64_t* sizes, int64_t* report) {
  Streamed k{};
  k.p = sizes_of(sizes);
  plan_call(sizes, k, report);
}

extern "C" void fill(const int64_t* sizes, double eps, void* const* pointers, uint32_t* counters,
                     char* scratch, char* out) {
  Streamed k{};
  make_call(sizes, eps, pointers, counters, scratch, k);
  std::memcpy(out, &k, sizeof(k));
}

extern "C" int64_t resident_parameter_bytes() {
  return sizeof(resident::Resident);
}

extern "C" void resident_plan(const int64_t* sizes, int64_t cluster, int64_t* report) {
  resident::Resident k{};
  k.p = sizes_of(sizes);
  plan_resident(sizes, cluster, k, report);
}

extern "C" void resident_fill(const int64_t* sizes, double eps, void* const* pointers, uint32_t* counters,
                              char* scratch, int64_t cluster, char* out) {
  resident::Resident k{};
  make_resident(sizes, eps, pointers, counters, scratch, cluster, k);
  std::memcpy(out, &k, sizeof(k));
}
