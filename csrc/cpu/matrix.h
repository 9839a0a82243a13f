// The passes over x as operations on a matrix of rows and lanes, shared by both memory layouts.
//
// Contiguous x has channels as rows and positions as lanes; channels-last x has positions as rows
// and channels as lanes. A pass reads each element of x (and dy) once; what it keeps per lane (gates,
// running maxima, sums) stays in the L1 cache and is loaded once for four rows. What counts most is the
// order in which memory is read, since the processor fetches ahead only where it sees one: reductions of
// rows and outputs take rows one by one (map_rows, or map_flat as one run from end to end), other passes four
// streams that are far apart (for_streams).

constexpr int kBlock = 4;
// Bytes: shorter rows are reduced four at a time; in longer ones, places are kept by chunks.
constexpr int64_t kShortRow = 512, kLongRow = 2048;

// How a row of `count` lanes is cut into vectors ("slots"). A last, incomplete slot is moved left
// over lanes that the slot before it has covered ("overlap"), so that it can be loaded whole. Where
// the row in memory is too short for that, it is copied ("partial").
template <class A>
struct Slots {
  int64_t full;        // complete slots
  int64_t tail_start;  // first lane of the last slot; negative if it begins before lane 0 of this range
  int tail_count;      // lanes that only the last slot has, 0 if there is no such slot
  bool partial;
  VecInt<A> fresh;  // mask of those lanes

  int64_t size() const { return full + (tail_count ? 1 : 0); }
};

// `before`: lanes of the same row in memory ahead of the first one.
template <class A>
Slots<A> make_slots(int64_t count, int64_t before) {
  constexpr int L = kLanes<A>;
  Slots<A> s;
  s.full = count / L;
  s.tail_count = int(count % L);
  s.partial = s.tail_count && count + before < L;
  s.tail_start = s.partial ? s.full * L : count - L;
  VecInt<A> lane = iota<A>();
  s.fresh = s.partial ? lane < splat_int<A>(s.tail_count) : lane >= splat_int<A>(L - s.tail_count);
  return s;
}

struct Full {};
template <class A>
struct Tail {
  const Slots<A>& slots;
};

// f(first lane, slot index, tag) for every slot.
template <class A, class F>
CBAM_INLINE void for_slots(const Slots<A>& s, F&& f) {
  const int64_t full = s.full;  // what f stores might be s, for all that a compiler knows
  for (int64_t k = 0; k < full; ++k) f(k * kLanes<A>, k, Full{});
  if (s.tail_count) f(s.tail_start, full, Tail<A>{s});
}
// Slots whose sums join (RowSums).
constexpr int64_t kSegment = 32;

// The same, after ahead(first lane) for as many slots of a row of T as a line of memory holds, with join(last
// slot) after each kSegment of them.
template <class T, class A, class Ahead, class F, class Join>
CBAM_INLINE void for_lines(const Slots<A>& s, Ahead&& ahead, F&& f, Join&& join) {
  constexpr int L = kLanes<A>, n = std::max<int>(1, 64 / (L * int(sizeof(T))));
  const int64_t full = s.full;
  for (int64_t k = 0; k < full;) {
    const int64_t end = std::min(k + kSegment, full), whole = end - (end - k) % n;
    for (; k < whole; k += n) {
      ahead(k * L);
      for (int u = 0; u < n; ++u) f((k + u) * L, k + u, Full{});
    }
    if (k < end) ahead(k * L);
    for (; k < end; ++k) f(k * L, k, Full{});
    if (end % kSegment == 0) join(end - 1);
  }
  if (s.tail_count) {
    ahead(s.tail_start);
    f(s.tail_start, full, Tail<A>{s});
  }
}
template <class T>
CBAM_INLINE Vec<Acc<T>> load(const T* p, Full) {
  return load(p);
}
template <class T, class A>
CBAM_INLINE Vec<Acc<T>> load(const T* p, Tail<A> t) {
  return t.slots.partial ? load_first(p, t.slots.tail_count) : load(p);
}
template <class V>
CBAM_INLINE V only_fresh(V v, Full, V) {
  return v;
}
// Lanes that this slot alone covers; `other` elsewhere.
template <class V, class A>
CBAM_INLINE V only_fresh(V v, Tail<A> t, V other) {
  return t.slots.fresh ? v : other;
}

enum class Write { kCached, kStreamed };
template <Write kWrite, class T>
CBAM_INLINE void write(T* p, Vec<Acc<T>> v, Full) {
  if constexpr (kWrite == Write::kStreamed) {
    stream(p, v);
  } else {
    store(p, v);
  }
}
template <Write kWrite, class T, class A>
CBAM_INLINE void write(T* p, Vec<Acc<T>> v, Tail<A> t) {
  if (t.slots.partial) {
    store_first(p, v, t.slots.tail_count);
  } else {
    store(p, v);
  }
}

