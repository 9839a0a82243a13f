// The CPU kernels with a clock around each pass, for passes.py, which compiles this against csrc/cpu as it is
// or was at some commit, for one instruction set (CBAM_VECTOR_BYTES) and dtype (CBAM_PASSES_DTYPE). The
// kernels are not touched: their stages are members of Backward, Schedule calls them, and here a class
// between the two measures each call.
#include "kernels.h"

#include <chrono>

#if __has_include("caches.h")
#include "caches.h"
#else  // kernels of before, which know the last level alone
#include <unistd.h>
namespace cbam_fused {
inline void set_caches(Problem& p, int64_t threads) {
  const int64_t last = sysconf(_SC_LEVEL3_CACHE_SIZE);
  p.cache_bytes = std::min(last > 0 ? last : INT64_MAX, std::max<int64_t>(32, 4 * threads) << 20);
}
}  // namespace cbam_fused
#endif

namespace cbam_fused {
namespace {

#include "vec.h"

#include "matrix.h"

#include "nets.h"

#include "block.h"

#include "backward.h"

enum Pass {
  kPool,
  kMlp,
  kSpatialPool,
  kSpatialGate,
  kApply,
  kLoadSaved,
  kProducts,
  kLogitsGradient,
  kMapsGradient,
  kRest,
  kPlanesGradient,
  kMlpBackward,
  kDx,
  kWeightGradients,
  kPasses
};

struct alignas(128) Clocks {
  double seconds[kPasses];
  int64_t calls[kPasses];
};
Clocks clocks[256];  // one a thread
thread_local Clocks* own = clocks;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Measured {
  const Pass pass;
  const bool counted = true;
  const double begin = now();
  ~Measured() {
    own->seconds[pass] += now() - begin;
    own->calls[pass] += counted;
  }
};

template <class T, bool kChannelsLast>
struct Timed : Backward<T, kChannelsLast> {
  using Base = Backward<T, kChannelsLast>;
  using Base::Base;
#define CBAM_TIMED(name, ...)       \
  template <class... Args>          \
  void name(Args&&... args) const { \
    Measured m{__VA_ARGS__};        \
    Base::name(args...);            \
  }
  CBAM_TIMED(pool, kPool)
  CBAM_TIMED(mlp, kMlp)
  CBAM_TIMED(spatial_pool, kSpatialPool)
  CBAM_TIMED(spatial_gate, kSpatialGate)
  CBAM_TIMED(apply, kApply)
  // The same where threads share a sample, or the MLP.
  CBAM_TIMED(mlp_hidden, kMlp)
  CBAM_TIMED(mlp_gate, kMlp)
  CBAM_TIMED(pool_chunk, kSpatialPool)
  CBAM_TIMED(merge_chunks, kSpatialPool)
  CBAM_TIMED(apply_rows, kApply)
  CBAM_TIMED(mlp_backward_hidden, kMlpBackward)
  CBAM_TIMED(mlp_backward_input, kMlpBackward)
  CBAM_TIMED(products_chunk, kProducts)
  CBAM_TIMED(merge_products, kProducts, false)  // by one thread: not its part of the pass
  CBAM_TIMED(rest_chunk, kRest)
  CBAM_TIMED(merge_rest, kRest, false)
  CBAM_TIMED(dx_chunks, kDx)
  CBAM_TIMED(load_saved, kLoadSaved)
  CBAM_TIMED(products, kProducts)
  CBAM_TIMED(logits_gradient, kLogitsGradient)
  CBAM_TIMED(maps_gradient, kMapsGradient)
  CBAM_TIMED(rest_of_gate_gradient, kRest)
  CBAM_TIMED(planes_gradient, kPlanesGradient)
  CBAM_TIMED(mlp_backward, kMlpBackward)
  CBAM_TIMED(dx, kDx)
  CBAM_TIMED(weight_gradients, kWeightGradients)
};

#define Backward Timed
#include "schedule.h"
#undef Backward

// A block of the default configuration, its weights, and room for everything but x, dy, y and dx.
struct Subject {
  Problem p;
  int64_t hidden;
  std::vector<std::vector<char>> room;

  void* take(int64_t bytes) {
    room.emplace_back(size_t(bytes + 64));
    const uintptr_t at = reinterpret_cast<uintptr_t>(room.back().data());
    return reinterpret_cast<void*>((at + 63) / 64 * 64);
  }
  // Uniform in [-scale, scale], the same in every build.
  template <class U>
  void* random(int64_t count, double scale) {
    U* to = static_cast<U*>(take(count * int64_t(sizeof(U))));
    uint32_t state = 1;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      store_one(to + i, Acc<U>((double(state) / 2147483648.0 - 1.0) * scale));
    }
    return to;
  }

