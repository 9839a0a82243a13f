// Runs the streamed tier's kernels of one dtype (CBAM_ELEMENT) on the host; see cuda_streamed.py.
#include <optional>

#include "cuda_streamed_problem.h"
#include "stream_counters.h"
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

// out[0]: whether every item waits only for items of lower tickets, whatever the number of units, and whether
// just those are announced that are waited for. out[1]: the least number of tickets between what waits and
// the last item that it waits for.
extern "C" SIMT_API void waits_backwards(const int64_t* sizes, int64_t* out) {
  Streamed k{};
  k.p = sizes_of(sizes);
  plan_call(sizes, k, nullptr);
  const Schedule& s = k.s;
  const auto items = [&](const StagePlan& d) {
    return int64_t{d.items} * (d.per_sample ? s.unit_samples : 1);
  };
  // Tickets of unit 0.
  const auto first = [&](const StagePlan& d) { return int64_t{d.lag} * s.step_items + d.first; };
  const auto last = [&](const StagePlan& d) { return first(d) + items(d) - 1; };
  bool fine = s.plans > 0;
  int64_t step = 0, least = INT64_MAX;
  for (int i = 0; i < s.plans; ++i) {
    const StagePlan& d = s.plan[i];
    step += items(d);
    bool awaited = s.ring && !s.chained && d.stage == s.ring_counter;
    for (int j = 0; j < s.plans; ++j) {
      const StagePlan& before = s.plan[j];
      const bool waited = before.tail[0] >= 0 ? d.wait_counter == kTailDone : d.wait_counter == before.stage;
      if (waited && i != j) {
        fine &= last(before) < first(d);
        least = std::min(least, first(d) - last(before) - 1);
      }
      const StagePlan& after = s.plan[j];
      awaited |= after.wait_counter == (d.tail[0] >= 0 ? kTailDone : d.stage) && i != j;
    }
    fine &= awaited == bool(d.awaited);
    if (d.wait_counter < 0 && s.ring) {
      fine &= last(s.plan[s.stage_plan[s.ring_counter]]) < first(d) + int64_t{s.ring} * s.step_items;
    }
  }
  out[0] = fine && step == s.step_items;
  out[1] = least;
}

// The size in bytes of each tensor of scratch, in the order of Scratch; each starts at a multiple of 256.
extern "C" SIMT_API void scratch_sizes(const int64_t* sizes, int64_t* out) {
  Streamed k{};
  k.p = sizes_of(sizes);
  plan_call(sizes, k, nullptr);
  visit_scratch(k, [&](int64_t bytes) -> void* {
    *out++ = bytes;
    return nullptr;
  });
}

// One argument a tensor, so that each is registered and checked by its name.
extern "C" SIMT_API void run(const int64_t* sizes, double eps, void* p0, void* p1, void* p2, void* p3,
                             void* p4, void* p5, void* p6, void* p7, void* p8, void* p9, void* p10, void* p11,
                             void* p12, void* p13, void* p14, void* p15, void* p16, void* p17, void* p18,
                             void* p19, void* p20, void* p21, void* p22, void* p23, void* p24, void* p25,
                             void* p26, void* p27, void* p28, void* p29, void* p30, void* p31, void* p32,
                             uint32_t* counters, char* scratch, int64_t launches) {
  void* const pointers[] = {p0,  p1,  p2,  p3,  p4,  p5,  p6,  p7,  p8,  p9,  p10,
                            p11, p12, p13, p14, p15, p16, p17, p18, p19, p20, p21,
                            p22, p23, p24, p25, p26, p27, p28, p29, p30, p31, p32};
  Streamed k{};
  const Variant variant = make_call(sizes, eps, pointers, counters, scratch, k);
  for (int64_t i = 0; i < launches; ++i) {
    if (k.p.layout == kChannelsLast) {
      if (variant.vector > 1)
        launch<StreamedTraits<T, kVector<T>, kChannelsLast, kWhole>>(k);
      else
        launch<StreamedTraits<T, 1, kChannelsLast, kWhole>>(k);
    } else if (variant.fold > 1) {
      if constexpr (sizeof(T) < 8) launch<StreamedTraits<T, kVector<T>, kContiguous, kFolded>>(k);
    } else if (variant.ragged) {
      if constexpr (sizeof(T) < 8) launch<StreamedTraits<T, kVector<T>, kContiguous, kRagged>>(k);
    } else {
      if (variant.vector > 1)
        launch<StreamedTraits<T, kVector<T>, kContiguous, kWhole>>(k);
      else
        launch<StreamedTraits<T, 1, kContiguous, kWhole>>(k);
    }
  }
}

