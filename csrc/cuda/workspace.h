// Counters of the streamed tier: zero when a launch starts, and zero again when it has ended.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace cbam {

// `owner` keeps those alive that are one call's; the others live as long as the process.
struct Counters {
  uint32_t* data;
  std::optional<torch::stable::Tensor> owner;
};

// At least `words` zeroed 32-bit counters on the current device, which is that of `like`, for a launch on
// `stream`, the current one.
//
// Outside a CUDA graph each stream has its own, zeroed once: every launch leaves zeros behind. They are
// memory of CUDA's and not of torch's allocator, which may be filling a pool of the caller's
// (torch.cuda.MemPool, the private pool of torch.compile's CUDA graphs), where nothing may outlive what the
// caller knows of. A launch that is being captured gets its own, from the graph's pool, and a memset before
// it in the graph: the graph's memory serves other nodes between two replays. Two graphs share nothing, and
// replays of one follow each other on whatever streams, as CUDA orders them; instances of one capture share
// their counters as they share their outputs.
//
// No call can find what a broken one left: a launch that fails has not touched its counters, and a kernel
// that is stopped by a fault ends its context, in which every later call fails with that fault.
Counters counters_for(const torch::stable::Tensor& like, int64_t words, cudaStream_t stream);

}  // namespace cbam
