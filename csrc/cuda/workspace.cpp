// Keeps the counters of each device and stream.
#include "workspace.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <utility>

namespace cbam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor counters_for(const Tensor& like, int64_t words, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) {
    Tensor own = torch::stable::new_empty(like, {words}, ScalarType::Int);
    STD_CUDA_CHECK(cudaMemsetAsync(own.data_ptr(), 0, static_cast<size_t>(words) * 4, stream));
    return own;
  }
  static std::mutex mutex;
  // Never destroyed: at exit, torch's allocator may be gone before this library.
  static auto* kept = new std::map<std::pair<int32_t, cudaStream_t>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(like.get_device_index(), stream);
  const auto found = kept->find(key);
  if (found != kept->end() && found->second.numel() >= words) return found->second;
  int64_t room = 1024;
  while (room < words) room *= 2;
  // An outgrown tensor goes back to the allocator, which hands it out on this same stream only after the
  // launches that still use it.
  const Tensor fresh = torch::stable::new_zeros(like, {room}, ScalarType::Int);
  kept->insert_or_assign(key, fresh);
  return fresh;
}

}  // namespace cbam
