// Kernels that are right: they must pass, and give the same bits under every seed.
#include <cuda_bf16.h>

#include "simt_ptx.h"

using namespace cbam::ptx;

// Sum of each row of x [rows, columns]; a block a row: vector loads with a tail, shuffles, static shared
// memory.
template <int kThreads>
__global__ void row_sum(const float* x, float* out, int columns) {
  CBAM_SHARED(partial, float[kThreads / 32]);
  const float* row = x + std::int64_t(blockIdx.x) * columns;
  float sum = 0.0f;
  const int vectors = columns % 4 == 0 ? columns / 4 : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(row) + i);
    sum += v.x + v.y + v.z + v.w;
  }
  for (int i = vectors * 4 + threadIdx.x; i < columns; i += kThreads) sum += row[i];
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) sum += partial[w];
    out[blockIdx.x] = sum;
  }
}
extern "C" SIMT_API void run_row_sum(const float* x, float* out, std::int64_t rows, std::int64_t columns) {
  simt::launch({.grid = unsigned(rows), .block = 256}, "row_sum", row_sum<256>, x, out, int(columns));
}

// Tickets: first `items` tiles are summed into partial, then each item of the second kind waits for all tiles
// of its unit. Counters reset themselves. counters: [ticket, blocks done, one a unit].
__global__ void tickets(const float* x, float* partial, float* out, unsigned* counters, int units, int tiles,
                        int width) {
  CBAM_SHARED(ticket, unsigned);
  CBAM_SHARED(last, unsigned);
  const unsigned per_unit = tiles + tiles, total = units * per_unit;
  for (;;) {
    if (threadIdx.x == 0) ticket = add_relaxed(&counters[0], 1u);
    __syncthreads();
    const unsigned t = ticket;
    if (t >= total) break;
    const unsigned unit = t / per_unit, item = t % per_unit;
    if (item < unsigned(tiles)) {
      float sum = 0.0f;
      for (int i = threadIdx.x % 32; i < width; i += 32)
        sum += x[(std::int64_t(unit) * tiles + item) * width + i];
      for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (threadIdx.x == 0) partial[unit * tiles + item] = sum;
      __syncthreads();
      if (threadIdx.x == 0) add_release(&counters[2 + unit], 1u);
    } else {
      if (threadIdx.x == 0)
        for (unsigned ns = 32; load_acquire(&counters[2 + unit]) < unsigned(tiles); ns = min(2 * ns, 256u))
          sleep(ns);
      __syncthreads();
      float sum = 0.0f;
      for (int i = 0; i < tiles; ++i) sum += load_coherent(&partial[unit * tiles + i]);
      const std::int64_t base = (std::int64_t(unit) * tiles + item - tiles) * width;
      for (int i = threadIdx.x; i < width; i += blockDim.x) out[base + i] = x[base + i] * sum;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) last = increment_acquire_release(&counters[1], gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last) {
    for (int u = threadIdx.x; u < units; u += blockDim.x) counters[2 + u] = 0;
    if (threadIdx.x == 0) counters[0] = 0;
  }
}
extern "C" SIMT_API void run_tickets(const float* x, float* partial, float* out, unsigned* counters,
                                     std::int64_t units, std::int64_t tiles, std::int64_t width,
                                     std::int64_t grid, std::int64_t launches) {
  for (int i = 0; i < launches; ++i)
    simt::launch({.grid = unsigned(grid), .block = 64}, "tickets", tickets, x, partial, out, counters,
                 int(units), int(tiles), int(width));
}

// A cluster holds one sample of bfloat16 x [samples, n] in its shared memory: bulk copies in, sums exchanged
// through distributed shared memory, y = x * total, bulk stores out.
__global__ void cluster_scale(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
  CBAM_DYNAMIC_SHARED(smem);
  const int share = n / int(cluster_size()), rank = int(cluster_rank());
  const int half_share = share / 2;
  auto* tile = reinterpret_cast<__nv_bfloat16*>(smem);
  auto* barriers = reinterpret_cast<std::uint64_t*>(smem + share * 2);
  auto* sums = reinterpret_cast<float*>(barriers + 2);  // [cluster size]
  auto* warps = sums + 16;
  const std::int64_t base = std::int64_t(blockIdx.x / cluster_size()) * n + rank * share;
  if (threadIdx.x < 2) {
    barrier_init(&barriers[threadIdx.x], 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    barrier_arrive_expect(&barriers[threadIdx.x], half_share * 2);
    bulk_load(tile + threadIdx.x * half_share, x + base + threadIdx.x * half_share, half_share * 2,
              &barriers[threadIdx.x]);
  }
  float sum = 0.0f;
  for (int stage = 0; stage < 2; ++stage) {
    barrier_wait(&barriers[stage], 0);
    for (int i = threadIdx.x; i < half_share; i += blockDim.x)
      sum += __bfloat162float(tile[stage * half_share + i]);
  }
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  cluster_sync();  // also: every block of the cluster runs before its memory is touched
  if (threadIdx.x < cluster_size()) {
    float block = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) block += warps[w];
    map_shared(sums, threadIdx.x)[rank] = block;
  }
  cluster_sync();
  float total = 0.0f;
  for (unsigned r = 0; r < cluster_size(); ++r) total += sums[r];
  for (int i = threadIdx.x; i < share; i += blockDim.x)
    tile[i] = __float2bfloat16(__bfloat162float(tile[i]) * total);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y + base, tile, share * 2);
    bulk_commit();
    bulk_wait<0>();
  }
}
extern "C" SIMT_API void run_cluster_scale(const __nv_bfloat16* x, __nv_bfloat16* y, std::int64_t samples,
                                           std::int64_t n, std::int64_t cluster) {
  const std::size_t shared = n / cluster * 2 + 16 + 64 + 64;
  simt::launch(
      {.grid = unsigned(samples * cluster), .block = 64, .shared = shared, .cluster = unsigned(cluster)},
      "cluster_scale", cluster_scale, x, y, int(n));
}

