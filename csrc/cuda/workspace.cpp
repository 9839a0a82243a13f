// Counters: kept for each stream, or held by a CUDA graph.
#include "workspace.h"

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include "graph_counters.h"
#include "stream_counters.h"

namespace cbam {
namespace {

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

// Zeroed in the order of `stream`, or, without one, when this returns.
cudaError_t zero(void* memory, size_t bytes, const cudaStream_t* stream) {
  if (stream) return cudaMemsetAsync(memory, 0, bytes, *stream);
  cudaStream_t own;
  cudaError_t error = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(memory, 0, bytes, own);
  if (error == cudaSuccess) error = cudaStreamSynchronize(own);
  const cudaError_t ended = cudaStreamDestroy(own);
  return error == cudaSuccess ? ended : error;
}

// Never freed: its last launch may be running when the process ends.
uint32_t* make_zeros(int64_t words, const cudaStream_t* stream) {
  const size_t bytes = static_cast<size_t>(words) * 4;
  void* memory = nullptr;
  // As torch's allocator does it: a capture, of this or another thread, would otherwise forbid it, and be
  // ended by it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaSuccess) {
    error = zero(memory, bytes, stream);
    if (error != cudaSuccess) cudaFree(memory);
  }
  if (error != cudaSuccess) cudaGetLastError();
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  STD_TORCH_CHECK(error == cudaSuccess, "cbam_fused: ", bytes,
                  " bytes for counters could not be made: ", cudaGetErrorString(error));
  return static_cast<uint32_t*>(memory);
}

// The graph that a capture of this stream fills.
cudaGraph_t graph_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  STD_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr));
#else
  STD_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, nullptr, nullptr));
#endif
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusActive && graph,
                  "cbam_fused: an earlier error has ended the capture of this stream into a CUDA graph");
  return graph;
}

uint32_t* held_by(cudaGraph_t graph, int32_t device, int64_t words) {
  static auto* pool = new GraphCounters;
  GraphCounters::Piece* piece =
      pool->take(device, words, [](int64_t room) { return make_zeros(room, nullptr); });
  // On a thread of CUDA's, where nothing of CUDA may be called.
  const auto give_back = [](void* p) { GraphCounters::give_back(static_cast<GraphCounters::Piece*>(p)); };
  cudaUserObject_t held = nullptr;
  cudaError_t error = cudaUserObjectCreate(&held, piece, give_back, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) {
    GraphCounters::give_back(piece);
  } else {
    error = cudaGraphRetainUserObject(graph, held, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(held, 1);
  }
  if (error != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess,
                  "cbam_fused: the CUDA graph does not take its counters: ", cudaGetErrorString(error));
  return piece->data;
}

}  // namespace

uint32_t* counters_for(int32_t device, int64_t words, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) return held_by(graph_of(stream), device, words);
  static auto* kept = new StreamCounters<uint32_t*>;
  return kept->of(device, id_of(stream), words, [&](int64_t room) { return make_zeros(room, &stream); });
}

}  // namespace cbam
