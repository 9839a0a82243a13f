// The simulated device: threads, warps, blocks, clusters and the launch that is running.
#pragma once
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "simt/core.h"
#include "simt/memory.h"
#include "simt/warp.h"

namespace simt {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

// What a thread knows of the others, as vector clocks: entry i is the last clock of party i that happened
// before. Parties are the cluster's threads, then one for each mbarrier (standing for the copies that
// complete on it).
using Entries = std::vector<u32>;

// The same of other clusters, by cluster number; what was released through global memory and acquired.
struct Foreign {
  u64 id, parent;  // of the one that this adds to, which it covers
  std::vector<std::pair<u32, std::shared_ptr<const Entries>>> clusters;  // sorted
};
using ForeignRef = std::shared_ptr<const Foreign>;

// Snapshots are immutable and shared: after a block barrier all its threads hold the same one.
struct Clocks {
  Entries local;
  ForeignRef foreign;
};
using Snapshot = std::shared_ptr<const Clocks>;

struct Block;
struct Cluster;
struct Warp;

struct Copy {  // an asynchronous copy that has been issued and has not landed
  unsigned char* to;
  const unsigned char* from;
  std::vector<u8> bytes;  // the source as it was at issue, then zero fill
  unsigned source_bytes;
  u64* barrier;  // null for cp.async and bulk stores
  u32 phase;     // of `barrier`, at issue
  bool early;    // take the source at issue or at landing: hardware may do either
  unsigned issuer;
  Where where;
};

struct Thread {
  View view;
  Fiber fiber;
  Block* block;
  Warp* warp;
  unsigned linear, party;  // index in the block; index in the cluster
  bool ready, done;
  const char* waiting;  // for the deadlock report
  Where where;
  const void* poll;  // where set, names the place of a poll instead of `where`
  u64 result;        // of a warp or block collective
  bool cluster_arrived;
  u32 cluster_waits;

  WarpOp op;  // the collective this lane waits in
  u32 mask;
  u64 value;
  int argument, width;

  u32 clock;
  Snapshot base;
  std::vector<Snapshot> extra;
  u32 warp_seen[32];
  u32 proxy_fence;  // clock of the last fence.proxy.async
  bool fenced_since_acquire;
  ForeignRef foreign;
  ForeignRef fence_release;  // what the last fence covers: a relaxed atomic after it releases this
  ForeignRef fence_acquire;  // what relaxed atomics have seen: the next fence acquires it
  ForeignRef last_acquired;

