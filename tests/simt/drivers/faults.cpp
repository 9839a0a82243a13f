// One planted fault a kernel. Each is right but for the line marked FAULT, and must be reported there.
#include "simt_ptx.h"

using namespace cbam::ptx;

#define FAULT_KERNEL(name) __global__ void name(const float* x, float* out, unsigned* counters)
#define FAULT(name, ...)                                                                \
  FAULT_KERNEL(name);                                                                   \
  extern "C" SIMT_API void run_##name(const float* x, float* out, unsigned* counters) { \
    simt::launch({__VA_ARGS__}, #name, name, x, out, counters);                         \
  }                                                                                     \
  FAULT_KERNEL(name)

FAULT(missing_barrier, .grid = 2, .block = 64) {
  CBAM_SHARED(s, float[64]);
  s[threadIdx.x] = x[threadIdx.x];
  out[blockIdx.x * 64 + threadIdx.x] = s[63 - threadIdx.x];  // FAULT
}
FAULT(missing_second_barrier, .grid = 1, .block = 64) {
  CBAM_SHARED(s, float[64]);
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = x[threadIdx.x] + i;  // FAULT
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];  // FAULT: the next store does not wait for it
  }
}
FAULT(missing_syncwarp, .grid = 1, .block = 32) {
  CBAM_SHARED(s, float[32]);
  s[threadIdx.x] = x[threadIdx.x];
  const float sum = __shfl_xor_sync(~0u, x[threadIdx.x], 1);  // a shuffle orders no memory
  out[threadIdx.x] = s[31 - threadIdx.x] + sum;               // FAULT
}
FAULT(byte_race, .grid = 1, .block = 64) {
  CBAM_SHARED(s, unsigned char[64]);
  s[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);  // neighbours in one word: no race
  out[threadIdx.x] = s[threadIdx.x ^ 1];                     // FAULT
}
FAULT(global_store_bounds, .grid = 2, .block = 64) {
  const unsigned i = blockIdx.x * 64 + threadIdx.x;
  out[i + 1] = x[i];  // FAULT
}
FAULT(global_load_bounds, .grid = 1, .block = 64) {
  out[threadIdx.x] = __ldg(x + int(threadIdx.x) - 1);  // FAULT
}
FAULT(read_only_store, .grid = 1, .block = 64) {
  const_cast<float*>(x)[threadIdx.x] = 0.0f;  // FAULT
  out[threadIdx.x] = 0.0f;
}
FAULT(shared_bounds, .grid = 1, .block = 64, .shared = 256) {
  CBAM_DYNAMIC_SHARED(smem);
  reinterpret_cast<float*>(smem)[threadIdx.x + 1] = x[threadIdx.x];  // FAULT
}
FAULT(static_shared_bounds, .grid = 1, .block = 64) {
  CBAM_SHARED(s, float[64]);
  float* p = s;
  p[threadIdx.x + 1] = x[threadIdx.x];  // FAULT
}
FAULT(local_bounds, .grid = 1, .block = 64) {
  float v[4] = {};
  for (unsigned i = 0; i < 4; ++i) v[i] = x[i];
  const unsigned i = counters[0] + 4 + threadIdx.x % 2;
  out[threadIdx.x] = v[i];  // FAULT
}
FAULT(unwritten_shared, .grid = 1, .block = 64, .shared = 260) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];  // FAULT
}
FAULT(unwritten_global, .grid = 1, .block = 64) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = 1.0f;
  else
    out[threadIdx.x] += 1.0f;  // FAULT
}
FAULT(half_unwritten_shared, .grid = 1, .block = 64, .shared = 256) {
  CBAM_DYNAMIC_SHARED(smem);
  reinterpret_cast<unsigned short*>(smem)[2 * threadIdx.x] = 1;
  out[threadIdx.x] = float(reinterpret_cast<unsigned*>(smem)[threadIdx.x]);  // FAULT: its upper half
}
FAULT(half_unwritten_global, .grid = 1, .block = 64) {
  reinterpret_cast<unsigned short*>(out)[2 * threadIdx.x] = 1;
  out[threadIdx.x] = __ldcg(out + threadIdx.x);  // FAULT: its upper half
}
FAULT(async_not_waited, .grid = 1, .block = 64, .shared = 1024) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  copy_async_4(s + threadIdx.x, x + threadIdx.x);
  copy_async_commit();
  copy_async_wait<1>();
  out[threadIdx.x] = s[threadIdx.x];  // FAULT
  copy_async_wait<0>();
}
FAULT(async_no_barrier, .grid = 1, .block = 64, .shared = 1024) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  copy_async_4(s + threadIdx.x, x + threadIdx.x);
  copy_async_wait_all();
  out[threadIdx.x] = s[63 - threadIdx.x];  // FAULT
}
FAULT(async_never_waited, .grid = 1, .block = 64, .shared = 1024) {
  CBAM_DYNAMIC_SHARED(smem);
  copy_async_4(smem + 4 * threadIdx.x, x + threadIdx.x);  // FAULT
  copy_async_commit();
}
FAULT(bulk_not_waited, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem + 256);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, 256);
    bulk_load(s, x, 256, barrier);
  }
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];  // FAULT
  barrier_wait(barrier, 0);
}
FAULT(bulk_wrong_parity, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem + 256);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, 256);
    bulk_load(s, x, 256, barrier);
  }
  __syncthreads();
  barrier_wait(barrier, 1);           // the phase before the first: passes at once
  out[threadIdx.x] = s[threadIdx.x];  // FAULT
}
FAULT(bulk_expect_too_much, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem + 256);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, 272);
    bulk_load(smem, x, 256, barrier);
  }
  __syncthreads();
  barrier_wait(barrier, 0);  // FAULT
}
FAULT(mbarrier_no_barrier, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem);
  if (threadIdx.x == 0) barrier_init(barrier, 64);
  barrier_arrive(barrier);  // FAULT
}
FAULT(bulk_misaligned, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem + 256);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_arrive_expect(barrier, 128);
    bulk_load(smem, x + 1, 128, barrier);  // FAULT
  }
}
FAULT(bulk_store_no_fence, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  reinterpret_cast<float*>(smem)[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}
FAULT(bulk_store_overwritten, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  s[threadIdx.x] = x[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
  }
  __syncthreads();
  s[threadIdx.x] = -1.0f;
  __syncthreads();
  if (threadIdx.x == 0) bulk_wait<0>();
}
FAULT(bulk_store_never_waited, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  reinterpret_cast<float2*>(smem)[threadIdx.x] = make_float2(0, 0);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
  }
}
FAULT(early_return, .grid = 1, .block = 64) {
  if (threadIdx.x >= 60) return;
  out[threadIdx.x] = x[threadIdx.x];
  __syncthreads();  // FAULT
}
FAULT(two_barriers, .grid = 1, .block = 64) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = 1.0f;
    __syncthreads();  // FAULT
  } else {
    out[threadIdx.x] = 2.0f;
    __syncthreads();  // FAULT
  }
}
FAULT(barrier_deadlock, .grid = 1, .block = 64) {
  if (threadIdx.x < 32)
    named_barrier_sync(1, 64);  // FAULT
  else
    named_barrier_sync(2, 64);  // FAULT
}
FAULT(cluster_deadlock, .grid = 2, .block = 32, .cluster = 2) {
  if (blockIdx.x == 0)
    cluster_sync();  // FAULT
  else
    while (load_acquire(counters) == 0) sleep(64);  // FAULT
}
FAULT(livelock, .grid = 2, .block = 32) {
  if (threadIdx.x == 0)
    while (load_acquire(counters + blockIdx.x) == 0) sleep(64);  // FAULT
}
FAULT(volatile_poll, .grid = 2, .block = 32) {
  if (threadIdx.x == 0)
    while (*(const volatile unsigned*)counters == 0) {  // FAULT
    }
}
FAULT(plain_poll, .grid = 1, .block = 32) {
  if (threadIdx.x == 0)
    for (out[0] = x[0]; out[0] == x[0]; out[0] = x[0]) asm volatile("" ::: "memory");  // FAULT
}
FAULT(shuffle_absent_lane, .grid = 1, .block = 32) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_sync(0xffffu, v, int(threadIdx.x) + 16);  // FAULT
  out[threadIdx.x] = v;
}
FAULT(shuffle_returned_lane, .grid = 1, .block = 32) {
  if (threadIdx.x == 31) return;
  out[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 1);  // FAULT
}
FAULT(shuffle_partial_warp, .grid = 1, .block = 48) {
  out[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);  // FAULT
}
FAULT(shuffle_outside_mask, .grid = 1, .block = 32) {
  out[threadIdx.x] = __shfl_xor_sync(0xffu, x[threadIdx.x], 1);  // FAULT
}
FAULT(shuffle_divergent, .grid = 1, .block = 32) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(~0u, v, 1);  // FAULT
  else
    v = __shfl_xor_sync(~0u, v, 2);  // FAULT
  out[threadIdx.x] = v;
}
FAULT(misaligned_ldg, .grid = 1, .block = 8) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(x + 1) + threadIdx.x);  // FAULT
  out[threadIdx.x] = v.x;
}
FAULT(misaligned_dereference, .grid = 1, .block = 8) {
  const float4 v = reinterpret_cast<const float4*>(x + 2)[threadIdx.x];  // FAULT
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}
FAULT(misaligned_shared, .grid = 1, .block = 8, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  *reinterpret_cast<double2*>(smem + 8 + 16 * threadIdx.x) = make_double2(x[0], 1.0);  // FAULT
}
FAULT(remote_before_start, .grid = 2, .block = 32, .shared = 128, .cluster = 2) {
  CBAM_DYNAMIC_SHARED(smem);
  reinterpret_cast<float*>(map_shared(smem, 1 - cluster_rank()))[threadIdx.x] = 1.0f;  // FAULT
  cluster_sync();
}
FAULT(remote_after_return, .grid = 2, .block = 32, .shared = 128, .cluster = 2) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  s[threadIdx.x] = x[threadIdx.x];
  cluster_sync();
  if (cluster_rank() == 1) return;
  for (int i = 0; i < 200; ++i) out[threadIdx.x] = map_shared(s, 1)[threadIdx.x], __syncwarp();  // FAULT
}
FAULT(remote_race, .grid = 2, .block = 32, .shared = 128, .cluster = 2) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  s[threadIdx.x] = x[threadIdx.x];
  cluster_sync();
  map_shared(s, 1 - cluster_rank())[threadIdx.x] = 1.0f;
  out[blockIdx.x * 32 + threadIdx.x] =
      s[threadIdx.x];  // races with the other block's store, whichever comes first
  cluster_sync();
}
FAULT(relaxed_cluster_arrive, .grid = 2, .block = 32, .shared = 128, .cluster = 2) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  cluster_sync();
  s[threadIdx.x] = x[threadIdx.x];
  cluster_arrive_relaxed();
  cluster_wait();
  out[blockIdx.x * 32 + threadIdx.x] = map_shared(s, 1 - cluster_rank())[threadIdx.x];  // FAULT
  cluster_sync();
}
// Block 0 hands out[0..63] to block 1 through a counter.
#define HANDOVER(name, barrier, signal, poll, load)         \
  FAULT(name, .grid = 2, .block = 64) {                     \
    if (blockIdx.x == 0) {                                  \
      out[threadIdx.x] = x[threadIdx.x];                    \
      barrier;                                              \
      if (threadIdx.x == 0) signal(counters, 1u);           \
    } else {                                                \
      if (threadIdx.x == 0)                                 \
        while (poll(counters) == 0) sleep(32);              \
      __syncthreads();                                      \
      out[64 + threadIdx.x] = load(out + 63 - threadIdx.x); \
    }                                                       \
  }
