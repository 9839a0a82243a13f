// The streamed tier's forward kernels for float32.
#include "streamed_forward.cuh"
#include "streamed_launch.cuh"

namespace cbam {

template <class Tr>
struct ForwardKernel {
  static auto get() { return streamed_forward_kernel<Tr>; }
};

cudaError_t launch_streamed_forward_float32(const Streamed& k, Variant v, cudaStream_t stream) {
  return launch_variant<float, ForwardKernel>(k, v, stream);
}

}  // namespace cbam
