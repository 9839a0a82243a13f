// The streamed tier's engine: draws items by ticket, waits for what they read, and leaves all counters zero.
#pragma once

#include "reduce.cuh"
#include "streamed.h"

namespace cbam {

// How contiguous rows of x meet the vectors of memory. Whole: every row begins and ends where a vector does.
// Folded: several channels make such a row. Ragged: rows begin and end within vectors.
enum Rows : int { kWhole, kFolded, kRagged };

template <class T_, int kVector_, Layout kLayout_, Rows kRows_>
struct StreamedTraits {
  using T = T_;
  using A = Accumulate<T>;
  static constexpr int V = kVector_;
  static constexpr Layout kLayout = kLayout_;
  static constexpr Rows kRows = kRows_;
  static constexpr bool kFold = kRows == kFolded;
  // Blocks a multiprocessor: two leave 128 registers a thread, too few for doubles.
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;
  static_assert(V == 1 || V == kVector<T>, "an access is one element or 16 bytes");
  static_assert(kRows == kWhole || (kLayout == kContiguous && V > 1), "one element begins and ends anywhere");
  static_assert(kThreads % 32 == 0 && kThreads * kBlocks <= 1024);
};

// Dynamic shared memory, handed out in 16-byte steps in the order in which streamed_memory.h counts it.
struct Shared {
  unsigned char *next, *start;
  template <class X>
  __device__ __forceinline__ X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(next);
    next += (count * static_cast<int64_t>(sizeof(X)) + 15) / 16 * 16;
    return p;
  }
};

// The launch's parameters, read from shared memory by every item. Out of the constant bank, whatever the
// stages derive from them would be hoisted out of the loop over the items: more than registers can hold.
__device__ __forceinline__ void share_parameters(const Streamed& launch, Streamed* k) {
  if (threadIdx.x == 0) *k = launch;
  __syncthreads();
}

// Of chained samples: points the scratch that has slots to the end of this block's shared memory.
template <class A>
__device__ __forceinline__ void take_slot(Streamed* k, unsigned char* memory) {
  if (k->s.chained && threadIdx.x == 0) {
    Shared slot{memory + k->shared_bytes - k->s.slot_bytes, memory};
    k->w.cross_parts = slot.take<A>(k->p.channels);
    k->w.pool_grad = slot.take<A>(pool_count(k->p.pools) * k->p.channels);
    k->w.spatial_grad = slot.take<A>(k->p.positions);
    k->w.hidden_parts = slot.take<A>(k->p.hidden);
  }
  __syncthreads();
}

// One item: sample n of a per-sample stage; `index` counts within the sample, or within the unit. Units are
// counted in the order in which they are drawn.
struct Item {
  int stage, index;
  int part;  // a map tile of an item that has several
  int unit, whole;
  int64_t n;
  int64_t first, count;  // the unit's samples
};

__device__ __forceinline__ bool gathers(const Schedule& s, const Item& item) {
  return s.gather_tiles && (item.stage == kGateGrad || item.stage == kInputGrad);
}

// Which tile of Schedule::map an item is at.
__device__ __forceinline__ int map_tile(const Schedule& s, const Item& item) {
  return s.gather_tiles ? item.index * s.gather_tiles + item.part : item.index;
}

// dq of an item that gathers it, at the end of shared memory: the maximum's, `conv_positions` on the mean's.
template <class A>
__device__ __forceinline__ A* gathered_grads(const Streamed& k, const Shared& shared) {
  return reinterpret_cast<A*>(shared.start + k.shared_bytes) - 2 * k.s.conv_positions;
}

// threadIdx.x for the smaller stages. The compiler would derive what they need of it ahead of the loop over
// the items, and keep it in registers that the passes over x have no room for.
__device__ __forceinline__ int thread_index() {
  return ptx::opaque(static_cast<int>(threadIdx.x));
}

__device__ __forceinline__ bool is_short_extent(int64_t extent) {
  return extent < kShortIndexExtent;
}