static void fenced_add(unsigned* p, unsigned v) {
  __threadfence();
  atomicAdd(p, v);
}
static unsigned fenced_poll(const unsigned* p) {
  const unsigned v = load_relaxed(p);
  __threadfence();
  return v;
}
HANDOVER(handover, __syncthreads(), add_release, load_acquire, __ldcg)                 // right
HANDOVER(handover_fence, __syncthreads(), fenced_add, fenced_poll, __ldcg)             // right
HANDOVER(handover_no_barrier, , add_release, load_acquire, __ldcg)                     // FAULT
HANDOVER(handover_relaxed_signal, __syncthreads(), add_relaxed, load_acquire, __ldcg)  // FAULT
HANDOVER(handover_relaxed_poll, __syncthreads(), add_release, load_relaxed, __ldcg)    // FAULT
HANDOVER(handover_read_only, __syncthreads(), add_release, load_acquire, __ldg)        // FAULT

// The same with a block between them, which knows nothing of what was released. A read-modify-write continues
// the chain of a release, a store ends it: who reads the store's value has not acquired what was released.
#define CHAIN(name, pass_on)                                                                            \
  FAULT(name, .grid = 3, .block = 64) {                                                                 \
    if (blockIdx.x == 0) {                                                                              \
      out[threadIdx.x] = x[threadIdx.x];                                                                \
      __syncthreads();                                                                                  \
      if (threadIdx.x == 0) add_release(counters, 1u);                                                  \
    } else if (blockIdx.x == 1) {                                                                       \
      if (threadIdx.x == 0) {                                                                           \
        while (load_relaxed(counters) == 0) sleep(32);                                                  \
        pass_on;                                                                                        \
      }                                                                                                 \
    } else {                                                                                            \
      if (threadIdx.x == 0) {                                                                           \
        while (load_relaxed(counters) != 2) sleep(32); /* an acquire that reads 1 acquires the first */ \
        load_acquire(counters);                                                                         \
      }                                                                                                 \
      __syncthreads();                                                                                  \
      out[64 + threadIdx.x] = __ldcg(out + 63 - threadIdx.x);                                           \
    }                                                                                                   \
  }
