// How warps walk a resident tile: statistics of its rows and of its columns.
#pragma once

#include "resident_tile.cuh"
#include "streamed_pool.cuh"

namespace cbam {
namespace resident {

#if CBAM_HAS_CLUSTERS

// V values of shared memory: one, or a multiple of 4 from a multiple of 4 on.
template <int V>
__device__ __forceinline__ void load_factors(const float* from, float (&v)[V]) {
  static_assert(V == 1 || V % 4 == 0);
  if constexpr (V == 1) {
    v[0] = *from;
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      const float4 w = *reinterpret_cast<const float4*>(from + j);
      v[j] = w.x;
      v[j + 1] = w.y;
      v[j + 2] = w.z;
      v[j + 3] = w.w;
    }
  }
}

// ---- Long sums: of partial sums, so that what is added up one by one stays short.

// Of a partial sum. A lane that has one for each of V columns takes kJoined: joins are V additions there, and
// up to 32 rows a lane, which is most maps, need none.
constexpr int kTerms = 16;

// Of a statistic: as Joined, but by one addition where a lane has one for each of V columns to make.
template <class S>
struct Steps : Joined<S> {};
template <>
struct Steps<MeanMax<float, false>> {
  float sum = 0;
  __device__ __forceinline__ void take(MeanMax<float, false>& s) {
    sum += s.sum;
    s.sum = 0;
  }
  __device__ __forceinline__ void finish(MeanMax<float, false>& s) const { s.sum += sum; }
};

// value(i) for i from `begin` to `end` in steps, half of a partial sum read at a time.
template <class A, class Index, class Value>
__device__ __forceinline__ A long_sum(Index begin, Index end, Index step, Value value) {
  constexpr int kAtOnce = kTerms / 2;
  LongSum<A> total;
  for (Index base = begin; base < end; base += kAtOnce * step) {
    A sum = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (base + u * step < end) sum += value(base + u * step);
    }
    total.add(sum);
  }
  return total.sum;
}

// ---- Walks.

constexpr int kBatch = 4;  // rows a lane takes at a time: one wait, and fewer exchanges, for all of them

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// A warp's share of a strip of columns: lane (down, across) takes rows first, first + step, ... of one
// vector.
template <class Tr>
struct Strip {
  int index, group;       // strip, and which of the groups that share it
  int vector;             // within the row, of a vector that is there
  int down, first, step;  // the lane's row of the first kDown
  bool inside;            // false: this lane repeats another one's vector

  __device__ __forceinline__ Strip(const Block<Tr>& b, int item, int groups) {
    const int strips = (b.vectors + Tr::kAcross - 1) / Tr::kAcross;
    index = item % strips;
    group = item / strips;
    vector = index * Tr::kAcross + b.lane % Tr::kAcross;
    inside = vector < b.vectors;
    vector = min(vector, b.vectors - 1);
    down = b.lane / Tr::kAcross;
    if constexpr (Tr::kAcross == 4) {
      // Lanes 0..7 read two rows at a time, which are in different banks where the distance of these rows is
      // half of 128 bytes off a multiple of it: 4, 2 or 1 rows apart.
      if (b.vectors % 2)
        down = down / 2 + down % 2 * 4;
      else if (b.vectors % 4)
        down = down % 2 * 2 + down / 2 % 2 + down / 4 * 4;
    }
    first = group * Tr::kDown + down;
    step = groups * Tr::kDown;
  }
  static __device__ __forceinline__ int items(const Block<Tr>& b, int groups) {
    return (b.vectors + Tr::kAcross - 1) / Tr::kAcross * groups;
  }
};

// Calls use(row, load(row)) for the lane's rows of a strip. A staged tile is written where it was read: rows
// are loaded a few at a time, since the compiler may not carry a load across the store of the row before.
template <class Tr, int kUnroll, class Load, class Use>
__device__ __forceinline__ void for_rows(const Block<Tr>& b, const Strip<Tr>& s, Load load, Use use) {
  if constexpr (Tr::kStaged) {
    for (int base = s.first; base < b.rows; base += kUnroll * s.step) {
      decltype(load(0)) v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (base + u * s.step < b.rows) v[u] = load(base + u * s.step);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (base + u * s.step < b.rows) use(base + u * s.step, v[u]);
      }
    }
  } else {
#pragma unroll kUnroll
    for (int r = s.first; r < b.rows; r += s.step) {
      auto v = load(r);
      use(r, v);
    }
  }
}

