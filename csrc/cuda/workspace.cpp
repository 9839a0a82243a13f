// Counters: kept for each stream, or made for one node of a CUDA graph.
#include "workspace.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

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

// Never freed: its last launch may be running when the process ends.
uint32_t* make_zeros(int64_t words, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(words) * 4;
  void* memory = nullptr;
  // As torch's allocator does it: a capture of another thread would otherwise forbid it, and be ended by it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error != cudaSuccess) cudaGetLastError();
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  STD_TORCH_CHECK(error == cudaSuccess, "cbam_fused: no ", bytes,
                  " bytes for a stream's counters: ", cudaGetErrorString(error));
  STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
  return static_cast<uint32_t*>(memory);
}

}  // namespace

Counters counters_for(const Tensor& like, int64_t words, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) {
    Tensor own = torch::stable::new_empty(like, {words}, ScalarType::Int);
    auto* data = static_cast<uint32_t*>(own.data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(words) * 4, stream));
    return {data, own};
  }
  static auto* kept = new StreamCounters<uint32_t*>;
  const auto make = [&](int64_t room) { return make_zeros(room, stream); };
  return {kept->of(like.get_device_index(), id_of(stream), words, make), {}};
}

}  // namespace cbam