CHAIN(handover_chain, add_relaxed(counters, 1u))           // right
CHAIN(handover_chain_broken, store_release(counters, 2u))  // FAULT

// After a write and a barrier, so that a race is reported and not a read of what nobody wrote: each kind that
// the detector tells apart.
FAULT(shared_written_twice, .grid = 1, .block = 64) {
  CBAM_SHARED(s, float[64]);
  s[threadIdx.x] = 1.0f;       // FAULT
  s[63 - threadIdx.x] = 2.0f;  // FAULT
  out[threadIdx.x] = 0.0f;
}
FAULT(global_written_twice, .grid = 2, .block = 32) {
  out[threadIdx.x] = x[threadIdx.x];  // FAULT
}
FAULT(shared_written_behind_readers, .grid = 1, .block = 128) {
  CBAM_SHARED(s, float[1]);
  if (threadIdx.x == 0) s[0] = 1.0f;
  __syncthreads();
  if (threadIdx.x >= 32) out[threadIdx.x] = s[0];  // three warps, one of which the writer waits for
  if (threadIdx.x < 64) named_barrier_sync(1, 64);
  if (threadIdx.x == 0) s[0] = 2.0f;  // FAULT
}
FAULT(global_written_behind_readers, .grid = 1, .block = 128) {
  if (threadIdx.x == 0) out[0] = 1.0f;
  __syncthreads();
  if (threadIdx.x >= 32) out[threadIdx.x] = out[0];
  if (threadIdx.x < 64) named_barrier_sync(1, 64);
  if (threadIdx.x == 0) out[0] = 2.0f;  // FAULT
}
FAULT(bytes_of_a_word, .grid = 1, .block = 64) {
  CBAM_SHARED(s, unsigned char[64]);
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = 1;                     // FAULT
  out[threadIdx.x] = s[threadIdx.x ^ 1];  // FAULT
}
FAULT(halves_of_a_word, .grid = 1, .block = 64) {
  auto* halves = reinterpret_cast<unsigned short*>(out);
  halves[threadIdx.x] = 0;
  __syncthreads();
  halves[threadIdx.x] = 1;                             // FAULT
  halves[64 + threadIdx.x] = halves[threadIdx.x ^ 1];  // FAULT
}
FAULT(named_barrier_not_waited, .grid = 1, .block = 64) {
  CBAM_SHARED(s, float[32]);
  if (threadIdx.x < 32) {
    s[threadIdx.x] = x[threadIdx.x];
    named_barrier_arrive(1, 64);
    s[threadIdx.x] = 0.0f;  // FAULT
  } else {
    named_barrier_sync(1, 64);
    out[threadIdx.x] = s[threadIdx.x - 32];  // FAULT
  }
}
FAULT(bulk_never_waited, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem + 256);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, 256);
    bulk_load(smem, x, 256, barrier);  // FAULT
  }
}
FAULT(bulk_store_early_fence, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  fence_proxy_async();  // before what it would have to order
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}

