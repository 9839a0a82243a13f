// The resident tier's forward kernels for float32.
#include "resident_forward.cuh"
#include "resident_launch.cuh"

namespace cbam {
namespace resident {

template <class Tr>
struct ForwardKernel {
  static auto get() { return resident_forward_kernel<Tr>; }
};

cudaError_t launch_forward_float32(const Resident& k, cudaStream_t stream, int* clusters) {
  return launch_resident<float, ForwardKernel>(k, stream, clusters);
}

}  // namespace resident
}  // namespace cbam