// spread_over_lanes between two known bits: a lane is left with `left` values from number `first` on.
template <int kCount, int kFrom, int kTo>
struct Spread {
  static constexpr int kLanes = kTo / kFrom;
  static constexpr int left = kCount > kLanes ? kCount / kLanes : 1;
  int first;
  bool repeated;

  template <class S>
  __device__ __forceinline__ Spread(S (&s)[kCount], int lane) {
    spread_over_lanes(s, lane, kFrom, kTo, first, repeated);
  }
};

// The maximum and sum of a vector, the usual pools: the index of the maximum is found later.
template <class A, int V>
__device__ __forceinline__ A largest_of(const A (&v)[V]) {
  A m = v[0];
#pragma unroll
  for (int j = 1; j < V; ++j) m = ptx::max_nan(m, v[j]);
  return m;
}
template <class A, int V>
__device__ __forceinline__ A sum_of(const A (&v)[V]) {
  A s[V];
#pragma unroll
  for (int j = 0; j < V; ++j) s[j] = v[j];
#pragma unroll
  for (int half = V / 2; half; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) s[j] += s[j + half];
  }
  return s[0];
}

template <class S>
struct IsUsual : Flag<false> {};
template <>
struct IsUsual<MeanMax<float, false>> : Flag<true> {};

// Where a running maximum moves: also once it is NaN, which is put right at the end of a walk. One
// comparison an element instead of three.
template <class A>
__device__ __forceinline__ bool moves(A v, A peak) {
  return !(v <= peak);
}

constexpr int kTeam = 8;  // lanes a row

// The usual pools of the tile's rows, kRows of them a team at a time: fewer exchanges, and the maximum's
// place within its vector is looked for in as many rows at a time.
template <int kRows, class S, class Tr, class Value, class Out>
__device__ __forceinline__ void reduce_usual_rows(const Block<Tr>& b, Landed& landed, Value value, Out out) {
  using A = typename Tr::A;
  constexpr int V = Tr::V, kTeams = 32 / kTeam;
  const int lane = b.lane % kTeam, team = b.lane / kTeam;
  for (int base = b.warp * kTeams * kRows; base < b.rows; base += b.warps * kTeams * kRows) {
    landed.wait(min(base + kTeams * kRows, b.rows) - 1);
    S acc[kRows];  // until the merge, a mark is a vector's
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int row = min(base + u * kTeams + team, b.rows - 1);
      LongSum<A> whole;
      A sum = 0, peak = negative_infinity<A>();
      int best = lane;
      for (int first = lane;; first += kTerms * kTeam) {
        const int end = min(first + kTerms * kTeam, b.vectors);
#pragma unroll 2
        for (int j = first; j < end; j += kTeam) {
          A v[V];
          value(row, j, v);
          const A m = largest_of(v);
          sum += sum_of(v);
          if (moves(m, peak)) best = j;
          peak = ptx::max_nan(peak, m);
        }
        if (first + kTerms * kTeam >= b.vectors) break;
        whole.add(sum);
        sum = 0;
      }
      if (peak != peak) {  // `best` went on moving: back to the first vector with a NaN
        A v[V];
        best = lane;
        value(row, best, v);
        while (largest_of(v) == largest_of(v)) {
          best += kTeam;
          value(row, best, v);
        }
      }
      acc[u] = {whole.sum + sum, {peak, lane < b.vectors ? best : kNoIndex}};
    }
    const Spread<kRows, 1, kTeam> mine(acc, lane);
    const int row = base + mine.first * kTeams + team;
    if (row >= b.rows || mine.repeated) continue;
    S total = acc[0];
    const int vector = total.peak.mark;
    A v[V];
    value(row, vector, v);
#pragma unroll
    for (int j = V - 1; j >= 0; --j) {
      if (v[j] == total.peak.value || v[j] != v[j]) total.peak.mark = vector * V + j;
    }
    out(row, total);
  }
}

