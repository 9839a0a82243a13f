// The passes over x as operations on a matrix of rows and lanes, shared by both memory layouts.
//
// Contiguous x has channels as rows and positions as lanes; channels-last x has positions as rows
// and channels as lanes. Either way memory is read row by row, four rows at a time: the vectors
// that belong to lanes (gates, running maxima, sums) are then loaded once for four rows.
// A pass reads each element of x (and dy) once; what it keeps per lane stays in the L1 cache.

constexpr int kBlock = 4;
constexpr int64_t kLongRow = 2048;  // bytes, from where on a reduction takes rows one by one

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
  for (int64_t k = 0; k < s.full; ++k) f(k * kLanes<A>, k, Full{});
  if (s.tail_count) f(s.tail_start, s.full, Tail<A>{s});
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

// Fetches the same lanes of the next block of rows.
template <class T, int kRows>
CBAM_INLINE void prefetch_next(const T* p, int64_t stride) {
  for (int u = 0; u < kRows; ++u) __builtin_prefetch(p + (kRows + u) * stride);
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

// Sum of the rows of a block by halves: shorter chains of additions, so less is lost, and more at a time.
template <class V>
CBAM_INLINE V sum_block(const V (&v)[1]) {
  return v[0];
}
template <class V>
CBAM_INLINE V sum_block(const V (&v)[4]) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// Work of another tile that is done along with a pass: reads of one and writes of the other overlap.
struct Nothing {
  template <class... Args>
  CBAM_INLINE void operator()(const Args&...) const {}
};

// A statistic of one lane or row: sum and first maximum with its index.
template <class A>
struct Extremum {
  A sum, max;
  int64_t index;
};

// Exact first maximum of `count` values where the sum came out NaN: a NaN wins, the first one.
// Without a NaN among the values (infinity minus infinity), the vector result stands.
template <class A, class Get>
void settle_nan(Extremum<A>& e, int64_t count, Get get) {
  for (int64_t i = 0; i < count; ++i) {
    if (A v = get(i); v != v) {
      e.max = v;
      e.index = i;
      return;
    }
  }
}

// Running sum and maximum of the lanes of a row; with kIndex, where the maximum was first met.
template <class A, bool kIndex>
struct RowState {
  Vec<A> sum, max;
  VecInt<A> index;

  // Written out, since an implicit constructor would not be compiled for this instruction set.
  CBAM_INLINE RowState()
      : sum(Vec<A>{}), max(splat<A>(-std::numeric_limits<A>::infinity())), index(VecInt<A>{}) {}
  template <class Tag>
  CBAM_INLINE void take(Vec<A> v, int64_t l, Tag tag) {
    sum += only_fresh(v, tag, Vec<A>{});
    v = only_fresh(v, tag, splat<A>(-std::numeric_limits<A>::infinity()));
    VecInt<A> greater = v > max;
    if constexpr (kIndex) index = greater ? iota<A>() + splat_int<A>(l) : index;
    max = greater ? v : max;
  }
  CBAM_INLINE void join(const RowState& o) {
    sum += o.sum;
    VecInt<A> theirs = o.max > max;
    if constexpr (kIndex) {
      VecInt<A> same = o.max == max;
      index = theirs ? o.index : index;
      index = same && o.index < index ? o.index : index;
    }
    max = theirs ? o.max : max;
  }
};

// The statistics of R rows from their states.
template <class A, bool kIndex, int R>
CBAM_INLINE void finish_rows(const RowState<A, kIndex> (&state)[R], Extremum<A> (&e)[R]) {
  Vec<A> v[R];
  A sum[R], max[R];
  for (int u = 0; u < R; ++u) v[u] = state[u].sum;
  sum_lanes<A>(v, sum);
  for (int u = 0; u < R; ++u) v[u] = state[u].max;
  max_lanes<A>(v, max);
  typename Lanes<A>::Int index[R] = {};
  if constexpr (kIndex) {
    VecInt<A> where[R], far = splat_int<A>(std::numeric_limits<int32_t>::max());
    for (int u = 0; u < R; ++u) where[u] = v[u] == splat<A>(max[u]) ? state[u].index : far;
    min_lanes<A>(where, index);
  }
  for (int u = 0; u < R; ++u) {
    e[u] = {sum[u], max[u], max[u] == -std::numeric_limits<A>::infinity() ? 0 : int64_t(index[u])};
  }
}

// Sum and first maximum over the lanes of each row in [r0, r1): done(row, Extremum).
// kScaled multiplies lane l by lane_scale[l] first. Long rows are read one by one, which memory
// serves best (measured: a third faster than four at a time), short ones four at a time.
// also(begin, end) follows each row or block of rows.
template <bool kScaled, bool kIndex, class T, class A, class Done, class Also = Nothing>
void reduce_rows(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots, int64_t count,
                 const A* lane_scale, Done done, Also also = {}) {
  constexpr int L = kLanes<A>;
  auto value = [&](const T* row, int64_t l, auto tag) CBAM_INLINE_LAMBDA {
    Vec<A> v = load(row + l, tag);  // [lanes]
    return kScaled ? v * load(lane_scale + l) : v;
  };
  auto finish = [&](int64_t r, Extremum<A> e) {
    if (e.sum != e.sum) {
      settle_nan(e, count, [&](int64_t l) {
        A v = load_one(x + r * stride + l);
        return kScaled ? v * lane_scale[l] : v;
      });
    }
    done(r, e);
  };
  if (slots.full * L * int64_t(sizeof(T)) >= kLongRow) {
    for (int64_t r = r0; r < r1; ++r) {
      const T* row = x + r * stride;
      RowState<A, kIndex> state[kBlock];
      int64_t k = 0;
      for (; k + kBlock <= slots.full; k += kBlock) {
        for (int u = 0; u < kBlock; ++u) state[u].take(value(row, (k + u) * L, Full{}), (k + u) * L, Full{});
      }
      for (; k < slots.full; ++k) state[0].take(value(row, k * L, Full{}), k * L, Full{});
      if (slots.tail_count) {
        Tail<A> tag{slots};
        state[1].take(value(row, slots.tail_start, tag), slots.tail_start, tag);
      }
      for (int u = 1; u < kBlock; ++u) state[0].join(state[u]);
      Extremum<A> e[1];
      RowState<A, kIndex> joined[1] = {state[0]};
      finish_rows(joined, e);
      finish(r, e[0]);
      also(r, r + 1);
    }
    return;
  }
  for_blocks(r0, r1, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    RowState<A, kIndex> state[R];
    for_slots(slots, [&](int64_t l, int64_t, auto tag) {
      for (int u = 0; u < R; ++u) state[u].take(value(x + (r + u) * stride, l, tag), l, tag);
    });
    Extremum<A> e[R];
    finish_rows(state, e);
    for (int u = 0; u < R; ++u) finish(r + u, e[u]);
    also(r, r + R);
  });
}

