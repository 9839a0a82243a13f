// Counters of the streamed tier: zero when a launch starts, and zero again when it has ended.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

namespace cbam {

// At least `words` zeroed 32-bit counters on like's device, for a launch on `stream`, the current one.
//
// Outside a CUDA graph each stream has its own, zeroed once: every launch leaves zeros behind. A launch that
// is being captured gets its own, and a memset before it in the graph: the graph's memory serves other nodes
// between two replays. Two graphs share nothing, and replays of one follow each other on whatever streams, as
// CUDA orders them; instances of one capture share their counters as they share their outputs.
//
// No call can find what a broken one left: a launch that fails has not touched its counters, and a kernel
// that is stopped by a fault ends its context, in which every later call fails with that fault.
torch::stable::Tensor counters_for(const torch::stable::Tensor& like, int64_t words, cudaStream_t stream);

}  // namespace cbam
