// The host side of the CUDA backend (ops, tiers, workspace) on the CPU: its ops registered for CPU tensors,
// on a runtime that tests/cuda_host.py controls and whose calls are logged. A launch runs the kernels of
// cuda_module_kernels.cpp where it was given them, and else nothing.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "resident_launch.h"

namespace {

struct Fake {
  int device = 0;
  int capability = 90, multiprocessors = 132, shared = 227 << 10, l2 = 50 << 20;
  int clusters_of_8 = 16, clusters_of_16 = 8;  // that run at a time; negative: the error of this number
  int ptx = 90;                                // the version that the kernels were compiled for
  int launch_error = 0;
  int code_error = 0;  // what the device says of kernels that were not compiled for it
  int malloc_error = 0, memset_error = 0, object_error = 0, retain_error = 0;
  int capture_broken = 0;
} fake;
char own_stream;  // that the library makes
std::pair<void*, size_t> pending;
// By dtype, or null: what runs a launch.
struct {
  int (*streamed)(int backward, const cbam::Streamed*, const cbam::Variant*, uint64_t bytes);
  int (*resident)(int backward, const cbam::resident::Resident*, uint64_t bytes);
} bodies[4];
const cbam::resident::Resident* launching;  // by cudaLaunchKernelExC, which has no more than its memory
cudaError_t last_error;
cudaError_t returned(int error) {
  if (error) last_error = static_cast<cudaError_t>(error);
  return static_cast<cudaError_t>(error);
}
// The current stream, and the counters that the last launch of the streamed tier was given.
struct {
  void* handle = nullptr;
  unsigned long long id = 0;
  int64_t graph = 0;  // the number of the graph that a capture of it fills, or 0
} stream_now;
// What graphs hold, and what is to be called when they are gone.
struct Held {
  int64_t graph;
  void* object;
  cudaHostFn_t destroy;
};
std::vector<Held> held;
struct {
  const uint32_t* address = nullptr;
  int64_t words = 0;
  bool zero = false;
} counters;
std::string calls;  // a line each

template <class... Parts>
void log(const Parts&... parts) {
  std::ostringstream line;
  ((line << parts << ' '), ...);
  calls += line.str() + '\n';
}

// One address a kernel; `kernels` names them.
char kernels[2][4];
int64_t number_of(const void* kernel) {
  return static_cast<const char*>(kernel) - &kernels[0][0];
}
std::string name_of(const void* kernel) {
  const auto i = number_of(kernel);
  static const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
  return std::string(i / 4 ? "backward " : "forward ") + dtypes[i % 4];
}
cudaError_t streamed(bool backward, int dtype, const cbam::Streamed& k, const cbam::Variant& v) {
  log("streamed", name_of(&kernels[backward][dtype]));
  counters = {k.w.counters, cbam::counter_words(k), true};
  for (int64_t i = 0; i < counters.words; ++i) counters.zero &= k.w.counters[i] == 0;
  if (fake.launch_error || !bodies[dtype].streamed) return returned(fake.launch_error);
  return returned(bodies[dtype].streamed(backward, &k, &v, sizeof k));
}
cudaError_t resident(bool backward, int dtype, const cbam::resident::Resident& k, cudaStream_t stream,
                     int* clusters) {
  const auto kernel = reinterpret_cast<void (*)(const cbam::resident::Resident)>(&kernels[backward][dtype]);
  launching = &k;
  return cbam::resident::launch_kernel(kernel, k, stream, clusters);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void fake_set(const int* values) {
  static_assert(sizeof fake == 15 * sizeof(int));
  std::memcpy(&fake, values, sizeof fake);
  calls.clear();
}
__attribute__((visibility("default"))) void fake_stream(int64_t handle, int64_t id, int64_t graph) {
  stream_now = {reinterpret_cast<void*>(handle), static_cast<unsigned long long>(id), graph};
}
// The graph and its instances are destroyed.
__attribute__((visibility("default"))) void fake_destroy(int64_t graph) {
  for (const Held& h : held) {
    if (h.graph == graph) h.destroy(h.object);
  }
  held.erase(std::remove_if(held.begin(), held.end(), [&](const Held& h) { return h.graph == graph; }),
             held.end());
}
// Address, words, whether they were all zero.
__attribute__((visibility("default"))) void fake_counters(int64_t* out) {
  out[0] = reinterpret_cast<int64_t>(counters.address);
  out[1] = counters.words;
  out[2] = counters.zero;
}
__attribute__((visibility("default"))) const char* fake_calls() {
  return calls.c_str();
}
// What launches of a dtype run from now on: functions of cuda_module_kernels.cpp, or null.
__attribute__((visibility("default"))) void fake_bodies(int dtype, void* streamed, void* resident) {
  bodies[dtype] = {reinterpret_cast<decltype(bodies->streamed)>(streamed),
                   reinterpret_cast<decltype(bodies->resident)>(resident)};
}
// The error that the next call of cudaGetLastError would return.
__attribute__((visibility("default"))) int fake_last_error() {
  return last_error;
}

// LibTorch's shims that would ask for a device; the build renames them, so that their declarations stay.
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = fake.device;
  return AOTI_TORCH_SUCCESS;
}
int32_t aoti_torch_device_type_cuda() {
  return aoti_torch_device_type_cpu();
}
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  log("guard", index);
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  log("stream of", index);
  *stream = stream_now.handle;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  if (error) *message = const_cast<char*>(cudaGetErrorString(static_cast<cudaError_t>(error)));
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char*) {}