// Where sample n's scratch lives: in a ring of units, or everywhere.
__device__ __forceinline__ int64_t slot_of(const Streamed& k, int64_t n) {
  const Schedule& s = k.s;
  return s.ring ? n % (int64_t{s.ring} * s.unit_samples) : n;
}

__device__ __forceinline__ uint32_t* unit_counters(const Streamed& k, int64_t unit) {
  return k.w.counters + kUnitCounters + unit * kCounters;
}

// Until the counter reaches `value`. An item only ever waits for items of lower tickets, which some
// block holds already: no deadlock, however few blocks are resident.
__device__ __forceinline__ void wait_for(const uint32_t* counter, uint32_t value) {
  unsigned pause = 32;
  while (ptx::load_acquire(counter) < value) {
    ptx::sleep(pause);
    if (pause < 256) pause *= 2;
  }
}

__device__ __forceinline__ uint32_t expected(Count c, int64_t samples) {
  return static_cast<uint32_t>(c.per_sample * samples + c.per_unit);
}

// What a block is at: kept in shared memory, where it takes no registers while a stage runs.
struct Work {
  enum Kind { kMain, kWeights, kJoin, kNothing, kEnd };
  int kind;
  int plan;
  int turn;   // in the tail of plan
  int again;  // item has been replaced by a stage of the tail
  Item item;

  // By one thread.
  __device__ __forceinline__ void take(const Streamed& k, uint32_t ticket) {
    const Schedule& s = k.s;
    if (ticket >= s.main_items) {
      uint32_t index = ticket - s.main_items;
      kind = kWeights;
      if (index >= s.weight_items) {
        index -= s.weight_items;
        kind = index < s.join_items ? kJoin : kEnd;
      }
      item.index = static_cast<int>(index);
      return;
    }
    // The first and last steps are not full: some tickets stand for units outside the batch.
    kind = kNothing;
    const uint32_t step = ticket / s.step_items, rest = ticket % s.step_items;
    plan = s.plans - 1;
    while (s.plan[plan].first > rest) --plan;
    const StagePlan& d = s.plan[plan];
    const int64_t unit = int64_t{step} - d.lag;
    if (unit < 0 || unit >= s.units) return;
    const uint32_t within = rest - d.first;
    const int64_t first = (s.backwards ? s.units - 1 - unit : unit) * s.unit_samples;
    const int64_t left = k.p.samples - first;
    item.stage = d.stage;
    item.unit = static_cast<int>(unit);
    item.part = item.whole = turn = 0;
    item.first = first;
    item.count = left < s.unit_samples ? left : s.unit_samples;
    item.n = d.per_sample ? first + within / d.items : first;
    item.index = static_cast<int>(d.per_sample ? within % d.items : within);
    if (item.n < k.p.samples) kind = kMain;
  }

  // By one thread, after the whole block has done the item: tells those that wait for it.
  __device__ __forceinline__ void finish(const Streamed& k) {
    const StagePlan& d = k.s.plan[plan];
    uint32_t* unit = unit_counters(k, item.unit);
    again = 0;
    if (gathers(k.s, item)) {
      const int next = map_tile(k.s, item) + 1;
      if (++item.part < k.s.gather_tiles && next < k.s.map.tiles * k.s.map.chunks) {
        again = 1;
        return;
      }
    }
    if (turn == 0 && d.tail[0] >= 0) {
      const uint32_t all = expected(d.total, item.count);
      if (ptx::add_acquire_release(unit + d.stage, 1) != all - 1) return;
    }
    if (turn < kTails && d.tail[turn] >= 0) {
      item.stage = d.tail[turn++];
      item.part = 0;
      item.whole = again = 1;
      return;
    }
    // Only where somebody waits: the release would hold this block up until its stores are done.
    if (d.awaited) ptx::add_release(unit + (turn ? kTailDone : d.stage), 1);
    if (d.feeds_weights) ptx::add_release(k.w.counters + kReadyForWeights, 1);
  }
};