FAULT(bulk_store_fence_before_own, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  if (threadIdx.x == 0) {
    fence_proxy_async();  // before what it would have to order, and nothing is waited for in between
    for (int i = 0; i < 64; ++i) reinterpret_cast<float*>(smem)[i] = x[i];
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}
// The issuer's fence orders what it had learnt of by then, not what it learns of later: of other threads'
// stores by a barrier of the block, of the warp, by a named barrier, by a counter.
FAULT(bulk_store_fence_before_syncthreads, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  if (threadIdx.x >= 32) reinterpret_cast<float2*>(smem)[threadIdx.x - 32] = make_float2(0, 0);
  if (threadIdx.x == 0) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}
FAULT(bulk_store_fence_before_syncwarp, .grid = 1, .block = 32, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  reinterpret_cast<float2*>(smem)[threadIdx.x] = make_float2(0, 0);
  if (threadIdx.x == 0) fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}
FAULT(bulk_store_fence_before_named, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  if (threadIdx.x >= 32) {
    reinterpret_cast<float2*>(smem)[threadIdx.x - 32] = make_float2(0, 0);
    named_barrier_arrive(1, 64);
    return;
  }
  if (threadIdx.x == 0) fence_proxy_async();
  named_barrier_sync(1, 64);
  if (threadIdx.x == 0) {
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}
FAULT(bulk_store_fence_before_acquire, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  if (threadIdx.x == 32) {
    for (int i = 0; i < 64; ++i) reinterpret_cast<float*>(smem)[i] = x[i];
    add_release(counters, 1u);
  }
  if (threadIdx.x == 0) {
    fence_proxy_async();
    while (load_acquire(counters) == 0) sleep(32);
    bulk_store(out, smem, 256);  // FAULT
    bulk_commit();
    bulk_wait<0>();
  }
}
FAULT(mbarrier_arrivals_too_many, .grid = 1, .block = 64, .shared = 512) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 2);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) barrier_arrive_expect(barrier, 16);  // its phase stays open: the bytes never come
  __syncthreads();
  if (threadIdx.x == 1 || threadIdx.x == 2) barrier_arrive(barrier);  // FAULT
  out[threadIdx.x] = 0.0f;
}
FAULT(cluster_not_waited, .grid = 2, .block = 32, .cluster = 2) {
  out[threadIdx.x + 32 * blockIdx.x] = x[threadIdx.x];
  cluster_arrive();  // FAULT
}
FAULT(cluster_arrived_twice, .grid = 2, .block = 32, .cluster = 2) {
  cluster_arrive();
  cluster_arrive();  // FAULT
  cluster_wait();
}
FAULT(cluster_returned_lane, .grid = 2, .block = 32, .cluster = 2) {
  if (threadIdx.x == 5) return;
  cluster_sync();  // FAULT
}
FAULT(atomic_beside_plain, .grid = 1, .block = 64) {
  CBAM_SHARED(s, unsigned[1]);
  if (threadIdx.x == 0) s[0] = 0;
  __syncthreads();
  if (threadIdx.x >= 32)
    atomicAdd(&s[0], 1u);  // FAULT
  else
    out[threadIdx.x] = float(s[0]);  // FAULT
}

