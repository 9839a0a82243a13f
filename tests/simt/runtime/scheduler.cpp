// Runs a grid: admits clusters, picks a thread at random wherever one can run, and reports what cannot go on.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <set>

#include "state.h"

namespace simt {

Device device;
View* self = nullptr;

namespace {

constexpr std::size_t kStaticBytes = 64 << 10;  // room for a block's static shared memory
constexpr std::size_t kGuard = 64;              // unaddressable bytes behind each piece of shared memory

u64 mix(u64 z) {  // splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

unsigned char* reserve(std::size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail_device("cannot reserve memory for stacks or shared memory");
  return static_cast<unsigned char*>(p);
}

void thread_entry() {
  fiber_entered(device.scheduler);
  device.body(device.parameters);
  Thread& t = *device.thread;
  finish_copies(t);
  t.done = true;
  t.warp->exited |= 1u << t.view.lane;
  t.block->live--;
  device.progress = device.switches;
  if (t.block->barrier.count)
    fail(t.where,
         "thread (%u,%u,%u) returned while others wait at the __syncthreads() of %s:%d: divergent barrier",
         t.view.thread_index.x, t.view.thread_index.y, t.view.thread_index.z, t.block->barrier.where.file,
         t.block->barrier.where.line);
  if (t.warp->waiting)
    for (Thread* lane : t.warp->lanes)
      if (lane && (t.warp->waiting >> lane->view.lane & 1) && (lane->mask >> t.view.lane & 1))
        fail(lane->where, "lane %u returned, but the mask %08x of a warp operation waits for it", t.view.lane,
             lane->mask);
  cluster_leave(t);
  if (fiber_overflowed(t.fiber)) fail(t.where, "the thread overflowed its stack of %zu bytes", kStackBytes);
  fiber_switch(t.fiber, device.scheduler, true);
}

// Where the images of this process lie: their static data may be read by kernels (constant tables).
int add_image(dl_phdr_info* info, std::size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_LOAD) {
      const std::uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      device.images.emplace_back(begin, begin + info->dlpi_phdr[i].p_memsz);
    }
  return 0;
}

std::unique_ptr<Block> make_block(Cluster& cluster, unsigned rank, uint3 index, const Snapshot& start) {
  const LaunchConfig& c = device.config;
  auto block = std::make_unique<Block>();
  Block& b = *block;
  b.cluster = &cluster;
  b.rank = rank;
  b.index = index;
  b.live = device.block_threads;
  b.slot = device.free_slots.back();
  device.free_slots.pop_back();
  device.slots[b.slot] = &b;
  b.shared = device.arena + b.slot * device.slot_bytes;
#if SIMT_ASAN
  __asan_unpoison_memory_region(b.shared, device.slot_bytes);
#endif
  std::memset(b.shared, 0xff, device.slot_bytes);  // NaN in every floating-point type
#if SIMT_ASAN
  __asan_poison_memory_region(b.shared, device.slot_bytes);
  __asan_unpoison_memory_region(b.shared, c.shared);
#endif
  b.segments.push_back({0, c.shared, "dynamic shared memory"});
  if (device.instrumented) {
    b.cells = static_cast<Cell*>(std::calloc(device.slot_bytes / 4, sizeof(Cell)));
    b.bytes = static_cast<Cell*>(
        std::calloc(device.slot_bytes, sizeof(Cell)));  // touched only where words are split
  }
  b.threads.resize(device.block_threads);
  b.warps.resize((device.block_threads + 31) / 32);
  for (unsigned i = 0; i < device.block_threads; ++i) {
    Thread& t = b.threads[i];
    const uint3 at{i % c.block.x, i / c.block.x % c.block.y, i / (c.block.x * c.block.y)};
    t.view = {at, index, c.block, c.grid, i & 31, rank, c.cluster};
    t.block = &b;
    t.linear = i;
    t.party = rank * device.block_threads + i;
    t.warp = &b.warps[i >> 5];
    t.warp->lanes[i & 31] = &t;
    t.warp->exists |= 1u << (i & 31);
    t.clock = 1;
    t.base = start;
    t.ready = true;
    t.where = {"kernel entry", 0};
    fiber_create(t.fiber, device.stacks + (std::size_t(b.slot) * device.block_threads + i) * kStackBytes,
                 thread_entry);
    b.ready.push_back(&t);
  }
  return block;
}

void admit(unsigned cluster_index) {
  const LaunchConfig& c = device.config;
  auto owned = std::make_unique<Cluster>();
  Cluster& cluster = *owned;
  cluster.number = static_cast<u32>(device.first_blocks.size());
  cluster.parties = c.cluster * device.block_threads;
  const auto start = std::make_shared<const Clocks>(Clocks{Entries(cluster.parties, 0u), nullptr});
  const unsigned along_x = c.grid.x / c.cluster;
  for (unsigned r = 0; r < c.cluster; ++r) {
    const uint3 at{cluster_index % along_x * c.cluster + r, cluster_index / along_x % c.grid.y,
                   cluster_index / along_x / c.grid.y};
    if (r == 0) device.first_blocks.push_back(at);
    cluster.blocks.push_back(make_block(cluster, r, at, start));
    device.resident.push_back(cluster.blocks.back().get());
  }
  device.clusters.push_back(std::move(owned));
}

void release(Block& b) {
  device.resident.erase(std::find(device.resident.begin(), device.resident.end(), &b));
  block_leaves(b);
}

// A cluster's shared memory stays reserved until all its blocks are over; only then may others reuse it.
bool retire(Cluster* cluster) {
  for (auto& b : cluster->blocks)
    if (b->live) return false;
  while (land_one(*cluster)) {
  }
  for (auto& b : cluster->blocks) {
    std::free(b->cells);
    std::free(b->bytes);
    device.slots[b->slot] = nullptr;
    device.free_slots.push_back(b->slot);
  }
  auto& all = device.clusters;
  all.erase(std::find_if(all.begin(), all.end(), [&](auto& c) { return c.get() == cluster; }));
  return true;
}

std::string stuck_report(const char* what) {
  std::string report = std::string("kernel '") + device.kernel + "': " + what;
  std::set<std::string> seen;
  std::set<const void*> polls;  // resolving one costs a process
  for (auto& cluster : device.clusters)
    for (auto& b : cluster->blocks)
      for (Thread& t : b->threads) {
        if (t.done || seen.size() == 8 || (t.poll && !polls.insert(t.poll).second)) continue;
        const Where where = t.poll ? place_of(t.poll) : t.where;
        const std::string doing = std::string(t.waiting ? t.waiting : "runs") + " at " + where.file + ":" +
                                  std::to_string(where.line);
        if (!seen.insert(doing).second) continue;
        char who[120];
        const uint3 i = t.view.thread_index;
        std::snprintf(who, sizeof who, "\n  block (%u,%u,%u) thread (%u,%u,%u) ", b->index.x, b->index.y,
                      b->index.z, i.x, i.y, i.z);
        report += who + doing;
      }
  return report;
}

void run_thread(Block& b) {
  const std::size_t pick = random_below(b.ready.size());
  Thread* t = b.ready[pick];
  b.ready[pick] = b.ready.back();
  b.ready.pop_back();
  t->ready = false;
  t->waiting = nullptr;
  device.thread = t;
  self = &t->view;
  device.switches++;
  device.accesses = 0;
  fiber_switch(device.scheduler, t->fiber);
  self = nullptr;
  device.thread = nullptr;
}

void run_all() {
  const LaunchConfig& c = device.config;
  std::vector<unsigned> waiting(c.grid.x / c.cluster * c.grid.y * c.grid.z);
  for (unsigned i = 0; i < waiting.size(); ++i) waiting[i] = i;
  for (std::size_t i = waiting.size(); i > 1; --i) std::swap(waiting[i - 1], waiting[random_below(i)]);
  std::vector<Block*> candidates;
  while (device.error.empty()) {
    while (!waiting.empty() && device.free_slots.size() >= c.cluster) {
      admit(waiting.back());
      waiting.pop_back();
    }
    if (device.resident.empty()) return;
    candidates.clear();
    for (Block* b : device.resident)
      if (!b->ready.empty()) candidates.push_back(b);
    Cluster& any = *device.clusters[random_below(device.clusters.size())];
    if (candidates.empty() || (!any.copies.empty() && random_below(4) == 0)) {
      bool landed = land_one(any);
      for (auto& cluster : device.clusters) landed = landed || (candidates.empty() && land_one(*cluster));
      if (landed) {
        device.progress = device.switches;
        continue;
      }
      if (candidates.empty()) {
        device.error = stuck_report("deadlock: no thread can run");
        return;
      }
    }
    Block& b = *candidates[random_below(candidates.size())];
    for (u64 quantum = 1 + random_below(2 * device.block_threads); quantum && !b.ready.empty(); --quantum) {
      run_thread(b);
      if (!device.error.empty()) return;
    }
    if (b.live == 0) {
      Cluster* cluster = b.cluster;
      release(b);
      retire(cluster);
    } else if (device.switches - device.progress >
               200000 + 400ull * device.block_threads * device.resident.size()) {
      device.error = stuck_report("livelock: threads only poll, and nothing changes");
      return;
    }
  }
}

void check_config(const LaunchConfig& c) {
  const u64 threads = u64(c.block.x) * c.block.y * c.block.z;
  char message[200] = "";
  if (threads == 0 || threads > 1024)
    std::snprintf(message, sizeof message, "%llu threads a block: 1 to 1024", (unsigned long long)threads);
  else if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0 || c.grid.y > 65535 || c.grid.z > 65535 ||
           c.grid.x > 0x7fffffff)
    std::snprintf(message, sizeof message, "grid (%u,%u,%u) is empty or too large", c.grid.x, c.grid.y,
                  c.grid.z);
  else if (c.shared > 227 << 10)
    std::snprintf(message, sizeof message, "%zu bytes of shared memory: at most 227 KiB", c.shared);
  else if (c.cluster == 0 || c.cluster > 16 || c.grid.x % c.cluster)
    std::snprintf(message, sizeof message, "cluster of %u blocks does not divide grid.x = %u, or is above 16",
                  c.cluster, c.grid.x);
  if (*message) fail_device(std::string("kernel '") + device.kernel + "': " + message);
}

}  // namespace

