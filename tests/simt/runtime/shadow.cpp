// Checks each memory access: bounds, alignment, values never written, races in shared memory; counts global
// bytes.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace simt {

namespace {

__attribute__((format(printf, 2, 3))) void report(Site site, const char* format, ...) {
  char text[1200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail_site(site, text);
}

void forget_readers(Block& owner, Cell& cell) {
  cell.read_mask = 0;
  if (cell.more) owner.readers[cell.more - 1].clear();
}

bool all_known(const Thread& t, u16 warp, u32 clock, u32 mask, unsigned& offender) {
  for (u32 m = mask; m; m &= m - 1) {
    const unsigned threads = device.block_threads, per_block = (threads + 31) / 32;
    offender = warp / per_block * threads + warp % per_block * 32 + static_cast<unsigned>(__builtin_ctz(m));
    if (!knows(t, offender, clock)) return false;
  }
  return true;
}

u16 warp_of(const Thread& t) {
  return static_cast<u16>(t.view.cluster_rank * ((device.block_threads + 31) / 32) + t.linear / 32);
}

void record_read(Block& owner, Cell& cell, const Thread& t) {
  const u16 warp = warp_of(t);
  const u32 lane = 1u << t.view.lane;
  if (cell.read_mask && cell.read_warp == warp && cell.read_clock == t.clock) {
    cell.read_mask |= lane;
    return;
  }
  unsigned offender;
  if (cell.read_mask && !all_known(t, cell.read_warp, cell.read_clock, cell.read_mask, offender)) {
    // Readers that nothing orders: keep each warp's, since a later write must come after all of them.
    if (!cell.more) {
      owner.readers.emplace_back();
      cell.more = static_cast<u32>(owner.readers.size());
    }
    auto& list = owner.readers[cell.more - 1];
    for (Readers& r : list)
      if (r.warp == warp && r.clock == t.clock) {
        r.mask |= lane;
        return;
      }
    list.erase(
        std::remove_if(list.begin(), list.end(),
                       [&](const Readers& r) { return all_known(t, r.warp, r.clock, r.mask, offender); }),
        list.end());
    list.push_back({t.clock, lane, warp});
    return;
  }
  cell.read_warp = warp;
  cell.read_clock = t.clock;
  cell.read_mask = lane;
}

void check_order(Block& owner, Cell& cell, const Thread& t, unsigned access, std::size_t offset, Site site) {
  const Cluster& cluster = *owner.cluster;
  if ((cell.flags & kWritten) && cell.writer != t.party &&
      !((access & kAtomic) && (cell.flags & kAtomicCell)) && !knows(t, cell.writer, cell.write_clock)) {
    if (cell.writer >= cluster.parties)
      report(site, "%s at byte %zu of shared memory before the bulk copy into it was waited for",
             access & kWrite ? "store" : "read", offset);
    report(
        site,
        "race: %s at byte %zu of shared memory (block rank %u), last written by %s, with no barrier between",
        access & kAtomic  ? "atomic"
        : access & kWrite ? "store"
                          : "read",
        offset, owner.rank, party_name(cluster.number, cell.writer).c_str());
  }
  if (!(access & kWrite)) return;
  unsigned reader = 0;
  bool ordered = !cell.read_mask || all_known(t, cell.read_warp, cell.read_clock, cell.read_mask, reader);
  if (ordered && cell.more)
    for (const Readers& r : owner.readers[cell.more - 1])
      if (!all_known(t, r.warp, r.clock, r.mask, reader)) {
        ordered = false;
        break;
      }
  if (!ordered)
    report(site, "race: %s at byte %zu of shared memory (block rank %u), read by %s, with no barrier between",
           access & kIssue    ? "asynchronous copy"
           : access & kAtomic ? "atomic"
                              : "store",
           offset, owner.rank, party_name(cluster.number, reader).c_str());
}

void touch(Block& owner, Cell& cell, Thread& t, unsigned access, std::size_t offset, Site site) {
  if (cell.flags & kPending)
    report(site, "%s at byte %zu of shared memory while an asynchronous copy into it has not landed",
           access & kWrite ? "store" : "read", offset);
  if ((access & kRead) && !(cell.flags & kWritten))
    report(site, "read of unwritten shared memory at byte %zu", offset);
  check_order(owner, cell, t, access, offset, site);
  if (access & kCheckOnly) return;
  if (access & kWrite) {
    forget_readers(owner, cell);
    cell.writer = static_cast<u16>(t.party);
    cell.write_clock = t.clock;
    cell.flags = static_cast<u8>((cell.flags & kSplit) | kWritten | (access & kAtomic ? kAtomicCell : 0));
  } else {
    record_read(owner, cell, t);
  }
}

void split(Block& owner, std::size_t word) {
  Cell& whole = owner.cells[word];
  if (whole.flags & kSplit) return;
  for (int i = 0; i < 4; ++i) {
    Cell& part = owner.bytes[4 * word + i];
    part = whole;
    if (whole.more) {
      owner.readers.push_back(owner.readers[whole.more - 1]);
      part.more = static_cast<u32>(owner.readers.size());
    }
  }
  whole.flags |= kSplit;
}

template <class F>
void for_cells(Block& owner, std::size_t offset, std::size_t bytes, F&& f) {
  if (offset % 4 == 0 && bytes % 4 == 0) {
    for (std::size_t w = offset / 4; w < (offset + bytes) / 4; ++w) {
      if (!(owner.cells[w].flags & kSplit)) {
        f(owner.cells[w], 4 * w);
        continue;
      }
      for (int i = 0; i < 4; ++i) f(owner.bytes[4 * w + i], 4 * w + i);
    }
    return;
  }
  for (std::size_t b = offset; b < offset + bytes; ++b) {
    split(owner, b / 4);
    f(owner.bytes[b], b);
  }
}

void check_shared(Block& owner, Thread& t, std::size_t offset, std::size_t bytes, unsigned access,
                  Site site) {
  if (owner.cluster != t.block->cluster)
    report(site, "access to shared memory of a block outside the cluster");
  bool inside = false;
  for (const Segment& s : owner.segments) inside = inside || (offset >= s.begin && offset + bytes <= s.end);
  if (!inside)
    report(site,
           "out-of-bounds %s at byte %zu of shared memory; the block has %zu bytes of dynamic shared memory",
           access_name(access, bytes).text, offset, device.config.shared);
  if (&owner != t.block) {
    if (owner.live == 0)
      report(site, "access to shared memory of block rank %u, which has returned", owner.rank);
    if (device.instrumented && !knows(t, owner.threads[0].party, 1))
      report(site,
             "access to shared memory of block rank %u before a cluster barrier shows that it has started",
             owner.rank);
  }
  if (device.instrumented)
    for_cells(owner, offset, bytes, [&](Cell& c, std::size_t at) { touch(owner, c, t, access, at, site); });
}

}  // namespace

Name access_name(unsigned access, std::size_t bytes) {
  Name n;
  std::snprintf(n.text, sizeof n.text, "%s of %zu bytes",
                access & kAtomic  ? "atomic"
                : access & kWrite ? "store"
                                  : "load",
                bytes);
  return n;
}

void fail_site(Site site, const std::string& message) {
  fail(site.pc ? place_of(site.pc) : site.where, "%s", message.c_str());
}

Where place_of(const void* pc) {
  static char place[600];
  int line = 0;
  Dl_info info{};
  const auto call = static_cast<const char*>(pc) - 1;  // the return address is already the next line's
  if (!dladdr(call, &info) || !info.dli_fname) return {"an unknown place", 0};
  const auto offset = static_cast<std::size_t>(call - static_cast<const char*>(info.dli_fbase));
  std::snprintf(place, sizeof place, "%s+0x%zx", info.dli_fname, offset);
  char command[700], answer[500] = "";
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  if (std::FILE* pipe = popen(command, "r")) {
    char* colon = std::fgets(answer, sizeof answer, pipe) ? std::strrchr(answer, ':') : nullptr;
    if (colon && answer[0] != '?') {
      *colon = 0;
      line = std::atoi(colon + 1);
      std::snprintf(place, sizeof place, "%s", answer);
    }
    pclose(pipe);
  }
  return {place, line};
}

bool in_own_stack(const void* address) {
  return static_cast<std::size_t>(static_cast<const unsigned char*>(address) - device.thread->fiber.stack) <
         kStackBytes;
}

bool in_shared(const void* address) {
  return static_cast<std::size_t>(static_cast<const unsigned char*>(address) - device.arena) <
         device.arena_bytes;
}

Block* shared_block(const void* address) {
  return device.slots[static_cast<std::size_t>(static_cast<const unsigned char*>(address) - device.arena) /
                      device.slot_bytes];
}

void check_access(const void* address, std::size_t bytes, std::size_t alignment, unsigned access, Site site) {
  Device& d = device;
  Thread& t = *d.thread;
  const auto a = reinterpret_cast<std::uintptr_t>(address);
  if (in_own_stack(address)) return;
  if (a % alignment)
    report(site, "misaligned %s at %p: the address is not a multiple of %zu", access_name(access, bytes).text,
           address, alignment);
  if (in_shared(address)) {
    Block* owner = shared_block(address);
    if (!owner) report(site, "access to shared memory of a block that has returned");
    check_shared(*owner, t,
                 static_cast<std::size_t>(static_cast<const unsigned char*>(address) - owner->shared), bytes,
                 access, site);
    return;
  }
  if (a - reinterpret_cast<std::uintptr_t>(d.stacks) < d.stack_bytes)
    report(site, "%s in another thread's local memory", access_name(access, bytes).text);
  check_global(t, a, bytes, access, site);
}

// The destination of an asynchronous copy: checked as a store of the issuing thread, then owned by `party`,
// which nobody knows of until the copy has been waited for.
void mark_async(Thread& t, void* address, std::size_t bytes, unsigned party, u32 clock, bool pending,
                Site site) {
  Block& owner = *shared_block(address);
  check_access(address, bytes, 1, unsigned(kWrite) | kIssue | kCheckOnly, site);
  if (!device.instrumented) return;
  (void)t;
  for_cells(owner, static_cast<std::size_t>(static_cast<unsigned char*>(address) - owner.shared), bytes,
            [&](Cell& c, std::size_t) {
              forget_readers(owner, c);
              c.writer = static_cast<u16>(party);
              c.write_clock = clock;
              c.flags = static_cast<u8>((c.flags & kSplit) | kWritten | (pending ? kPending : 0));
            });
}

// A cp.async that its thread has waited for is that thread's own store.
void mark_landed(Thread& t, void* address, std::size_t bytes) {
  Block& owner = *shared_block(address);
  for_cells(owner, static_cast<std::size_t>(static_cast<unsigned char*>(address) - owner.shared), bytes,
            [&](Cell& c, std::size_t) {
              c.write_clock = t.clock;
              c.flags &= static_cast<u8>(~kPending);
            });
}

// Plain stores that a bulk copy is to read must be followed by fence.proxy.async: by the writer, or, if that
// is another thread, by the issuer after it learnt of them.
void check_proxy(Thread& t, const void* address, std::size_t bytes, Site site) {
  if (!device.instrumented) return;
  Block& owner = *shared_block(address);
  const Cluster& cluster = *owner.cluster;
  for_cells(
      owner, static_cast<std::size_t>(static_cast<const unsigned char*>(address) - owner.shared), bytes,
      [&](Cell& c, std::size_t at) {
        if (c.writer >= cluster.parties || (t.fenced_since_acquire && c.writer != t.party)) return;
        const Thread& w =
            cluster.blocks[c.writer / device.block_threads]->threads[c.writer % device.block_threads];
        if (w.proxy_fence < c.write_clock)
          report(
              site,
              "a bulk copy reads byte %zu of shared memory, written by %s with no fence.proxy.async after it",
              at, party_name(cluster.number, c.writer).c_str());
      });
}

void load(void* out, const void* address, std::size_t bytes, std::size_t alignment, bool read_only_path,
          Where where) {
  check_access(address, bytes, alignment, unsigned(kRead) | (read_only_path ? unsigned(kReadOnlyPath) : 0),
               {where, nullptr});
  std::memcpy(out, address, bytes);
}

void store(void* address, const void* value, std::size_t bytes, std::size_t alignment, Where where) {
  check_access(address, bytes, alignment, kWrite, {where, nullptr});
  std::memcpy(address, value, bytes);
}

}  // namespace simt
