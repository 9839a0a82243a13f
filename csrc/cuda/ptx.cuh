// Every inline-PTX instruction of the project as a named device function.
// Under CBAM_SIMT the host implementation supplies the same names in simt_ptx.h.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef CBAM_SIMT
#include "simt_ptx.h"
#else

// Shared memory is declared by these two alone: on the host a block's shared memory is no variable.
#define CBAM_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define CBAM_SHARED(name, ...) __shared__ cbam::ptx::shared_type<__VA_ARGS__> name

namespace cbam {
namespace ptx {

template <class T>
using shared_type = T;

// ---- Global memory. W is unsigned short, unsigned, unsigned long long or uint4.

// Data that no thread of this kernel writes.
template <class W>
__device__ __forceinline__ W load_read_only(const W* p) {
  return __ldg(p);
}
// As load_read_only, for the last read in this kernel: the line may leave L2 first.
template <class W>
__device__ __forceinline__ W load_last_use(const W* p) {
  return __ldcs(p);
}
// Data that other blocks of this kernel wrote before a release that this block acquired: past L1.
template <class W>
__device__ __forceinline__ W load_coherent(const W* p) {
  return __ldcg(p);
}
// The same, or this block's own shared memory.
__device__ __forceinline__ unsigned load_generic(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ unsigned long long load_generic(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
template <class W>
__device__ __forceinline__ void store(W* p, W v) {
  *p = v;
}
// For an output that this kernel does not read back.
template <class W>
__device__ __forceinline__ void store_streaming(W* p, W v) {
  __stcs(p, v);
}

// Keeps what is in memory there: the compiler may not carry loads across in registers.
__device__ __forceinline__ void forget_registers() {
  asm volatile("" ::: "memory");
}

// The same value, but the compiler cannot know: what is derived from it is computed where it is used.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- Order between blocks (scope gpu).

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(unsigned* p, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ unsigned add_acquire_release(unsigned* p, unsigned x) {
  unsigned v;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "r"(x) : "memory");
  return v;
}
__device__ __forceinline__ unsigned add_relaxed(unsigned* p, unsigned x) {
  unsigned v;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "r"(x) : "memory");
  return v;
}
// Adds one, or wraps to zero where the old value is `last`: a counter that resets itself.
__device__ __forceinline__ unsigned increment_acquire_release(unsigned* p, unsigned last) {
  unsigned v;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "r"(last) : "memory");
  return v;
}
// Called in every loop that polls; under SIMT it yields to the other fibers.
__device__ __forceinline__ void sleep(unsigned nanoseconds) {
  __nanosleep(nanoseconds);
}

// ---- Conversions. Two values a word, the first in the low half; round to nearest even.

__device__ __forceinline__ unsigned pack_bfloat16(float low, float high) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ unsigned pack_half(float low, float high) {
  unsigned v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ float unpack_half(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
__device__ __forceinline__ float bits_to_float(unsigned bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ unsigned float_to_bits(float v) {
  return __float_as_uint(v);
}
__device__ __forceinline__ double bits_to_double(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
__device__ __forceinline__ unsigned long long double_to_bits(double v) {
  return static_cast<unsigned long long>(__double_as_longlong(v));
}
// The larger one, or NaN where either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// ---- Asynchronous copies of 16 bytes, global to shared (sm_80).

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// ---- mbarrier and bulk copies (sm_90). Addresses and sizes are multiples of 16 bytes.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised mbarriers visible to the asynchronous proxy and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and adds `bytes` to what must land before the phase ends.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, unsigned parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most kPending groups have still to be read out of shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// Orders ordinary shared-memory writes before bulk copies that read them.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Clusters (sm_90).

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned v;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned v;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  return v;
}
// `.aligned`: the warp executes them as one. Lanes that left a loop one by one meet first; the compiler sees
// to that for its own barriers, not for what is in an asm statement.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The address of the same shared-memory object in the block of this rank.
template <class T>
__device__ __forceinline__ T* map_shared(T* shared, unsigned rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

#endif  // sm_90

}  // namespace ptx
}  // namespace cbam

#endif  // CBAM_SIMT