u64 random_below(u64 n) {
  device.random += 0x9e3779b97f4a7c15;
  return static_cast<u64>((static_cast<unsigned __int128>(mix(device.random)) * n) >> 64);
}

void wait(const char* what, Where where) {
  Thread& t = *device.thread;
  t.waiting = what;
  t.where = where;
  fiber_switch(t.fiber, device.scheduler);
}

void wake(Thread* t) {
  if (t->ready) return;
  t->ready = true;
  t->block->ready.push_back(t);
  device.progress = device.switches;
}

void pause(Where where) {
  Thread& t = *device.thread;
  t.ready = true;
  t.block->ready.push_back(&t);
  wait("polls", where);
}

u64 clock() {
  return device.switches;
}

void fail(Where where, const char* format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Thread& t = *device.thread;
  char head[600];
  std::snprintf(head, sizeof head, "kernel '%s' block (%u,%u,%u) thread (%u,%u,%u) at %s:%d: ", device.kernel,
                t.block->index.x, t.block->index.y, t.block->index.z, t.view.thread_index.x,
                t.view.thread_index.y, t.view.thread_index.z, where.file, where.line);
  device.error = std::string(head) + text;
  for (;;) fiber_switch(device.thread->fiber, device.scheduler);  // never resumed: the launch is over
}

