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

// The same for one kernel.
inline cudaError_t launch_kernel(void (*kernel)(const Resident), const Resident& k, cudaStream_t stream,
                                 int* clusters) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  // The device's limit, not this call's need: another thread may be launching a larger plan.
  cudaError_t error =
      cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_limit);
  if (error != cudaSuccess) return error;
  constexpr int kPortable = 8;
  if (k.cluster > kPortable) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(k.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(k.p.samples * k.cluster));
  config.blockDim = dim3(static_cast<unsigned>(k.threads));
  config.dynamicSmemBytes = static_cast<size_t>(k.at.total);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (clusters) {
    // A device newer than what this was compiled for may run the PTX of an older one, in which the kernel is
    // empty.
    cudaFuncAttributes compiled;
    error = cudaFuncGetAttributes(&compiled, entry);
    if (error != cudaSuccess) return error;
    *clusters = 0;
    if (compiled.ptxVersion < 90) return cudaSuccess;
    return cudaOccupancyMaxActiveClusters(clusters, entry, &config);
  }
  return cudaLaunchKernelEx(&config, kernel, k);
}

}  // namespace resident
}  // namespace cbam
