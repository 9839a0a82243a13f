// The kernels' host entry points: plain C++ with the CUDA runtime, no torch.
#pragma once

#include <cuda_runtime.h>

#include "policy.h"

namespace cbam {

// One function a dtype and direction, each in a .cu file of its own. They set the kernel's limit of
// shared memory, launch it, and return what CUDA says.
cudaError_t launch_streamed_forward_float32(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_forward_float64(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_forward_float16(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_forward_bfloat16(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_backward_float32(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_backward_float64(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_backward_float16(const Streamed&, Variant, cudaStream_t);
cudaError_t launch_streamed_backward_bfloat16(const Streamed&, Variant, cudaStream_t);

// Success where the module has code for the current device.
cudaError_t find_code();

using StreamedLauncher = cudaError_t (*)(const Streamed&, Variant, cudaStream_t);

// Indexed by [backward][DType].
constexpr StreamedLauncher kStreamedLaunchers[2][4] = {
    {launch_streamed_forward_float32, launch_streamed_forward_float64, launch_streamed_forward_float16,
     launch_streamed_forward_bfloat16},
    {launch_streamed_backward_float32, launch_streamed_backward_float64, launch_streamed_backward_float16,
     launch_streamed_backward_bfloat16},
};

}  // namespace cbam
