// Which events happened before which: see Clocks in state.h.
#include <algorithm>

#include "state.h"

namespace simt {

namespace {

void raise(Entries& into, const Entries& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

bool covers(const Entries& a, const Entries& b) {
  for (std::size_t i = 0; i < b.size(); ++i)
    if (b[i] > (i < a.size() ? a[i] : 0)) return false;
  return true;
}

const Entries* entries_of(const Foreign& f, u32 cluster) {
  const auto it = std::lower_bound(f.clusters.begin(), f.clusters.end(), cluster,
                                   [](const auto& e, u32 c) { return e.first < c; });
  return it != f.clusters.end() && it->first == cluster ? it->second.get() : nullptr;
}

u64 next_id() {
  static u64 last = 0;
  return ++last;
}

void join_local(Entries& into, const Thread& t) {
  raise(into, t.base->local);
  for (const Snapshot& s : t.extra) raise(into, s->local);
  const unsigned first = t.party - t.view.lane;
  for (unsigned l = 0; l < 32; ++l)
    if (t.warp->exists >> l & 1) into[first + l] = std::max(into[first + l], t.warp_seen[l]);
  into[t.party] = std::max(into[t.party], t.clock);
}

}  // namespace

bool knows(const Thread& t, unsigned party, u32 clock) {
  if (party == t.party) return true;
  if (party < t.base->local.size() && t.base->local[party] >= clock) return true;
  const unsigned first = t.party - t.view.lane;
  if (party - first < 32 && party < t.block->cluster->parties && t.warp_seen[party - first] >= clock)
    return true;
  for (const Snapshot& s : t.extra)
    if (party < s->local.size() && s->local[party] >= clock) return true;
  return false;
}

bool knows(const Thread& t, u32 cluster, unsigned party, u32 clock) {
  if (cluster == t.block->cluster->number) return knows(t, party, clock);
  const Entries* e = t.foreign ? entries_of(*t.foreign, cluster) : nullptr;
  return e && party < e->size() && (*e)[party] >= clock;
}

ForeignRef merge(const ForeignRef& a, const ForeignRef& b) {
  if (!a || a == b) return b;
  if (!b || a->parent == b->id) return a;
  if (b->parent == a->id) return b;
  auto all = std::make_shared<Foreign>();
  all->id = next_id();
  all->parent = a->id;
  auto x = a->clusters.begin(), y = b->clusters.begin();
  while (x != a->clusters.end() || y != b->clusters.end()) {
    if (y == b->clusters.end() || (x != a->clusters.end() && x->first < y->first)) {
      all->clusters.push_back(*x++);
    } else if (x == a->clusters.end() || y->first < x->first) {
      all->clusters.push_back(*y++);
    } else {
      if (x->second == y->second || covers(*x->second, *y->second)) {
        all->clusters.push_back(*x);
      } else {
        auto both = std::make_shared<Entries>(*x->second);
        raise(*both, *y->second);
        all->clusters.emplace_back(x->first, both);
      }
      ++x, ++y;
    }
  }
  return all;
}

ForeignRef release_of(const Thread& t) {
  auto own = std::make_shared<Entries>(t.block->cluster->parties, 0u);
  join_local(*own, t);
  auto single = std::make_shared<Foreign>();
  single->id = next_id();
  single->parent = 0;
  single->clusters.emplace_back(t.block->cluster->number, own);
  return merge(t.foreign, single);
}

void acquire(Thread& t, const ForeignRef& released) {
  if (!released || released == t.last_acquired) return;
  t.last_acquired = released;
  t.foreign = merge(t.foreign, released);
  const Entries* own = entries_of(*released, t.block->cluster->number);
  if (own && !covers(t.base->local, *own)) absorb(t, std::make_shared<const Clocks>(Clocks{*own, nullptr}));
}

void join(Clocks& into, const Thread& t) {
  join_local(into.local, t);
  into.foreign = merge(t.foreign, into.foreign);
}

void join_snapshot(Clocks& into, const Snapshot& snapshot) {
  raise(into.local, snapshot->local);
  into.foreign = merge(into.foreign, snapshot->foreign);
}

void absorb(Thread& t, const Snapshot& snapshot) {
  t.fenced_since_acquire = false;
  if (!snapshot || snapshot == t.base) return;
  for (const Snapshot& s : t.extra)
    if (s == snapshot) return;
  t.foreign = merge(t.foreign, snapshot->foreign);
  t.extra.push_back(snapshot);
  if (t.extra.size() > 6) {
    auto all = std::make_shared<Clocks>(*t.base);
    for (const Snapshot& s : t.extra) raise(all->local, s->local);
    t.base = all;
    t.extra.clear();
  }
}

// For a snapshot that covers all that `t` knew.
void reset_base(Thread& t, const Snapshot& snapshot) {
  t.fenced_since_acquire = false;
  t.base = snapshot;
  t.foreign = snapshot->foreign;
  t.extra.clear();
}

std::string party_name(u32 cluster, unsigned party) {
  const dim3 shape = device.config.block;
  const unsigned i = party % device.block_threads;
  const uint3 b = device.first_blocks[cluster];
  char text[120];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", i % shape.x,
                i / shape.x % shape.y, i / (shape.x * shape.y), b.x + party / device.block_threads, b.y, b.z);
  return text;
}

}  // namespace simt
