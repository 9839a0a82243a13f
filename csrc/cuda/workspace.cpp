// Counters in torch's memory: kept for each stream, or made for one node of a CUDA graph.
#include "workspace.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "stream_counters.h"

namespace cbam {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The handle itself may come again for another stream, and cudaStreamPerThread is another one in every
// thread.
uint64_t id_of(cudaStream_t stream) {
#if CUDART_VERSION >= 12000
  unsigned long long id = 0;
  STD_CUDA_CHECK(cudaStreamGetId(stream, &id));
  return id;
#else
  return reinterpret_cast<uintptr_t>(stream);
#endif
}

}  // namespace

Tensor counters_for(const Tensor& like, int64_t words, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) {
    Tensor own = torch::stable::new_empty(like, {words}, ScalarType::Int);
    STD_CUDA_CHECK(cudaMemsetAsync(own.data_ptr(), 0, static_cast<size_t>(words) * 4, stream));
    return own;
  }
  // Never destroyed: at exit, torch's allocator may be gone before this library.
  static auto* kept = new StreamCounters<std::optional<Tensor>>;
  return *kept->of(like.get_device_index(), id_of(stream), words, [&](int64_t room) {
    return std::optional<Tensor>(torch::stable::new_zeros(like, {room}, ScalarType::Int));
  });
}

}  // namespace cbam
