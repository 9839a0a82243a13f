// Barriers and warp collectives: rendezvous of threads, their results, and what each then knows of the
// others.
#include <algorithm>

#include "simt_ptx.h"
#include "state.h"

namespace simt {

namespace {

void note_first(Rendezvous& r, Thread& t, Where where) {
  if (r.count++) return;
  r.where = where;
  r.first = &t;
}

// Everybody of the block is here: what all know together is each one's own clock and the union of their
// snapshots, which are mostly one and the same object.
Snapshot union_of_block(const Rendezvous& r) {
  auto all = std::make_shared<Clocks>();
  all->local.resize(r.first->block->cluster->parties);
  const Clocks* last = nullptr;
  for (const Thread* t : r.arrived) {
    if (t->base.get() != last) join_snapshot(*all, t->base);
    last = t->base.get();
    for (const Snapshot& s : t->extra) join_snapshot(*all, s);
    all->foreign = merge(all->foreign, t->foreign);
  }
  for (Thread* t : r.arrived) all->local[t->party] = t->clock++;
  return all;
}

u64 block_rendezvous(int op, unsigned predicate, Where where) {
  Thread& t = *device.thread;
  Block& b = *t.block;
  Rendezvous& r = b.barrier;
  if (b.live < device.block_threads)
    fail(where, "__syncthreads() after %u threads of the block returned: divergent barrier",
         device.block_threads - b.live);
  if (r.count && (r.where.line != where.line || std::strcmp(r.where.file, where.file) || r.op != op))
    fail(where, "__syncthreads() here, but thread (%u,%u,%u) waits at %s:%d: divergent barrier",
         r.first->view.thread_index.x, r.first->view.thread_index.y, r.first->view.thread_index.z,
         r.where.file, r.where.line);
  note_first(r, t, where);
  r.op = op;
  r.sum += predicate;
  r.arrived.push_back(&t);
  if (r.count == device.block_threads) {
    const u64 sum = r.sum;
    for (Thread* a : r.arrived) a->result = op == 1 ? sum == device.block_threads : op == 2 ? sum != 0 : sum;
    device.barriers++;
    if (device.instrumented) {
      const Snapshot all = union_of_block(r);
      for (Thread* a : r.arrived) reset_base(*a, all);
    }
    for (Thread* a : r.arrived)
      if (a != &t) wake(a);
    r = Rendezvous{};
    // The last to arrive takes its turn with the others.
    t.ready = true;
    b.ready.push_back(&t);
  }
  wait("waits at __syncthreads()", where);
  return t.result;
}

u64 reduce(WarpOp op, u64 a, u64 b) {
  const u32 x = static_cast<u32>(a), y = static_cast<u32>(b);
  const auto sx = static_cast<std::int32_t>(x), sy = static_cast<std::int32_t>(y);
  switch (op) {
    case WarpOp::kAdd:
      return static_cast<u32>(x + y);
    case WarpOp::kMinS:
      return static_cast<u32>(std::min(sx, sy));
    case WarpOp::kMaxS:
      return static_cast<u32>(std::max(sx, sy));
    case WarpOp::kMinU:
      return std::min(x, y);
    case WarpOp::kMaxU:
      return std::max(x, y);
    case WarpOp::kAnd:
      return x & y;
    default:
      return x | y;
  }
}

int shuffle_source(const Thread& t, WarpOp op) {
  const int lane = static_cast<int>(t.view.lane), width = t.width, segment = lane & ~(width - 1);
  int source = lane;
  switch (op) {
    case WarpOp::kShuffleIndex:
      return segment + (t.argument & (width - 1));
    case WarpOp::kShuffleUp:
      source = lane - t.argument;
      return source < segment ? lane : source;
    case WarpOp::kShuffleDown:
      source = lane + t.argument;
      return source >= segment + width ? lane : source;
    default:
      source = lane ^ t.argument;
      return source >= segment + width ? lane : source;
  }
}

// All lanes of `mask` have arrived: gives each its result.
void complete_warp(Warp& warp, u32 mask, WarpOp op) {
  u64 combined = 0;
  bool first = true;
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const u64 v = warp.lanes[l]->value;
    if (op == WarpOp::kBallot)
      combined |= v << l;
    else
      combined = first ? v : reduce(op, combined, v);
    first = false;
  }
  u32 seen[32] = {};
  if (op == WarpOp::kSync)
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1) {
        for (unsigned i = 0; i < 32; ++i) seen[i] = std::max(seen[i], warp.lanes[l]->warp_seen[i]);
        seen[l] = std::max(seen[l], warp.lanes[l]->clock);
      }
  std::vector<Snapshot> extras;
  if (op == WarpOp::kSync)
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1)
        for (const Snapshot& s : warp.lanes[l]->extra)
          if (std::find(extras.begin(), extras.end(), s) == extras.end()) extras.push_back(s);
  ForeignRef foreign;
  if (op == WarpOp::kSync)
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1) foreign = merge(foreign, warp.lanes[l]->foreign);
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Thread& t = *warp.lanes[l];
    t.result = combined;
    if (op == WarpOp::kMatch) {
      t.result = 0;
      for (unsigned j = 0; j < 32; ++j)
        if ((mask >> j & 1) && warp.lanes[j]->value == t.value) t.result |= 1ull << j;
    } else if (op >= WarpOp::kShuffleIndex && op <= WarpOp::kShuffleXor) {
      const int source = shuffle_source(t, op);
      if (source < 0 || source > 31 || !(mask >> source & 1))
        fail(t.where, "lane %u shuffles from lane %d, which is not in the mask %08x", l, source, mask);
      t.result = warp.lanes[source]->value;
    } else if (op == WarpOp::kSync) {
      std::copy(seen, seen + 32, t.warp_seen);
      t.clock++;
      for (const Snapshot& s : extras) absorb(t, s);
      t.foreign = foreign;
      t.fenced_since_acquire = false;
    }
  }
  warp.waiting &= ~mask;
  for (unsigned l = 0; l < 32; ++l)
    if ((mask >> l & 1) && warp.lanes[l] != device.thread) wake(warp.lanes[l]);
  device.progress = device.switches;
}