// f(first row, rows as a constant) for blocks of kBlock rows and then single rows.
template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};
template <class F>
CBAM_INLINE void for_blocks(int64_t begin, int64_t end, F&& f) {
  int64_t r = begin;
  for (; r + kBlock <= end; r += kBlock) f(r, Rows<kBlock>{});
  for (; r < end; ++r) f(r, Rows<1>{});
}

// f(first row, step, rows as a constant) for blocks of kBlock rows a step apart, and then single rows.
// Short rows that lie next to each other share pages, and four at a time the processor sees no order in
// what is read there (measured from memory, rows of 1 KiB: 0.6 of the speed); so each of the
// four goes through a quarter of the rows instead.
template <class T, class F>
CBAM_INLINE void for_streams(int64_t begin, int64_t end, int64_t stride, F&& f) {
  const bool short_rows = stride * int64_t(sizeof(T)) <= 2048;
  const int64_t blocks = (end - begin) / kBlock;
  const int64_t step = short_rows ? blocks : 1, advance = short_rows ? 1 : kBlock;
  for (int64_t i = 0; i < blocks; ++i) f(begin + i * advance, step, Rows<kBlock>{});
  for (int64_t r = begin + kBlock * blocks; r < end; ++r) f(r, int64_t(1), Rows<1>{});
}

// The rows of one block of for_streams, and how far a later block's are fetched ahead, and to where.
//
// Rows that are a multiple of 4 KiB apart, as those of a power of two often are, compete for the same few
// lines of a first-level cache: four of x, four of dy and as many ahead are more than its 8 ways, and
// what was fetched is gone before it is used. Such rows are fetched into the second level only (measured,
// channels_last, C = 1024 and 2048 at 14x14 and 7x7, products: 0.7 to 0.8 of the time in cache; C = 256 and
// 512 from memory: 0.8). Rows of less than 1 KiB lose by it.
//
// On AMD's processors other rows gain by it too, and all are fetched twice as far ahead (measured on Zen 4
// from beyond the second-level cache, products: 0.85 to 0.95 of the time at (256, 56, 56) and (512, 28, 28);
// rows of less than 1 KiB lose up to a sixth).
template <class T, int R>
struct RowPointers {
  T* row[R];
  int64_t next;  // from here to the same lanes of that block
  bool far;      // fetched into the second level only

  // `crowded`: to the second level whatever the stride.
  CBAM_INLINE RowPointers(T* x, int64_t stride, int64_t r, int64_t step, bool crowded = false)
      : next((step == 1 ? R : 1) * stride),
        far(stride * int64_t(sizeof(T)) >= 1024 &&
            (kFetch.far || crowded || step * stride * int64_t(sizeof(T)) % 4096 == 0)) {
    if (kFetch.far && far) next *= 2;
    row[0] = x + r * stride;
    for (int u = 1; u < R; ++u) row[u] = row[u - 1] + step * stride;
  }
  CBAM_INLINE void prefetch(int64_t l) const {
    for (int u = 0; u < R; ++u) {
      const T* ahead = row[u] + l + next;
      far ? __builtin_prefetch(ahead, 0, 2) : __builtin_prefetch(ahead);
    }
  }
};

// Sum of the rows of a block by halves: shorter chains of additions, so less is lost, and more at a time.
struct Plus {
  template <class V>
  CBAM_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct PlusBesideMax {
  template <class V>
  CBAM_INLINE V operator()(V a, V b) const {
    return add_beside_max(a, b);
  }
};
template <class V, class Add = Plus>
CBAM_INLINE V sum_block(const V (&v)[1], Add = {}) {
  return v[0];
}
template <class V, class Add = Plus>
CBAM_INLINE V sum_block(const V (&v)[4], Add add = {}) {
  return add(add(v[0], v[1]), add(v[2], v[3]));
}

// Work of another tile that is done along with a pass: reads of one and writes of the other overlap.
struct Nothing {
  template <class... Args>
  CBAM_INLINE void operator()(const Args&...) const {}
};

// Sums and first maxima with their indices, one a lane.
template <class A>
struct Extrema {
  Vec<A> sum, max;
  VecInt<A> index;
};

// The exact first maximum of those lanes whose sum came out NaN: a NaN wins, the first one. Without a NaN
// among the values (infinity minus infinity), the vector result stands. get(lane, i): value i of a lane.
template <class A, class Get>
void settle_nan(Extrema<A>& e, int lanes, int64_t count, Get get) {
  for (int lane = 0; lane < lanes; ++lane) {
    for (int64_t i = 0; e.sum[lane] != e.sum[lane] && i < count; ++i) {
      if (A v = get(lane, i); v != v) {
        e.max[lane] = v;
        e.index[lane] = typename Lanes<A>::Int(i);
        break;
      }
    }
  }
}

// Running sum and maximum of the lanes of a row; with kIndex, where the maximum was first met: the
// lane, or where `where` says so the chunk of slots.
template <class A, bool kIndex>
struct RowState {
  Vec<A> sum, max;
  VecInt<A> index;

