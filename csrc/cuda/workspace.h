// Counters of the streamed tier: zero when a launch starts, and zero again when it has ended.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

namespace cbam {

// At least `words` zeroed 32-bit counters on like's device, for a launch on `stream`.
//
// Outside a CUDA graph each stream has its own, zeroed once: launches on one stream follow each other,
// and every launch leaves zeros behind. A launch that is being captured gets its own, with a memset in
// the graph: several instances of a graph may be replayed on different streams, but not one of them twice
// at a time.
torch::stable::Tensor counters_for(const torch::stable::Tensor& like, int64_t words, cudaStream_t stream);

}  // namespace cbam
