// Which events happened before which: see Clocks in state.h.
#include <algorithm>

#include "state.h"

namespace simt {

namespace {
void raise(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
}  // namespace

bool knows(const Thread& t, unsigned party, u32 clock) {
  if (party == t.party) return true;
  if (party < t.base->size() && (*t.base)[party] >= clock) return true;
  const unsigned first = t.party - t.view.lane;
  if (party - first < 32 && party < t.block->cluster->parties && t.warp_seen[party - first] >= clock) return true;
  for (const Snapshot& s : t.extra)
    if (party < s->size() && (*s)[party] >= clock) return true;
  return false;
}

void join(Clocks& into, const Thread& t) {
  raise(into, *t.base);
  for (const Snapshot& s : t.extra) raise(into, *s);
  const unsigned first = t.party - t.view.lane;
  for (unsigned l = 0; l < 32; ++l)
    if (t.warp->exists >> l & 1) into[first + l] = std::max(into[first + l], t.warp_seen[l]);
  into[t.party] = std::max(into[t.party], t.clock);
}

void absorb(Thread& t, const Snapshot& snapshot) {
  t.fenced_since_acquire = false;
  if (!snapshot || snapshot == t.base) return;
  for (const Snapshot& s : t.extra)
    if (s == snapshot) return;
  t.extra.push_back(snapshot);
  if (t.extra.size() > 6) {
    auto all = std::make_shared<Clocks>(*t.base);
    for (const Snapshot& s : t.extra) raise(*all, *s);
    t.base = all;
    t.extra.clear();
  }
}

// For a snapshot that covers all that `t` knew.
void reset_base(Thread& t, const Snapshot& snapshot) {
  t.fenced_since_acquire = false;
  t.base = snapshot;
  t.extra.clear();
}

std::string party_name(const Cluster& cluster, unsigned party) {
  if (party >= cluster.parties) return "an asynchronous copy";
  const unsigned threads = device.block_threads;
  const Thread& t = cluster.blocks[party / threads]->threads[party % threads];
  char text[120];
  const uint3 b = t.block->index, i = t.view.thread_index;
  std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", i.x, i.y, i.z, b.x, b.y, b.z);
  return text;
}

}  // namespace simt