  template <class A>
  void fill(bool train) {
    const int64_t N = p.N, C = p.C, P = p.P, h = hidden, a = int64_t(sizeof(A));
    p.matrices_as_x = sizeof(CBAM_PASSES_DTYPE) == 2;
    p.w1 = random<CBAM_PASSES_DTYPE>(h * C, 1 / std::sqrt(double(C)));
    p.b1 = random<A>(h, 0.1);
    p.w2 = random<CBAM_PASSES_DTYPE>(C * h, 1 / std::sqrt(double(h)));
    p.b2 = random<A>(C, 0.1);
    p.planes = random<A>(98, 0.1);
    if (!train) return;
    p.pooled = take(N * 2 * C * a), p.pool_index = take(N * C * 4), p.channel_gate = take(N * C * a);
    p.spatial_pool = take(N * 2 * P * a), p.spatial_index = take(N * P * 4);
    p.hidden_layer = take(N * 2 * h * a), p.spatial_gate = take(N * P * a);
    p.wide_pool_index = P > 32767, p.wide_spatial_index = C > 32767;
    p.dw1 = take(h * C * a), p.db1 = take(h * a), p.dw2 = take(h * C * a), p.db2 = take(C * a);
    p.dplanes = take(98 * a);
  }
};

// f(schedule, where its scratch ends) in the layout of a problem.
template <class F>
void with_schedule(const Problem& p, bool backward, F f) {
  Carver carver{p.scratch};
  if (p.channels_last) {
    Schedule<CBAM_PASSES_DTYPE, true> schedule(p, backward, carver);
    f(schedule, carver);
  } else {
    Schedule<CBAM_PASSES_DTYPE, false> schedule(p, backward, carver);
    f(schedule, carver);
  }
}

void in_parallel(int64_t count, ParallelBody body, void* context) {
#pragma omp parallel for num_threads(int(count)) schedule(static, 1)
  for (int64_t i = 0; i < count; ++i) {
    own = clocks + i;
    body(i, i + 1, context);
  }
}

}  // namespace
}  // namespace cbam_fused

using namespace cbam_fused;

#define CBAM_EXPORT extern "C" __attribute__((visibility("default")))

CBAM_EXPORT Subject* make(int64_t N, int64_t C, int64_t H, int64_t W, int64_t hidden, int channels_last,
                          int train, int threads, const void* x, const void* dy) {
  Subject* s = new Subject{};
  Problem& p = s->p;
  p.N = N, p.C = C, p.H = H, p.W = W, p.P = H * W, p.kH = p.kW = 7;
  p.hidden = s->hidden = hidden;
  p.pools = kAvg | kMax, p.spatial = true, p.channels_last = channels_last;
  p.threads = threads, p.parallel = in_parallel;
  set_caches(p, threads);
  p.x = x, p.dy = dy;
  s->fill<Acc<CBAM_PASSES_DTYPE>>(train);
  int64_t bytes = 0;
  for (int backward = 0; backward <= train; ++backward)
    with_schedule(p, backward, [&](auto&, Carver& c) { bytes = std::max(bytes, c.used + 64); });
  p.scratch = static_cast<char*>(s->take(bytes));
  return s;
}

CBAM_EXPORT void release(Subject* s) {
  delete s;
}

// One call, forward or backward; `seconds` gets the passes' times, summed over threads and divided by their
// number, then the whole.
CBAM_EXPORT void run(Subject* s, int is_backward, void* out, double* seconds) {
  for (Clocks& c : clocks) c = {};
  Problem& p = s->p;
  p.out = out;
  const double begin = now();
  with_schedule(p, is_backward, [&](auto& schedule, Carver&) {
    is_backward ? schedule.backward_pass(Stage::kWhole) : schedule.forward(Stage::kWhole);
  });
  seconds[kPasses] = now() - begin;
  for (int i = 0; i < kPasses; ++i) {
    seconds[i] = 0;
    for (const Clocks& c : clocks) seconds[i] += c.seconds[i] / p.threads;
  }
}

// How often a thread entered each pass in the last call.
CBAM_EXPORT void calls(int thread, int64_t* out) {
  std::copy_n(clocks[thread].calls, int(kPasses), out);
}

// The gradients of the parameters after a backward, to out[2 h C + h + C + 98].
CBAM_EXPORT void gradients(const Subject* s, double* out) {
  const Problem& p = s->p;
  auto put = [&](const void* from, int64_t count) {
    out = std::copy_n(static_cast<const Acc<CBAM_PASSES_DTYPE>*>(from), count, out);
  };
  put(p.dw1, p.hidden * p.C), put(p.db1, p.hidden);
  put(p.dw2, p.hidden * p.C), put(p.db2, p.C), put(p.dplanes, 98);
}

// Writes `bytes` of a thread's own in each thread, so that its caches hold nothing else.
CBAM_EXPORT void write_other(char* other, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) {
    for (int64_t k = 0; k < bytes; k += 64) ++other[i * bytes + k];
  }
}

// Seconds of a plain read of `bytes` by all threads, and of a plain copy past the caches.
CBAM_EXPORT double plain_read(const void* x, int64_t bytes, int threads) {
  const double begin = now();
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int i = 0; i < threads; ++i) {
    const int64_t first = bytes / 256 * i / threads * 64, last = bytes / 256 * (i + 1) / threads * 64;
    const float* at = static_cast<const float*>(x);
    VecF sum[4] = {};
    for (int64_t k = first; k < last; k += 64) {
      for (int u = 0; u < 64 / kLanes<float>; ++u) sum[u % 4] += load(at + k + u * kLanes<float>);
    }
    total += (sum[0] + sum[1] + sum[2] + sum[3])[0];
  }
  static volatile float kept;
  kept = total;
  return now() - begin;
}
CBAM_EXPORT double plain_copy(const void* x, void* y, int64_t bytes, int threads) {
  const double begin = now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) {
    const int64_t first = bytes / 256 * i / threads * 64, last = bytes / 256 * (i + 1) / threads * 64;
    for (int64_t k = first; k < last; k += kLanes<float>)
      stream(static_cast<float*>(y) + k, load(static_cast<const float*>(x) + k));
    stream_fence();
  }
  return now() - begin;
}
