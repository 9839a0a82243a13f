// Picks a tier and launches it.
#include "tiers.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "resident_tier.h"
#include "workspace.h"

namespace cbam {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

Device query(int index) {
  return {attribute(cudaDevAttrL2CacheSize, index), attribute(cudaDevAttrMultiProcessorCount, index),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

// Asked once a device: attributes do not change, and every call would pay for them.
const Device& device_of(int index) {
  constexpr int kDevices = 64;
  static std::atomic<const Device*> known[kDevices];
  STD_TORCH_CHECK(index >= 0 && index < kDevices, "cbam_fused: device index must be below ", kDevices,
                  ", got ", index);
  if (const Device* found = known[index].load(std::memory_order_acquire)) return *found;
  const Device* fresh = new Device(query(index));
  const Device* expected = nullptr;
  if (known[index].compare_exchange_strong(expected, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *expected;
}

bool aligned(const Problem& p) {
  for (const void* t : {p.x, p.dy, static_cast<const void*>(p.y), static_cast<const void*>(p.dx)}) {
    if (reinterpret_cast<uintptr_t>(t) % 16) return false;
  }
  return true;
}

// What CBAM_FUSED_TIER asks for: "streamed" alone, or "resident" wherever it fits, however few the samples.
enum Wish { kTheBetter, kStreamedAlone, kResidentFirst };
Wish wished_tier() {
  static const Wish wish = [] {
    const char* wanted = std::getenv("CBAM_FUSED_TIER");
    if (!wanted) return kTheBetter;
    if (!std::strcmp(wanted, "streamed")) return kStreamedAlone;
    STD_TORCH_CHECK(!std::strcmp(wanted, "resident"),
                    "cbam_fused: CBAM_FUSED_TIER must be streamed or resident, got ", wanted);
    return kResidentFirst;
  }();
  return wish;
}

constexpr const char* kNames[] = {"cbam_forward",  "attention_forward",  "scale_forward",
                                  "cbam_backward", "attention_backward", "scale_backward"};

void launch_streamed(const Problem& p, Operation operation, const Device& device, const Tensor& x,
                     cudaStream_t stream) {
  Streamed k{};
  k.p = p;
  k.operation = operation;
  Variant variant = choose_variant(p, aligned(p));
  STD_TORCH_CHECK(plan_streamed(k, variant, device), "cbam_fused: ", kNames[operation], " with ", p.channels,
                  " channels needs ", k.shared_bytes, " bytes of shared memory a block; this device has ",
                  k.shared_limit);
  const int64_t bytes = lay_out_scratch(k, nullptr);
  Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  lay_out_scratch(k, static_cast<char*>(scratch.data_ptr()));
  k.w.counters = counters_for(x.get_device_index(), counter_words(k), stream);
  const cudaError_t error = kStreamedLaunchers[is_backward(operation)][p.dtype](k, variant, stream);
  if (error != cudaSuccess) cudaGetLastError();  // told here; torch's next check is not to find it
  STD_TORCH_CHECK(error == cudaSuccess, "cbam_fused: the streamed kernel of ", kNames[operation],
                  " did not launch: ", cudaGetErrorString(error));
}

}  // namespace

void launch(const Problem& p, Operation operation, const Tensor& x, cudaStream_t stream) {
  const Wish wish = wished_tier();
  if (wish != kStreamedAlone && resident::launch(p, operation, aligned(p), wish == kResidentFirst, x, stream))
    return;
  launch_streamed(p, operation, device_of(x.get_device_index()), x, stream);
}

}  // namespace cbam

const char* cbam_fused_cuda_missing_code() {
  const cudaError_t error = cbam::find_code();
  if (error != cudaSuccess) cudaGetLastError();
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return cudaGetErrorString(error);
    default:  // no error, or none of the code's: a launch will tell
      return nullptr;
  }
}
