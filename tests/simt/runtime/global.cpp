// Global memory: bounds, values never written, byte counts, and the order of accesses by different threads
// and blocks.
#include <algorithm>

#include "state.h"

namespace simt {

namespace {

constexpr unsigned kWordBytes = 4, kHalfBytes = 2;

unsigned warps_per_block() {
  return (device.block_threads + 31) / 32;
}

bool ordered(const Thread& t, const GlobalReaders& r, unsigned& offender) {
  for (u32 m = r.mask; m; m &= m - 1) {
    offender = r.warp / warps_per_block() * device.block_threads + r.warp % warps_per_block() * 32 +
               static_cast<unsigned>(__builtin_ctz(m));
    if (!knows(t, r.cluster, offender, r.clock)) return false;
  }
  return true;
}

[[noreturn]] void race(const Thread& t, const Buffer& b, std::uintptr_t a, const char* verb,
                       const char* other, u32 cluster, unsigned party, Site site) {
  const bool same = cluster == t.block->cluster->number;
  fail_site(site, std::string("race: ") + verb + " at byte " + std::to_string(a - b.begin) + " of '" +
                      b.name + "', " + other + " by " + party_name(cluster, party) +
                      (same ? ", with no barrier between" : ", with no release and acquire between"));
}

void record_read(Buffer& b, GlobalCell& cell, const Thread& t, bool atomic) {
  if (!cell.readers) {
    b.readers.emplace_back();
    cell.readers = static_cast<u32>(b.readers.size());
  }
  auto& list = b.readers[cell.readers - 1];
  const u32 cluster = t.block->cluster->number, lane = 1u << t.view.lane;
  const u16 warp = static_cast<u16>(t.view.cluster_rank * warps_per_block() + t.linear / 32);
  for (GlobalReaders& r : list)
    if (r.cluster == cluster && r.warp == warp && r.clock == t.clock && r.atomic == atomic) {
      r.mask |= lane;
      return;
    }
  // A read that happened before this one needs no entry: a store after this one comes after both.
  unsigned offender;
  list.erase(std::remove_if(
                 list.begin(), list.end(),
                 [&](const GlobalReaders& r) { return (r.atomic || !atomic) && ordered(t, r, offender); }),
             list.end());
  list.push_back({cluster, t.clock, lane, warp, atomic});
}

void touch(Buffer& b, GlobalCell& cell, Thread& t, std::uintptr_t a, unsigned access, Site site) {
  const u32 launch = static_cast<u32>(device.launches);
  if (cell.launch != launch) {
    if (cell.readers) b.readers[cell.readers - 1].clear();
    cell = GlobalCell{launch, 0, 0, 0, 0, cell.readers};
  }
  const bool atomic = access & kAtomic;
  if (cell.flags & kWritten) {
    if (access & kReadOnlyPath)
      fail_site(site, "a load through the read-only path (ld.global.nc) at byte " +
                          std::to_string(a - b.begin) + " of '" + b.name +
                          "', which this launch has written");
    if (!(atomic && (cell.flags & kAtomicCell)) && !knows(t, cell.cluster, cell.party, cell.clock))
      race(t, b, a,
           atomic            ? "atomic"
           : access & kWrite ? "store"
                             : "load",
           "written", cell.cluster, cell.party, site);
  }
  if (access & kWrite) {
    if (cell.readers) {
      unsigned reader = 0;
      for (const GlobalReaders& r : b.readers[cell.readers - 1])
        if (!(atomic && r.atomic) && !ordered(t, r, reader))
          race(t, b, a, atomic ? "atomic" : "store", "read", r.cluster, reader, site);
      b.readers[cell.readers - 1].clear();
    }
    cell.cluster = t.block->cluster->number;
    cell.party = static_cast<u16>(t.party);
    cell.clock = t.clock;
    cell.flags = static_cast<u8>((cell.flags & kSplit) | kWritten | (atomic ? kAtomicCell : 0));
  } else {
    record_read(b, cell, t, atomic);
  }
}

void track(Buffer& b, Thread& t, std::uintptr_t a, std::size_t bytes, unsigned access, Site site) {
  if (b.words.empty()) b.words.resize((b.end - b.begin + kWordBytes - 1) / kWordBytes);
  const std::size_t begin = a - b.begin;
  for (std::size_t w = begin / kWordBytes; w <= (begin + bytes - 1) / kWordBytes; ++w) {
    const std::size_t from = std::max(begin, w * kWordBytes),
                      to = std::min(begin + bytes, (w + 1) * kWordBytes);
    GlobalCell& cell = b.words[w];
    if (to - from == kWordBytes && !(cell.flags & kSplit)) {
      touch(b, cell, t, b.begin + from, access, site);
      continue;
    }
    if (b.halves.empty()) b.halves.resize(2 * b.words.size());
    if (!(cell.flags & kSplit)) {
      for (int i = 0; i < 2; ++i) {
        b.halves[2 * w + i] = cell;
        if (cell.readers) {
          auto copy = b.readers[cell.readers - 1];
          b.readers.push_back(std::move(copy));
          b.halves[2 * w + i].readers = static_cast<u32>(b.readers.size());
        }
      }
      cell.flags |= kSplit;
    }
    for (std::size_t h = from / kHalfBytes; h <= (to - 1) / kHalfBytes; ++h)
      touch(b, b.halves[h], t, b.begin + h * kHalfBytes, access, site);
  }
}

}  // namespace

void check_global(Thread& t, std::uintptr_t a, std::size_t bytes, unsigned access, Site site) {
  Device& d = device;
  auto it = std::upper_bound(d.buffers.begin(), d.buffers.end(), a,
                             [](std::uintptr_t v, const Buffer& b) { return v < b.begin; });
  Buffer* b = it == d.buffers.begin() ? nullptr : &*std::prev(it);
  if (!b || a + bytes > b->end) {
    const auto parameters = reinterpret_cast<std::uintptr_t>(d.parameters);
    if (a >= parameters && a + bytes <= parameters + d.parameter_bytes && !(access & kWrite)) return;
    for (const auto& image : d.images)
      if (a >= image.first && a + bytes <= image.second && !(access & kWrite)) return;
    const std::string name = access_name(access, bytes).text;
    if (b && a - b->begin < 2 * (b->end - b->begin) + 4096)
      fail_site(site, "out-of-bounds " + name + " at byte " + std::to_string(a - b->begin) + " of '" +
                          b->name + "', which has " + std::to_string(b->end - b->begin) + " bytes");
    if (it != d.buffers.end() && it->begin - a < 4096)
      fail_site(site, "out-of-bounds " + name + " " + std::to_string(it->begin - a) + " bytes before '" +
                          it->name + "'");
    if (d.buffers.empty()) return;  // a driver that registers nothing is checked by AddressSanitizer alone
    char text[40];
    std::snprintf(text, sizeof text, "%p", reinterpret_cast<void*>(a));
    fail_site(site, "out-of-bounds " + name + " at " + text + ": no registered buffer is there");
  }
  if ((access & kWrite) && b->read_only)
    fail_site(site,
              std::string(access_name(access, bytes).text) + " into the read-only buffer '" + b->name + "'");
  if (d.instrumented) {
    if (!b->written.empty()) {
      u8* w = b->written.data() + (a - b->begin);
      if ((access & kRead) && std::memchr(w, 0, bytes))
        fail_site(site, std::string(access_name(access, bytes).text) + " of unwritten memory at byte " +
                            std::to_string(a - b->begin) + " of '" + b->name + "'");
      if (access & kWrite) std::memset(w, 1, bytes);
    }
    if (!b->read_only) track(*b, t, a, bytes, access, site);
  }
  if (access & kAtomic) {
    d.atomics++;
    return;
  }
  if (access & kRead) b->bytes_read += bytes, d.bytes_read += bytes;
  if (access & kWrite) b->bytes_written += bytes, d.bytes_written += bytes;
}

void atomic_begin(void* address, std::size_t bytes, unsigned access, Order order, Where where) {
  Thread& t = *device.thread;
  // Before, not after: what the operation sees is what others did up to now.
  if (random_below(2)) {
    t.ready = true;
    t.block->ready.push_back(&t);
    wait("runs", where);
  }
  check_access(address, bytes, bytes, access, {where, nullptr});
  if (access & kWrite) device.progress = device.switches;
  if (!device.instrumented || in_shared(address)) return;
  const bool acquires = order == Order::kAcquire || order == Order::kAcquireRelease;
  const bool releases = order == Order::kRelease || order == Order::kAcquireRelease;
  ForeignRef& released = device.released[reinterpret_cast<std::uintptr_t>(address)];
  if (access & kRead) {
    if (acquires)
      acquire(t, released);
    else
      t.fence_acquire = merge(t.fence_acquire, released);
  }
  if (access & kWrite) {
    // A read-modify-write continues the chain of releases before it; a plain store starts a new one.
    if (!(access & kRead)) released = nullptr;
    if (releases) {
      released = merge(released, release_of(t));
      t.clock++;
    } else {
      released = merge(released, t.fence_release);
    }
  }
}

void atomic_copy(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}

// __threadfence(): makes relaxed atomics before it acquire and those after it release.
void fence() {
  if (!device.instrumented) return;
  Thread& t = *device.thread;
  acquire(t, t.fence_acquire);
  t.fence_release = release_of(t);
  t.clock++;
}

}  // namespace simt