  // Written out, since an implicit constructor would not be compiled for this instruction set.
  CBAM_INLINE RowState()
      : sum(Vec<A>{}), max(splat<A>(-std::numeric_limits<A>::infinity())), index(VecInt<A>{}) {}
  template <class Tag>
  CBAM_INLINE void take(Vec<A> v, int64_t l, Tag tag) {
    sum = add_beside_max(only_fresh(v, tag, Vec<A>{}), sum);
    raise(only_fresh(v, tag, splat<A>(-std::numeric_limits<A>::infinity())),
          [l] { return iota<A>() + splat_int<A>(l); });
  }
  template <class Where>
  CBAM_INLINE void raise(Vec<A> v, Where where) {
    if constexpr (kIndex) index = v > max ? where() : index;
    max = greater_of(v, max);
  }
};

// Sums of R rows, slot by slot, in steps that join: 32 slots, 32 of those, and so on. One running sum along a
// long row would lose more than the reference's, which adds by halves: a map of 256 x 256 equal numbers 60
// times as much.
template <class A, int R>
struct RowSums {
  static constexpr int kSteps = 4;
  Vec<A> step[kSteps][R];

  CBAM_INLINE RowSums() {
    for (int i = 0; i < kSteps; ++i) {
      for (int u = 0; u < R; ++u) step[i][u] = Vec<A>{};
    }
  }
  CBAM_INLINE void add(int u, Vec<A> v) { step[0][u] += v; }
  // After the slot.
  CBAM_INLINE void join(int64_t slot) {
    for (int i = 1; i < kSteps && (slot + 1) % (int64_t{1} << 5 * i) == 0; ++i) {
      for (int u = 0; u < R; ++u) {
        step[i][u] += step[i - 1][u];
        step[i - 1][u] = Vec<A>{};
      }
    }
  }
  CBAM_INLINE void total(Vec<A> (&sum)[R]) const {
    for (int u = 0; u < R; ++u) sum[u] = ((step[0][u] + step[1][u]) + step[2][u]) + step[3][u];
  }
};

// Row state of a row of some length, its sum in kBlock chains: one alone takes the time of as many additions
// as the row has slots (measured in cache with 32-byte vectors, 25 slots: 1.15 times that of four; 98: 2.2
// times).
template <bool kIndex, class A, class Value>
CBAM_INLINE RowState<A, kIndex> reduce_row(const Slots<A>& slots, Value value) {
  constexpr int L = kLanes<A>;
  RowState<A, kIndex> best;
  Vec<A> sum[kBlock];
  for (auto& s : sum) s = Vec<A>{};
  VecInt<A> lanes = iota<A>();
  auto take = [&](int u, Vec<A> v) CBAM_INLINE_LAMBDA {
    sum[u] = add_beside_max(v, sum[u]);
    best.raise(v, [&] { return lanes; });
    lanes += splat_int<A>(L);
  };
  const int64_t full = slots.full;
  int64_t k = 0;
  for (; k + kBlock <= full; k += kBlock) {
    for (int u = 0; u < kBlock; ++u) take(u, value((k + u) * L, Full{}));
  }
  for (; k < full; ++k) take(0, value(k * L, Full{}));
  best.sum = sum_block(sum);
  if (slots.tail_count) best.take(value(slots.tail_start, Tail<A>{slots}), slots.tail_start, Tail<A>{slots});
  return best;
}

// Slots of a long row whose maxima are compared before their place is kept; found within them afterwards.
constexpr int kTogetherSlots = 8;

// Row state of a long row: with kIndex, the index is a chunk of kTogetherSlots slots, the last one longer.
template <bool kIndex, class A, class Value>
CBAM_INLINE RowState<A, kIndex> reduce_long_row(const Slots<A>& slots, Value value) {
  constexpr int L = kLanes<A>, n = kTogetherSlots;
  RowState<A, kIndex> best;
  RowState<A, false> part[kBlock];
  RowSums<A, 1> sums;  // a step of its slots is a chunk
  const int64_t chunks = std::max<int64_t>(1, slots.full / n);
  for (int64_t j = 0; j < chunks; ++j) {
    const int64_t end = j + 1 == chunks ? slots.full : (j + 1) * n;
    int64_t k = j * n;
    for (; k + kBlock <= end; k += kBlock) {
      for (int u = 0; u < kBlock; ++u) part[u].take(value((k + u) * L, Full{}), 0, Full{});
    }
    for (; k < end; ++k) part[0].take(value(k * L, Full{}), 0, Full{});
    if (j + 1 == chunks && slots.tail_count) {
      Tail<A> tag{slots};
      part[1].take(value(slots.tail_start, tag), 0, tag);
    }
    // The maxima so far, so that a chunk is kept only if it is the first with its maximum.
    if (kIndex || j + 1 == chunks) {
      Vec<A> max = greater_of(greater_of(part[0].max, part[1].max), greater_of(part[2].max, part[3].max));
      best.raise(max, [j] { return splat_int<A>(j); });
    }
    if (j % 8 == 7 || j + 1 == chunks) {
      sums.add(0, (part[0].sum + part[1].sum) + (part[2].sum + part[3].sum));
      sums.join(j / 8);
      for (auto& p : part) p.sum = Vec<A>{};
    }
  }
  Vec<A> total[1];
  sums.total(total);
  best.sum = total[0];
  return best;
}

// The first lane of chunk j that equals `max`.
template <class A, class Value>
CBAM_INLINE typename Lanes<A>::Int find_in_chunk(const Slots<A>& slots, int64_t j, A max, Value value) {
  constexpr int L = kLanes<A>, n = kTogetherSlots;
  const VecInt<A> far = splat_int<A>(std::numeric_limits<int32_t>::max());
  const bool last = j + 1 >= slots.full / n;
  VecInt<A> first = far;
  for (int64_t k = j * n; k < (last ? slots.full : (j + 1) * n); ++k) {
    VecInt<A> at = value(k * L, Full{}) == splat<A>(max) ? iota<A>() + splat_int<A>(k * L) : far;
    first = at < first ? at : first;
  }
  if (last && slots.tail_count) {
    Tail<A> tag{slots};
    // Clang's comparison of doubles is a vector of another 64-bit integer, which only_fresh would not take.
    const VecInt<A> same = value(slots.tail_start, tag) == splat<A>(max);
    VecInt<A> at = only_fresh(same, tag, VecInt<A>{}) ? iota<A>() + splat_int<A>(slots.tail_start) : far;
    first = at < first ? at : first;
  }
  return min_lanes<A>(first);
}

// A run of memory, so far ahead that the processor has not seen it coming.
template <class T>
CBAM_INLINE void fetch_run(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + 4096, 0, 2);
}

