// Host twins of csrc/cuda/ptx.cuh: each function stands for the PTX named beside it.
// Pointers stay generic: a shared-memory operand is an ordinary pointer into (distributed) shared memory.
#pragma once
#include "memory.h"

namespace simt {
SIMT_API void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Where where);
SIMT_API void async_commit(Where where);
SIMT_API void async_wait(unsigned pending_groups, bool all, Where where);
SIMT_API void mbarrier_init(std::uint64_t* barrier, unsigned count, Where where);
SIMT_API void mbarrier_invalidate(std::uint64_t* barrier, Where where);
SIMT_API void mbarrier_arrive(std::uint64_t* barrier, unsigned count, unsigned expected_bytes, Where where);
SIMT_API bool mbarrier_test(std::uint64_t* barrier, unsigned parity, Where where);
SIMT_API void mbarrier_async_arrive(std::uint64_t* barrier, Where where);
SIMT_API void bulk_copy_in(void* shared, const void* source, unsigned bytes, std::uint64_t* barrier, Where where);
SIMT_API void bulk_copy_out(void* global, const void* shared, unsigned bytes, Where where);
SIMT_API void bulk_commit(Where where);
SIMT_API void bulk_wait(unsigned pending_groups, bool read_only, Where where);
SIMT_API void remote_store(void* remote, const void* value, unsigned bytes, std::uint64_t* remote_barrier, Where where);
SIMT_API void cluster_arrive(bool release, Where where);
SIMT_API void cluster_wait(Where where);
SIMT_API void* cluster_map(const void* shared, unsigned rank, Where where);
}  // namespace simt

