// Tensors that the ops fill, on LibTorch's stable ABI. They are made by a function of its C interface:
// torch::stable::new_empty, which looks its operator up by name, takes four times as long, and a call makes
// ten.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cbam_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A device, as the C interface has it.
struct Place {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
};

inline int32_t code_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Short:
      return aoti_torch_dtype_int16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    default:
      STD_TORCH_CHECK(false, "cbam_fused: no output has this dtype");
  }
}

// A tensor to be written whole.
inline Tensor make(const std::vector<int64_t>& size, const std::vector<int64_t>& strides, ScalarType type,
                   Place place = {}) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(),
                                                         code_of(type), place.type, place.index, &made));
  return Tensor(made);
}
inline Tensor make(const std::vector<int64_t>& size, ScalarType type, Place place = {}) {
  std::vector<int64_t> strides(size.size());
  int64_t next = 1;
  for (size_t d = size.size(); d-- > 0; next *= std::max<int64_t>(1, size[d])) strides[d] = next;
  return make(size, strides, type, place);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> size;
  for (int64_t d = 0; d < t.dim(); ++d) size.push_back(t.size(d));
  return size;
}

// With t's strides, as empty_like has them for a dense t.
inline Tensor make_like(const Tensor& t, Place place = {}) {
  std::vector<int64_t> strides;
  for (int64_t d = 0; d < t.dim(); ++d) strides.push_back(t.stride(d));
  return make(sizes_of(t), strides, t.scalar_type(), place);
}

}  // namespace cbam_fused
