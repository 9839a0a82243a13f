// Runs the resident tier's kernels of one dtype (CBAM_ELEMENT) on the host; see cuda_resident.py.
#include "cuda_resident_problem.h"
#include "resident_backward.cuh"
#include "resident_forward.cuh"

using namespace cbam;
using T = CBAM_ELEMENT;

extern "C" SIMT_API void plan(const int64_t* sizes, int64_t cluster, int64_t* report) {
  resident::Resident k{};
  k.p = sizes_of(sizes);
  plan_resident(sizes, cluster, k, report);
}

extern "C" SIMT_API void preferred(int64_t samples, int64_t active, int64_t positions, int64_t weights,
                                   int64_t* answer) {
  // 512 channels, the MLP's matrices `weights` times as large as a sample.
  Problem p{};
  p.samples = samples;
  p.channels = 512;
  p.positions = positions;
  p.hidden = positions * weights / 2;
  p.w1.data = p.w2.data = &p;
  *answer = resident::preferred(p, active);
}

namespace {

__global__ void sum_over_rows(const float* values, int64_t rows, float* sums, float* products) {
  CBAM_DYNAMIC_SHARED(memory);
  float* parts = reinterpret_cast<float*>(memory);
  const auto value = [&](int64_t i, int c) { return fresh<float>(values, i * kWeightColumns + c); };
  resident::column_sum<kWeightColumns>(0, kWeightColumns, rows, parts, value,
                                       [&](int c, float sum) { sums[c] = sum; });
  __syncthreads();
  resident::outer_sum<true>(0, kWeightRows, kWeightColumns, rows, parts, values + rows * kWeightColumns,
                            value, [&](int r, int c, float sum) { products[r * kWeightColumns + c] = sum; });
}

}  // namespace

// A (rows, 32), then B (rows, 8): the sums of A's columns, and B^T A, as the weights' gradients have them.
extern "C" SIMT_API void sums_over_rows(const float* values, int64_t rows, float* sums, float* products) {
  constexpr unsigned kThreads = resident::kMaxThreads / 2;
  simt::launch({.grid = 1, .block = kThreads, .shared = kThreads * kWeightRows * 4}, "sum_over_rows",
               sum_over_rows, values, rows, sums, products);
}

// One argument a tensor, so that each is registered and checked by its name.
extern "C" SIMT_API void run(const int64_t* sizes, double eps, void* p0, void* p1, void* p2, void* p3,
                             void* p4, void* p5, void* p6, void* p7, void* p8, void* p9, void* p10, void* p11,
                             void* p12, void* p13, void* p14, void* p15, void* p16, void* p17, void* p18,
                             void* p19, void* p20, void* p21, void* p22, void* p23, void* p24, void* p25,
                             void* p26, void* p27, void* p28, void* p29, void* p30, void* p31, void* p32,
                             uint32_t* counters, char* scratch, int64_t launches, int64_t cluster) {
  void* const pointers[] = {p0,  p1,  p2,  p3,  p4,  p5,  p6,  p7,  p8,  p9,  p10,
                            p11, p12, p13, p14, p15, p16, p17, p18, p19, p20, p21,
                            p22, p23, p24, p25, p26, p27, p28, p29, p30, p31, p32};
  resident::Resident k{};
  make_resident(sizes, eps, pointers, counters, scratch, cluster, k);
  const simt::LaunchConfig config{.grid = unsigned(k.p.samples * k.cluster),
                                  .block = unsigned(k.threads),
                                  .shared = unsigned(k.at.total),
                                  .cluster = unsigned(k.cluster)};
  for (int64_t i = 0; i < launches; ++i) {
    resident::with_traits<T, resident::Traits>(k, [&](auto traits) {
      using Tr = decltype(traits);
      if (is_backward(k.operation))
        simt::launch(config, "resident_backward", resident::resident_backward_kernel<Tr>, k);
      else
        simt::launch(config, "resident_forward", resident::resident_forward_kernel<Tr>, k);
    });
  }
}