// Rows whose sums are added up one block after the other before they join the total: one running sum
// over all channels would lose more than the reference's, which adds by halves.
constexpr int64_t kChunk = 64;

// Likewise along a row: every 32 slots, the sums of each row join their total.
template <class V, int kRows>
CBAM_INLINE void join_chain(int64_t slot, V (&acc)[kRows], V (&total)[kRows]) {
  if (slot % 32 != 31) return;
  for (int u = 0; u < kRows; ++u) {
    total[u] += acc[u];
    acc[u] = V{};
  }
}

// f(r0, r1) for the chunks of [r0, r1).
template <class F>
CBAM_INLINE void for_chunks(int64_t r0, int64_t r1, F&& f) {
  for (int64_t r = r0; r < r1; r += kChunk) f(r, std::min(r + kChunk, r1));
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

// Sum and first maximum over the rows [r0, r1) of each lane, in slot order: state arrays of
// slots.size() vectors, `part` among them as scratch. kScaled multiplies row r by row_scale[r] first;
// without kIndex the index is not kept.
// also(row, first lane, tag, rows) follows each block of rows and slot.
template <bool kScaled, bool kIndex, class T, class A, class Also = Nothing>
void reduce_columns(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                    const A* row_scale, A* part, A* sum, A* max, typename Lanes<A>::Int* index,
                    Also also = {}) {
  constexpr int L = kLanes<A>;
  for (int64_t k = 0; k < slots.size(); ++k) {
    store(part + k * L, Vec<A>{});
    store(sum + k * L, Vec<A>{});
    store(max + k * L, splat<A>(-std::numeric_limits<A>::infinity()));
    store(index + k * L, VecInt<A>{});
  }
  for_chunks(r0, r1, [&](int64_t c0, int64_t c1) {
    for_blocks(c0, c1, [&](int64_t r, auto rows) {
      constexpr int R = decltype(rows)::value;
      const T* row = x + r * stride;
      Vec<A> scale[R];
      if constexpr (kScaled) {
        for (int u = 0; u < R; ++u) scale[u] = splat<A>(row_scale[r + u]);
      }
      for_slots(slots, [&](int64_t l, int64_t k, auto tag) {
        prefetch_next<T, R>(row + l, stride);
        Vec<A> m = load(max + k * L);
        VecInt<A> i{};
        if constexpr (kIndex) i = load(index + k * L);
        Vec<A> value[R];
        for (int u = 0; u < R; ++u) {
          Vec<A> v = load(row + u * stride + l, tag);  // [R, lanes]
          if constexpr (kScaled) v = v * scale[u];
          value[u] = v;
          VecInt<A> greater = v > m;
          m = greater ? v : m;
          if constexpr (kIndex) i = greater ? splat_int<A>(r + u) : i;
        }
        store(part + k * L, load(part + k * L) + sum_block(value));
        store(max + k * L, m);
        if constexpr (kIndex) store(index + k * L, i);
        also(r, l, tag, rows);
      });
    });
    fold(slots, part, sum);
  });
}

// Settles the NaN lanes of a reduce_columns and hands over each slot: done(first lane, slot, tag).
template <bool kScaled, class T, class A, class Done>
void finish_columns(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                    const A* row_scale, A* sum, A* max, typename Lanes<A>::Int* index, Done done) {
  constexpr int L = kLanes<A>;
  for_slots(slots, [&](int64_t l, int64_t k, auto tag) {
    Vec<A> s = load(sum + k * L);
    if (any_lane<A>(s != s)) {
      int lanes = slots.partial && k == slots.full ? slots.tail_count : L;
      for (int i = 0; i < lanes; ++i) {
        if (s[i] == s[i]) continue;
        Extremum<A> e{s[i], max[k * L + i], index[k * L + i] - r0};
        settle_nan(e, r1 - r0, [&](int64_t r) {
          A v = load_one(x + (r0 + r) * stride + l + i);
          return kScaled ? v * row_scale[r0 + r] : v;
        });
        max[k * L + i] = e.max;
        index[k * L + i] = typename Lanes<A>::Int(e.index + r0);
      }
    }
    done(l, k, tag);
  });
}

// With t = x * dy: row_out[r] = sum over lanes of t * lane_weight, and per slot
// lane_out += sum over rows of t * row_weight, by way of `part` (zeros before and after).
template <class T, class A>
void weigh_product(const T* x, const T* dy, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                   const A* row_weight, const A* lane_weight, A* row_out, A* part, A* lane_out) {
  constexpr int L = kLanes<A>;
  for_chunks(r0, r1, [&](int64_t c0, int64_t c1) {
    for_blocks(c0, c1, [&](int64_t r, auto rows) {
      constexpr int R = decltype(rows)::value;
      const int64_t offset = r * stride;
      Vec<A> weight[R], acc[R], total[R];
      for (int u = 0; u < R; ++u) {
        weight[u] = splat<A>(row_weight[r + u]);
        acc[u] = total[u] = Vec<A>{};
      }
      for_slots(slots, [&](int64_t l, int64_t k, auto tag) {
        prefetch_next<T, R>(x + offset + l, stride);
        prefetch_next<T, R>(dy + offset + l, stride);
        Vec<A> lane = load(lane_weight + l), product[R];
        for (int u = 0; u < R; ++u) {
          Vec<A> t =
              load(x + offset + u * stride + l, tag) * load(dy + offset + u * stride + l, tag);  // [R, lanes]
          acc[u] += only_fresh(t * lane, tag, Vec<A>{});
          product[u] = t * weight[u];
        }
        store(part + k * L, load(part + k * L) + sum_block(product));
        join_chain(k, acc, total);
      });
      A sum[R];
      for (int u = 0; u < R; ++u) total[u] += acc[u];
      sum_lanes<A>(total, sum);
      for (int u = 0; u < R; ++u) row_out[r + u] = sum[u];
    });
    fold(slots, part, lane_out);
  });
}

// row_out[r] += sum over lanes of f(x, row, first lane, u) for the rows [r0, r1).
template <class T, class A, class F>
CBAM_INLINE void sum_rows(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                          A* row_out, F f) {
  for_blocks(r0, r1, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    const T* row = x + r * stride;
    Vec<A> acc[R], total[R];
    for (int u = 0; u < R; ++u) acc[u] = total[u] = Vec<A>{};
    for_slots(slots, [&](int64_t l, int64_t k, auto tag) {
      for (int u = 0; u < R; ++u) {
        Vec<A> v = load(row + u * stride + l, tag);  // [R, lanes]
        acc[u] += only_fresh(f(v, r + u, l), tag, Vec<A>{});
      }
      join_chain(k, acc, total);
    });
    A sum[R];
    for (int u = 0; u < R; ++u) total[u] += acc[u];
    sum_lanes<A>(total, sum);
    for (int u = 0; u < R; ++u) row_out[r + u] += sum[u];
  });
}

