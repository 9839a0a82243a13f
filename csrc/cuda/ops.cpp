// The ops of cbam_fused/_ops.py for CUDA tensors, on LibTorch's stable ABI.
//
// Every op goes one way: checks, device guard, allocate, stream, empty return, launch, launch check.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "tiers.h"

namespace cbam {
namespace {

using cbam_fused::sizes_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, "cbam_fused: x must have dtype float32, float64, bfloat16 or float16");
  }
}

bool is_channels_last(const Tensor& x) {
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

struct Options {
  int64_t pools, spatial, ties;
  bool residual;
};
struct Weights {
  const Optional &w1, &b1, &w2, &b2, &conv_weight, &conv_bias;
};
struct Norm {
  const Optional &weight, &bias, &mean, &var;
  double eps;
};
struct Saved {
  Tensor pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden;
};

// One call: its Problem, and the tensors that the Problem's pointers keep alive.
class Call {
 public:
  Problem p{};

  Call(const Tensor& x, const Options& o)
      : x_(x), place_{aoti_torch_device_type_cuda(), x.get_device_index()} {
    STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "cbam_fused: x must have 3 to 5 dimensions, got ", x.dim());
    p.dtype = dtype_of(x);
    accumulate_ = p.dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
    const bool contiguous = x.is_contiguous();
    STD_TORCH_CHECK(contiguous || is_channels_last(x), "cbam_fused: x must be contiguous or channels-last");
    p.layout = contiguous ? kContiguous : kChannelsLast;
    int64_t spatial[3] = {1, 1, 1};
    for (int64_t d = 2; d < x.dim(); ++d) spatial[3 - x.dim() + d] = x.size(d);
    p.samples = x.size(0);
    p.channels = x.size(1);
    p.positions = spatial[0] * spatial[1] * spatial[2];
    STD_TORCH_CHECK(p.positions < INT32_MAX && p.channels < INT32_MAX, "cbam_fused: x must have fewer than ",
                    INT32_MAX, " channels and positions, got ", p.channels, " and ", p.positions);
    p.depth = static_cast<int32_t>(spatial[0]);
    p.height = static_cast<int32_t>(spatial[1]);
    p.width = static_cast<int32_t>(spatial[2]);
    p.kernel_d = p.kernel_h = p.kernel_w = 1;
    p.hidden = p.channels;
    p.pools = static_cast<int32_t>(o.pools);
    p.spatial = static_cast<int32_t>(o.spatial);
    p.ties = static_cast<int32_t>(o.ties);
    p.residual = o.residual;
    p.x = x.data_ptr();
  }

  // After the checks and before the first allocation; torch guards a weight's copy itself.
  void enter_device() { guard_.emplace(x_.get_device_index()); }

  bool empty() const { return x_.numel() == 0; }
  int64_t map_elements() const { return p.samples * p.positions; }

  // A tensor of x's size and layout that the caller made.
  const void* like_x(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.scalar_type() == x_.scalar_type() && sizes_of(t) == sizes_of(x_), "cbam_fused: ", name,
                    " must have the shape and dtype of x");
    STD_TORCH_CHECK(p.layout == kChannelsLast ? is_channels_last(t) : t.is_contiguous(), "cbam_fused: ", name,
                    " must have the layout of x");
    check_device(t, name);
    return t.data_ptr();
  }
  // A tensor of x's size, layout and dtype, to be written.
  Tensor output() const { return cbam_fused::make_like(x_, place_); }
  // A saved tensor; its elements are of the accumulation dtype, or indices into `extent`.
  void* saved(const Tensor& t, int64_t count, const char* name, int64_t extent = 0) const {
    const ScalarType type = extent ? index_type(extent) : accumulate_;
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count && t.scalar_type() == type, "cbam_fused: ", name,
                    " must be contiguous with ", count, " elements of the dtype in _ops.py, got ", t.numel());
    check_device(t, name);
    return t.data_ptr();
  }

  static ScalarType index_type(int64_t extent) {
    return extent < kShortIndexExtent ? ScalarType::Short : ScalarType::Int;
  }
  Tensor accumulate(std::vector<int64_t> sizes) const { return cbam_fused::make(sizes, accumulate_, place_); }
  Tensor indices(std::vector<int64_t> sizes, int64_t extent) const {
    return cbam_fused::make(sizes, index_type(extent), place_);
  }
  std::vector<int64_t> map_sizes(std::vector<int64_t> front) const {
    for (int64_t d = 2; d < x_.dim(); ++d) front.push_back(x_.size(d));
    return front;
  }
  Tensor map() const { return accumulate(map_sizes({p.samples, 1})); }
  Tensor nothing() const { return accumulate({0}); }
  Tensor no_indices() const { return cbam_fused::make({0}, ScalarType::Short, place_); }

  void take_weights(const Weights& w) {
    if (p.pools) {
      STD_TORCH_CHECK(w.w2.has_value(), "cbam_fused: w2 must be a tensor where pools are given");
      if (w.w1) p.hidden = w.w1->size(0);
      p.w1 = weight(w.w1, p.hidden * p.channels, "w1");
      p.b1 = weight(w.b1, p.hidden, "b1");
      p.w2 = weight(w.w2, p.channels * p.hidden, "w2");
      p.b2 = weight(w.b2, p.channels, "b2");
    }
    if (p.spatial) {
      STD_TORCH_CHECK(w.conv_weight.has_value(),
                      "cbam_fused: conv_weight must be a tensor where spatial is given");
      const Tensor& k = *w.conv_weight;
      const int64_t planes = p.spatial == kSpatialBlend ? 1 : 2;
      STD_TORCH_CHECK(k.dim() == x_.dim() && k.size(0) == 1 && k.size(1) == planes,
                      "cbam_fused: conv_weight must have shape (1, ", planes, ", *k)");
      int32_t* sizes[3] = {&p.kernel_d, &p.kernel_h, &p.kernel_w};
      for (int64_t d = 2; d < k.dim(); ++d) {
        STD_TORCH_CHECK(k.size(d) % 2 == 1, "cbam_fused: conv_weight must have odd kernel sizes, got ",
                        k.size(d));
        *sizes[3 - k.dim() + d] = static_cast<int32_t>(k.size(d));
      }
      p.conv_weight = weight(w.conv_weight, planes * taps(p), "conv_weight");
      p.conv_bias = weight(w.conv_bias, 1, "conv_bias");
    }
  }
  void take_norm(const Norm& n) {
    if (!p.spatial || !n.mean) return;
    p.bn_weight = weight(n.weight, 1, "bn_weight");
    p.bn_bias = weight(n.bias, 1, "bn_bias");
    p.bn_mean = weight(n.mean, 1, "bn_mean");
    p.bn_var = weight(n.var, 1, "bn_var");
    p.bn_eps = n.eps;
  }

  // What forward computes between its stages. The kernels need most of it whether it is saved or not;
  // what is not, goes back to the allocator when the call has been queued.
  Saved make_saved(bool save, bool keep_gate) {
    Saved s{nothing(), no_indices(), nothing(), nothing(), no_indices(), nothing()};
    const auto keep = [&](bool wanted, Tensor made, Tensor& kept) {
      void* data = made.data_ptr();
      if (wanted)
        kept = made;
      else
        kept_.push_back(made);
      return data;
    };
    if (p.pools) {
      p.pooled = keep(save, accumulate({p.samples, pool_count(p.pools), p.channels}), s.pooled);
      p.channel_gate = keep(keep_gate, accumulate({p.samples, p.channels}), s.channel_gate);
      if (save && p.pools & kMax)
        p.pool_index = keep(true, indices({p.samples, p.channels}, p.positions), s.pool_index);
      if (save && p.w1.data)
        p.hidden_layer = keep(true, accumulate({p.samples, mlp_passes(p.pools), p.hidden}), s.hidden);
    }
    if (p.spatial) {
      p.spatial_pool = keep(save, accumulate(map_sizes({p.samples, 2})), s.spatial_pool);
      if (save) p.spatial_index = keep(true, indices(map_sizes({p.samples}), p.channels), s.spatial_index);
    }
    return s;
  }
  void take_saved(const Saved& s, const Tensor& spatial_gate) {
    if (p.pools) {
      p.pooled = saved(s.pooled, p.samples * pool_count(p.pools) * p.channels, "pooled");
      p.channel_gate = saved(s.channel_gate, p.samples * p.channels, "channel_gate");
      if (p.pools & kMax)
        p.pool_index = saved(s.pool_index, p.samples * p.channels, "pool_index", p.positions);
      if (p.w1.data) p.hidden_layer = saved(s.hidden, p.samples * mlp_passes(p.pools) * p.hidden, "hidden");
    }
    if (p.spatial) {
      p.spatial_pool = saved(s.spatial_pool, 2 * map_elements(), "spatial_pool");
      p.spatial_index = saved(s.spatial_index, map_elements(), "spatial_index", p.channels);
      p.spatial_gate = saved(spatial_gate, map_elements(), "spatial_gate");
    }
  }

  // The gradient of a weight, contiguous, in its shape and dtype; `part` is what uses the weight.
  Tensor gradient(const Optional& w, bool used, WeightGrad& grad) {
    if (!w) return cbam_fused::make({0}, x_.scalar_type(), place_);
    if (!used || empty()) return torch::stable::new_zeros(*w, sizes_of(*w));
    Tensor t = cbam_fused::make(sizes_of(*w), w->scalar_type(), place_);
    grad = {t.data_ptr(), w->scalar_type() != x_.scalar_type()};
    return t;
  }

  void run(Operation operation) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x_.get_device_index(), &stream));
    if (!empty()) launch(p, operation, x_, static_cast<cudaStream_t>(stream));
  }

 private:
  void check_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x_.get_device_index(), "cbam_fused: ", name,
                    " must be on the device of x");
  }
  Weight weight(const Optional& w, int64_t count, const char* name) {
    if (!w) return {nullptr, 0};
    const bool wide = w->scalar_type() != x_.scalar_type();
    STD_TORCH_CHECK(w->numel() == count, "cbam_fused: ", name, " must have ", count, " elements, got ",
                    w->numel());
    STD_TORCH_CHECK(!wide || (w->scalar_type() == ScalarType::Float && p.dtype != kFloat64),
                    "cbam_fused: ", name,
                    " must have the dtype of x, or float32 where x is float16 or bfloat16");
    check_device(*w, name);
    if (w->is_contiguous()) return {w->data_ptr(), wide};
    kept_.push_back(torch::stable::contiguous(*w));
    return {kept_.back().data_ptr(), wide};
  }

  const Tensor& x_;
  const cbam_fused::Place place_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  ScalarType accumulate_;
  std::vector<Tensor> kept_;
};