namespace cbam {

// barrier.cta.sync / barrier.cta.arrive with an id of 1..15; a barrier of some of the block's warps
inline void barrier_sync(unsigned id, unsigned threads, SIMT_WHERE) { simt::named_barrier(id, threads, true, where); }
inline void barrier_arrive(unsigned id, unsigned threads, SIMT_WHERE) { simt::named_barrier(id, threads, false, where); }

// ld.acquire.gpu, ld.relaxed.gpu, st.release.gpu, st.relaxed.gpu, red.release.gpu.add, atom.{relaxed,acq_rel}.gpu.add,
// atom.acq_rel.gpu.inc (wraps to 0 after `limit`), atom.acq_rel.gpu.exch
template <class T>
inline T load_acquire(const T* p, SIMT_WHERE) { return simt::atomic_load(p, simt::Order::kAcquire, where); }
template <class T>
inline T load_relaxed(const T* p, SIMT_WHERE) { return simt::atomic_load(p, simt::Order::kRelaxed, where); }
template <class T>
inline void store_release(T* p, std::type_identity_t<T> v, SIMT_WHERE) { simt::atomic_store(p, v, simt::Order::kRelease, where); }
template <class T>
inline void store_relaxed(T* p, std::type_identity_t<T> v, SIMT_WHERE) { simt::atomic_store(p, v, simt::Order::kRelaxed, where); }
template <class T>
inline void red_add_release(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  simt::atomic_update(p, simt::Order::kRelease, where, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
inline T atomic_add_relaxed(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kRelaxed, where, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
inline T atomic_add_acq_rel(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kAcquireRelease, where, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
inline T atomic_inc_acq_rel(T* p, std::type_identity_t<T> limit, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kAcquireRelease, where, [limit](T old) { return static_cast<T>(old >= limit ? 0 : old + 1); });
}
template <class T>
inline T atomic_exchange_acq_rel(T* p, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kAcquireRelease, where, [v](T) { return v; });
}

// max.NaN.f32, min.NaN.f32: NaN if either is
inline float max_nan(float a, float b) { return a != a || b != b ? __builtin_nanf("") : a > b ? a : b; }
inline float min_nan(float a, float b) { return a != a || b != b ? __builtin_nanf("") : a < b ? a : b; }

// prefetch.global.L2: a hint
inline void prefetch_l2(const void*) {}
inline void bulk_prefetch_l2(const void*, unsigned) {}

// cp.async.ca (4, 8) / .cg (16); the zero-filling form copies `source_bytes` and clears the rest
template <int Bytes>
inline void cp_async(void* shared, const void* global, SIMT_WHERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::async_copy(shared, global, Bytes, Bytes, where);
}
template <int Bytes>
inline void cp_async_zfill(void* shared, const void* global, unsigned source_bytes, SIMT_WHERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::async_copy(shared, global, Bytes, source_bytes, where);
}
inline void cp_async_commit(SIMT_WHERE) { simt::async_commit(where); }
template <int Groups>
inline void cp_async_wait(SIMT_WHERE) { simt::async_wait(Groups, false, where); }
inline void cp_async_wait_all(SIMT_WHERE) { simt::async_wait(0, true, where); }
// cp.async.mbarrier.arrive.noinc: arrives when this thread's earlier cp.async copies have landed
inline void cp_async_mbarrier_arrive(std::uint64_t* barrier, SIMT_WHERE) { simt::mbarrier_async_arrive(barrier, where); }

// mbarrier.init, .inval, .arrive, .arrive.expect_tx, .try_wait.parity, and fence.mbarrier_init.release.cluster.
// `barrier` may be mapped to another block of the cluster where PTX allows it (arrive, arrive.expect_tx).
inline void mbarrier_init(std::uint64_t* barrier, unsigned count, SIMT_WHERE) { simt::mbarrier_init(barrier, count, where); }
inline void mbarrier_invalidate(std::uint64_t* barrier, SIMT_WHERE) { simt::mbarrier_invalidate(barrier, where); }
inline void mbarrier_init_fence() { simt::fence(); }
inline void mbarrier_arrive(std::uint64_t* barrier, SIMT_WHERE) { simt::mbarrier_arrive(barrier, 1, 0, where); }
inline void mbarrier_arrive_expect(std::uint64_t* barrier, unsigned bytes, SIMT_WHERE) { simt::mbarrier_arrive(barrier, 1, bytes, where); }
inline void mbarrier_expect(std::uint64_t* barrier, unsigned bytes, SIMT_WHERE) { simt::mbarrier_arrive(barrier, 0, bytes, where); }
inline bool mbarrier_try_wait(std::uint64_t* barrier, unsigned parity, SIMT_WHERE) { return simt::mbarrier_test(barrier, parity, where); }
inline void mbarrier_wait(std::uint64_t* barrier, unsigned parity, SIMT_WHERE) {
  while (!simt::mbarrier_test(barrier, parity, where)) simt::pause(where);
}

// cp.async.bulk.shared::cluster.global.mbarrier, .shared::cluster.shared::cta.mbarrier, .global.shared::cta.bulk_group.
// Addresses and sizes are multiples of 16. fence.proxy.async goes between plain writes to shared memory and a bulk
// copy that reads them.
inline void bulk_load(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier, SIMT_WHERE) {
  simt::bulk_copy_in(shared, global, bytes, barrier, where);
}
inline void bulk_copy_cluster(void* remote, const void* shared, unsigned bytes, std::uint64_t* remote_barrier, SIMT_WHERE) {
  simt::bulk_copy_in(remote, shared, bytes, remote_barrier, where);
}
inline void bulk_store(void* global, const void* shared, unsigned bytes, SIMT_WHERE) {
  simt::bulk_copy_out(global, shared, bytes, where);
}
inline void bulk_commit(SIMT_WHERE) { simt::bulk_commit(where); }
template <int Groups>
inline void bulk_wait(SIMT_WHERE) { simt::bulk_wait(Groups, false, where); }
template <int Groups>
inline void bulk_wait_read(SIMT_WHERE) { simt::bulk_wait(Groups, true, where); }
inline void fence_proxy_async() { simt::fence(); }

// %cluster_ctarank, %cluster_nctarank, barrier.cluster.arrive.release / .relaxed, .wait.acquire, mapa,
// st.async.mbarrier::complete_tx::bytes
inline unsigned cluster_rank() { return simt::self->cluster_rank; }
inline unsigned cluster_size() { return simt::self->cluster_size; }
inline void cluster_arrive(SIMT_WHERE) { simt::cluster_arrive(true, where); }
inline void cluster_arrive_relaxed(SIMT_WHERE) { simt::cluster_arrive(false, where); }
inline void cluster_wait(SIMT_WHERE) { simt::cluster_wait(where); }
inline void cluster_sync(SIMT_WHERE) {
  simt::cluster_arrive(true, where);
  simt::cluster_wait(where);
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

}  // namespace cbam