static_assert(sizeof(Streamed) + sizeof(Work) + 2 * sizeof(uint32_t) + 48 <= kStaticShared);

// An item's inputs: the stage before it, or for a unit's first stage the ring's slot that it takes over.
__device__ __forceinline__ void wait_for_inputs(const Streamed& k, const StagePlan& plan, const Item& item) {
  const Schedule& s = k.s;
  const uint32_t* unit = unit_counters(k, item.unit);
  if (plan.wait_counter >= 0) {
    wait_for(unit + plan.wait_counter, expected(plan.wait_for, item.count));
  } else if (s.ring && !s.chained && item.unit >= s.ring) {
    const Count all = s.plan[s.stage_plan[s.ring_counter]].total;
    // Drawn backwards, the unit of those samples may be the one that is not full.
    const int64_t left = k.p.samples - item.first - int64_t{s.ring} * s.unit_samples;
    const int64_t samples = s.backwards && left < s.unit_samples ? left : s.unit_samples;
    wait_for(unit - s.ring * kCounters + s.ring_counter, expected(all, samples));
  }
}

// Runs every item of the launch. `body(item)` does one item's work, or a whole unit's where item.whole is
// set, `weights(index, join)` one item of the weight gradients, or one that joins shares of them. Both are
// entered by the whole block, after a barrier.
template <class Body, class Weights>
__device__ __forceinline__ void run_items(const Streamed& k, Body body, Weights weights) {
  CBAM_SHARED(work, Work);
  CBAM_SHARED(shared_last, uint32_t);
  CBAM_SHARED(drawn, uint32_t);
  const Schedule& s = k.s;
  const bool leader = threadIdx.x == 0;
  if (leader) drawn = ptx::add_relaxed(k.w.counters + kTicket, 1);
  while (true) {
    if (leader) work.take(k, drawn);
    __syncthreads();
    if (work.kind == Work::kEnd) break;
    // Drawn before the wait below, to hide its latency: this block still takes its items in order. Kept in
    // shared memory, since a register that lives through every stage is one too many.
    uint32_t next = 0;
    if (leader) next = ptx::add_relaxed(k.w.counters + kTicket, 1);
    if (work.kind == Work::kMain) {
      if (leader) wait_for_inputs(k, s.plan[work.plan], work.item);
      __syncthreads();
      if (leader) drawn = next;
      do {
        body(work.item);
        __syncthreads();
        if (leader) work.finish(k);
        __syncthreads();
      } while (work.again);
    } else {
      if (leader) drawn = next;
      // Read here: behind the last barrier the leader may be at the next item.
      const bool join = work.kind == Work::kJoin, part = work.kind == Work::kWeights && s.join_items;
      if (join || work.kind == Work::kWeights) {
        if (leader) {
          if (join)
            wait_for(k.w.counters + kWeightParts, s.weight_items);
          else
            wait_for(k.w.counters + kReadyForWeights, s.weights_ready);
        }
        __syncthreads();
        weights(work.item.index, join);
      }
      __syncthreads();
      if (leader && part) ptx::add_release(k.w.counters + kWeightParts, 1);
    }
  }
  // The counter of finished blocks wraps to zero by itself; the last block clears the others, which
  // nobody reads any more.
  if (leader) {
    const uint32_t last = static_cast<uint32_t>(k.grid) - 1;
    shared_last = ptx::increment_acquire_release(k.w.counters + kBlocksDone, last) == last;
  }
  __syncthreads();
  if (shared_last) {
    for (int64_t i = thread_index(); i < int64_t{s.units} * kCounters; i += kThreads) {
      ptx::store(k.w.counters + kUnitCounters + i, 0u);
    }
    if (leader) {
      ptx::store(k.w.counters + kTicket, 0u);
      ptx::store(k.w.counters + kReadyForWeights, 0u);
      ptx::store(k.w.counters + kWeightParts, 0u);
    }
  }
}