// f(true) or f(false), a constant: for loops that are bound by their instructions. (Measured on Zen 4, where
// nothing is fetched by hand: a branch a vector cost y of (512, 28, 28) and (1024, 14, 14) a tenth, dx 8 %,
// in bfloat16 channel pools a tenth.) The processors that ask for it have vectors of 64 bytes; other
// instruction sets have no second loop.
template <class F>
CBAM_INLINE void decided(bool condition, F f) {
  if constexpr (kVectorBytes == 64) {
    if (condition) return f(std::true_type{});
  }
  f(std::false_type{});
}

// Sum and first maximum over the lanes of each row in [r0, r1), for up to kLanes rows at a time:
// done(first row, rows, Extrema). kScaled multiplies lane l by lane_scale[l] first. Memory is read row by
// row, as it serves best (measured: a third faster than four rows at a time in cache, twice as
// fast from memory), but for the shortest rows. also(begin, end) follows each row or block of rows.
// With `fetch` memory is fetched ahead by hand too, on Intel's processors, which see no further than the
// page. (Measured on a Xeon, channel pools: 0.6 to 0.85 of the time from memory, 0.85 to 1 in cache.)
template <bool kScaled, bool kIndex, bool kRun, class T, class A, class Done, class Also>
void reduce_rows_as(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots, int64_t count,
                    const A* lane_scale, Done done, Also also) {
  constexpr int L = kLanes<A>;
  const int64_t bytes = slots.full * L * int64_t(sizeof(T));
  auto value_of = [&](int64_t r) CBAM_INLINE_LAMBDA {
    const T* row = x + r * stride;
    return [=](int64_t l, auto tag) CBAM_INLINE_LAMBDA {
      if constexpr (kRun) fetch_run(row + l);
      Vec<A> v = load(row + l, tag);  // [lanes]
      return in_register(kScaled ? v * load(lane_scale + l) : v);
    };
  };
  Vec<A> sum[L], max[L];
  VecInt<A> index[L];
  for (int u = 0; u < L; ++u) {
    sum[u] = max[u] = Vec<A>{};
    index[u] = VecInt<A>{};
  }
  auto keep = [&](int u, const RowState<A, kIndex>& s) CBAM_INLINE_LAMBDA {
    sum[u] = s.sum;
    max[u] = s.max;
    if constexpr (kIndex) index[u] = s.index;
  };
  for (int64_t first = r0; first < r1; first += L) {
    const int rows = int(std::min<int64_t>(L, r1 - first));
    if (bytes >= kLongRow) {
      for (int u = 0; u < rows; ++u) {
        keep(u, reduce_long_row<kIndex, A>(slots, value_of(first + u)));
        also(first + u, first + u + 1);
      }
    } else if (bytes >= kShortRow) {
      for (int u = 0; u < rows; ++u) {
        keep(u, reduce_row<kIndex, A>(slots, value_of(first + u)));
        also(first + u, first + u + 1);
      }
    } else {
      for_blocks(first, first + rows, [&](int64_t r, auto block) {
        constexpr int R = decltype(block)::value;
        RowState<A, kIndex> state[R];
        for_slots(slots, [&](int64_t l, int64_t, auto tag) CBAM_INLINE_LAMBDA {
          for (int u = 0; u < R; ++u) state[u].take(value_of(r + u)(l, tag), l, tag);
        });
        for (int u = 0; u < R; ++u) keep(int(r - first) + u, state[u]);
        also(r, r + R);
      });
    }
    Extrema<A> e{
        fold_to_lanes<A>(sum, Plus{}),
        fold_to_lanes<A>(max, [](Vec<A> a, Vec<A> b) CBAM_INLINE_LAMBDA { return greater_of(b, a); }),
        VecInt<A>{}};
    if constexpr (kIndex) {
      const VecInt<A> far = splat_int<A>(std::numeric_limits<int32_t>::max());
      A top[L];
      store(top, e.max);
      VecInt<A> where[L];
      for (int u = 0; u < L; ++u) where[u] = max[u] == splat<A>(top[u]) ? index[u] : far;
      e.index =
          fold_to_lanes<A>(where, [](VecInt<A> a, VecInt<A> b) CBAM_INLINE_LAMBDA { return b < a ? b : a; });
      if (bytes >= kLongRow) {
        typename Lanes<A>::Int chunk[L];
        store(chunk, e.index);
        for (int u = 0; u < rows; ++u)
          chunk[u] = find_in_chunk<A>(slots, chunk[u], top[u], value_of(first + u));
        e.index = load(chunk);
      }
      // Nothing was greater than what the states began with.
      e.index = e.max == splat<A>(-std::numeric_limits<A>::infinity()) ? VecInt<A>{} : e.index;
    }
    if (any_nan(e.sum)) {
      settle_nan(e, rows, count, [&](int lane, int64_t l) {
        A v = load_one(x + (first + lane) * stride + l);
        return kScaled ? v * lane_scale[l] : v;
      });
    }
    done(first, rows, e);
  }
}

