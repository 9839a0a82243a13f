// Host twins of csrc/cuda/ptx.cuh: each function stands for the PTX named beside it.
// Pointers stay generic: a shared-memory operand is an ordinary pointer into (distributed) shared memory.
#pragma once
#include "simt.h"

namespace simt {
SIMT_API void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes,
                         Where where);
SIMT_API void async_commit(Where where);
SIMT_API void async_wait(unsigned pending_groups, bool all, Where where);
SIMT_API void mbarrier_init(std::uint64_t* barrier, unsigned count, Where where);
SIMT_API void mbarrier_invalidate(std::uint64_t* barrier, Where where);
SIMT_API void mbarrier_arrive(std::uint64_t* barrier, unsigned count, unsigned expected_bytes, Where where);
SIMT_API bool mbarrier_test(std::uint64_t* barrier, unsigned parity, Where where);
SIMT_API void bulk_copy_in(void* shared, const void* source, unsigned bytes, std::uint64_t* barrier,
                           Where where);
SIMT_API void bulk_copy_out(void* global, const void* shared, unsigned bytes, Where where);
SIMT_API void bulk_commit(Where where);
SIMT_API void bulk_wait(unsigned pending_groups, bool read_only, Where where);
SIMT_API void remote_store(void* remote, const void* value, unsigned bytes, std::uint64_t* remote_barrier,
                           Where where);
SIMT_API void proxy_fence();
SIMT_API void cluster_arrive(bool release, Where where);
SIMT_API void cluster_wait(Where where);
SIMT_API void* cluster_map(const void* shared, unsigned rank, Where where);
}  // namespace simt

