// The ops of cbam_fused/_ops.py for CPU tensors, on LibTorch's stable ABI.
//
// Every op goes one way: checks, allocate, empty return, fill in a Problem, run, hand over.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "caches.h"
#include "problem.h"

namespace cbam_fused {
namespace {

using Optional = std::optional<Tensor>;

struct InstructionSet {
  const char* name;
  bool available;
  const Kernels* (*kernels)();
};

// The widest that this processor has, or what CBAM_FUSED_ISA names.
const Kernels& kernels() {
  static const Kernels* chosen = [] {
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    const InstructionSet sets[] = {
#if defined(CBAM_HAS_AVX512_BF16)
        {"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), kernels_avx512_bf16},
#endif
#if defined(__x86_64__)
        {"avx512", avx512, kernels_avx512},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2},
#endif
        {"baseline", true, kernels_baseline},
    };
    const char* wanted = std::getenv("CBAM_FUSED_ISA");
    std::string names;
    for (const InstructionSet& s : sets) {
      if (!s.available) continue;
      if (!wanted || !std::strcmp(wanted, s.name)) return s.kernels();
      names += (names.empty() ? "" : ", ") + std::string(s.name);
    }
    STD_TORCH_CHECK(false, "cbam_fused: CBAM_FUSED_ISA must be one of ", names, " on this processor, got ",
                    wanted);
  }();
  return *chosen;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, "cbam_fused: x must have dtype float32, float64, bfloat16 or float16");
  }
}

bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

int64_t positions(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 2; d < x.dim(); ++d) count *= x.size(d);
  return count;
}