template <bool kScaled, bool kIndex, class T, class A, class Done, class Also = Nothing>
void reduce_rows(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots, int64_t count,
                 const A* lane_scale, bool fetch, Done done, Also also = {}) {
  decided(fetch && kFetch.run, [&](auto run) {
    constexpr bool kRun = decltype(run)::value;
    reduce_rows_as<kScaled, kIndex, kRun>(x, stride, r0, r1, slots, count, lane_scale, done, also);
  });
}

// Rows whose sums are added up one block after the other before they join the total, for the reason of
// RowSums.
constexpr int64_t kChunk = 64;
// The same in backward. Threads that share a sample by rows, or the positions of its maps, have whole ones.
constexpr int64_t kShare = 32;

// f(r0, r1) for the chunks of [r0, r1).
template <class F>
CBAM_INLINE void for_chunks(int64_t r0, int64_t r1, int64_t chunk, F&& f) {
  for (int64_t r = r0; r < r1; r += chunk) f(r, std::min(r + chunk, r1));
}

// Adds `part` to `total`, and clears it for the next chunk.
template <class A>
void fold(const Slots<A>& slots, A* part, A* total) {
  constexpr int L = kLanes<A>;
  for (int64_t k = 0; k < slots.size(); ++k) {
    store(total + k * L, load(total + k * L) + load(part + k * L));
    store(part + k * L, Vec<A>{});
  }
}

// Where sums over many rows join on their way to `sum`, in slot order: `part` is a chunk's, zeros before and
// after; sums of 16 chunks join the first of the levels, 16 of those the next. Fewer chunks need no levels.
template <class A>
struct ColumnSums {
  static constexpr int kLevels = 3, kJoined = 16;
  A *part, *sum, *levels;

  CBAM_INLINE void begin(const Slots<A>& slots) const {
    constexpr int L = kLanes<A>;
    for (int64_t k = 0; k < slots.size(); ++k) {
      store(part + k * L, Vec<A>{});
      store(sum + k * L, Vec<A>{});
    }
    for (int64_t k = 0; levels && k < kLevels * slots.size(); ++k) store(levels + k * L, Vec<A>{});
  }
  A* level(const Slots<A>& slots, int m) const { return levels + m * slots.size() * kLanes<A>; }
  // After the i-th chunk, whose sums are in `of` (cleared), or in `part`.
  void join(const Slots<A>& slots, int64_t i, A* of = nullptr) const {
    fold(slots, of ? of : part, sum);
    int64_t done = i + 1;
    for (int m = 0; levels && m < kLevels && done % kJoined == 0; ++m, done /= kJoined)
      fold(slots, m ? level(slots, m - 1) : sum, level(slots, m));
  }
  void end(const Slots<A>& slots) const {
    for (int m = 0; levels && m < kLevels; ++m) fold(slots, level(slots, m), sum);
  }
};

