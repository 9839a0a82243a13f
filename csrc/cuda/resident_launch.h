// The resident kernels' host entry points: plain C++ with the CUDA runtime, no torch.
#pragma once

#include <cuda_runtime.h>

#include "resident.h"

namespace cbam {
namespace resident {

// One function a dtype and direction, each in a .cu file of its own. With `clusters`, only asks how many
// clusters of this plan the device runs at a time, 0 where it runs none; else launches the kernel. Returns
// what CUDA says.
cudaError_t launch_forward_float32(const Resident&, cudaStream_t, int* clusters);
cudaError_t launch_forward_float16(const Resident&, cudaStream_t, int* clusters);
cudaError_t launch_forward_bfloat16(const Resident&, cudaStream_t, int* clusters);
cudaError_t launch_backward_float32(const Resident&, cudaStream_t, int* clusters);
cudaError_t launch_backward_float16(const Resident&, cudaStream_t, int* clusters);
cudaError_t launch_backward_bfloat16(const Resident&, cudaStream_t, int* clusters);

using Launcher = cudaError_t (*)(const Resident&, cudaStream_t, int*);

// Indexed by [backward][DType]; null where `covers` says no.
constexpr Launcher kLaunchers[2][4] = {
    {launch_forward_float32, nullptr, launch_forward_float16, launch_forward_bfloat16},
    {launch_backward_float32, nullptr, launch_backward_float16, launch_backward_bfloat16},
};

}  // namespace resident
}  // namespace cbam
