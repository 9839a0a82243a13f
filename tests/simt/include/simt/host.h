// CUDA's runtime as launch code calls it, with its names and numbers. A launch runs its grid to the end, and
// is refused where the kernel has not been allowed its shared memory or its cluster.
#pragma once
#include <cstddef>
#include <map>
#include <set>

#include "core.h"

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {

// What cudaFuncSetAttribute has allowed each kernel beyond 48 KiB of shared memory and eight blocks a
// cluster.
struct Allowed {
  std::map<const void*, int> shared;
  std::set<const void*> clusters;
};
inline Allowed& allowed() {
  static Allowed one;
  return one;
}

inline cudaError_t refusal(const cudaLaunchConfig_t& config, const void* kernel, unsigned cluster) {
  constexpr int kSharedAtFirst = 48 << 10;
  constexpr unsigned kPortableCluster = 8;
  const auto found = allowed().shared.find(kernel);
  const int most = found == allowed().shared.end() ? kSharedAtFirst : found->second;
  if (config.dynamicSmemBytes > std::size_t(most) || !config.gridDim.x) return cudaErrorInvalidValue;
  const bool portable = cluster <= kPortableCluster || allowed().clusters.count(kernel);
  return portable && config.gridDim.x % cluster == 0 ? cudaSuccess : cudaErrorInvalidClusterSize;
}

}  // namespace simt

extern "C" SIMT_API const char* simt_error();

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize)
    simt::allowed().shared[kernel] = value;
  else if (value)
    simt::allowed().clusters.insert(kernel);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  of->ptxVersion = 90;
  return cudaSuccess;
}
// One: a host runs clusters one after the other.
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[i].val.clusterDim.x;
  }
  const cudaError_t error = simt::refusal(*config, reinterpret_cast<const void*>(kernel), cluster);
  if (error != cudaSuccess) return error;
  simt::launch({.grid = config->gridDim,
                .block = config->blockDim,
                .shared = config->dynamicSmemBytes,
                .stream = config->stream,
                .cluster = cluster},
               "kernel", kernel, static_cast<A&&>(arguments)...);
  return simt_error() ? cudaErrorLaunchFailure : cudaSuccess;
}