// One statistic for each row of the tile: value(row, vector, v) brings V elements, whose indices begin at
// vector * V; out(row, S) is called in one lane. `landed` is waited on where a tile may still be loading.
template <class S, class Tr, class Value, class Out>
__device__ __forceinline__ void reduce_rows(const Block<Tr>& b, Landed& landed, Value value, Out out) {
  using A = typename Tr::A;
  constexpr int V = Tr::V, kTeams = 32 / kTeam;
  if constexpr (IsUsual<S>::value) {
    // Where there are rows for all warps.
    if (b.rows > b.warps * kTeams * (kBatch / 2))
      reduce_usual_rows<kBatch, S>(b, landed, value, out);
    else
      reduce_usual_rows<1, S>(b, landed, value, out);
  } else {
    const int lane = b.lane % kTeam, team = b.lane / kTeam;
    for (int base = b.warp * kTeams; base < b.rows; base += b.warps * kTeams) {
      const bool inside = base + team < b.rows;
      const int row = inside ? base + team : b.rows - 1;
      landed.wait(row);
      S acc = S::empty(lane < b.vectors ? lane * V : kNoIndex);
      Joined<S> joined;
      for (int first = lane; first < b.vectors; first += kTerms / V * kTeam) {
        const int end = min(first + kTerms / V * kTeam, b.vectors);
        for (int j = first; j < end; j += kTeam) {
          A v[V];
          value(row, j, v);
#pragma unroll
          for (int u = 0; u < V; ++u) acc.add(v[u], j * V + u);
        }
        joined.take(acc);
      }
      joined.finish(acc);
      merge_lanes(acc, 1, kTeam);
      if (inside && lane == 0) out(row, acc);
    }
  }
}

// One statistic for each column: value(strip, row, v) brings V elements of index `row`; out(column, S) once
// each, after a barrier. `parts` holds column_groups x columns of them.
template <class S, class Tr, class Value, class Out>
__device__ __forceinline__ void reduce_columns(const Block<Tr>& b, Landed& landed, S* parts, Value value,
                                               Out out) {
  using A = typename Tr::A;
  constexpr int V = Tr::V;
  const int groups = b.k.column_groups, columns = b.vectors * V;
  for (int item = b.warp; item < Strip<Tr>::items(b, groups); item += b.warps) {
    const Strip<Tr> strip(b, item, groups);
    S acc[V];
#pragma unroll
    for (int j = 0; j < V; ++j) acc[j] = S::empty(strip.first < b.rows ? strip.first : kNoIndex);
    const int jump = kJoined * strip.step;
    Steps<S> joined[V];
    const auto walk = [&](int first, int end, auto wait_too) {
#pragma unroll 4
      for (int r = first; r < end; r += strip.step) {
        if constexpr (decltype(wait_too)::value) landed.wait(r);
        A v[V];
        value(strip, r, v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if constexpr (IsUsual<S>::value) {
            acc[j].sum += v[j];
            if (moves(v[j], acc[j].peak.value)) acc[j].peak.mark = r;
            acc[j].peak.value = ptx::max_nan(acc[j].peak.value, v[j]);
          } else {
            acc[j].add(v[j], r);
          }
        }
      }
    };
    // Few rows need no join, and pay for none.
    int first = strip.first;
    for (;; first += jump) {
      const int end = min(first + jump, b.rows);
      if (landed.rows < end)
        walk(first, end, Flag<true>{});
      else
        walk(first, end, Flag<false>{});
      if (first + jump >= b.rows) break;
#pragma unroll
      for (int j = 0; j < V; ++j) joined[j].take(acc[j]);
    }
    if (first != strip.first) {
#pragma unroll
      for (int j = 0; j < V; ++j) joined[j].finish(acc[j]);
    }
    if constexpr (IsUsual<S>::value) {
      A top = acc[0].peak.value;
#pragma unroll
      for (int j = 1; j < V; ++j) top = ptx::max_nan(top, acc[j].peak.value);
      if (top != top) {  // marks of NaN went on moving: back to the first
#pragma unroll 1
        for (int r = b.rows - 1 - (b.rows - 1 - strip.first) % strip.step; r >= strip.first;
             r -= strip.step) {
          A v[V];
          value(strip, r, v);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (v[j] != v[j]) acc[j].peak.mark = r;
          }
        }
      }
    }
    const Spread<V, Tr::kAcross, 32> mine(acc, b.lane);
    if (!mine.repeated && strip.inside) {
      S* to = parts + strip.group * columns + strip.vector * V + mine.first;
#pragma unroll
      for (int j = 0; j < mine.left; ++j) to[j] = acc[j];
    }
  }
  __syncthreads();
  for (int i = b.thread; i < columns; i += b.threads) {
    S total = parts[i];
    for (int g = 1; g < groups; ++g) total.merge(parts[g * columns + i]);
    out(i, total);
  }
}