// Sum and first maximum over the rows [r0, r1) of each lane, in slot order: state arrays of
// slots.size() vectors. kScaled multiplies row r by row_scale[r] first;
// without kIndex the index is not kept.
// also(row, step, first lane, tag, rows) follows each block of rows and slot.
template <bool kScaled, bool kIndex, class T, class A, class Also = Nothing>
void reduce_columns(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                    const A* row_scale, const ColumnSums<A>& sums, A* max, typename Lanes<A>::Int* index,
                    Also also = {}) {
  constexpr int L = kLanes<A>;
  A* const part = sums.part;
  // A block fetched ahead beside the block at work and what is kept per lane would not stay in the
  // first-level cache. (Measured on a Xeon, spatial pools of (128, 40, 40): 0.8 of the time.)
  const bool crowded = kBlock * slots.size() * L * int64_t(sizeof(T)) > 16 << 10;
  sums.begin(slots);
  for (int64_t k = 0; k < slots.size(); ++k) {
    store(max + k * L, splat<A>(-std::numeric_limits<A>::infinity()));
    store(index + k * L, VecInt<A>{});
  }
  auto block = [=, &slots](int64_t r, int64_t step, auto rows) CBAM_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    const RowPointers<const T, R> xs(x, stride, r, step, crowded);
    Vec<A> scale[R];
    for (int u = 0; u < R; ++u) scale[u] = kScaled ? splat<A>(row_scale[r + u * step]) : Vec<A>{};
    auto ahead = [=](int64_t l) CBAM_INLINE_LAMBDA { xs.prefetch(l); };
    auto take = [=](int64_t l, int64_t k, auto tag) CBAM_INLINE_LAMBDA {
      Vec<A> m = load(max + k * L);
      VecInt<A> i{};
      if constexpr (kIndex) i = load(index + k * L);
      Vec<A> value[R];
      for (int u = 0; u < R; ++u) {
        Vec<A> v = load(xs.row[u] + l, tag);  // [R, lanes]
        if constexpr (kScaled) v = v * scale[u];
        value[u] = v;
      }
      if constexpr (kIndex) {
        // The first of the block's rows with their maximum.
        Vec<A> top = value[0];
        for (int u = 1; u < R; ++u) top = greater_of(value[u], top);
        VecInt<A> at = splat_int<A>(r + (R - 1) * step);
        for (int u = R - 2; u >= 0; --u) at = value[u] == top ? splat_int<A>(r + u * step) : at;
        if (step > 1 && any_equal(top, m)) {  // streams do not pass in the order of the rows
          i = ((top == m) & (at < i)) ? at : i;
        }
        i = top > m ? at : i;
        m = greater_of(top, m);
      } else {
        for (int u = 0; u < R; ++u) m = greater_of(value[u], m);
      }
      store(part + k * L, add_beside_max(sum_block(value, PlusBesideMax{}), load(part + k * L)));
      store(max + k * L, m);
      if constexpr (kIndex) store(index + k * L, i);
      also(r, step, l, tag, rows);
    };
    for_lines<T>(slots, ahead, take, Nothing{});
  };
  for_chunks(r0, r1, kChunk, [&](int64_t c0, int64_t c1) {
    for_streams<T>(c0, c1, stride, block);
    sums.join(slots, (c0 - r0) / kChunk);
  });
  sums.end(slots);
}

// Settles the NaN lanes of a reduce_columns over [0, rows) and hands over each slot: done(first lane, tag,
// Extrema).
template <bool kScaled, class T, class A, class Done>
void finish_columns(const T* x, int64_t stride, int64_t rows, const Slots<A>& slots, const A* row_scale,
                    A* sum, A* max, typename Lanes<A>::Int* index, Done done) {
  constexpr int L = kLanes<A>;
  for_slots(slots, [&](int64_t l, int64_t k, auto tag) CBAM_INLINE_LAMBDA {
    Extrema<A> e{load(sum + k * L), load(max + k * L), load(index + k * L)};
    if (any_nan(e.sum)) {
      settle_nan(e, slots.partial && k == slots.full ? slots.tail_count : L, rows, [&](int lane, int64_t r) {
        A v = load_one(x + r * stride + l + lane);
        return kScaled ? v * row_scale[r] : v;
      });
    }
    done(l, tag, e);
  });
}

