// The resident tier's forward kernels for bfloat16.
#include "resident_forward.cuh"
#include "resident_launch.cuh"

namespace cbam {
namespace resident {

template <class Tr>
struct ForwardKernel {
  static auto get() { return resident_forward_kernel<Tr>; }
};

cudaError_t launch_forward_bfloat16(const Resident& k, cudaStream_t stream, int* clusters) {
  return launch_resident<BFloat16, ForwardKernel>(k, stream, clusters);
}

}  // namespace resident
}  // namespace cbam