template <class To>
void read_as(const Tensor& t, To* to) {
  // The tensors of the small networks may be permuted (a convolution's weight in channels_last).
  Tensor source = t.is_contiguous() ? t : torch::stable::contiguous(t);
  const int64_t count = source.numel();
  auto copy = [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(source.data_ptr());
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  };
  switch (source.scalar_type()) {
    case ScalarType::Float:
      return copy(float{});
    case ScalarType::Double:
      return copy(double{});
    case ScalarType::BFloat16:
      return copy(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return copy(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "cbam_fused: parameters must be float32, float64, bfloat16 or float16");
  }
}

double read_scalar(const Optional& t, double missing) {
  if (!t) return missing;
  STD_TORCH_CHECK(t->numel() == 1, "cbam_fused: the spatial gate's norm and bias must have one element, got ",
                  t->numel());
  double value;
  read_as(*t, &value);
  return value;
}

// Bytes of x from which on a thread is worth its start. (Measured on two cores of a Xeon, float32, calls on
// what is in cache, two threads over one: at 196 KiB of x forward 1.02 to 1.8 and backward 1.1 to 1.6, the
// more the fewer samples; at 392 KiB both 0.8 to 1.1, but for one row of 1.4.)
int64_t grain() {
  static const int64_t bytes = [] {
    const char* wanted = std::getenv("CBAM_FUSED_GRAIN");
    char* end = nullptr;
    const int64_t value = wanted ? std::strtoll(wanted, &end, 10) : int64_t(128) << 10;
    STD_TORCH_CHECK(value > 0 && (!wanted || *end == 0),
                    "cbam_fused: CBAM_FUSED_GRAIN must be a number of bytes, got ", wanted);
    return value;
  }();
  return bytes;
}

void run_in_torch_pool(int64_t count, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

struct Options {
  int64_t pools, spatial, ties;
  bool residual = false;
};
constexpr int64_t kMeanMax = 2, kSpatialBlend = 3;  // _config.py

struct Weights {
  const Optional &w1, &b1, &w2, &b2, &conv_weight, &conv_bias;
};
struct Norm {
  const Optional &weight, &bias, &mean, &var;
  double eps;
};
const Optional kNone;
const Norm kNoNorm{kNone, kNone, kNone, kNone, 0.0};

// Memory for the kernels' own arrays. A thread keeps what its calls took, up to 8 MiB: a call then allocates
// its outputs and nothing else, and does not move the end of the heap beyond what any operation with such an
// output does. (Beside an output of some MiB, scratch that came and went made glibc give back pages and ask
// for them again in every call of some processes: 2.0 ms for 0.87 at 8 x (512, 28, 28), inference.)
class Scratch {
 public:
  // Aligned to a line of memory; until the next call of this thread.
  char* take(int64_t bytes) {
    Optional& from = bytes <= kKept ? of_this_thread() : own_;
    if (!from || from->numel() < bytes + kLine) {
      from.reset();  // first, so that the two are not there at once
      from = make({bytes + kLine}, ScalarType::Char);
    }
    const uintptr_t at = reinterpret_cast<uintptr_t>(from->data_ptr());
    return reinterpret_cast<char*>((at + kLine - 1) / kLine * kLine);
  }

 private:
  static constexpr int64_t kKept = int64_t(8) << 20, kLine = 64;
  // A tensor, so that PyTorch's memory profiler sees it.
  static Optional& of_this_thread() {
    thread_local Optional kept;
    return kept;
  }
  Optional own_;
};

// A Problem with the tensors that its pointers need alive.
class Call {
 public:
  Problem p;
  DType dtype;
  ScalarType accumulate;

  Call(const Tensor& x, const Options& o) : x_(x), options_(o) {
    STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "cbam_fused: x must have 3 to 5 dimensions, got ", x.dim());
    dtype = dtype_of(x);
    accumulate = dtype == DType::kDouble ? ScalarType::Double : ScalarType::Float;
    const bool contiguous = x.is_contiguous();
    STD_TORCH_CHECK(contiguous || is_channels_last(x), "cbam_fused: x must be contiguous or channels-last");
    p.channels_last = !contiguous;
    p.N = x.size(0);
    p.C = x.size(1);
    p.P = positions(x);
    p.W = x.size(x.dim() - 1);
    p.H = x.dim() >= 4 ? x.size(x.dim() - 2) : 1;
    p.D = x.dim() == 5 ? x.size(2) : 1;
    p.pools = int(o.pools);
    p.spatial = o.spatial != 0;
    p.ties = int(o.ties);
    p.residual = o.residual;
    p.x = x.data_ptr();
    p.parallel = run_in_torch_pool;
    const int64_t bytes = p.N * p.C * p.P * (dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2);
    const int64_t threads = torch::stable::get_num_threads();
    p.threads = int(std::clamp<int64_t>(bytes / grain(), 1, threads));
    set_caches(p, threads);
  }

  void* same_layout(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.scalar_type() == x_.scalar_type(), "cbam_fused: ", name, " must have the dtype of x");
    STD_TORCH_CHECK(t.numel() == x_.numel(), "cbam_fused: ", name, " must have the shape of x");
    STD_TORCH_CHECK(p.channels_last ? is_channels_last(t) : t.is_contiguous(), "cbam_fused: ", name,
                    " must have the layout of x");
    return t.data_ptr();
  }

  void* saved(const Tensor& t, int64_t count, ScalarType type, const char* name) const {
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count && t.scalar_type() == type, "cbam_fused: ", name,
                    " must be contiguous with ", count, " elements of the dtype in _ops.py, got ", t.numel());
    return t.data_ptr();
  }

  Tensor nothing() const { return make({0}, accumulate); }
  Tensor nothing(ScalarType type) const { return make({0}, type); }
  int64_t passes() const { return p.pools & kBlend ? 1 : __builtin_popcount(p.pools & 15); }
  Tensor per_channel() const { return make({p.N, p.C}, accumulate); }
  std::vector<int64_t> map_size(int64_t maps) const {
    std::vector<int64_t> size{p.N, maps};
    if (maps == 0) size.pop_back();
    for (int64_t d = 2; d < x_.dim(); ++d) size.push_back(x_.size(d));
    return size;
  }
  static ScalarType index_type(int64_t extent) {
    return extent < (1 << 15) ? ScalarType::Short : ScalarType::Int;
  }

  void take_weights(const Weights& w) {
    if (p.pools) {
      STD_TORCH_CHECK(w.w2.has_value(), "cbam_fused: w2 must be a tensor");
      p.hidden = w.w1 ? w.w1->size(0) : 0;
      const int64_t width = p.hidden ? p.hidden : p.C;
      auto as_x = [&](const Tensor& t) { return t.scalar_type() == x_.scalar_type() && t.is_contiguous(); };
      p.matrices_as_x = as_x(*w.w2) && (!w.w1 || as_x(*w.w1));
      if (w.w1) p.w1 = weight(*w.w1, p.hidden * p.C, "w1", p.matrices_as_x);
      if (w.b1) p.b1 = weight(*w.b1, p.hidden, "b1");
      p.w2 = weight(*w.w2, p.C * width, "w2", p.matrices_as_x);
      if (w.b2) p.b2 = weight(*w.b2, p.C, "b2");
    }
    if (p.spatial) {
      STD_TORCH_CHECK(w.conv_weight.has_value(), "cbam_fused: conv_weight must be a tensor");
      const Tensor& k = *w.conv_weight;
      const bool blend = options_.spatial == kSpatialBlend;
      STD_TORCH_CHECK(k.dim() == x_.dim() && k.size(0) == 1 && k.size(1) == (blend ? 1 : 2),
                      "cbam_fused: conv_weight must have shape (1, ", blend ? 1 : 2, ", *k)");
      p.kW = k.size(k.dim() - 1);
      p.kH = k.dim() >= 4 ? k.size(k.dim() - 2) : 1;
      p.kD = k.dim() == 5 ? k.size(2) : 1;
      STD_TORCH_CHECK(p.kW % 2 && p.kH % 2 && p.kD % 2, "cbam_fused: conv_weight must have odd kernel sizes");
      accumulate == ScalarType::Double ? take_planes<double>(k) : take_planes<float>(k);
    }
  }

  // Folds a norm in eval mode, and the convolution's bias, into logits = scale * conv + shift.
  void take_norm(const Optional& conv_bias, const Norm& norm) {
    const double bias = read_scalar(conv_bias, 0.0);
    if (norm.mean) {
      rstd_ = 1.0 / std::sqrt(read_scalar(norm.var, 1.0) + norm.eps);
      mean_ = read_scalar(norm.mean, 0.0) - bias;
      p.scale = read_scalar(norm.weight, 1.0) * rstd_;
      p.shift = read_scalar(norm.bias, 0.0) - mean_ * p.scale;
    } else {
      p.shift = bias;
    }
  }

  Tensor gradient(const Optional& w, void*& pointer) {
    if (!w) return nothing(x_.scalar_type());
    Tensor t = make(sizes_of(*w), accumulate);
    pointer = t.data_ptr();
    return t;
  }
  // Gradients are accumulated in A and handed over in the parameter's dtype.
  Tensor finish(const Optional& w, const Tensor& t) const {
    return w && w->scalar_type() != accumulate ? torch::stable::to(t, w->scalar_type()) : t;
  }

  // dconv_weight from the gradients on the two planes.
  Tensor conv_gradient(const Optional& k) const {
    if (!p.spatial || !k) return nothing(x_.scalar_type());
    Tensor t = make(sizes_of(*k), accumulate);
    accumulate == ScalarType::Double ? put_planes<double>(t) : put_planes<float>(t);
    return finish(k, t);
  }

  // Gradient of a parameter with one element.
  Tensor one(const Optional& w, double value) const {
    if (!w) return nothing(x_.scalar_type());
    Tensor t = make(sizes_of(*w), w->scalar_type());
    return torch::stable::fill_(t, value);
  }
  double conv_bias_gradient() const { return dnorm_[0] * p.scale; }
  double norm_bias_gradient() const { return dnorm_[0]; }
  double norm_weight_gradient() const { return (dnorm_[1] - mean_ * dnorm_[0]) * rstd_; }

  void want_dplanes(bool norm_sums) {
    if (!p.spatial) return;
    dplanes_.resize(size_t(2 * p.kD * p.kH * p.kW) * element());
    p.dplanes = dplanes_.data();
    p.dnorm = norm_sums ? dnorm_ : nullptr;
  }

  void forward(Stage stage) {
    take_scratch(false);
    kernels().forward(p, dtype, stage);
  }
  void backward(Stage stage) {
    take_scratch(true);
    kernels().backward(p, dtype, stage);
  }

 private:
  size_t element() const { return accumulate == ScalarType::Double ? 8 : 4; }

  const void* weight(const Tensor& t, int64_t count, const char* name, bool as_it_is = false) {
    STD_TORCH_CHECK(t.numel() == count, "cbam_fused: ", name, " must have ", count, " elements, got ",
                    t.numel());
    if (as_it_is || (t.scalar_type() == accumulate && t.is_contiguous())) return t.data_ptr();
    Tensor copy = make({count}, accumulate);
    accumulate == ScalarType::Double ? read_as(t, static_cast<double*>(copy.data_ptr()))
                                     : read_as(t, static_cast<float*>(copy.data_ptr()));
    kept_.push_back(copy);
    return copy.data_ptr();
  }

  // The kernels read a plane of weights on the max map and one on the mean map, in this order.
  template <class A>
  void take_planes(const Tensor& k) {
    const size_t taps = size_t(p.kD * p.kH * p.kW);
    planes_.resize(2 * taps * sizeof(A));
    A* to = reinterpret_cast<A*>(planes_.data());
    if (options_.spatial == kSpatialBlend) {
      read_as(k, to);
      for (size_t t = 0; t < taps; ++t) to[t] = to[taps + t] = A(0.5) * to[t];
    } else {
      read_as(k, to);
      for (size_t t = 0; options_.spatial == kMeanMax && t < taps; ++t) std::swap(to[t], to[taps + t]);
    }
    p.planes = to;
  }
  template <class A>
  void put_planes(Tensor& t) const {
    const size_t taps = size_t(p.kD * p.kH * p.kW);
    const A* from = reinterpret_cast<const A*>(dplanes_.data());
    A* to = static_cast<A*>(t.data_ptr());
    for (size_t i = 0; i < taps; ++i) {
      const A max = from[i], mean = from[taps + i];
      if (options_.spatial == kSpatialBlend) {
        to[i] = A(0.5) * (max + mean);
      } else {
        to[i] = options_.spatial == kMeanMax ? mean : max;
        to[taps + i] = options_.spatial == kMeanMax ? max : mean;
      }
    }
  }

  void take_scratch(bool backward) { p.scratch = scratch_.take(kernels().scratch_bytes(p, dtype, backward)); }

  const Tensor& x_;
  Options options_;
  std::vector<Tensor> kept_;
  std::vector<char> planes_, dplanes_;
  double dnorm_[2] = {0, 0}, rstd_ = 1, mean_ = 0;
  Scratch scratch_;
};

