// Runs the streamed tier's kernels of one dtype (CBAM_ELEMENT) on the host; see cuda_streamed.py.
#include "cuda_streamed_problem.h"
#include "streamed_backward.cuh"
#include "streamed_forward.cuh"

using namespace cbam;
using T = CBAM_ELEMENT;

namespace {

template <class Tr>
void launch(const Streamed& k) {
  const simt::LaunchConfig config{
      .grid = unsigned(k.grid), .block = kThreads, .shared = unsigned(k.shared_bytes)};
  if (is_backward(k.operation))
    simt::launch(config, "streamed_backward", streamed_backward_kernel<Tr>, k);
  else
    simt::launch(config, "streamed_forward", streamed_forward_kernel<Tr>, k);
}

}  // namespace

extern "C" SIMT_API void plan(const int64_t* sizes, int64_t* report) {
  Streamed k{};
  k.p = sizes_of(sizes);
  plan_call(sizes, k, report);
}

// One argument a tensor, so that each is registered and checked by its name.
extern "C" SIMT_API void run(const int64_t* sizes, double eps, void* p0, void* p1, void* p2, void* p3,
                             void* p4, void* p5, void* p6, void* p7, void* p8, void* p9, void* p10, void* p11,
                             void* p12, void* p13, void* p14, void* p15, void* p16, void* p17, void* p18,
                             void* p19, void* p20, void* p21, void* p22, void* p23, void* p24, void* p25,
                             void* p26, void* p27, void* p28, void* p29, void* p30, void* p31,
                             uint32_t* counters, char* scratch, int64_t launches) {
  void* const pointers[] = {p0,  p1,  p2,  p3,  p4,  p5,  p6,  p7,  p8,  p9,  p10, p11, p12, p13, p14, p15,
                            p16, p17, p18, p19, p20, p21, p22, p23, p24, p25, p26, p27, p28, p29, p30, p31};
  Streamed k{};
  const Variant variant = make_call(sizes, eps, pointers, counters, scratch, k);
  for (int64_t i = 0; i < launches; ++i) {
    if (k.p.layout == kChannelsLast) {
      if (variant.vector > 1)
        launch<StreamedTraits<T, kVector<T>, kChannelsLast, false>>(k);
      else
        launch<StreamedTraits<T, 1, kChannelsLast, false>>(k);
    } else if (variant.fold > 1) {
      if constexpr (sizeof(T) < 8) launch<StreamedTraits<T, kVector<T>, kContiguous, true>>(k);
    } else {
      if (variant.vector > 1)
        launch<StreamedTraits<T, kVector<T>, kContiguous, false>>(k);
      else
        launch<StreamedTraits<T, 1, kContiguous, false>>(k);
    }
  }
}
