// Asynchronous copies and mbarriers: data lands late, and belongs to nobody until its completion was waited
// for.
#include <algorithm>

#include "simt_ptx.h"
#include "state.h"

namespace simt {

namespace {

Thread& me() {
  return *device.thread;
}

Copy make_copy(void* to, const void* from, unsigned bytes, unsigned source_bytes, u64* barrier, Where where) {
  Copy c{};
  c.to = static_cast<unsigned char*>(to);
  c.from = static_cast<const unsigned char*>(from);
  c.bytes.assign(bytes, 0);
  if (source_bytes) std::memcpy(c.bytes.data(), from, source_bytes);
  c.source_bytes = source_bytes;
  c.barrier = barrier;
  c.early = random_below(2);
  c.issuer = me().linear;
  c.where = where;
  return c;
}

void land(const Copy& c) {
  if (!c.early && c.source_bytes)
    std::memcpy(c.to, c.from, c.source_bytes);
  else
    std::memcpy(c.to, c.bytes.data(), c.source_bytes);
  if (c.source_bytes < c.bytes.size()) std::memset(c.to + c.source_bytes, 0, c.bytes.size() - c.source_bytes);
}

void land_groups(std::deque<std::vector<Copy>>& groups, unsigned keep) {
  Thread& t = me();
  for (; groups.size() > keep; groups.pop_front())
    for (const Copy& c : groups.front()) {
      land(c);
      if (device.instrumented) mark_landed(t, c.to, c.bytes.size());
    }
}

void land_stores(std::deque<std::vector<Copy>>& groups, unsigned keep) {
  for (; groups.size() > keep; groups.pop_front())
    for (const Copy& c : groups.front()) {
      if (std::memcmp(c.bytes.data(), c.from, c.bytes.size()))
        fail(c.where,
             "the shared memory that a bulk store reads was overwritten before the store was waited for");
      std::memcpy(c.to, c.bytes.data(), c.bytes.size());
    }
}

MBarrier& find(u64* barrier, Where where) {
  if (!in_shared(barrier)) fail(where, "the mbarrier is not in shared memory");
  Thread& t = me();
  auto& all = t.block->cluster->mbarriers;
  const auto it = all.find(barrier);
  if (it == all.end()) fail(where, "this mbarrier was never initialised");
  Block& owner = *shared_block(barrier);
  if (&owner != t.block && owner.live == 0)
    fail(where, "mbarrier of block rank %u, which has returned", owner.rank);
  if (device.instrumented && !knows(t, it->second.initialiser, it->second.init_clock))
    fail(where, "the mbarrier's initialisation is not ordered before this use: no barrier between");
  return it->second;
}

// A phase ends when nobody and nothing is awaited any more; those who then test it learn what the arrivers
// knew.
void settle(MBarrier& m) {
  if (m.pending || m.bytes) return;
  m.joining.local[m.party] = ++m.phase;
  m.released = std::make_shared<const Clocks>(m.joining);
  m.pending = m.count;
  device.progress = device.switches;
}

void check_bulk(const void* to, const void* from, unsigned bytes, Where where) {
  const auto bits = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from) | bytes;
  if (bits % 16 || bytes == 0)
    fail(where, "bulk copy of %u bytes from %p to %p: misaligned, or not a multiple of 16", bytes, from, to);
}

void await_bytes(u64* barrier, std::int64_t bytes, Cluster& cluster) {
  auto it = cluster.mbarriers.find(barrier);
  if (it == cluster.mbarriers.end()) return;
  it->second.bytes += bytes;
  if (bytes < 0) settle(it->second);
}

}  // namespace

void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Where where) {
  Thread& t = me();
  if (!in_shared(shared)) fail(where, "cp.async into memory that is not shared");
  if (in_shared(global)) fail(where, "cp.async from shared memory");
  if ((reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global)) % bytes)
    fail(where, "misaligned cp.async of %u bytes from %p to %p", bytes, global, shared);
  if (source_bytes > bytes) fail(where, "cp.async of %u bytes with a source of %u", bytes, source_bytes);
  if (source_bytes) check_access(global, source_bytes, 1, kRead, {where, nullptr});
  mark_async(t, shared, bytes, t.party, t.clock, true, {where, nullptr});
  t.copies.push_back(make_copy(shared, global, bytes, source_bytes, nullptr, where));
  std::memset(shared, 0xff, bytes);
}

