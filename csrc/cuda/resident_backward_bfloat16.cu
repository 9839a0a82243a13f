// The resident tier's backward kernels for bfloat16.
#include "resident_backward.cuh"
#include "resident_launch.cuh"

namespace cbam {
namespace resident {

template <class Tr>
struct BackwardKernel {
  static auto get() { return resident_backward_kernel<Tr>; }
};

cudaError_t launch_backward_bfloat16(const Resident& k, cudaStream_t stream, int* clusters) {
  return launch_resident<BFloat16, BackwardKernel>(k, stream, clusters);
}

}  // namespace resident
}  // namespace cbam