// ---- Small helpers of the stages.

template <class A>
__device__ __forceinline__ A* as(void* p) {
  return static_cast<A*>(p);
}
template <class A>
__device__ __forceinline__ const A* as(const void* p) {
  return static_cast<const A*>(p);
}

template <class A>
__device__ __forceinline__ A fresh(const void* p, int64_t i) {
  return load_one<Cache::kCoherent>(as<A>(p) + i);
}
// Of scratch that has slots.
template <class A>
__device__ __forceinline__ A from_slot(const void* p, int64_t i) {
  return load_one<Cache::kGeneric>(as<A>(p) + i);
}
template <class A>
__device__ __forceinline__ A constant(const void* p, int64_t i) {
  return load_one<Cache::kReadOnly>(as<A>(p) + i);
}
template <class A>
__device__ __forceinline__ void put(void* p, int64_t i, A v) {
  store_one(as<A>(p) + i, v);
}

// A sum over the lanes of a row, `lanes` being a power of two up to 32; every lane gets it.
template <class A>
__device__ __forceinline__ A lanes_sum(A v, int lanes) {
  for (int bit = lanes / 2; bit; bit /= 2) v += __shfl_xor_sync(kAllLanes, v, bit);
  return v;
}

// Statistics that a pool gathers: what one adds, and how two halves of a set are put together.
template <class A_, bool kSplit>
struct MeanMax {
  using A = A_;
  A sum;
  Peak<A> peak;
  static __device__ __forceinline__ MeanMax empty(int first) { return {A(0), empty_peak<kSplit, A>(first)}; }
  __device__ __forceinline__ void add(A v, int index) {
    sum += v;
    add_to_peak<kSplit>(peak, v, index);
  }
  // The same where the caller then finds_nan.
  __device__ __forceinline__ void add_number(A v, int index) {
    sum += v;
    add_number_to_peak<kSplit>(peak, v, index);
  }
  // Whether one of the elements may have been NaN, and the peak has to be the first such.
  __device__ __forceinline__ bool may_have_nan() const { return !kSplit && sum != sum; }
  __device__ __forceinline__ void merge(const MeanMax& other) {
    sum += other.sum;
    merge_peak<kSplit>(peak, other.peak);
  }
  __device__ __forceinline__ MeanMax exchange(int bit) const {
    return {__shfl_xor_sync(kAllLanes, sum, bit),
            {__shfl_xor_sync(kAllLanes, peak.value, bit), __shfl_xor_sync(kAllLanes, peak.mark, bit)}};
  }
};
template <class A_>
struct Sum {
  using A = A_;
  A sum;
  __device__ __forceinline__ void merge(const Sum& other) { sum += other.sum; }
  __device__ __forceinline__ Sum exchange(int bit) const { return {__shfl_xor_sync(kAllLanes, sum, bit)}; }
};
template <class A_>
struct Squares {
  using A = A_;
  A sum;
  static __device__ __forceinline__ Squares empty(int) { return {A(0)}; }
  __device__ __forceinline__ void add(A v, int) { sum += v * v; }
  __device__ __forceinline__ void merge(const Squares& other) { sum += other.sum; }
  __device__ __forceinline__ Squares exchange(int bit) const {
    return {__shfl_xor_sync(kAllLanes, sum, bit)};
  }
};
template <class A_>
struct Exponentials {
  using A = A_;
  LogSum<A> log_sum;
  static __device__ __forceinline__ Exponentials empty(int) { return {empty_log_sum<A>()}; }
  __device__ __forceinline__ void add(A v, int) { add_to_log_sum(log_sum, v); }
  __device__ __forceinline__ void merge(const Exponentials& other) { merge_log_sum(log_sum, other.log_sum); }
  __device__ __forceinline__ Exponentials exchange(int bit) const {
    return {{__shfl_xor_sync(kAllLanes, log_sum.peak, bit), __shfl_xor_sync(kAllLanes, log_sum.sum, bit)}};
  }
};

