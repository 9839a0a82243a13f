// Launches one of a dtype's instantiations of a resident kernel, or asks what the device can run of it.
#pragma once

#include "resident_launch.h"
#include "resident_tile.cuh"

namespace cbam {
namespace resident {

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

// Kernel<Traits>::get() is the kernel of these traits.
template <class T, template <class> class Kernel>
cudaError_t launch_resident(const Resident& k, cudaStream_t stream, int* clusters) {
  return with_traits<T, Traits>(
      k, [&](auto traits) { return launch_kernel(Kernel<decltype(traits)>::get(), k, stream, clusters); });
}

}  // namespace resident
}  // namespace cbam