// Per slot, lane_out += sum over the rows [r0, r1) of f(x, row, first lane).
template <class T, class A, class F>
CBAM_INLINE void sum_columns(const T* x, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                             A* lane_out, F f) {
  constexpr int L = kLanes<A>;
  for_blocks(r0, r1, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    const T* row = x + r * stride;
    for_slots(slots, [&](int64_t l, int64_t k, auto tag) {
      Vec<A> part[R];
      for (int u = 0; u < R; ++u) part[u] = f(load(row + u * stride + l, tag), r + u, l);  // [R, lanes]
      store(lane_out + k * L, load(lane_out + k * L) + sum_block(part));
    });
  });
}

// out = f(in, row, first lane) for one block of rows and one slot, [R, lanes].
template <Write kWrite, class T, class Tag, class Block, class F>
CBAM_INLINE void map_block(const T* in, T* out, int64_t stride, int64_t r, int64_t l, Tag tag, Block, F f) {
  constexpr int R = Block::value;
  const int64_t offset = r * stride + l;
  Vec<Acc<T>> result[R];  // all of them before the first store, so that what f loads per lane is loaded once
  for (int u = 0; u < R; ++u) result[u] = f(load(in + offset + u * stride, tag), r + u, l, tag);
  for (int u = 0; u < R; ++u) write<kWrite>(out + offset + u * stride, result[u], tag);
}

// The same over the rows [r0, r1).
template <Write kWrite, class T, class A, class F>
CBAM_INLINE void map_rows(const T* in, T* out, int64_t stride, int64_t r0, int64_t r1, const Slots<A>& slots,
                          F f) {
  for_blocks(r0, r1, [&](int64_t r, auto rows) {
    for_slots(slots, [&](int64_t l, int64_t, auto tag) {
      prefetch_next<T, decltype(rows)::value>(in + r * stride + l, stride);
      map_block<kWrite>(in, out, stride, r, l, tag, rows, f);
    });
  });
}

// Copies slot-ordered state to its lanes; `out` has room for a whole last slot.
template <class A>
void unslot(const Slots<A>& slots, const A* state, A* out) {
  for_slots(slots, [&](int64_t l, int64_t k, auto) { store(out + l, load(state + k * kLanes<A>)); });
}