// Merges over lanes whose numbers differ in the bits from `from` up to `to`, powers of two up to 32.
template <class S>
__device__ __forceinline__ void merge_lanes(S& s, int from, int to) {
  for (int bit = to / 2; bit >= from; bit /= 2) s.merge(s.exchange(bit));
}

// Merges each of kCount values over the lanes whose numbers differ in the bits from `from` up to `to`, powers
// of two up to 32. At every step half of the values change places, so that few are exchanged: a lane is left
// with those from `first` on, in the beginning of s, kCount over the number of lanes or one, and other lanes
// with the same one where `repeated`.
template <int kCount, class S>
__device__ __forceinline__ void spread_over_lanes(S (&s)[kCount], int lane, int from, int to, int& first,
                                                  bool& repeated) {
  constexpr int kMost = kCount / 2 ? kCount / 2 : 1;
  first = 0, repeated = false;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int bit = to / 2 >> step, half = kCount >> (step + 1);
    if (bit < from) break;
    const bool upper = lane & bit;
    if (half == 0) {
      s[0].merge(s[0].exchange(bit));
      repeated = repeated || upper;
      continue;
    }
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (j >= half) break;
      const S given = upper ? s[j] : s[j + half];
      if (upper) s[j] = s[j + half];
      s[j].merge(given.exchange(bit));
    }
    if (upper) first += half;
  }
}

// Merges each of one or four values over the lanes of a row, a power of two from kRowSums to 32: lane
// `column` gets value column % kRows. With four, each of the first steps halves what is left to merge.
template <int kRows, class S>
__device__ __forceinline__ S merge_in_row(const S (&v)[kRows], int lanes) {
  static_assert(kRows == 1 || kRows == kRowSums);
  if constexpr (kRows == 1) {
    S mine = v[0];
    merge_lanes(mine, 1, lanes);
    return mine;
  } else {
    const auto halve = [](const S& even, const S& odd, int bit) {
      const bool mine_is_odd = threadIdx.x & bit;
      S mine = even, other = odd;
      if (mine_is_odd) mine = odd, other = even;
      mine.merge(other.exchange(bit));
      return mine;
    };
    S mine = halve(halve(v[0], v[1], 1), halve(v[2], v[3], 1), 2);
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      if (bit < lanes) mine.merge(mine.exchange(bit));
    }
    return mine;
  }
}

// Where merge_rows keeps element i of a tile's row, column i / V: neither its stores, a column a lane, nor
// reads in the order of i meet in a bank.
template <int V>
__device__ __forceinline__ int merged_pitch(int columns) {
  return V > 1 ? columns + 32 / V : columns;
}

// Merges each column of a tile over its row lanes: thread (row, column) brings V of them. On return, after a
// barrier, merged_sum has what is left of them in so many groups. Columns is a power of two up to 32.
template <int V, class S>
__device__ __forceinline__ int merge_rows(S (&acc)[V], int columns, S* merged) {
  const int thread = thread_index(), column = thread & (columns - 1);
  const int pitch = merged_pitch<V>(columns);
  int first;
  bool repeated;
  spread_over_lanes(acc, thread, columns, 32, first, repeated);
  if (!repeated) {
    const int left = max(1, V * columns / 32);
    S* mine = merged + (thread / 32 * V + first) * pitch + column;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k < left) mine[k * pitch] = acc[k];
    }
  }
  __syncthreads();
  return kThreads / 32;
}
template <int V, class S>
__device__ __forceinline__ S merged_sum(const S* merged, int groups, int columns, int i) {
  const int pitch = merged_pitch<V>(columns), at = i % V * pitch + i / V;
  S total = merged[at];
  for (int g = 1; g < groups; ++g) total.merge(merged[g * V * pitch + at]);
  return total;
}

}  // namespace cbam
