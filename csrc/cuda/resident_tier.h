// The resident tier's host side: whether it runs a call on this device, and the launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include "problem.h"
#include "streamed.h"

namespace cbam {
namespace resident {

// Queues the operation on `stream` and returns true, or returns false where the streamed tier is to run it:
// `covers` says no, no cluster that the device runs holds a sample, or, unless `always`, `preferred` says no.
// `aligned`: every tensor of x's size starts at a multiple of 16 bytes. Raises where a launch
// fails.
bool launch(const Problem& p, Operation operation, bool aligned, bool always, const torch::stable::Tensor& x,
            cudaStream_t stream);

}  // namespace resident
}  // namespace cbam
