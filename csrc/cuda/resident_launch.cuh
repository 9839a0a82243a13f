// Launches one of a dtype's instantiations of a resident kernel, or asks what the device can run of it.
#pragma once

#include "resident_launch.h"
#include "resident_tile.cuh"

namespace cbam {
namespace resident {

// Kernel<Traits>::get() is the kernel of these traits.
template <class T, template <class> class Kernel>
cudaError_t launch_resident(const Resident& k, cudaStream_t stream, int* clusters) {
  return with_traits<T, Traits>(
      k, [&](auto traits) { return launch_kernel(Kernel<decltype(traits)>::get(), k, stream, clusters); });
}

}  // namespace resident
}  // namespace cbam