// y or dx, asked for after everything that outlives it. It then ends where the heap ends, and once freed is
// room for the next one. With a small tensor behind it glibc's malloc finds that room too small, by what it
// adds for alignment (so its source and the addresses tell; glibc 2.36): it grows the heap instead and gives
// the old pages back, and a training step pays a page fault for every 4 KiB of y or dx. (Measured over eight
// processes: a step got 1.14 of x's size in fresh pages at 8 x (512, 28, 28), now 0.27; 0.41 at (64, 56, 56),
// now 0.20. Medians of the former's time in three processes each: 3.0, 6.6 and 8.9 ms, now 2.8, 2.5 and 2.5.)
Tensor make_output(const Tensor& x) {
  return make_like(x);
}

// What forward leaves for backward, and the channel gate; empty tensors where the configuration or `save` has
// none.
struct Saved {
  Tensor pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden;
};

Saved make_saved(Call& call, bool save) {
  Problem& p = call.p;
  const int64_t pools = __builtin_popcount(p.pools & 15);
  Saved s{save && pools ? make({p.N, pools, p.C}, call.accumulate) : call.nothing(),
          save && p.pools & kMax ? make({p.N, p.C}, Call::index_type(p.P)) : call.nothing(ScalarType::Short),
          p.pools ? call.per_channel() : call.nothing(),
          save && p.spatial ? make(call.map_size(2), call.accumulate) : call.nothing(),
          save && p.spatial ? make(call.map_size(0), Call::index_type(p.C)) : call.nothing(ScalarType::Short),
          save && p.hidden ? make({p.N, call.passes(), p.hidden}, call.accumulate) : call.nothing()};
  auto pointer = [](const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; };
  p.pooled = pointer(s.pooled);
  p.pool_index = pointer(s.pool_index);
  p.channel_gate = pointer(s.channel_gate);
  p.spatial_pool = pointer(s.spatial_pool);
  p.spatial_index = pointer(s.spatial_index);
  p.hidden_layer = pointer(s.hidden);
  p.wide_pool_index = Call::index_type(p.P) == ScalarType::Int;
  p.wide_spatial_index = Call::index_type(p.C) == ScalarType::Int;
  return s;
}