struct Forward {
  Tensor y, spatial_gate;
  Saved saved;
};
Forward whole_forward(const Tensor& x, const Weights& weights, const Norm& norm, const Options& options,
                      bool save) {
  Call call(x, options);
  call.take_weights(weights);
  call.take_norm(norm);
  call.enter_device();
  Tensor y = call.output();
  call.p.y = y.data_ptr();
  Saved saved = call.make_saved(save, save);
  Tensor gate = options.spatial ? call.map() : call.nothing();
  if (options.spatial) call.p.spatial_gate = gate.data_ptr();
  call.run(kCbamForward);
  return {y, gate, saved};
}

Tensor cbam_inference(const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2,
                      const Optional& b2, const Optional& conv_weight, const Optional& conv_bias,
                      const Optional& bn_weight, const Optional& bn_bias, const Optional& bn_mean,
                      const Optional& bn_var, double bn_eps, int64_t pools, int64_t spatial, int64_t ties,
                      bool residual) {
  return whole_forward(x, {w1, b1, w2, b2, conv_weight, conv_bias},
                       {bn_weight, bn_bias, bn_mean, bn_var, bn_eps}, {pools, spatial, ties, residual}, false)
      .y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_forward(
    const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
    const Optional& conv_weight, const Optional& conv_bias, const Optional& bn_weight,
    const Optional& bn_bias, const Optional& bn_mean, const Optional& bn_var, double bn_eps, int64_t pools,
    int64_t spatial, int64_t ties, bool residual) {
  const auto [y, gate, s] =
      whole_forward(x, {w1, b1, w2, b2, conv_weight, conv_bias},
                    {bn_weight, bn_bias, bn_mean, bn_var, bn_eps}, {pools, spatial, ties, residual}, true);
  return {y, s.pooled, s.pool_index, s.channel_gate, s.spatial_pool, s.spatial_index, s.hidden, gate};
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
  call.take_norm({bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  call.take_saved({pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden}, spatial_gate);
  p.dy = call.like_x(dy, "dy");
  call.enter_device();
  Tensor dx = call.output();
  p.dx = dx.data_ptr();
  const bool norm = spatial && bn_mean.has_value();
  Tensor dw1 = call.gradient(w1, pools, p.dw1), db1 = call.gradient(b1, pools && w1.has_value(), p.db1);
  Tensor dw2 = call.gradient(w2, pools, p.dw2), db2 = call.gradient(b2, pools, p.db2);
  Tensor dk = call.gradient(conv_weight, spatial, p.dconv_weight),
         db = call.gradient(conv_bias, spatial, p.dconv_bias);
  Tensor dgamma = call.gradient(bn_weight, norm, p.dbn_weight),
         dbeta = call.gradient(bn_bias, norm, p.dbn_bias);
  call.run(kCbamBackward);
  return {dx, dw1, db1, dw2, db2, dk, db, dgamma, dbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_forward(
    const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
    const Optional& conv_weight, const Optional& conv_bias, int64_t pools, int64_t spatial, int64_t ties,
    bool save) {
  Call call(x, {pools, spatial, ties, false});
  call.take_weights({w1, b1, w2, b2, conv_weight, conv_bias});
  call.enter_device();
  Saved s = call.make_saved(save, true);
  Tensor z = spatial ? call.map() : call.nothing();
  if (spatial) call.p.z = z.data_ptr();
  if (pools || spatial) call.run(kAttentionForward);
  return {z, s.pooled, s.pool_index, s.channel_gate, s.spatial_pool, s.spatial_index, s.hidden};
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
  call.take_saved({pooled, pool_index, channel_gate, spatial_pool, spatial_index, hidden}, spatial_gate);
  if (spatial) p.dz = call.saved(dz, call.map_elements(), "dz");
  if (pools) p.dchannel_gate = call.saved(dchannel_gate, p.samples * p.channels, "dchannel_gate");
  p.dy = call.like_x(dy, "dy");
  call.enter_device();
  Tensor dx = call.output();
  p.dx = dx.data_ptr();
  Tensor dw1 = call.gradient(w1, pools, p.dw1), db1 = call.gradient(b1, pools && w1.has_value(), p.db1);
  Tensor dw2 = call.gradient(w2, pools, p.dw2), db2 = call.gradient(b2, pools, p.db2);
  Tensor dk = call.gradient(conv_weight, spatial, p.dconv_weight),
         db = call.gradient(conv_bias, spatial, p.dconv_bias);
  call.run(kAttentionBackward);
  return {dx, dw1, db1, dw2, db2, dk, db};
}

// `scale` has no options of its own: an absent channel gate is an empty tensor.
Options scale_options(const Tensor& channel_gate, bool residual) {
  return {channel_gate.numel() ? kAvg : 0, kMaxMean, kTiesFirst, residual};
}

std::tuple<Tensor, Tensor> scale_forward(const Tensor& x, const Tensor& channel_gate, const Tensor& z,
                                         bool residual) {
  Call call(x, scale_options(channel_gate, residual));
  Problem& p = call.p;
  if (p.pools) p.channel_gate = call.saved(channel_gate, p.samples * p.channels, "channel_gate");
  p.z = call.saved(z, call.map_elements(), "z");
  call.enter_device();
  Tensor y = call.output(), gate = call.map();
  p.y = y.data_ptr();
  p.spatial_gate = gate.data_ptr();
  call.run(kScaleForward);
  return {y, gate};
}

std::tuple<Tensor, Tensor> scale_backward(const Tensor& dy, const Tensor& x, const Tensor& channel_gate,
                                          const Tensor& spatial_gate) {
  Call call(x, scale_options(channel_gate, false));
  Problem& p = call.p;
  if (p.pools) p.channel_gate = call.saved(channel_gate, p.samples * p.channels, "channel_gate");
  p.spatial_gate = call.saved(spatial_gate, call.map_elements(), "spatial_gate");
  p.dy = call.like_x(dy, "dy");
  call.enter_device();
  Tensor dz = call.map();
  Tensor dgate = p.pools ? call.accumulate({p.samples, p.channels}) : call.nothing();
  p.dz_out = dz.data_ptr();
  p.dchannel_gate = dgate.data_ptr();
  call.run(kScaleBackward);
  return {dz, dgate};
}

}  // namespace
}  // namespace cbam

STABLE_TORCH_LIBRARY_IMPL(cbam_fused_cuda, CUDA, m) {
  m.impl("cbam_inference", TORCH_BOX(&cbam::cbam_inference));
  m.impl("cbam_forward", TORCH_BOX(&cbam::cbam_forward));
  m.impl("cbam_backward", TORCH_BOX(&cbam::cbam_backward));
  m.impl("attention_forward", TORCH_BOX(&cbam::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&cbam::attention_backward));
  m.impl("scale_forward", TORCH_BOX(&cbam::scale_forward));
  m.impl("scale_backward", TORCH_BOX(&cbam::scale_backward));
}
