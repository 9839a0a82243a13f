// Which tier runs a call, and its launch with scratch memory from torch's allocator.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include "policy.h"

namespace cbam {

// Queues the operation on `stream`; scratch memory is allocated like x. Raises with the kernel's name and
// CUDA's message where the launch fails, and with the limit where no tier covers the shape.
void launch(const Problem& p, Operation operation, const torch::stable::Tensor& x, cudaStream_t stream);

}  // namespace cbam

// What Python asks once a device: what CUDA says where the module has no code for the current one, else null.
extern "C" __attribute__((visibility("default"))) const char* cbam_fused_cuda_missing_code();