  std::vector<Copy> copies;  // cp.async, not yet committed
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> stores;  // bulk stores
  std::deque<std::vector<Copy>> store_groups;
};

struct Warp {
  Thread* lanes[32];
  u32 exists, exited, waiting;
};

struct Rendezvous {  // threads that wait at one barrier
  std::vector<Thread*> arrived;
  unsigned count = 0, expected = 0, sum = 0;
  int op = -1;
  Clocks clocks;
  Where where{};
  Thread* first = nullptr;
};

struct Segment {
  std::size_t begin, end;
  const char* what;
};

// Shadow of one word (or byte) of shared memory.
struct Cell {
  u32 write_clock, read_clock, read_mask, more;  // more: 1 + index of a list of further readers
  u16 writer, read_warp;
  u8 flags;
};
enum CellFlag : u8 { kWritten = 1, kPending = 2, kAtomicCell = 4, kSplit = 8 };
struct Readers {
  u32 clock, mask;
  u16 warp;
};

struct Block {
  Cluster* cluster;
  unsigned rank, slot, live;
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  Rendezvous barrier;
  std::map<unsigned, Rendezvous> named;
  unsigned char* shared;
  std::vector<Segment> segments;
  Cell* cells;  // a word each
  Cell* bytes;  // a byte each, used where words are split
  std::vector<std::vector<Readers>> readers;
};

struct MBarrier {
  unsigned count, pending;
  std::int64_t bytes;     // expected and not yet arrived
  u32 phase;              // completed so far
  unsigned party, owner;  // clock entry; block rank
  unsigned initialiser;
  u32 init_clock;
  Clocks joining;
  Snapshot released;
};

struct Cluster {
  u32 number;  // within the launch
  std::vector<std::unique_ptr<Block>> blocks;
  Rendezvous barrier;  // barrier.cluster, arrived side
  std::vector<Thread*> waiting;
  u32 barrier_phase = 0;
  Snapshot barrier_released;
  std::unordered_map<u64*, MBarrier> mbarriers;
  unsigned parties;
  std::vector<Copy> copies;  // bulk copies in flight
};

// Shadow of one word of global memory, of buffers that kernels may write. Of no meaning to a later launch.
struct GlobalReaders {
  u32 cluster, clock, mask;
  u16 warp;
  bool atomic;
};
struct GlobalCell {
  u32 launch, cluster, clock;
  u16 party;
  u8 flags;
  u32 readers;  // 1 + index of a list
};

struct Buffer {
  std::uintptr_t begin, end;
  std::string name;
  bool read_only;
  std::vector<u8> written;  // a byte each, where the buffer starts without values; else empty
  std::vector<GlobalCell> words;
  std::vector<GlobalCell> halves;  // two a word, where words are shared by 16-bit elements
  std::vector<std::vector<GlobalReaders>> readers;
  u64 bytes_read = 0, bytes_written = 0;
};

struct Device {
  // settings
  u64 seed = 0;
  unsigned max_resident = 16;
  bool instrumented = false;
  // the running launch
  LaunchConfig config;
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const unsigned char* parameters = nullptr;
  std::size_t parameter_bytes = 0;
  unsigned block_threads = 0;
  u64 random = 0, progress = 0, switches = 0;
  u64 accesses = 0;  // since the running thread was resumed
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Block*> resident;
  std::vector<unsigned> free_slots;
  unsigned char* stacks = nullptr;
  std::size_t stack_bytes = 0;
  unsigned char* arena = nullptr;
  std::size_t arena_bytes = 0, slot_bytes = 0;
  std::vector<Block*> slots;
  std::map<const void*, Segment> statics;
  std::size_t static_end = 0;
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> images;
  Fiber scheduler;
  Thread* thread = nullptr;
  bool running = false;
  std::string error;
  // counted
  std::vector<Buffer> buffers;                              // by address
  std::unordered_map<std::uintptr_t, ForeignRef> released;  // by an atomic's address
  std::vector<uint3> first_blocks;                          // of each cluster admitted, by its number
  u64 bytes_read = 0, bytes_written = 0, atomics = 0, barriers = 0, launches = 0;
};
extern Device device;

u64 random_below(u64 n);
void wait(const char* what, Where where);  // blocks the running thread until `wake`
void wake(Thread* thread);
Where place_of(const void* pc);                             // of a return address; valid until the next call
[[noreturn]] void fail_device(const std::string& message);  // from the scheduler: no thread is at fault

// sync.cpp
void cluster_leave(Thread& t);  // exited threads are not waited for by cluster barriers

// clocks.cpp
bool knows(const Thread& t, unsigned party, u32 clock);
bool knows(const Thread& t, u32 cluster, unsigned party, u32 clock);
void join(Clocks& into, const Thread& t);
ForeignRef merge(const ForeignRef& a, const ForeignRef& b);
ForeignRef release_of(const Thread& t);  // all that `t` knows, its own cluster included
void acquire(Thread& t, const ForeignRef& released);
void join_snapshot(Clocks& into, const Snapshot& snapshot);
void absorb(Thread& t, const Snapshot& snapshot);
void reset_base(Thread& t, const Snapshot& snapshot);
std::string party_name(u32 cluster, unsigned party);

// shadow.cpp
struct Site {
  Where where;
  const void* pc;  // where set, names the place instead of `where`
};
struct Name {
  char text[64];
};
Name access_name(unsigned access, std::size_t bytes);
enum AccessExtra : unsigned { kIssue = 16, kCheckOnly = 32 };
void check_access(const void* address, std::size_t bytes, std::size_t alignment, unsigned access, Site site);
void mark_async(Thread& t, void* address, std::size_t bytes, unsigned party, u32 clock, bool pending,
                Site site);
void mark_landed(Thread& t, void* address, std::size_t bytes);
void check_proxy(Thread& t, const void* address, std::size_t bytes, Site site);
void check_global(Thread& t, std::uintptr_t address, std::size_t bytes, unsigned access, Site site);
bool in_own_stack(const void* address);
bool in_shared(const void* address);
Block* shared_block(const void* address);
[[noreturn]] void fail_site(Site site, const std::string& message);

// async.cpp
bool land_one(Cluster& cluster);
void finish_copies(Thread& t);
void block_leaves(Block& block);

}  // namespace simt
