// The streamed tier's policy as a shared library, for the runner of compiled PTX; see cuda_ptx.py.
#include <cstring>

#include "cuda_streamed_problem.h"

using namespace cbam;

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
