// Launches one of a dtype's instantiations of a streamed kernel.
#pragma once

#include "launch.h"
#include "streamed_engine.cuh"

namespace cbam {

inline cudaError_t launch_kernel(void (*kernel)(Streamed), const Streamed& k, cudaStream_t stream) {
  // The device's limit, not this call's need: another thread may be launching a larger plan.
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_limit);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  // Blocks that find no room at first run when others have ended, and find no item left.
  config.gridDim = dim3(static_cast<unsigned>(k.grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(k.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, k);
}

// Kernel<Traits>::get() is the kernel of these traits.
template <class T, template <class> class Kernel>
cudaError_t launch_variant(const Streamed& k, Variant v, cudaStream_t stream) {
  constexpr int kFull = kVector<T>;
  if (k.p.layout == kChannelsLast) {
    if (v.vector > 1)
      return launch_kernel(Kernel<StreamedTraits<T, kFull, kChannelsLast, kWhole>>::get(), k, stream);
    return launch_kernel(Kernel<StreamedTraits<T, 1, kChannelsLast, kWhole>>::get(), k, stream);
  }
  if constexpr (sizeof(T) < 8) {
    if (v.fold > 1)
      return launch_kernel(Kernel<StreamedTraits<T, kFull, kContiguous, kFolded>>::get(), k, stream);
    if (v.ragged)
      return launch_kernel(Kernel<StreamedTraits<T, kFull, kContiguous, kRagged>>::get(), k, stream);
  }
  if (v.vector > 1)
    return launch_kernel(Kernel<StreamedTraits<T, kFull, kContiguous, kWhole>>::get(), k, stream);
  return launch_kernel(Kernel<StreamedTraits<T, 1, kContiguous, kWhole>>::get(), k, stream);
}

}  // namespace cbam
