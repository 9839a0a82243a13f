// The resident tier's backward kernels for float32.
#include "resident_backward.cuh"
#include "resident_launch.cuh"

namespace cbam {
namespace resident {

template <class Tr>
struct BackwardKernel {
  static auto get() { return resident_backward_kernel<Tr>; }
};

cudaError_t launch_backward_float32(const Resident& k, cudaStream_t stream, int* clusters) {
  return launch_resident<float, BackwardKernel>(k, stream, clusters);
}

}  // namespace resident
}  // namespace cbam
