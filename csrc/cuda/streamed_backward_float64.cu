// The streamed tier's backward kernels for float64.
#include "streamed_backward.cuh"
#include "streamed_launch.cuh"

namespace cbam {

template <class Tr>
struct BackwardKernel {
  static auto get() { return streamed_backward_kernel<Tr>; }
};

cudaError_t launch_streamed_backward_float64(const Streamed& k, Variant v, cudaStream_t stream) {
  return launch_variant<double, BackwardKernel>(k, v, stream);
}

}  // namespace cbam