void async_commit(Where) {
  Thread& t = me();
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

void async_wait(unsigned keep, bool all, Where where) {
  Thread& t = me();
  if (all) async_commit(where);
  land_groups(t.groups, keep);
}

void mbarrier_init(u64* barrier, unsigned count, Where where) {
  Thread& t = me();
  if (!in_shared(barrier) || shared_block(barrier) != t.block)
    fail(where, "an mbarrier is initialised in its own block's shared memory");
  if (count == 0 || count >= 1u << 20) fail(where, "mbarrier of %u arrivals", count);
  check_access(barrier, 8, 8, kWrite, {where, nullptr});
  Cluster& c = *t.block->cluster;
  const unsigned party = c.parties + static_cast<unsigned>(c.mbarriers.size());
  auto [it, fresh] = c.mbarriers.try_emplace(barrier);
  MBarrier& m = it->second;
  const unsigned old_party = m.party;
  const u32 old_phase = m.phase;
  m = MBarrier{};
  m.party = fresh ? party : old_party;
  m.phase = fresh ? 0 : (old_phase + 1) & ~1u;  // even again, and its clock never runs backwards
  m.count = m.pending = count;
  m.initialiser = t.party;
  m.init_clock = t.clock;
  m.joining.local.resize(m.party + 1);
}

void mbarrier_invalidate(u64* barrier, Where where) {
  find(barrier, where);
  check_access(barrier, 8, 8, kWrite, {where, nullptr});
}

void mbarrier_arrive(u64* barrier, unsigned count, unsigned expected_bytes, Where where) {
  Thread& t = me();
  MBarrier& m = find(barrier, where);
  if (count > m.pending) fail(where, "more arrivals at an mbarrier than its count of %u", m.count);
  if (device.instrumented) join(m.joining, t);
  t.clock++;
  m.bytes += expected_bytes;
  m.pending -= count;
  if (count) settle(m);
}

bool mbarrier_test(u64* barrier, unsigned parity, Where where) {
  MBarrier& m = find(barrier, where);
  if (shared_block(barrier) != me().block) fail(where, "a thread waits on the mbarrier of another block");
  if (parity > 1) fail(where, "mbarrier parity %u", parity);
  if ((m.phase & 1) == parity) return false;
  absorb(me(), m.released);
  return true;
}

void bulk_copy_in(void* to, const void* from, unsigned bytes, u64* barrier, Where where) {
  Thread& t = me();
  check_bulk(to, from, bytes, where);
  if (!in_shared(to)) fail(where, "bulk copy to memory that is not shared");
  MBarrier& m = find(barrier, where);
  if (shared_block(to) != shared_block(barrier))
    fail(where, "the mbarrier of a bulk copy is not in the destination's block");
  if (in_shared(from)) {
    if (shared_block(from) != t.block)
      fail(where, "a bulk copy between shared memories starts in the issuing block");
    check_proxy(t, from, bytes, {where, nullptr});
  }
  check_access(from, bytes, 16, kRead, {where, nullptr});
  mark_async(t, to, bytes, m.party, m.phase + 1, false, {where, nullptr});
  Copy c = make_copy(to, from, bytes, bytes, barrier, where);
  if (in_shared(from)) c.early = true;
  std::memset(to, 0xff, bytes);
  t.block->cluster->copies.push_back(std::move(c));
}

bool land_one(Cluster& cluster) {
  auto& copies = cluster.copies;
  if (copies.empty()) return false;
  std::swap(copies[random_below(copies.size())], copies.back());
  const Copy c = std::move(copies.back());
  copies.pop_back();
  land(c);
  await_bytes(c.barrier, -static_cast<std::int64_t>(c.bytes.size()), cluster);
  return true;
}

void remote_store(void* remote, const void* value, unsigned bytes, u64* barrier, Where where) {
  Thread& t = me();
  if (!in_shared(remote) || reinterpret_cast<std::uintptr_t>(remote) % bytes)
    fail(where, "st.async to %p: not shared, or misaligned", remote);
  MBarrier& m = find(barrier, where);
  if (shared_block(remote) != shared_block(barrier))
    fail(where, "the mbarrier of an st.async is not in the destination's block");
  mark_async(t, remote, bytes, m.party, m.phase + 1, false, {where, nullptr});
  Copy c{};
  c.to = static_cast<unsigned char*>(remote);
  c.bytes.assign(static_cast<const u8*>(value), static_cast<const u8*>(value) + bytes);
  c.source_bytes = bytes;
  c.barrier = barrier;
  c.early = true;
  c.where = where;
  std::memset(remote, 0xff, bytes);
  t.block->cluster->copies.push_back(std::move(c));
}

void bulk_copy_out(void* global, const void* shared, unsigned bytes, Where where) {
  Thread& t = me();
  check_bulk(global, shared, bytes, where);
  if (!in_shared(shared) || shared_block(shared) != t.block)
    fail(where, "a bulk store starts in the issuing block's shared memory");
  if (in_shared(global)) fail(where, "a bulk store goes to global memory");
  check_proxy(t, shared, bytes, {where, nullptr});
  check_access(shared, bytes, 16, kRead, {where, nullptr});
  check_access(global, bytes, 16, kWrite, {where, nullptr});
  t.stores.push_back(make_copy(global, shared, bytes, bytes, nullptr, where));
}

void bulk_commit(Where) {
  Thread& t = me();
  t.store_groups.push_back(std::move(t.stores));
  t.stores.clear();
}

void bulk_wait(unsigned keep, bool, Where) {
  land_stores(me().store_groups, keep);
}

void proxy_fence() {
  Thread& t = me();
  t.proxy_fence = t.clock++;  // a store that follows is later than it
  t.fenced_since_acquire = true;
}

// A thread that ends with copies in flight: nothing may still write its block's shared memory.
void finish_copies(Thread& t) {
  if (t.cluster_arrived) fail(t.where, "the thread returned between a cluster arrive and its wait");
  if (!t.copies.empty()) fail(t.copies[0].where, "the thread returned before this cp.async was waited for");
  for (const auto& group : t.groups)
    if (!group.empty()) fail(group[0].where, "the thread returned before this cp.async was waited for");
  if (!t.stores.empty())
    fail(t.stores[0].where, "the thread returned before this bulk store was committed and waited for");
  for (const auto& group : t.store_groups)
    if (!group.empty()) fail(group[0].where, "the thread returned before this bulk store was waited for");
}

// A block that ends with a copy into its memory in flight would have it written after another block took it
// over.
void block_leaves(Block& b) {
  for (const Copy& c : b.cluster->copies)
    if (shared_block(c.to) == &b) {
      char text[400];
      std::snprintf(
          text, sizeof text,
          "kernel '%s' block (%u,%u,%u): returned before the bulk copy of %s:%d landed in its shared memory",
          device.kernel, b.index.x, b.index.y, b.index.z, c.where.file, c.where.line);
      device.error = text;
    }
}

}  // namespace simt