// CUDA's runtime.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = fake.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = fake.capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = fake.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = fake.shared;
      break;
    case cudaDevAttrL2CacheSize:
      *value = fake.l2;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "what CUDA says of error " + std::to_string(static_cast<int>(error));
  return text.c_str();
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = stream_now.graph ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t* graph, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                        unsigned long long*, cudaGraph_t* graph, const cudaGraphNode_t**,
                                        size_t*) {
#endif
  *graph = reinterpret_cast<cudaGraph_t>(stream_now.graph);
  if (fake.capture_broken) *status = cudaStreamCaptureStatusInvalidated;
  return fake.capture_broken ? cudaSuccess : cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* of, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags) {
  if (fake.object_error) return returned(fake.object_error);
  if (count != 1 || flags != cudaUserObjectNoDestructorSync) return returned(cudaErrorInvalidValue);
  held.push_back({-1, of, destroy});
  *object = reinterpret_cast<cudaUserObject_t>(of);
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) {
  fake_destroy(-1);
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags) {
  // Without the move there would be a reference left that nothing releases.
  if (count != 1 || flags != cudaGraphUserObjectMove) return returned(cudaErrorInvalidValue);
  if (fake.retain_error) return returned(fake.retain_error);
  const auto number = reinterpret_cast<int64_t>(graph);
  for (Held& h : held) {
    if (h.graph == -1 && h.object == reinterpret_cast<void*>(object)) h.graph = number;
  }
  log("graph", number, "holds counters");
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(&own_stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
// What was cleared on the stream becomes so here.
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  log("synchronize");
  if (stream == reinterpret_cast<cudaStream_t>(&own_stream)) std::memset(pending.first, 0, pending.second);
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = stream_now.id;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(*mode, now);
  log("capture mode", now);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (fake.malloc_error) return returned(fake.malloc_error);
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xa5, bytes);  // as it comes from a device
  log("malloc", bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  log("free");
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (fake.memset_error) return returned(fake.memset_error);
  const bool own = stream == reinterpret_cast<cudaStream_t>(&own_stream);
  log("memset", bytes, own ? "apart" : stream_now.graph ? "in the graph" : "");
  if (own)
    pending = {memory, bytes};
  else if (!stream_now.graph)
    std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute which, int value) {
  log(which == cudaFuncAttributeNonPortableClusterSizeAllowed ? "non-portable" : "shared limit", value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  *of = {};
  of->ptxVersion = fake.ptx;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const unsigned cluster = config->attrs[0].val.clusterDim.x;
  log("asked of", cluster);
  *clusters = cluster == 8 ? fake.clusters_of_8 : fake.clusters_of_16;
  return returned(*clusters < 0 ? -*clusters : 0);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  log("resident", name_of(kernel), "grid", config->gridDim.x, "cluster", config->attrs[0].val.clusterDim.x,
      "threads", config->blockDim.x, "shared", config->dynamicSmemBytes);
  const auto number = number_of(kernel);
  const auto run = bodies[number % 4].resident;
  return returned(fake.launch_error || !run ? fake.launch_error
                                            : run(number / 4, launching, sizeof *launching));
}

}  // extern "C"

namespace cbam {

#define STREAMED(name, backward, dtype)                                            \
  cudaError_t launch_streamed_##name(const Streamed& k, Variant v, cudaStream_t) { \
    return streamed(backward, dtype, k, v);                                        \
  }
cudaError_t find_code() {
  return returned(fake.code_error);
}

STREAMED(forward_float32, false, kFloat32)
STREAMED(forward_float64, false, kFloat64)
STREAMED(forward_float16, false, kFloat16)
STREAMED(forward_bfloat16, false, kBFloat16)
STREAMED(backward_float32, true, kFloat32)
STREAMED(backward_float64, true, kFloat64)
STREAMED(backward_float16, true, kFloat16)
STREAMED(backward_bfloat16, true, kBFloat16)

namespace resident {

#define RESIDENT(name, backward, dtype)                                              \
  cudaError_t launch_##name(const Resident& k, cudaStream_t stream, int* clusters) { \
    return ::resident(backward, dtype, k, stream, clusters);                         \
  }
RESIDENT(forward_float32, false, kFloat32)
RESIDENT(forward_float16, false, kFloat16)
RESIDENT(forward_bfloat16, false, kBFloat16)
RESIDENT(backward_float32, true, kFloat32)
RESIDENT(backward_float16, true, kFloat16)
RESIDENT(backward_bfloat16, true, kBFloat16)

}  // namespace resident
}  // namespace cbam

#include "resident_tier.cpp"
#include "tiers.cpp"
#include "workspace.cpp"
// All headers are in by now: only the registration still says CUDA.
#define CUDA CPU
#include "ops.cpp"