namespace cbam {
namespace ptx {

// ld.global with cache hints; st.global, st.global.cs
template <class W>
inline W load_read_only(const W* p, SIMT_WHERE) {
  return simt::read_only(p, where);
}
template <class W>
inline W load_last_use(const W* p, SIMT_WHERE) {
  return simt::read(p, where);
}
template <class W>
inline W load_coherent(const W* p, SIMT_WHERE) {
  return simt::read(p, where);
}
template <class W>
inline W load_generic(const W* p, SIMT_WHERE) {
  return simt::read(p, where);
}
template <class W>
inline void store(W* p, std::type_identity_t<W> v, SIMT_WHERE) {
  simt::write(p, v, where);
}
template <class W>
inline void store_streaming(W* p, std::type_identity_t<W> v, SIMT_WHERE) {
  simt::write(p, v, where);
}

// ld.acquire.gpu, ld.relaxed.gpu, st.release.gpu, red.release.gpu.add, atom.{relaxed,acq_rel}.gpu.add,
// atom.acq_rel.gpu.inc (to zero where the old value is `last`)
template <class T>
inline T load_acquire(const T* p, SIMT_WHERE) {
  return simt::atomic_load(p, simt::Order::kAcquire, where);
}
template <class T>
inline T load_relaxed(const T* p, SIMT_WHERE) {
  return simt::atomic_load(p, simt::Order::kRelaxed, where);
}
template <class T>
inline void store_release(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  simt::atomic_store(p, v, simt::Order::kRelease, where);
}
template <class T>
inline void add_release(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  simt::atomic_update(p, simt::Order::kRelease, where, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
inline T add_relaxed(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kRelaxed, where, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
inline T add_acquire_release(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kAcquireRelease, where,
                             [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
inline T increment_acquire_release(T* p, std::type_identity_t<T> last, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kAcquireRelease, where,
                             [last](T old) { return static_cast<T>(old >= last ? 0 : old + 1); });
}
template <class T>
inline T exchange_acquire_release(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kAcquireRelease, where, [v](T) { return v; });
}
// a fence for the compiler alone
inline void forget_registers() {}
inline int opaque(int v) {
  return v;
}
inline void sleep(unsigned, SIMT_WHERE) {
  simt::pause(where);
}
// prefetch.global.L2: a hint
inline void prefetch_l2(const void*) {}

// cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32, cvt.f32.f16, bit casts; max.NaN.f32, min.NaN.f32: NaN if either is
inline unsigned pack_bfloat16(float low, float high) {
  return static_cast<unsigned>(simt::bfloat16_bits(high)) << 16 | simt::bfloat16_bits(low);
}
inline unsigned pack_half(float low, float high) {
  return static_cast<unsigned>(simt::half_bits(high)) << 16 | simt::half_bits(low);
}
inline float unpack_half(unsigned short bits) {
  return simt::half_value(bits);
}
inline float bits_to_float(unsigned bits) {
  return simt::bit_cast<float>(bits);
}
inline unsigned float_to_bits(float v) {
  return simt::bit_cast<unsigned>(v);
}
inline double bits_to_double(unsigned long long bits) {
  return simt::bit_cast<double>(bits);
}
inline unsigned long long double_to_bits(double v) {
  return simt::bit_cast<unsigned long long>(v);
}
inline float max_nan(float a, float b) {
  return a != a || b != b ? __builtin_nanf("") : a > b ? a : b;
}
inline float min_nan(float a, float b) {
  return a != a || b != b ? __builtin_nanf("") : a < b ? a : b;
}

// barrier.cta.sync / barrier.cta.arrive with an id of 1..15: some of the block's warps
inline void named_barrier_sync(unsigned id, unsigned threads, SIMT_WHERE) {
  simt::named_barrier(id, threads, true, where);
}
inline void named_barrier_arrive(unsigned id, unsigned threads, SIMT_WHERE) {
  simt::named_barrier(id, threads, false, where);
}

// cp.async.ca (4, 8), .cg (16); the zero-filling form copies `source_bytes` and clears the rest
template <int Bytes>
inline void copy_async(void* shared, const void* global, SIMT_WHERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::async_copy(shared, global, Bytes, Bytes, where);
}
template <int Bytes>
inline void copy_async_zfill(void* shared, const void* global, unsigned source_bytes, SIMT_WHERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::async_copy(shared, global, Bytes, source_bytes, where);
}
inline void copy_async_4(void* shared, const void* global, SIMT_WHERE) {
  copy_async<4>(shared, global, where);
}
inline void copy_async_8(void* shared, const void* global, SIMT_WHERE) {
  copy_async<8>(shared, global, where);
}
inline void copy_async_16(void* shared, const void* global, SIMT_WHERE) {
  copy_async<16>(shared, global, where);
}
inline void copy_async_commit(SIMT_WHERE) {
  simt::async_commit(where);
}
template <int kPending>
inline void copy_async_wait(SIMT_WHERE) {
  simt::async_wait(kPending, false, where);
}
inline void copy_async_wait_all(SIMT_WHERE) {
  simt::async_wait(0, true, where);
}

// mbarrier.init, .inval, fence.mbarrier_init.release.cluster, .arrive, .arrive.expect_tx, .expect_tx,
// .try_wait.parity. A barrier mapped to another block may be arrived at, not waited on.
inline void barrier_init(std::uint64_t* barrier, unsigned arrivals, SIMT_WHERE) {
  simt::mbarrier_init(barrier, arrivals, where);
}
inline void barrier_invalidate(std::uint64_t* barrier, SIMT_WHERE) {
  simt::mbarrier_invalidate(barrier, where);
}
inline void barrier_init_fence() {
  simt::fence();
}
inline void barrier_arrive(std::uint64_t* barrier, SIMT_WHERE) {
  simt::mbarrier_arrive(barrier, 1, 0, where);
}
inline void barrier_arrive_expect(std::uint64_t* barrier, unsigned bytes, SIMT_WHERE) {
  simt::mbarrier_arrive(barrier, 1, bytes, where);
}
inline void barrier_expect(std::uint64_t* barrier, unsigned bytes, SIMT_WHERE) {
  simt::mbarrier_arrive(barrier, 0, bytes, where);
}
inline bool barrier_try_wait(std::uint64_t* barrier, unsigned parity, SIMT_WHERE) {
  const bool done = simt::mbarrier_test(barrier, parity, where);
  if (!done) simt::pause(where);
  return done;
}
inline void barrier_wait(std::uint64_t* barrier, unsigned parity, SIMT_WHERE) {
  while (!barrier_try_wait(barrier, parity, where)) {
  }
}

// cp.async.bulk: .shared::cluster.global, .shared::cluster.shared::cta (both complete on an mbarrier of the
// destination's block), .global.shared::cta (bulk groups). fence.proxy.async stands between plain writes of
// shared memory and a bulk copy that reads them.
inline void bulk_load(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier, SIMT_WHERE) {
  simt::bulk_copy_in(shared, global, bytes, barrier, where);
}
inline void bulk_copy_cluster(void* remote, const void* shared, unsigned bytes, std::uint64_t* remote_barrier,
                              SIMT_WHERE) {
  simt::bulk_copy_in(remote, shared, bytes, remote_barrier, where);
}
inline void bulk_store(void* global, const void* shared, unsigned bytes, SIMT_WHERE) {
  simt::bulk_copy_out(global, shared, bytes, where);
}
inline void bulk_commit(SIMT_WHERE) {
  simt::bulk_commit(where);
}
template <int kPending>
inline void bulk_wait_read(SIMT_WHERE) {
  simt::bulk_wait(kPending, true, where);
}
template <int kPending>
inline void bulk_wait(SIMT_WHERE) {
  simt::bulk_wait(kPending, false, where);
}
inline void fence_proxy_async() {
  simt::proxy_fence();
}

// %cluster_ctarank, %cluster_nctarank, barrier.cluster.arrive{.release,.relaxed}, .wait.acquire, mapa,
// st.async
inline unsigned cluster_rank() {
  return simt::self->cluster_rank;
}
inline unsigned cluster_size() {
  return simt::self->cluster_size;
}
// The barriers are `.aligned`: a warp comes as one, and a lane that has returned is a fault.
inline void cluster_arrive(SIMT_WHERE) {
  __syncwarp(0xffffffffu, where);
  simt::cluster_arrive(true, where);
}
inline void cluster_arrive_relaxed(SIMT_WHERE) {
  __syncwarp(0xffffffffu, where);
  simt::cluster_arrive(false, where);
}
inline void cluster_wait(SIMT_WHERE) {
  __syncwarp(0xffffffffu, where);
  simt::cluster_wait(where);
}
inline void cluster_sync(SIMT_WHERE) {
  ptx::cluster_arrive(where);
  ptx::cluster_wait(where);
}
template <class T>
inline T* map_shared(T* shared, unsigned rank, SIMT_WHERE) {
  return static_cast<T*>(simt::cluster_map(shared, rank, where));
}
template <class T>
inline void store_async(T* remote, std::type_identity_t<T> v, std::uint64_t* remote_barrier, SIMT_WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  simt::remote_store(remote, &v, sizeof(T), remote_barrier, where);
}

}  // namespace ptx
}  // namespace cbam
