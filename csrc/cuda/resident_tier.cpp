// Asks the device what it can run of the resident tier, once a plan, and launches it.
#include "resident_tier.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>
#include <tuple>

#include "resident_launch.h"
#include "workspace.h"

namespace cbam {
namespace resident {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kNames[] = {"cbam_forward", "cbam_backward"};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Whether a device may say by this that it does not run such clusters; any other error is one of the
// program's.
bool refuses_clusters(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidClusterSize:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNotSupported:
      return true;
    default:
      return false;
  }
}

// What does not change while the process lives, and would cost every call microseconds to ask.
class Known {
 public:
  Machine machine(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = machines_.find(device);
    if (found != machines_.end()) return found->second;
    const Machine m{attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                        attribute(cudaDevAttrComputeCapabilityMinor, device),
                    attribute(cudaDevAttrMultiProcessorCount, device),
                    attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
    machines_.emplace(device, m);
    return m;
  }
  // Clusters of this plan that the device runs at a time.
  int clusters(int device, const Resident& k) {
    const bool backward = is_backward(k.operation);
    const auto key = std::make_tuple(device, backward, k.p.dtype, k.p.layout, k.split, k.vector, k.cluster,
                                     k.threads, k.at.total);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = clusters_.find(key);
    if (found != clusters_.end()) return found->second;
    int count = 0;
    const cudaError_t error = kLaunchers[backward][k.p.dtype](k, nullptr, &count);
    if (error != cudaSuccess) {
      cudaGetLastError();
      STD_TORCH_CHECK(refuses_clusters(error), "cbam_fused: asking what runs of the resident kernel of ",
                      kNames[backward], " failed: ", cudaGetErrorString(error));
      count = 0;
    }
    clusters_.emplace(key, count);
    return count;
  }

 private:
  std::mutex mutex_;
  std::map<int, Machine> machines_;
  std::map<std::tuple<int, bool, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t>, int>
      clusters_;
};

}  // namespace

bool launch(const Problem& p, Operation operation, bool aligned, bool always, const Tensor& x,
            cudaStream_t stream) {
  static auto* known = new Known;
  const int device = x.get_device_index();
  const Machine machine = known->machine(device);
  if (!covers(p, operation, machine, aligned)) return false;
  Resident k{};
  k.p = p;
  k.operation = operation;
  int active = 0;
  const bool fits = choose_cluster(k, machine, [&](const Resident& planned) {
    active = known->clusters(device, planned);
    return active > 0;
  });
  if (!fits || !(always || preferred(p, active))) return false;
  const int64_t bytes = lay_out(k, nullptr);
  Tensor scratch;
  if (is_backward(operation)) {
    scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    lay_out(k, static_cast<char*>(scratch.data_ptr()));
    k.counters = counters_for(device, kCounterWords, stream);
  }
  const cudaError_t error = kLaunchers[is_backward(operation)][p.dtype](k, stream, nullptr);
  if (error != cudaSuccess) cudaGetLastError();  // told here; torch's next check is not to find it
  STD_TORCH_CHECK(error == cudaSuccess, "cbam_fused: the resident kernel of ", kNames[is_backward(operation)],
                  " did not launch: ", cudaGetErrorString(error));
  return true;
}

}  // namespace resident
}  // namespace cbam