// What two streams run at the same time: even blocks belong to one launch, odd blocks to the other.
template <class Tr>
__global__ void two_launches(const Streamed even, const Streamed odd) {
  streamed_forward_kernel<Tr>(blockIdx.x % 2 ? odd : even);
}

// The forward of two problems of one size on the streams with these ids; x and y hold both, one after the
// other. Where each launch's counters are comes from the library's own StreamCounters, which takes memory
// from `pool`, `room` words of zeros.
extern "C" SIMT_API void run_on_streams(const int64_t* sizes, const void* x, void* y, void* pooled,
                                        void* channel_gate, void* spatial_pool, void* spatial_gate,
                                        const void* w1, const void* w2, const void* conv_weight,
                                        uint32_t* pool, int64_t room, char* scratch, int64_t scratch_bytes,
                                        int64_t first_stream, int64_t second_stream) {
  StreamCounters<uint32_t*> counters;
  Streamed launches[2]{};
  for (int64_t i = 0; i < 2; ++i) {
    Streamed& k = launches[i];
    Problem& p = k.p = sizes_of(sizes);
    const auto half = [&](auto* both, int64_t elements, int64_t bytes) -> decltype(both) {
      using Byte =
          std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(both)>>, const char, char>;
      return static_cast<Byte*>(both) + i * elements * bytes;
    };
    const int64_t a = accumulate_bytes(p.dtype), size = p.samples * p.channels * p.positions;
    const int64_t map = p.samples * p.positions;
    p.x = half(x, size, sizeof(T));
    p.y = half(y, size, sizeof(T));
    p.pooled = half(pooled, p.samples * pool_count(p.pools) * p.channels, a);
    p.channel_gate = half(channel_gate, p.samples * p.channels, a);
    p.spatial_pool = half(spatial_pool, 2 * map, a);
    p.spatial_gate = half(spatial_gate, map, a);
    p.w1 = {w1, 0};
    p.w2 = {w2, 0};
    p.conv_weight = {conv_weight, 0};
    plan_call(sizes, k, nullptr);
    lay_out_scratch(k, scratch + i * scratch_bytes);
    k.w.counters = counters.of(0, uint64_t(i ? second_stream : first_stream), counter_words(k),
                               [&](int64_t words) -> uint32_t* {
                                 uint32_t* fresh = pool;
                                 pool += words;
                                 return (room -= words) < 0 ? nullptr : fresh;
                               });
  }
  const simt::LaunchConfig config{.grid = 2 * unsigned(launches[0].grid),
                                  .block = kThreads,
                                  .shared = unsigned(launches[0].shared_bytes)};
  simt::launch(config, "two_launches", two_launches<StreamedTraits<T, kVector<T>, kContiguous, kWhole>>,
               launches[0], launches[1]);
}

// Asks for `count` sets of counters: out[i] is the set that (devices[i], streams[i]) gets for words[i].
extern "C" SIMT_API void counter_sets(const int64_t* devices, const int64_t* streams, const int64_t* words,
                                      int64_t count, int64_t* out) {
  StreamCounters<std::optional<int64_t>> counters;
  int64_t made = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = *counters.of(int32_t(devices[i]), uint64_t(streams[i]), words[i],
                          [&](int64_t) { return std::optional<int64_t>(made++); });
  }
}