// Each block hands its row [n] to the next rank with a bulk copy between shared memories, and one word with
// st.async.
__global__ void rotate(const float* x, float* y, int n) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* mine = reinterpret_cast<float*>(smem);
  auto* theirs = mine + n;
  auto* word = theirs + n;
  auto* barrier = reinterpret_cast<std::uint64_t*>(word + 4);
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, n * 4 + 4);
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x) mine[i] = x[std::int64_t(blockIdx.x) * n + i];
  fence_proxy_async();
  cluster_sync();
  if (threadIdx.x == 0) {
    bulk_copy_cluster(map_shared(theirs, next), mine, n * 4, map_shared(barrier, next));
    store_async(map_shared(word, next), float(blockIdx.x), map_shared(barrier, next));
  }
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[std::int64_t(blockIdx.x) * n + i] = theirs[i] + *word;
  cluster_sync();  // the source of the copy stays until its reader has it
}
extern "C" SIMT_API void run_rotate(const float* x, float* y, std::int64_t blocks, std::int64_t n,
                                    std::int64_t cluster) {
  simt::launch({.grid = unsigned(blocks),
                .block = 32,
                .shared = std::size_t(n * 8 + 32),
                .cluster = unsigned(cluster)},
               "rotate", rotate, x, y, int(n));
}

// Pipelined cp.async of x [tiles, 4 * threads], two stages; out[i] = sum over tiles.
__global__ void pipeline(const float* x, float* out, int tiles) {
  CBAM_DYNAMIC_SHARED(smem);
  auto* stage = reinterpret_cast<float*>(smem);  // [2, 4 * threads]
  const int width = 4 * int(blockDim.x), t = threadIdx.x;
  float4 sum = make_float4(0, 0, 0, 0);
  copy_async_16(stage + 4 * t, x + 4 * t);
  copy_async_commit();
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles)
      copy_async_16(stage + (i + 1) % 2 * width + 4 * t, x + std::int64_t(i + 1) * width + 4 * t);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const float4 v = *reinterpret_cast<const float4*>(stage + i % 2 * width +
                                                      4 * (blockDim.x - 1 - t));  // another thread's
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    __syncthreads();
  }
  reinterpret_cast<float4*>(out)[blockDim.x - 1 - t] = sum;
}
extern "C" SIMT_API void run_pipeline(const float* x, float* out, std::int64_t tiles) {
  simt::launch({.grid = 1, .block = 64, .shared = 2 * 64 * 16}, "pipeline", pipeline, x, out, int(tiles));
}

// Producer warp, consumer warps and named barriers: 1 says full, 2 says empty.
__global__ void producer(const int* x, int* out, int rounds) {
  CBAM_SHARED(box, int[32]);
  const bool produces = threadIdx.x < 32;
  int sum = 0;
  for (int r = 0; r < rounds; ++r) {
    if (produces) {
      box[threadIdx.x] = x[r * 32 + threadIdx.x];
      named_barrier_arrive(1, 64);
      named_barrier_sync(2, 64);
    } else {
      named_barrier_sync(1, 64);
      sum += box[63 - threadIdx.x];
      named_barrier_arrive(2, 64);
    }
  }
  if (!produces) out[threadIdx.x - 32] = sum;
}
extern "C" SIMT_API void run_producer(const int* x, int* out, std::int64_t rounds) {
  simt::launch({.grid = 1, .block = 64}, "producer", producer, x, out, int(rounds));
}

// out: [ballot, match, scan of lane 31, minimum, count over the block]
__global__ void votes(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned ballot = __ballot_sync(~0u, lane % 3 == 0), match = __match_any_sync(~0u, lane / 8);
  int scan = int(lane);
  for (unsigned d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(~0u, scan, d);
    if (lane >= d) scan += below;
  }
  const int least = __reduce_min_sync(~0u, 5 - int(lane)), count = __syncthreads_count(threadIdx.x % 2);
  // Halves of a warp with masks of their own.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  const int leader = __shfl_sync(half, int(lane), 0, 16);
  if (threadIdx.x == 31) {
    out[0] = ballot, out[1] = match, out[2] = scan, out[3] = unsigned(least), out[4] = count, out[5] = leader;
  }
}
extern "C" SIMT_API void run_votes(unsigned* out) {
  simt::launch({.grid = 1, .block = 128}, "votes", votes, out);
}

// Bits of every half and bfloat16 value rounded from float x [n], and back.
extern "C" SIMT_API void run_convert(const float* x, std::uint16_t* h, std::uint16_t* b, float* from_h,
                                     float* from_b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    h[i] = __half_as_ushort(__float2half(x[i]));
    b[i] = __bfloat16_as_ushort(__float2bfloat16(x[i]));
    from_h[i] = __half2float(__ushort_as_half(h[i]));
    from_b[i] = __bfloat162float(__ushort_as_bfloat16(b[i]));
  }
}
