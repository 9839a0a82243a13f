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

// Every kernel is compiled for the same devices: one is asked for all.
cudaError_t find_code() {
  cudaFuncAttributes found;
  const auto kernel = ForwardKernel<StreamedTraits<float, 1, kContiguous, kWhole>>::get();
  return cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel));
}

}  // namespace cbam