void cluster_settle(Cluster& c) {
  unsigned live = 0;
  for (const auto& b : c.blocks) live += b->live;
  if (c.barrier.count == 0 || c.barrier.count < live) return;
  c.barrier_released = std::make_shared<const Clocks>(std::move(c.barrier.clocks));
  c.barrier_phase++;
  c.barrier = Rendezvous{};
  for (Thread* w : c.waiting) {
    absorb(*w, c.barrier_released);
    wake(w);
  }
  c.waiting.clear();
  device.progress = device.switches;
}

}  // namespace

void block_barrier(Where where) {
  block_rendezvous(-1, 0, where);
}

unsigned block_barrier_reduce(int predicate, int op, Where where) {
  return static_cast<unsigned>(block_rendezvous(op, predicate != 0, where));
}

void named_barrier(unsigned id, unsigned threads, bool waits, Where where) {
  Thread& t = *device.thread;
  if (id > 15 || threads == 0 || threads % 32 || threads > device.block_threads)
    fail(where, "barrier %u of %u threads: the id is 0..15, the count a multiple of 32 within the block", id,
         threads);
  Rendezvous& r = t.block->named[id];
  if (r.count && r.expected != threads)
    fail(where, "barrier %u expects %u threads, others said %u", id, threads, r.expected);
  note_first(r, t, where);
  if (r.clocks.local.empty()) r.clocks.local.resize(t.block->cluster->parties);
  if (device.instrumented) join(r.clocks, t);
  t.clock++;
  r.expected = threads;
  if (waits) r.arrived.push_back(&t);
  if (r.count == threads) {
    const auto snapshot = std::make_shared<const Clocks>(std::move(r.clocks));
    for (Thread* a : r.arrived) {
      absorb(*a, snapshot);
      if (a != &t) wake(a);
    }
    r = Rendezvous{};
    device.progress = device.switches;
    pause(where);
  } else if (waits) {
    wait("waits at a named barrier", where);
  }
}

u64 warp_collective(WarpOp op, unsigned mask, u64 value, int argument, int width, Where where) {
  Thread& t = *device.thread;
  Warp& w = *t.warp;
  if (!(mask >> t.view.lane & 1))
    fail(where, "lane %u calls a warp operation whose mask %08x leaves it out", t.view.lane, mask);
  if (const u32 absent = mask & (~w.exists | w.exited))
    fail(where, "the mask %08x names lanes %08x, which %s: they cannot take part", mask, absent,
         absent & w.exited ? "have returned" : "do not exist");
  if (width <= 0 || width > 32 || (width & (width - 1)))
    fail(where, "shuffle width %d is not a power of two within 32", width);
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.argument = argument;
  t.width = width;
  t.where = where;
  w.waiting |= 1u << t.view.lane;
  bool complete = (w.waiting & mask) == mask;
  const u32 others = w.waiting & mask & ~(1u << t.view.lane);
  // While lanes are missing, comparing with one that waits is enough: it was compared with those before it.
  for (u32 m = complete ? mask : others & -others; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const Thread& other = *w.lanes[l];
    if (other.mask != mask) {
      complete = false;
    } else if (other.op != op || other.where.line != where.line) {
      fail(where,
           "lanes %u and %d of one mask %08x are at different warp operations: the other's is at %s:%d",
           t.view.lane, l, mask, other.where.file, other.where.line);
    }
  }
  if (complete) {
    complete_warp(w, mask, op);
    t.ready = true;
    t.block->ready.push_back(&t);
  }
  wait("waits in a warp operation", where);
  return t.result;
}

void cluster_arrive(bool release, Where where) {
  Thread& t = *device.thread;
  Cluster& c = *t.block->cluster;
  if (t.cluster_arrived) fail(where, "cluster barrier: a second arrive without a wait between");
  t.cluster_arrived = true;
  t.where = where;  // of the report, should it never wait
  Rendezvous& r = c.barrier;
  if (r.clocks.local.empty()) r.clocks.local.resize(c.parties);
  if (release && device.instrumented) join(r.clocks, t);
  t.clock++;
  r.count++;
  cluster_settle(c);
}

void cluster_leave(Thread& t) {
  cluster_settle(*t.block->cluster);
}

void cluster_wait(Where where) {
  Thread& t = *device.thread;
  Cluster& c = *t.block->cluster;
  if (!t.cluster_arrived) fail(where, "cluster barrier: a wait without an arrive");
  // Nobody arrives for the next phase before waiting for this one, so phases cannot lap a thread that has not
  // waited.
  if (c.barrier_phase == t.cluster_waits) {
    c.waiting.push_back(&t);
    wait("waits at a cluster barrier", where);
  } else {
    absorb(t, c.barrier_released);
    pause(where);
  }
  t.cluster_waits++;
  t.cluster_arrived = false;
}

void* cluster_map(const void* address, unsigned rank, Where where) {
  Thread& t = *device.thread;
  Block& b = *t.block;
  const auto offset = static_cast<std::size_t>(static_cast<const unsigned char*>(address) - b.shared);
  if (offset >= device.slot_bytes) fail(where, "the address to map is not in this block's shared memory");
  if (rank >= device.config.cluster)
    fail(where, "rank %u of a cluster of %u blocks", rank, device.config.cluster);
  return b.cluster->blocks[rank]->shared + offset;
}

}  // namespace simt