// With t = x * dy: row_out[r] = sum over lanes of t * lane_weight, and per slot
// lane_out += sum over rows of t * row_weight, by way of `part` (zeros before and after).
template <class T, class A>
void weigh_product(const T* x, const T* dy, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                   const A* row_weight, const A* lane_weight, A* row_out, A* part, A* lane_out) {
  constexpr int L = kLanes<A>;
  for_chunks(r0, r1, kShare, [&](int64_t c0, int64_t c1) {
    for_streams<T>(c0, c1, stride, [=, &slots](int64_t r, int64_t step, auto rows) CBAM_INLINE_LAMBDA {
      constexpr int R = decltype(rows)::value;
      const RowPointers<const T, R> xs(x, stride, r, step), dys(dy, stride, r, step);
      Vec<A> weight[R], total[R];
      RowSums<A, R> sums;
      for (int u = 0; u < R; ++u) weight[u] = splat<A>(row_weight[r + u * step]);
      auto ahead = [=](int64_t l) CBAM_INLINE_LAMBDA {
        xs.prefetch(l);
        dys.prefetch(l);
      };
      auto take = [=, &sums](int64_t l, int64_t k, auto tag) CBAM_INLINE_LAMBDA {
        Vec<A> lane = in_register(load(lane_weight + l)), product[R];
        for (int u = 0; u < R; ++u) {
          Vec<A> t = load(xs.row[u] + l, tag) * load(dys.row[u] + l, tag);  // [R, lanes]
          sums.add(u, only_fresh(t * lane, tag, Vec<A>{}));
          product[u] = t * weight[u];
        }
        store(part + k * L, load(part + k * L) + sum_block(product));
      };
      for_lines<T>(slots, ahead, take, [&](int64_t k) CBAM_INLINE_LAMBDA { sums.join(k); });
      A sum[R];
      sums.total(total);
      sum_lanes<A>(total, sum);
      for (int u = 0; u < R; ++u) row_out[r + u * step] = sum[u];
    });
    fold(slots, part, lane_out);
  });
}

// row_out[r] += sum over lanes of f(x, row, first lane, u) for the rows [r0, r1).
template <class T, class A, class F>
CBAM_INLINE void sum_rows(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                          A* row_out, F f) {
  for_streams<T>(r0, r1, stride, [&](int64_t r, int64_t step, auto rows) CBAM_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    const RowPointers<const T, R> xs(x, stride, r, step);
    RowSums<A, R> sums;
    auto take = [&, xs](int64_t l, int64_t, auto tag) CBAM_INLINE_LAMBDA {
      for (int u = 0; u < R; ++u) {
        Vec<A> v = load(xs.row[u] + l, tag);  // [R, lanes]
        sums.add(u, only_fresh(f(v, r + u * step, l), tag, Vec<A>{}));
      }
    };
    for_lines<T>(slots, Nothing{}, take, [&](int64_t k) CBAM_INLINE_LAMBDA { sums.join(k); });
    Vec<A> total[R];
    A sum[R];
    sums.total(total);
    sum_lanes<A>(total, sum);
    for (int u = 0; u < R; ++u) row_out[r + u * step] += sum[u];
  });
}

// Per slot, the sum over the rows [r0, r1) of f(x, row, first lane).
template <class T, class A, class F>
CBAM_INLINE void sum_columns(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                             const ColumnSums<A>& sums, int64_t chunk, F f) {
  constexpr int L = kLanes<A>;
  sums.begin(slots);
  for_chunks(r0, r1, chunk, [&](int64_t c0, int64_t c1) {
    for_streams<T>(c0, c1, stride, [&](int64_t r, int64_t step, auto rows) CBAM_INLINE_LAMBDA {
      constexpr int R = decltype(rows)::value;
      const RowPointers<const T, R> xs(x, stride, r, step);
      for_slots(slots, [&](int64_t l, int64_t k, auto tag) CBAM_INLINE_LAMBDA {
        Vec<A> value[R];
        for (int u = 0; u < R; ++u) value[u] = f(load(xs.row[u] + l, tag), r + u * step, l);  // [R, lanes]
        store(sums.part + k * L, load(sums.part + k * L) + sum_block(value));
      });
    });
    sums.join(slots, (c0 - r0) / chunk);
  });
  sums.end(slots);
}

// What f of the passes below reads per row, for a vector within row r: rows(a) is a[r] in every lane.
struct OneRow {
  int64_t r;

  template <class A>
  CBAM_INLINE Vec<A> operator()(const A* a) const {
    return splat<A>(a[r]);
  }
  template <class A>
  CBAM_INLINE VecInt<A> index() const {
    return splat_int<A>(r);
  }
};
// The same for a vector that ends in row r + 1.
template <class I>
struct TwoRows {
  int64_t r;
  I second;  // mask of the lanes in row r + 1

  template <class A>
  CBAM_INLINE Vec<A> operator()(const A* a) const {
    return second ? splat<A>(a[r + 1]) : splat<A>(a[r]);
  }
  template <class A>
  CBAM_INLINE VecInt<A> index() const {
    return splat_int<A>(r) - second;
  }
};