// ---- Sums of rows while a strip is walked.

// Sums each of kBatch values over the lanes of a row. Half of the values change places at each of two steps;
// lane l ends with the sum of value batch_value(l).
template <class Tr, class A>
__device__ __forceinline__ A sum_batch(A (&v)[kBatch], int lane) {
  constexpr int kHalf = Tr::kAcross / 2, kQuarter = Tr::kAcross / 4;
  const bool upper = lane & kHalf, odd = lane & kQuarter;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const A given = upper ? v[j] : v[j + 2], kept = upper ? v[j + 2] : v[j];
    v[j] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
  }
  const A given = odd ? v[0] : v[1], kept = odd ? v[1] : v[0];
  return lane_sum<1, kQuarter>(kept + __shfl_xor_sync(kAllLanes, given, kQuarter));
}
template <class Tr>
__device__ __forceinline__ int batch_value(int lane) {
  return (lane / (Tr::kAcross / 2) % 2) * 2 + lane / (Tr::kAcross / 4) % 2;
}

// Walks a strip: body(row, offset of this lane's vector in the tile) brings this lane's part of a row's sum,
// which ends up in parts[strip][row]. join() after every kJoined rows of a lane but the last.
template <class A, class Tr, class Body, class Join>
__device__ __forceinline__ void sum_rows(const Block<Tr>& b, const Strip<Tr>& s, Landed& landed, A* parts,
                                         Body body, Join join) {
  static_assert(kJoined % kBatch == 0);
  const int pitch = b.vectors * Tr::V, jump = s.step * pitch;
  const int mine = batch_value<Tr>(b.lane) * s.step + s.down;
  const bool full = (s.index + 1) * Tr::kAcross <= b.vectors, puts = b.lane % (Tr::kAcross / 4) == 0;
  A* out = parts + s.index * b.rows;
  int offset = s.first * pitch + s.vector * Tr::V, joined = s.group * Tr::kDown + kJoined * s.step;
  for (int base = s.group * Tr::kDown; base < b.rows; base += kBatch * s.step, offset += kBatch * jump) {
    if (base == joined) {
      join();
      joined += kJoined * s.step;
    }
    const int end = base + (kBatch - 1) * s.step + Tr::kDown;
    landed.wait(min(end, b.rows) - 1);
    A sums[kBatch];
    if (full && end <= b.rows) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) sums[u] = body(base + u * s.step + s.down, offset + u * jump);
    } else {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int r = base + u * s.step + s.down;
        sums[u] = s.inside && r < b.rows ? body(r, offset + u * jump) : A(0);
      }
    }
    const A sum = sum_batch<Tr>(sums, b.lane);
    if (puts && base + mine < b.rows) out[base + mine] = sum;
  }
}
// The sum of a row over all strips.
template <class A, class Tr>
__device__ __forceinline__ A row_sum(const Block<Tr>& b, const A* parts, int row) {
  const int strips = Strip<Tr>::items(b, 1);
  return long_sum<A>(0, strips, 1, [&](int i) { return parts[i * b.rows + row]; });
}
// Sums of a lane's columns, and of those that have joined.
template <class A, int V>
struct ColumnSums {
  A sums[V] = {}, joined[V] = {};
  __device__ __forceinline__ void join() {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      joined[j] += sums[j];
      sums[j] = 0;
    }
  }
};
// Over a strip's lanes, into parts[group][column].
template <class A, class Tr>
__device__ __forceinline__ void put_columns(const Block<Tr>& b, const Strip<Tr>& s,
                                            const ColumnSums<A, Tr::V>& of, A* parts) {
  A sums[Tr::V];
#pragma unroll
  for (int j = 0; j < Tr::V; ++j) sums[j] = lane_sum<Tr::kAcross, 32>(of.joined[j] + of.sums[j]);
  if (b.lane < Tr::kAcross && s.inside) {
#pragma unroll
    for (int j = 0; j < Tr::V; ++j) parts[(s.group * b.vectors + s.vector) * Tr::V + j] = sums[j];
  }
}
template <class A, class Tr>
__device__ __forceinline__ A column_sum(const Block<Tr>& b, const A* parts, int groups, int column) {
  A sum = parts[column];
  for (int g = 1; g < groups; ++g) sum += parts[g * b.vectors * Tr::V + column];
  return sum;
}

#endif  // CBAM_HAS_CLUSTERS

}  // namespace resident
}  // namespace cbam