struct LaunchRefused {
  std::string message;
};
void fail_device(const std::string& message) {
  throw LaunchRefused{message};
}

void launch_grid(const LaunchConfig& config, const char* kernel, void (*body)(const void*),
                 const void* parameters, std::size_t parameter_bytes, bool instrumented) {
  Device& d = device;
  if (!d.error.empty()) return;
  d.instrumented = instrumented;
  d.config = config;
  d.kernel = kernel;
  d.body = body;
  d.parameters = static_cast<const unsigned char*>(parameters);
  d.parameter_bytes = parameter_bytes;
  d.random = mix(d.seed * 0x2545f4914f6cdd1d + ++d.launches);
  d.switches = d.progress = 0;
  d.statics.clear();
  d.released.clear();
  d.first_blocks.clear();
  d.static_end = (config.shared + kGuard + 127) / 128 * 128;
  try {
    check_config(config);
    d.block_threads = config.block.x * config.block.y * config.block.z;
    d.images.clear();
    dl_iterate_phdr(add_image, nullptr);
    const u64 blocks = u64(config.grid.x) * config.grid.y * config.grid.z;
    const u64 slots = std::max<u64>(config.cluster, std::min<u64>(blocks, d.max_resident));
    d.slot_bytes = (d.static_end + kStaticBytes + 4095) / 4096 * 4096;
    d.arena_bytes = slots * d.slot_bytes;
    d.arena = reserve(d.arena_bytes);
    d.stack_bytes = slots * d.block_threads * kStackBytes;
    d.stacks = reserve(d.stack_bytes);
    d.slots.assign(slots, nullptr);
    for (u64 s = slots; s-- > 0;) d.free_slots.push_back(static_cast<unsigned>(s));
    d.running = true;
    run_all();
  } catch (const LaunchRefused& refused) {
    d.error = refused.message;
  }
  d.running = false;
  for (auto& cluster : d.clusters)
    for (auto& b : cluster->blocks) {
      std::free(b->cells);
      std::free(b->bytes);
    }
  d.clusters.clear();
  d.resident.clear();
  d.free_slots.clear();
#if SIMT_ASAN
  if (d.arena) __asan_unpoison_memory_region(d.arena, d.arena_bytes);
  if (d.stacks) __asan_unpoison_memory_region(d.stacks, d.stack_bytes);
#endif
  if (d.arena) munmap(d.arena, d.arena_bytes);
  if (d.stacks) munmap(d.stacks, d.stack_bytes);
  d.arena = d.stacks = nullptr;
}

void* dynamic_shared() {
  return device.thread->block->shared;
}

void* static_shared(const void* key, std::size_t bytes, std::size_t alignment, Where where) {
  Device& d = device;
  Block& b = *d.thread->block;
  auto [it, fresh] = d.statics.try_emplace(key);
  if (fresh) {  // one offset for all blocks of a launch, so that a mapped address means the same variable
    const std::size_t begin = (d.static_end + alignment - 1) / alignment * alignment;
    it->second = {begin, begin + bytes, "static shared memory"};
    d.static_end = begin + bytes + kGuard;
    if (d.static_end > d.slot_bytes) fail(where, "static shared memory exceeds %zu bytes", kStaticBytes);
  }
  const Segment& s = it->second;
  if (std::none_of(b.segments.begin(), b.segments.end(),
                   [&](const Segment& o) { return o.begin == s.begin && o.end == s.end; })) {
    b.segments.push_back(s);
#if SIMT_ASAN
    __asan_unpoison_memory_region(b.shared + s.begin, bytes);
#endif
  }
  return b.shared + s.begin;
}

}  // namespace simt