FAULT(ring_overwritten, .grid = 2, .block = 32) {
  if (blockIdx.x == 0) {
    for (unsigned i = 0; i < 3; ++i) {
      out[threadIdx.x] = x[threadIdx.x] + i;  // FAULT
      __syncthreads();
      if (threadIdx.x == 0) add_release(counters, 1u);
    }
  } else {
    if (threadIdx.x == 0)
      while (load_acquire(counters) == 0) sleep(32);
    __syncthreads();
    out[64 + threadIdx.x] = __ldcg(out + threadIdx.x);  // FAULT
  }
}
// A thread that overwrites what its own copy reads races with nobody: the copy brings the old value or the
// new one.
FAULT(async_source_overwritten, .grid = 1, .block = 1, .shared = 256) {
  CBAM_DYNAMIC_SHARED(smem);
  out[0] = 1.0f;
  copy_async_4(smem, out);
  out[0] = 2.0f;
  copy_async_wait_all();
  out[1] = *reinterpret_cast<float*>(smem);
}
FAULT(bulk_source_overwritten, .grid = 1, .block = 1, .shared = 256) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* barrier = reinterpret_cast<std::uint64_t*>(smem + 128);
  barrier_init(barrier, 1);
  barrier_init_fence();
  for (int i = 0; i < 4; ++i) out[i] = 1.0f;
  barrier_arrive_expect(barrier, 16);
  bulk_load(smem, out, 16, barrier);
  for (int i = 0; i < 4; ++i) out[i] = 2.0f;
  barrier_wait(barrier, 0);
  out[1] = *reinterpret_cast<float*>(smem);
}
FAULT(signed_overflow, .grid = 1, .block = 32) {
  const int v = 0x7fffffff - int(threadIdx.x) + int(counters[0]);
  out[threadIdx.x] = float(v + 40);  // FAULT
}
FAULT(too_much_shared, .grid = 1, .block = 32, .shared = 228 << 10) {
  out[0] = x[0];
}
FAULT(uneven_cluster, .grid = 3, .block = 32, .cluster = 2) {
  out[0] = x[0];
}