void take_saved(Call& call, const Tensor& pooled, const Tensor& pool_index, const Tensor& channel_gate,
                const Tensor& spatial_pool, const Tensor& spatial_index, const Tensor& hidden) {
  Problem& p = call.p;
  if (p.hidden)
    p.hidden_layer = call.saved(hidden, p.N * call.passes() * p.hidden, call.accumulate, "hidden");
  if (p.pools) {
    p.pooled = call.saved(pooled, p.N * __builtin_popcount(p.pools & 15) * p.C, call.accumulate, "pooled");
    p.channel_gate = call.saved(channel_gate, p.N * p.C, call.accumulate, "channel_gate");
    if (p.pools & kMax) p.pool_index = call.saved(pool_index, p.N * p.C, Call::index_type(p.P), "pool_index");
  }
  if (p.spatial) {
    p.spatial_pool = call.saved(spatial_pool, p.N * 2 * p.P, call.accumulate, "spatial_pool");
    p.spatial_index = call.saved(spatial_index, p.N * p.P, Call::index_type(p.C), "spatial_index");
  }
  p.wide_pool_index = Call::index_type(p.P) == ScalarType::Int;
  p.wide_spatial_index = Call::index_type(p.C) == ScalarType::Int;
}

Tensor cbam_inference(const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2,
                      const Optional& b2, const Optional& conv_weight, const Optional& conv_bias,
                      const Optional& bn_weight, const Optional& bn_bias, const Optional& bn_mean,
                      const Optional& bn_var, double bn_eps, int64_t pools, int64_t spatial, int64_t ties,
                      bool residual) {
  Call call(x, {pools, spatial, ties, residual});
  call.take_weights({w1, b1, w2, b2, conv_weight, conv_bias});
  if (call.p.spatial) call.take_norm(conv_bias, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  Tensor y = make_output(x);
  call.p.out = y.data_ptr();
  if (x.numel()) call.forward(Stage::kWhole);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_forward(
    const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
    const Optional& conv_weight, const Optional& conv_bias, const Optional& bn_weight,
    const Optional& bn_bias, const Optional& bn_mean, const Optional& bn_var, double bn_eps, int64_t pools,
    int64_t spatial, int64_t ties, bool residual) {
  Call call(x, {pools, spatial, ties, residual});
  call.take_weights({w1, b1, w2, b2, conv_weight, conv_bias});
  if (call.p.spatial) call.take_norm(conv_bias, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  Saved saved = make_saved(call, true);
  Tensor s = call.p.spatial ? make(call.map_size(1), call.accumulate) : call.nothing();
  Tensor y = make_output(x);
  call.p.out = y.data_ptr();
  call.p.spatial_gate = s.numel() ? s.data_ptr() : nullptr;
  if (x.numel()) call.forward(Stage::kWhole);
  return {y,
          saved.pooled,
          saved.pool_index,
          saved.channel_gate,
          saved.spatial_pool,
          saved.spatial_index,
          saved.hidden,
          s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_forward(
    const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
    const Optional& conv_weight, const Optional& conv_bias, int64_t pools, int64_t spatial, int64_t ties,
    bool save) {
  Call call(x, {pools, spatial, ties});
  call.take_weights({w1, b1, w2, b2, conv_weight, conv_bias});
  if (call.p.spatial) call.take_norm(conv_bias, kNoNorm);
  Saved saved = make_saved(call, save);
  Tensor z = call.p.spatial ? make(call.map_size(1), call.accumulate) : call.nothing();
  call.p.z = z.numel() ? z.data_ptr() : nullptr;
  if (x.numel()) call.forward(Stage::kAttention);
  return {z,
          saved.pooled,
          saved.pool_index,
          saved.channel_gate,
          saved.spatial_pool,
          saved.spatial_index,
          saved.hidden};
}

std::tuple<Tensor, Tensor> scale_forward(const Tensor& x, const Tensor& channel_gate, const Tensor& z,
                                         bool residual) {
  Call call(x, {channel_gate.numel() ? kAvg : 0, 1, kFirst, residual});
  Problem& p = call.p;
  if (p.pools) p.channel_gate = call.saved(channel_gate, p.N * p.C, call.accumulate, "channel_gate");
  p.z = call.saved(z, p.N * p.P, call.accumulate, "z");
  Tensor s = make(call.map_size(1), call.accumulate);
  Tensor y = make_output(x);
  p.out = y.data_ptr();
  p.spatial_gate = s.data_ptr();
  if (x.numel()) call.forward(Stage::kScale);
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_backward(
    const Tensor& dy, const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2,
    const Optional& b2, const Optional& conv_weight, const Optional& conv_bias, const Optional& bn_weight,
    const Optional& bn_bias, const Optional& bn_mean, const Optional& bn_var, double bn_eps,
    const Tensor& pooled, const Tensor& pool_index, const Tensor& channel_gate, const Tensor& spatial_pool,
    const Tensor& spatial_index, const Tensor& hidden, const Tensor& spatial_gate, int64_t pools,
    int64_t spatial, int64_t ties, bool residual) {
  Call call(x, {pools, spatial, ties, residual});
  Problem& p = call.p;
  call.take_weights({w1, b1, w2, b2, conv_weight, conv_bias});
  if (p.spatial) call.take_norm(conv_bias, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  take_saved(call, pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden);
  if (p.spatial) p.spatial_gate = call.saved(spatial_gate, p.N * p.P, call.accumulate, "spatial_gate");
  p.dy = call.same_layout(dy, "dy");
  Tensor dw1 = call.gradient(w1, p.dw1), db1 = call.gradient(b1, p.db1);
  Tensor dw2 = call.gradient(w2, p.dw2), db2 = call.gradient(b2, p.db2);
  call.want_dplanes(conv_bias || bn_weight || bn_bias);
  Tensor dx = make_output(x);
  p.out = dx.data_ptr();
  call.backward(Stage::kWhole);
  return {dx,
          call.finish(w1, dw1),
          call.finish(b1, db1),
          call.finish(w2, dw2),
          call.finish(b2, db2),
          call.conv_gradient(conv_weight),
          call.one(conv_bias, call.conv_bias_gradient()),
          call.one(bn_weight, call.norm_weight_gradient()),
          call.one(bn_bias, call.norm_bias_gradient())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dy, const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2,
    const Optional& b2, const Optional& conv_weight, const Optional& conv_bias, const Tensor& pooled,
    const Tensor& pool_index, const Tensor& channel_gate, const Tensor& spatial_pool,
    const Tensor& spatial_index, const Tensor& hidden, const Tensor& spatial_gate, const Tensor& dz,
    const Tensor& dchannel_gate, int64_t pools, int64_t spatial, int64_t ties, bool residual) {
  Call call(x, {pools, spatial, ties, residual});
  Problem& p = call.p;
  call.take_weights({w1, b1, w2, b2, conv_weight, conv_bias});
  take_saved(call, pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden);
  if (p.spatial) {
    p.spatial_gate = call.saved(spatial_gate, p.N * p.P, call.accumulate, "spatial_gate");
    p.dz = call.saved(dz, p.N * p.P, call.accumulate, "dz");
  }
  if (p.pools) p.dgate = call.saved(dchannel_gate, p.N * p.C, call.accumulate, "dchannel_gate");
  p.dy = call.same_layout(dy, "dy");
  Tensor dw1 = call.gradient(w1, p.dw1), db1 = call.gradient(b1, p.db1);
  Tensor dw2 = call.gradient(w2, p.dw2), db2 = call.gradient(b2, p.db2);
  call.want_dplanes(conv_bias.has_value());
  Tensor dx = make_output(x);
  p.out = dx.data_ptr();
  call.backward(Stage::kAttention);
  return {dx,
          call.finish(w1, dw1),
          call.finish(b1, db1),
          call.finish(w2, dw2),
          call.finish(b2, db2),
          call.conv_gradient(conv_weight),
          call.one(conv_bias, call.conv_bias_gradient())};
}

std::tuple<Tensor, Tensor> scale_backward(const Tensor& dy, const Tensor& x, const Tensor& channel_gate,
                                          const Tensor& spatial_gate) {
  Call call(x, {channel_gate.numel() ? kAvg : 0, 1, kFirst});
  Problem& p = call.p;
  if (p.pools) p.channel_gate = call.saved(channel_gate, p.N * p.C, call.accumulate, "channel_gate");
  p.spatial_gate = call.saved(spatial_gate, p.N * p.P, call.accumulate, "spatial_gate");
  p.dy = call.same_layout(dy, "dy");
  Tensor dz = make_like(spatial_gate), dgate = make_like(channel_gate);
  p.dz = dz.data_ptr();
  p.dgate = dgate.data_ptr();
  if (x.numel()) call.backward(Stage::kScale);
  return {dz, dgate};
}

}  // namespace
}  // namespace cbam_fused

STABLE_TORCH_LIBRARY_IMPL(cbam_fused_cpu, CPU, m) {
  m.impl("cbam_inference", TORCH_BOX(&cbam_fused::cbam_inference));
  m.impl("cbam_forward", TORCH_BOX(&cbam_fused::cbam_forward));
  m.impl("cbam_backward", TORCH_BOX(&cbam_fused::cbam_backward));
  m.impl("attention_forward", TORCH_BOX(&cbam_fused::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&cbam_fused::attention_backward));
  m.impl("scale_forward", TORCH_BOX(&cbam_fused::scale_forward));
  m.impl("scale_backward", TORCH_BOX(&cbam_fused::scale_backward));
}