// out = f(in, rows, first lane, tag) for one block of rows and one slot, [R, lanes].
template <Write kWrite, class T, int R, class Tag, class F>
CBAM_INLINE void map_block(const RowPointers<const T, R>& in, const RowPointers<T, R>& out, int64_t r,
                           int64_t step, int64_t l, Tag tag, F f) {
  Vec<Acc<T>> result[R];  // all of them before the first store, so that what f loads per lane is loaded once
  for (int u = 0; u < R; ++u) result[u] = f(load(in.row[u] + l, tag), OneRow{r + u * step}, l, tag);
  for (int u = 0; u < R; ++u) write<kWrite>(out.row[u] + l, result[u], tag);
}

// The same over the rows [r0, r1), one by one: what f loads per lane comes from the first-level cache each
// time, but lines are read and written in the order of memory. (Measured on a Xeon, four rows at a time took
// longer: dx of (256, 56, 56) 1.35 times, y of (64, 56, 56) 1.7, dx 1.2, of small maps as long or 1.1. Not so
// bf16 of (256, 56, 56), which is bound by its conversions: y and dx 0.87 in cache, 1.1 and 0.96 streamed.)
// Where a tile's rows are pieces of longer ones, the processor does not see the next piece coming. With
// `fetch` the one kRowsAhead further is fetched for it, which pays where it is not in the second-level cache.
// (Measured, dx of (256, 56, 56), streamed: Zen 4 0.78 of the time; a Xeon 0.72 from memory, 0.9 from the
// last level. Of (64, 56, 56), which is in the second level: 1.05.)
constexpr int64_t kRowsAhead = 8;
template <Write kWrite, class T, class A, class F>
CBAM_INLINE void map_rows(const T* in, T* out, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                          F f, bool fetch = false) {
  const int64_t count = slots.full * kLanes<A> + slots.tail_count, line = 64 / int64_t(sizeof(T));
  const bool pieces = fetch && kFetch.pieces && count < stride;
  decided(fetch && kFetch.run && count == stride, [&](auto run) CBAM_INLINE_LAMBDA {
    for (int64_t r = r0; r < r1; ++r) {
      const RowPointers<const T, 1> from(in, stride, r, 1);
      const RowPointers<T, 1> to(out, stride, r, 1);
      if (pieces && r + kRowsAhead < r1) {
        const T* ahead = from.row[0] + kRowsAhead * stride;
        for (int64_t l = 0; l < count; l += line) __builtin_prefetch(ahead + l, 0, 2);
      }
      for_slots(slots, [&](int64_t l, int64_t, auto tag) CBAM_INLINE_LAMBDA {
        if constexpr (decltype(run)::value) fetch_run(from.row[0] + l);
        map_block<kWrite>(from, to, r, 1, l, tag, f);
      });
    }
  });
}

// The same over rows of a matrix without gaps, as one run of vectors that pay no regard to where a row of
// `count` >= L lanes ends: aligned where the matrix is, each line of memory written once and in order.
// (Measured at rows of 196 floats: half of map_rows' time from memory; in cache 0.8 for y, 1.1 for dx, which
// loads four things a lane.) What f loads per lane repeats with the rows: f's lane runs over [0, period),
// `period` being a multiple of count, of L as well where that keeps f's loads aligned, and a vector may reach
// L lanes further.
template <Write kWrite, class T, class F>
CBAM_INLINE void map_flat(const T* in, T* out, int64_t r0, int64_t r1, int64_t count, int64_t period, F f,
                          bool fetch = false) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  decided(fetch && kFetch.run, [&](auto run) CBAM_INLINE_LAMBDA {
    int64_t l = 0, at = 0;
    auto next = [&] {
      l += L;
      at += L;
      if (at >= period) at -= period;
    };
    const T* from = in + r0 * count;
    T* to = out + r0 * count;
    for (int64_t r = r0; r < r1; ++r, from += count, to += count, l -= count) {
      for (; l + L <= count; next()) {
        if constexpr (decltype(run)::value) fetch_run(from + l);
        write<kWrite>(to + l, f(load(from + l), OneRow{r}, at, Full{}), Full{});
      }
      if (l == count) continue;
      if (r + 1 < r1) {
        TwoRows<VecInt<A>> two{r, iota<A>() >= splat_int<A>(count - l)};
        write<kWrite>(to + l, f(load(from + l), two, at, Full{}), Full{});
        next();
      } else {
        const int rest = int(count - l);
        store_first(to + l, f(load_first(from + l, rest), OneRow{r}, at, Full{}), rest);
      }
    }
  });
}

// Copies slot-ordered state to its lanes; `out` has room for a whole last slot.
template <class A>
void unslot(const Slots<A>& slots, const A* state, A* out) {
  for_slots(slots, [&](int64_t l, int64_t k, auto) { store(out + l, load(state + k * kLanes<A>)); });
}
