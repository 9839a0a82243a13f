// The stages of one sample, each on a range of channels or positions, forward and backward.
//
// A tile is a range of positions whose values of x (and dy) fit in the second-level cache. Stages
// that follow each other on a tile find it there; stages that need the whole sample find it in the
// last-level cache. Sums over positions are kept per tile and added in tile order, and every other sum in an
// order of its own too, so that no bit depends on the number of threads.

struct Carver {
  char* base;
  int64_t used = 0;

  template <class U>
  U* take(int64_t count) {
    used = (used + 63) / 64 * 64;
    char* at = base ? base + used : nullptr;
    used += count * int64_t(sizeof(U));
    return reinterpret_cast<U*>(at);
  }
};

// Arrays of one thread.
template <class A>
struct Worker {
  A *part, *sum, *levels, *max, *flat;  // the first three as in ColumnSums
  typename Lanes<A>::Int* index;
  double* gathered;  // (C)
};

// Arrays of a sample at work: its thread's, or shared where threads share a sample. "[L]" is room for
// a whole vector past the end.
template <class A>
struct Sample {
  A* gate;                          // (C)[L]
  A* s;                             // (P)[L]  spatial gate
  A *q_max, *q_mean;                // (P)[L]
  A* maps[2];                       // padded q_max and q_mean
  A* dz;                            // padded
  A *ds, *dq_max, *dq_mean;         // (P)[L]; dq_max by ties, dq_mean over C
  A* dgate;                         // (tiles, C)[L]
  A *peak, *partition;              // (C)[L]: max and lse pools; partition, dlp, dlse where they are
  A *da, *dm, *dlp, *dlse;          // (C)[L]: gradients of the pools, in the terms of dx
  typename Lanes<A>::Int* q_index;  // (P)[L]
  typename Lanes<A>::Int* p_index;  // (C)[L]
  int64_t n;
};

// Arrays of the whole call.
template <class A>
struct Call {
  uint32_t* phases;                     // of the team
  A *pooled, *gate;                     // (N, K, C), (N, C)
  A* blend;                             // (N, C): the pool that a blended MLP reads
  A *hidden, *hidden_sum;               // (N, M, h) before ReLU, (N, h) after ReLU over the M passes
  A *logits, *dlogits;                  // (N, C)
  A *dhidden, *dpooled;                 // (N, M, h), (N, M, C)
  A* dplanes;                           // (N, 2 taps)
  double* dnorm;                        // (N, 2)
  A *chunk_sum, *chunk_max;             // (chunks of channels, tiles, a tile's slots): the spatial pools of a
  typename Lanes<A>::Int* chunk_index;  // sample that threads share by channels; in backward, where they
                                        // share one that is one tile, chunk_sum has its sums over rows,
  double* maxima;                       // (P) and this, in channels-last, x where the positions' maxima are
  std::vector<Worker<A>> workers;
  std::vector<Sample<A>> samples;  // `group` for each worker, then the shared one
};

// Indices as they are saved, of as many lanes as a vector has.
template <class I, int kCount>
struct IndexVector {
  typedef I type __attribute__((vector_size(sizeof(I) * kCount)));
};

// Lanes [begin, end) of v to their places in to[0, L).
template <class V, class U>
CBAM_INLINE void store_lanes(U* to, V v, int begin, int end) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  if (begin == 0 && end == n) {
    store_bytes(to, v);
  } else {
    for (int i = begin; i < end; ++i) to[i] = v[i];
  }
}

template <class U>
inline int64_t read_index(const void* base, int64_t i) {
  return static_cast<const U*>(base)[i];
}
inline int64_t index_at(const void* base, bool wide, int64_t i) {
  return wide ? read_index<int32_t>(base, i) : read_index<int16_t>(base, i);
}
inline void put_index(void* base, bool wide, int64_t i, int64_t value) {
  if (wide) {
    static_cast<int32_t*>(base)[i] = int32_t(value);
  } else {
    static_cast<int16_t*>(base)[i] = int16_t(value);
  }
}

template <class A>
inline void put_indices(void* base, bool wide, int64_t i, VecInt<A> v, int begin, int end) {
  if (wide) {
    store_lanes(static_cast<int32_t*>(base) + i,
                __builtin_convertvector(v, typename IndexVector<int32_t, kLanes<A>>::type), begin, end);
  } else {
    store_lanes(static_cast<int16_t*>(base) + i,
                __builtin_convertvector(v, typename IndexVector<int16_t, kLanes<A>>::type), begin, end);
  }
}

template <class T, bool kChannelsLast>
struct Block {
  using A = Acc<T>;
  using Int = typename Lanes<A>::Int;
  static constexpr int L = kLanes<A>;
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  const Problem& p;
  const Padded pad;
  const bool backward;
  const int pools_count, passes;  // rows of pooled; MLP passes
  const bool by_rows;
  const int64_t tile, tiles;
  const bool by_chunks;
  const int64_t period;  // of map_flat, 0 where a tile is not all of a sample
  const int64_t group;
  const bool together;
  const bool streams;
  Call<A> call;

  static int count_pools(int pools) { return __builtin_popcount(pools & 15); }

  // Positions whose x, and in backward dy, take 192 KiB each: two tiles of them are at work, and what is
  // written beside them takes as much again of a second-level cache of 1 or 2 MiB. (Measured on a Xeon with
  // 2 MiB, (256, 56, 56): forward 0.8 of its time with tiles of 512 KiB, backward 0.85 of that with 2 MiB.)
  // Not so many that a sum over a tile, one value after the other, loses more than the sum over tiles, or
  // that what is kept per position crowds the first-level cache. Samples that are small altogether are one
  // tile: long runs of a row serve memory better than a second read from cache ((512, 28, 28) backward: 5 %
  // in cache and up to 15 % from memory; forward, where map_flat takes them: 15 %, 10 to 20 %); but not
  // forward in channels-last, where a tile is a run of memory already (0.9 of the time in training), and not
  // forward where that leaves the threads that share a remaining sample without a part of it. In backward
  // sums over positions go by tiles, so that tiles which hung on threads or batch would change dx's bits:
  // threads that share a sample of one tile have rows of it (by_chunks).
  static int64_t tile_positions(const Problem& p, bool backward) {
    const int64_t bytes = p.C * int64_t(sizeof(T)) * (backward ? 2 : 1), mebi = 1 << 20;
    const bool alone = backward || p.N % p.threads == 0 || p.N > 16 * p.threads || shares_rows(p, backward);
    if (alone && (backward || !kChannelsLast) && p.P <= 2048 &&
        bytes * p.P <= (backward ? 4 * mebi : 2 * mebi))
      return p.P;
    const int64_t line = 64 / int64_t(sizeof(T));  // whole lines of memory, half a line is slow to stream
    const int64_t least = kChannelsLast && !alone ? 16 : 64;  // of a 7x7 map, threads have a part each
    int64_t positions = std::max<int64_t>(mebi * 3 / 16 / (p.C * int64_t(sizeof(T))) / line * line, least);
    positions = std::min<int64_t>(positions, 2048);
    // Of equal size, and at most a quarter larger than that: a short last tile takes a line here and there.
    const int64_t tiles = std::max<int64_t>(1, (4 * p.P + 3 * positions) / (4 * positions));
    return std::min((p.P / tiles + line) / line * line, p.P);
  }

  static int64_t count_chunks(const Problem& p) { return (p.C + kChunk - 1) / kChunk; }

  // Whether threads that share a sample have channels of their own from the first pass to the last, so that
  // what one has read is in its cache when it reads it again. (Split by positions, all but the channel pools,
  // two threads took longer than one: (1024, 14, 14), 115 us against 82; by channels 62.)
  static bool shares_rows(const Problem& p, bool backward) {
    return !kChannelsLast && !backward && p.N % p.threads != 0 && count_chunks(p) >= p.threads;
  }

  // A last tile of less than a vector joins the one before it: its vector would reach back over
  // positions that another thread may own, or that are already final.
  static int64_t count_tiles(int64_t P, int64_t tile) { return std::max<int64_t>(1, (P + tile - L) / tile); }

  // Rows as many as end where a vector ends, unless their lanes would crowd the first-level cache.
  static int64_t flat_period(int64_t P) {
    const int64_t aligned = P / std::gcd(P, int64_t(L)) * L;
    return aligned * int64_t(sizeof(A)) <= 6 << 10 ? aligned : P;
  }

  // Samples that a thread takes through the pools together, so that each load of the MLP's weights
  // serves all of them: only where weights weigh against a sample.
  static int64_t group_size(const Problem& p, bool backward) {
    if (!p.pools || !p.w2) return 1;
    const int64_t weights = (p.hidden ? 2 * p.hidden : p.C) * p.C * int64_t(sizeof(A));
    const int64_t sample = p.C * p.P * int64_t(sizeof(T)) * (backward ? 2 : 1);
    const int64_t wanted = std::min((4 * weights + sample - 1) / sample, (int64_t(4) << 20) / sample);
    const int64_t share = std::max<int64_t>(1, p.N / p.threads), most = std::clamp<int64_t>(wanted, 1, share);
    const int64_t groups = (share + most - 1) / most;
    return (share + groups - 1) / groups;  // of equal size, so that no thread waits for another's remainder
  }

  // Whether whole vectors of the output can bypass the caches, and what a step passes through them, x and y
  // or in training x, y, dy and dx, takes more than two thirds of the last one. A cached y comes to be read
  // before it is written, and drives x out that backward will read. Measured with 32 MiB of cache: inference
  // at 6 MiB of x loses a fifth by it and gains a tenth at 12 MiB; a training step loses 5 % at 3 MiB and
  // gains 15 to 20 % at 6. Where the last level is slow (caches.h), outputs stay in cache if x and y fit the
  // threads' second levels, and in backward twice that: at 3 MiB of x and 4 of second levels forward takes
  // 0.8 to 0.9 of the time streamed, and backward 0.95 at 14x14, but 1.1 at 7x7, where dx_as pays for it.
  static bool can_stream(const Problem& p, bool backward, int64_t tiles) {
    const int64_t whole = !kChannelsLast && tiles == 1 ? p.C : 1, width = L * int64_t(sizeof(T));
    const int64_t row = whole * (kChannelsLast ? p.C : p.P) * int64_t(sizeof(T));
    const int64_t tensors = backward || p.pooled || p.spatial_gate ? 4 : 2;
    const int64_t size = p.N * p.C * p.P * int64_t(sizeof(T));
    return row % width == 0 && reinterpret_cast<uintptr_t>(p.out) % size_t(width) == 0 &&
           (p.slow_last_level ? (backward ? 1 : 2) * size > p.threads * p.second_level
                              : 3 * tensors * size > 2 * p.cache_bytes);
  }

  // Of the MLP's matrices; none in a call that only scales.
  static int64_t matrix_bytes(const Problem& p) {
    if (!p.w2) return 0;
    const int64_t element = p.matrices_as_x ? int64_t(sizeof(T)) : int64_t(sizeof(A));
    return (p.hidden ? 2 * p.hidden : p.C) * p.C * element;
  }

  // Whether threads take their groups of samples through a forward at the same time and share the MLP of all
  // of them, each with rows of the matrices of its own: where those fill a second-level cache, so that every
  // thread would read all of them from beyond its own. (Measured with two threads, (2048, 7, 7), with over
  // without: on a Xeon with 2 MiB, the MLP 0.82 to 0.94 of the time, of which a part goes into waiting:
  // forward 0.94 to 0.98; on Zen 4 with 1 MiB, whose last level is faster, 0.92 to 1.04, and 1.00 to 1.03.
  // Backward, whose products are by columns, took 0.98 to 1.02 and 1.10 when it shared them too. At (1024,
  // 14, 14) 2 to 3 % longer.) Samples of which a group has one weigh more than the matrices.
  static bool shares_mlp(const Problem& p, bool backward, int64_t group) {
    return !backward && p.pools && p.threads > 1 && group > 1 && matrix_bytes(p) >= p.second_level;
  }

  Block(const Problem& problem, bool is_backward, Carver& carver)
      : p(problem),
        pad(problem),
        backward(is_backward),
        pools_count(count_pools(problem.pools)),
        passes(problem.pools & kBlend ? 1 : count_pools(problem.pools)),
        by_rows(shares_rows(problem, is_backward)),
        tile(tile_positions(problem, is_backward)),
        tiles(count_tiles(problem.P, tile)),
        by_chunks(is_backward && tiles == 1 && problem.N % problem.threads != 0 && row_chunks() > 1),
        period(kChannelsLast || tiles > 1 || problem.P < L ? 0 : flat_period(problem.P)),
        group(group_size(problem, is_backward)),
        together(shares_mlp(problem, is_backward, group)),
        streams(can_stream(problem, is_backward, tiles)) {
    carve(carver);
  }

  void carve(Carver& c) {
    const int64_t N = p.N, C = p.C, P = p.P, h = p.hidden, M = passes;
    call.phases = c.take<uint32_t>(phase_words());
    call.pooled = p.pooled ? static_cast<A*>(p.pooled) : c.take<A>(N * pools_count * C);
    call.gate = p.channel_gate ? static_cast<A*>(p.channel_gate) : c.take<A>(p.pools ? N * C : 0);
    if (p.pools) {
      call.blend = p.pools & kBlend || (p.hidden == 0) ? c.take<A>(N * C) : nullptr;
      call.hidden = p.hidden_layer ? static_cast<A*>(p.hidden_layer) : c.take<A>(N * M * h);
      call.hidden_sum = c.take<A>(N * h);
      call.logits = c.take<A>(N * C);
      if (backward) {
        call.dlogits = c.take<A>(N * C);
        call.dhidden = c.take<A>(N * M * h);
        call.dpooled = c.take<A>(N * M * C);
      }
    }
    if (backward && p.spatial) {
      call.dplanes = c.take<A>(N * 2 * pad.taps());
      call.dnorm = c.take<double>(N * 2);
    }
    if (by_rows && p.spatial) {
      call.chunk_sum = c.take<A>(count_chunks(p) * tiles * chunk_lanes());
      call.chunk_max = c.take<A>(count_chunks(p) * tiles * chunk_lanes());
      call.chunk_index = c.take<Int>(count_chunks(p) * tiles * chunk_lanes());
    }
    if (by_chunks) {
      call.chunk_sum = c.take<A>(row_chunks() * chunk_lanes());
      if (kChannelsLast) call.maxima = c.take<double>(P);
    }
    const int64_t lanes = std::max(C, tile + L) + L, positions = std::max(P, period) + L, channels = C + L;
    const int64_t padded = p.spatial ? pad.size + 8 * L : 0;
    for (int i = 0; i < p.threads; ++i) {
      Worker<A> w{};
      w.part = c.take<A>(lanes);
      w.sum = c.take<A>(lanes);
      if (kChannelsLast && p.P > ColumnSums<A>::kJoined * (backward ? kShare : kChunk))
        w.levels = c.take<A>(ColumnSums<A>::kLevels * lanes);
      w.max = c.take<A>(lanes);
      w.index = c.take<Int>(lanes);
      w.gathered = c.take<double>(backward ? C : 0);
      w.flat = c.take<A>(2 * padded);
      call.workers.push_back(w);
    }
    for (int64_t i = 0; i <= p.threads * group; ++i) {
      Sample<A> s{};
      s.gate = c.take<A>(channels);
      s.s = c.take<A>(positions);
      s.peak = c.take<A>(channels);
      if (p.pools & kLse) s.partition = c.take<A>(channels);
      s.q_index = c.take<Int>(positions);
      if (p.spatial) {
        s.q_max = c.take<A>(positions);
        s.q_mean = c.take<A>(positions);
        s.maps[0] = c.take<A>(padded);
        s.maps[1] = c.take<A>(padded);
      }
      if (backward) {
        s.dz = c.take<A>(padded);
        s.ds = c.take<A>(positions);
        s.dq_max = c.take<A>(positions);
        s.dq_mean = c.take<A>(positions);
        s.dgate = c.take<A>(tiles * channels);
        s.da = c.take<A>(channels);
        s.dm = c.take<A>(channels);
        if (p.pools & kLp) s.dlp = c.take<A>(channels);
        if (p.pools & kLse) s.dlse = c.take<A>(channels);
        s.p_index = c.take<Int>(channels);
      }
      call.samples.push_back(s);
    }
  }

  // Borders of the padded maps are zero and stay so; without a gate, its array holds ones.
  void prepare() {
    const int64_t padded = p.spatial ? pad.size + 8 * L : 0;
    for (Sample<A>& s : call.samples) {
      if (p.spatial) {
        std::fill_n(s.maps[0], padded, A(0));
        std::fill_n(s.maps[1], padded, A(0));
      }
      if (!p.spatial) std::fill_n(s.s, std::max(p.P, period) + L, A(1));
      if (!p.pools) std::fill_n(s.gate, p.C + L, A(1));
      if (backward) {
        std::fill_n(s.dz, padded, A(0));
        if (!p.spatial) {
          std::fill_n(s.dq_max, p.P + L, A(0));
          std::fill_n(s.dq_mean, p.P + L, A(0));
          std::fill_n(s.q_index, p.P + L, Int(-1));
        }
        if (!p.pools) std::fill_n(s.da, p.C + L, A(0));
      }
    }
  }

  const T* x(int64_t n) const { return static_cast<const T*>(p.x) + n * p.C * p.P; }
  const T* dy(int64_t n) const { return static_cast<const T*>(p.dy) + n * p.C * p.P; }
  T* out(int64_t n) const { return static_cast<T*>(p.out) + n * p.C * p.P; }
  int64_t element(int64_t c, int64_t pos) const { return kChannelsLast ? pos * p.C + c : c * p.P + pos; }
  int64_t tile_end(int64_t t) const { return t + 1 == tiles ? p.P : (t + 1) * tile; }
  A* tile_dgate(const Sample<A>& s, int64_t t) const { return s.dgate + t * (p.C + L); }

  // The samples of which each thread can have as many as the others.
  int64_t even() const { return p.N / p.threads * p.threads; }
  // Samples that all threads take at the same time where they share the MLP, and such rounds.
  int64_t round() const { return p.threads * group; }
  int64_t rounds() const { return together ? (even() + round() - 1) / round() : 0; }
  // At most so many phases draw samples, share one, take a round of them, or end the call.
  static constexpr int64_t kPhases = 16;
  int64_t phase_words() const { return Member::words(p.threads, kPhases * (p.N % p.threads + 2 + rounds())); }
  // Room for the slots of a row of a tile.
  int64_t chunk_lanes() const { return ((kChannelsLast ? p.C : tile) / L + 2) * L; }
  // Chunks of a sample's rows, in backward, of one that is one tile.
  int64_t row_chunks() const { return ((kChannelsLast ? p.P : p.C) + kShare - 1) / kShare; }
  int64_t chunk_end(int64_t k) const { return std::min((k + 1) * kShare, kChannelsLast ? p.P : p.C); }
  A* chunk_part(int64_t k) const { return call.chunk_sum + k * chunk_lanes(); }

  // body(member) by every member of a team of all threads.
  template <class F>
  void run_team(F body) const {
    std::fill_n(call.phases, phase_words(), 0u);
    run_parallel(p.threads, [&](int64_t i) {
      Member member(call.phases, p.threads, i);
      body(member);
      stream_fence();
    });
  }

  template <class F>
  void run_parallel(int64_t count, F f) const {
    if (count <= 1) {
      if (count == 1) f(0);
      return;
    }
    p.parallel(
        count,
        [](int64_t begin, int64_t end, void* context) {
          for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(context))(i);
        },
        &f);
  }

  // ---- channel gate

  // Pools of the channels [c0, c1); c0 is a multiple of L or 0.
  void pool(int64_t n, int64_t c0, int64_t c1, Worker<A>& w, Sample<A>& s) const {
    const T* xs = x(n);
    auto done = [&](int64_t c, int begin, int end, const Extrema<A>& e) {
      A* row = call.pooled + n * pools_count * p.C + c;
      if (p.pools & kAvg) store_lanes(row, e.sum / A(p.P), begin, end), row += p.C;
      if (p.pools & kMax) store_lanes(row, e.max, begin, end);
      store_lanes(s.peak + c, e.max, begin, end);
      if (p.pool_index) put_indices<A>(p.pool_index, p.wide_pool_index, n * p.C + c, e.index, begin, end);
    };
    auto indexed = [&](auto index) {
      constexpr bool kIndex = decltype(index)::value;
      if constexpr (kChannelsLast) {
        auto slots = make_slots<A>(c1 - c0, c0);
        reduce_columns<false, kIndex>(xs + c0, p.C, 0, p.P, slots, (const A*)nullptr,
                                      ColumnSums<A>{w.part, w.sum, w.levels}, w.max, w.index);
        finish_columns<false>(xs + c0, p.C, p.P, slots, (const A*)nullptr, w.sum, w.max, w.index,
                              [&](int64_t l, auto, const Extrema<A>& e) {
                                // From c0 on: what lies before belongs to another thread, which may have put
                                // the number of its ties in place of the index.
                                done(c0 + l, int(std::max<int64_t>(0, -l)),
                                     int(std::min<int64_t>(L, c1 - c0 - l)), e);
                              });
      } else {
        reduce_rows<false, kIndex>(xs, p.P, c0, c1, make_slots<A>(p.P, 0), p.P, (const A*)nullptr, true,
                                   [&](int64_t c, int rows, const Extrema<A>& e) { done(c, 0, rows, e); });
      }
    };
    p.pool_index ? indexed(std::true_type{}) : indexed(std::false_type{});
    if (p.pools & (kLp | kLse)) norms(n, c0, c1, w, s);
    if (p.pool_index && p.ties == kSplit) {
      count_positions(n, c0, c1, w, s);
    }
  }

  // Sum over positions of f(x, max of the channel), for the channels [c0, c1), into w.sum[c - c0].
  template <class F>
  void sum_positions(int64_t n, int64_t c0, int64_t c1, Worker<A>& w, const A* per_channel, F f) const {
    if constexpr (kChannelsLast) {
      auto slots = make_slots<A>(c1 - c0, c0);
      sum_columns(x(n) + c0, p.C, 0, p.P, slots, ColumnSums<A>{w.part, w.max, w.levels}, kChunk,
                  [&](Vec<A> v, int64_t, int64_t l) { return f(v, load(per_channel + c0 + l)); });
      // Each lane from the slot that it would have in any range of channels: two need not round alike.
      for_slots(slots, [&](int64_t l, int64_t k, auto) {
        const int first = k == slots.full && !slots.partial ? L - slots.tail_count : 0;
        for (int i = first; i < L; ++i) w.sum[l + i] = w.max[k * L + i];
      });
    } else {
      std::fill_n(w.sum, c1 - c0, A(0));
      sum_rows(x(n) + c0 * p.P, p.P, 0, c1 - c0, make_slots<A>(p.P, 0), w.sum,
               [&](Vec<A> v, int64_t r, int64_t) { return f(v, splat<A>(per_channel[c0 + r])); });
    }
  }

  void norms(int64_t n, int64_t c0, int64_t c1, Worker<A>& w, Sample<A>& s) const {
    A* row = call.pooled + n * pools_count * p.C + (__builtin_popcount(p.pools & (kAvg | kMax))) * p.C;
    if (p.pools & kLp) {
      sum_positions(n, c0, c1, w, s.peak, [](Vec<A> v, Vec<A>) { return v * v; });
      for (int64_t c = c0; c < c1; ++c) row[c] = std::sqrt(w.sum[c - c0]);
      row += p.C;
    }
    if (p.pools & kLse) {
      A* origin = s.partition;  // what is subtracted before exp
      for (int64_t c = c0; c < c1; ++c)
        origin[c] = std::isfinite(s.peak[c]) || s.peak[c] != s.peak[c] ? s.peak[c] : A(0);
      sum_positions(n, c0, c1, w, origin, [](Vec<A> v, Vec<A> m) { return exp(v - m); });
      for (int64_t c = c0; c < c1; ++c) row[c] = origin[c] + std::log(w.sum[c - c0]);
    }
  }

  void count_positions(int64_t n, int64_t c0, int64_t c1, Worker<A>& w, Sample<A>& s) const {
    sum_positions(n, c0, c1, w, s.peak, [](Vec<A> v, Vec<A> m) { return v == m ? splat<A>(1) : Vec<A>{}; });
    for (int64_t c = c0; c < c1; ++c)
      put_index(p.pool_index, p.wide_pool_index, n * p.C + c, int64_t(w.sum[c - c0]));
  }

  // What the MLP reads in each pass: (N, M, C).
  const A* mlp_input() const { return call.blend ? call.blend : call.pooled; }

  // The channels [c0, c1) of it for the samples [n0, n1), where it is not what the pools left.
  void blend(int64_t n0, int64_t n1, int64_t c0, int64_t c1) const {
    for (int64_t n = n0; call.blend && n < n1; ++n) {
      const A* rows = call.pooled + n * pools_count * p.C;
      for (int64_t c = c0; c < c1; ++c) {
        A u = 0;
        for (int k = 0; k < pools_count; ++k) u += rows[k * p.C + c];
        call.blend[n * p.C + c] = p.pools & kBlend ? A(0.5) * rows[c] + A(0.5) * rows[p.C + c] : u;
      }
    }
  }

  // f(w) with one of the MLP's matrices as what it is.
  template <class F>
  void with_matrix(const void* w, F f) const {
    if (std::is_same_v<T, A> || !p.matrices_as_x) {
      f(static_cast<const A*>(w));
    } else {
      f(static_cast<const T*>(w));
    }
  }

  // Units [j0, j1) of the MLP's first layer for the samples [n0, n1); in backward it is at hand.
  void mlp_hidden(int64_t n0, int64_t n1, int64_t j0, int64_t j1) const {
    const int64_t h = p.hidden, M = passes;
    const A* b1 = backward ? nullptr : static_cast<const A*>(p.b1);
    if (!backward) {
      with_matrix(p.w1, [&](auto* w1) {
        matvec(w1 + j0 * p.C, j1 - j0, p.C, mlp_input() + n0 * M * p.C, p.C, int((n1 - n0) * M),
               call.hidden + n0 * M * h + j0, h);
      });
    }
    for (int64_t n = n0; n < n1; ++n) {
      for (int64_t j = j0; j < j1; ++j) {
        A total = 0;
        for (int64_t k = 0; k < M; ++k) {
          A& v = call.hidden[(n * M + k) * h + j];
          if (b1) v += b1[j];
          total += relu(v);
        }
        call.hidden_sum[n * h + j] = total;
      }
    }
  }

  // Gates of the channels [c0, c1). The second layer is linear: one pass on the sum.
  void mlp_gate(int64_t n0, int64_t n1, int64_t c0, int64_t c1) const {
    const A* in = p.hidden ? call.hidden_sum : call.blend;
    const int64_t width = p.hidden ? p.hidden : p.C;
    const A* b2 = static_cast<const A*>(p.b2);
    with_matrix(p.w2, [&](auto* w2) {
      matvec(w2 + c0 * width, c1 - c0, width, in + n0 * width, width, int(n1 - n0),
             call.logits + n0 * p.C + c0, p.C);
    });
    for (int64_t n = n0; n < n1; ++n) {
      A* l = call.logits + n * p.C;
      for (int64_t c = c0; b2 && c < c1; ++c) l[c] += A(passes) * b2[c];
      sigmoid_all(l + c0, call.gate + n * p.C + c0, c1 - c0);
    }
  }

  // Channel gates of the samples [n0, n1), whose pools are blended.
  void mlp(int64_t n0, int64_t n1) const {
    mlp_hidden(n0, n1, 0, p.hidden);
    mlp_gate(n0, n1, 0, p.C);
  }

  static void sigmoid_all(const A* z, A* s, int64_t count) {
    int64_t i = 0;
    for (; i + L <= count; i += L) store(s + i, sigmoid<A>(load(z + i)));
    if (i < count) store_first(s + i, sigmoid<A>(load_first(z + i, int(count - i))), int(count - i));
  }

  void load_gate(int64_t n, Sample<A>& s) const {
    s.n = n;
    if (p.pools) std::copy_n(call.gate + n * p.C, p.C, s.gate);
  }

  // ---- spatial gate

  // Pools over channels of gated x on tile t, into the padded maps and what is saved. Along with it,
  // where memory is busy with reads alone, the output of tile `done` is written, if there is one.
  void spatial_pool(int64_t t, int64_t done, Worker<A>& w, Sample<A>& s) const {
    if (done < 0) {
      spatial_pool_and(t, w, s, Nothing{});
    } else if (tile_end(done) - done * tile != tile_end(t) - t * tile) {
      spatial_pool_and(t, w, s, Nothing{});
      apply(done, s);
    } else {
      with_output(s, [&](auto write_as, auto f) {
        constexpr Write kWrite = decltype(write_as)::value;
        const T* in = x(s.n);
        T* to = out(s.n);
        if constexpr (kChannelsLast) {
          auto slots = make_slots<A>(p.C, 0);
          const int64_t shift = (done - t) * tile;
          spatial_pool_and(t, w, s, [=](int64_t begin, int64_t end) {
            map_rows<kWrite>(in, to, p.C, begin + shift, end + shift, slots, f);
          });
        } else {
          const int64_t q0 = done * tile, P = p.P;
          spatial_pool_and(t, w, s,
                           [=](int64_t r, int64_t step, int64_t l, auto tag, auto rows) CBAM_INLINE_LAMBDA {
                             constexpr int R = decltype(rows)::value;
                             map_block<kWrite>(RowPointers<const T, R>(in, P, r, step),
                                               RowPointers<T, R>(to, P, r, step), r, step, q0 + l, tag, f);
                           });
        }
      });
    }
  }

  template <class Also>
  void spatial_pool_and(int64_t t, Worker<A>& w, Sample<A>& s, Also also) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    const T* xs = x(s.n);
    auto indexed = [&](auto with_index) {
      constexpr bool kIndex = decltype(with_index)::value;
      if constexpr (kChannelsLast) {
        auto done = [&](int64_t pos, int rows, const Extrema<A>& e) {
          store_lanes(s.q_max + pos, e.max, 0, rows);
          store_lanes(s.q_mean + pos, e.sum / A(p.C), 0, rows);
          if (kIndex) store_lanes(s.q_index + pos, e.index, 0, rows);
        };
        const bool fetch = p.C * p.P * int64_t(sizeof(T)) > p.second_level;
        reduce_rows<true, kIndex>(xs, p.C, p0, p1, make_slots<A>(p.C, 0), p.C, s.gate, fetch, done, also);
      } else {
        auto slots = make_slots<A>(p1 - p0, p0);
        reduce_columns<true, kIndex>(xs + p0, p.P, 0, p.C, slots, s.gate,
                                     ColumnSums<A>{w.part, w.sum, nullptr}, w.max, w.index, also);
        finish_maps<kIndex>(t, slots, w, s);
      }
    };
    p.spatial_index ? indexed(std::true_type{}) : indexed(std::false_type{});
    save_maps(t, w, s);
  }

  // The maps of tile t from the sums and maxima over channels, in slot order.
  template <bool kIndex>
  void finish_maps(int64_t t, const Slots<A>& slots, Worker<A>& w, Sample<A>& s) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    finish_columns<true>(x(s.n) + p0, p.P, p.C, slots, s.gate, w.sum, w.max, w.index,
                         [&](int64_t l, auto, const Extrema<A>& e) {
                           const int end = int(std::min<int64_t>(L, p1 - p0 - l));
                           store_lanes(s.q_max + p0 + l, e.max, 0, end);
                           store_lanes(s.q_mean + p0 + l, e.sum / A(p.C), 0, end);
                           if (kIndex) store_lanes(s.q_index + p0 + l, e.index, 0, end);
                         });
  }

  // Spatial pools over one chunk of channels, at all positions.
  void pool_chunk(int64_t k, Worker<A>& w, const Sample<A>& s) const {
    const int64_t c0 = k * kChunk, c1 = std::min(c0 + kChunk, p.C);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t p0 = t * tile, at = (k * tiles + t) * chunk_lanes();
      auto indexed = [&](auto with_index) {
        reduce_columns<true, decltype(with_index)::value>(
            x(s.n) + p0, p.P, c0, c1, make_slots<A>(tile_end(t) - p0, p0), s.gate,
            ColumnSums<A>{w.part, call.chunk_sum + at, nullptr}, call.chunk_max + at, call.chunk_index + at);
      };
      p.spatial_index ? indexed(std::true_type{}) : indexed(std::false_type{});
    }
  }

  // The maps of tile t from those of all chunks, in the order in which one thread adds them up.
  void merge_chunks(int64_t t, Worker<A>& w, Sample<A>& s) const {
    auto slots = make_slots<A>(tile_end(t) - t * tile, t * tile);
    for (int64_t i = 0; i < slots.size() * L; i += L) {
      Vec<A> sum{}, max = splat<A>(-kInfinity);
      VecInt<A> index{};
      for (int64_t k = 0; k < count_chunks(p); ++k) {
        const int64_t at = (k * tiles + t) * chunk_lanes() + i;
        const Vec<A> higher = load(call.chunk_max + at);
        sum += load(call.chunk_sum + at);
        index = higher > max ? load(call.chunk_index + at) : index;
        max = greater_of(higher, max);
      }
      store(w.sum + i, sum);
      store(w.max + i, max);
      store(w.index + i, index);
    }
    p.spatial_index ? finish_maps<true>(t, slots, w, s) : finish_maps<false>(t, slots, w, s);
    save_maps(t, w, s);
  }

  // The maps of tile t, padded for the convolution, and what backward needs of them.
  void save_maps(int64_t t, Worker<A>& w, Sample<A>& s) const {
    const int64_t p0 = t * tile, p1 = tile_end(t), n = s.n;
    place_maps(p0, p1, s);
    if (!p.spatial_index) return;
    std::copy_n(s.q_max + p0, p1 - p0, static_cast<A*>(p.spatial_pool) + n * 2 * p.P + p0);
    std::copy_n(s.q_mean + p0, p1 - p0, static_cast<A*>(p.spatial_pool) + (n * 2 + 1) * p.P + p0);
    if (p.ties == kSplit) count_channels(t, w, s);
    for (int64_t pos = p0; pos < p1; ++pos) {
      put_index(p.spatial_index, p.wide_spatial_index, n * p.P + pos, s.q_index[pos]);
    }
  }

  void place_maps(int64_t p0, int64_t p1, Sample<A>& s) const {
    pad.for_pieces(p0, p1, [&](int64_t pos, int64_t flat, int64_t count) {
      std::copy_n(s.q_max + pos, count, s.maps[0] + flat + pad.center);
      std::copy_n(s.q_mean + pos, count, s.maps[1] + flat + pad.center);
    });
  }

  // Channels that equal the maximum at each position of the tile.
  void count_channels(int64_t t, Worker<A>& w, Sample<A>& s) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    auto equal = [](Vec<A> v, Vec<A> m) { return v == m ? splat<A>(1) : Vec<A>{}; };
    if constexpr (kChannelsLast) {
      std::fill_n(w.sum, p1 - p0, A(0));
      sum_rows(x(s.n) + p0 * p.C, p.C, 0, p1 - p0, make_slots<A>(p.C, 0), w.sum,
               [&](Vec<A> v, int64_t r, int64_t l) {
                 return equal(v * load(s.gate + l), splat<A>(s.q_max[p0 + r]));
               });
    } else {
      auto slots = make_slots<A>(p1 - p0, p0);
      sum_columns(x(s.n) + p0, p.P, 0, p.C, slots, ColumnSums<A>{w.part, w.max, nullptr}, kChunk,
                  [&](Vec<A> v, int64_t r, int64_t l) {
                    return equal(v * splat<A>(s.gate[r]), load(s.q_max + p0 + l));
                  });
      for_slots(slots, [&](int64_t l, int64_t k, auto) {
        for (int i = 0; i < L && p0 + l + i < p1; ++i) {
          if (l + i >= 0) w.sum[l + i] = w.max[k * L + i];
        }
      });
    }
    for (int64_t pos = p0; pos < p1; ++pos) s.q_index[pos] = Int(w.sum[pos - p0]);
  }

  // Logits of the positions [p0, p1), from the padded maps, into `z`.
  void logits(int64_t p0, int64_t p1, Worker<A>& w, const Sample<A>& s, A* z) const {
    const int64_t i0 = pad.flat(p0), i1 = pad.flat(p1 - 1) + 1;
    A* flat[1] = {w.flat - i0};
    convolve<2, 1>(pad, s.maps, static_cast<const A*>(p.planes), false, i0, i1, flat);
    pad.for_pieces(p0, p1, [&](int64_t pos, int64_t f, int64_t count) {
      for (int64_t i = 0; i < count; ++i) z[pos + i] = A(p.scale) * flat[0][f + i] + A(p.shift);
    });
  }

  // Spatial gate of the positions [p0, p1): from the padded maps, or from given logits.
  void spatial_gate(int64_t p0, int64_t p1, Worker<A>& w, Sample<A>& s, Stage stage) const {
    A* z = p.z ? static_cast<A*>(p.z) + s.n * p.P : s.s;
    if (stage != Stage::kScale) logits(p0, p1, w, s, z);
    if (stage == Stage::kAttention) return;
    sigmoid_all(z + p0, s.s + p0, p1 - p0);
    if (p.spatial_gate) std::copy_n(s.s + p0, p1 - p0, static_cast<A*>(p.spatial_gate) + s.n * p.P + p0);
  }

  template <Write kWrite>
  struct WriteAs {
    static constexpr Write value = kWrite;
  };

  // What map_flat asks of an array of positions, of those in [p0, p1).
  template <class U>
  void repeat(U* a, int64_t p0, int64_t p1) const {
    for (int64_t to = p.P; to + p0 < period + L; to += p.P) {
      std::copy(a + p0, a + std::min(p1, period + L - to), a + to + p0);
    }
  }
  template <class U>
  void repeat(U* a) const {
    repeat(a, 0, p.P);
  }

  // g(how to write, y as a function of x, its rows, first lane and tag), the last pass of the block.
  template <class G>
  void with_output(const Sample<A>& s, G g) const {
    const A *gate = s.gate, *sp = s.s;
    auto plain = [=](Vec<A> v, auto rows, int64_t l, auto) CBAM_INLINE_LAMBDA {
      return kChannelsLast ? v * load(gate + l) * rows(sp) : v * rows(gate) * load(sp + l);
    };
    auto residual = [=](Vec<A> v, auto rows, int64_t l, auto tag)
                        CBAM_INLINE_LAMBDA { return plain(v, rows, l, tag) + v; };
    if (streams) {
      p.residual ? g(WriteAs<Write::kStreamed>{}, residual) : g(WriteAs<Write::kStreamed>{}, plain);
    } else {
      p.residual ? g(WriteAs<Write::kCached>{}, residual) : g(WriteAs<Write::kCached>{}, plain);
    }
  }
  void apply(int64_t t, const Sample<A>& s) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    if (period && p.C * p.P * int64_t(sizeof(T)) > int64_t(1) << 20) {
      // More than a second-level cache holds beside y: from the last channels back, which it still has, so
      // that y pushes out those that it would have lost anyway. ((512, 28, 28), 2 MiB of cache: 396 us
      // to 370.)
      repeat(s.s);
      for (int64_t c1 = p.C, c0; c1 > 0; c1 = c0) {
        c0 = (c1 - 1) / kChunk * kChunk;
        apply_rows(c0, c1, s);
      }
      return;
    }
    // A call that only scales reads x for the first time here.
    const bool fetch = p.spatial && !p.planes;
    with_output(s, [&](auto write_as, auto f) {
      constexpr Write kWrite = decltype(write_as)::value;
      if constexpr (kChannelsLast) {
        map_rows<kWrite>(x(s.n), out(s.n), p.C, p0, p1, make_slots<A>(p.C, 0), f, fetch);
      } else if (period) {
        repeat(s.s);
        map_flat<kWrite>(x(s.n), out(s.n), 0, p.C, p.P, period, f, fetch);
      } else {
        map_rows<kWrite>(
            x(s.n) + p0, out(s.n) + p0, p.P, 0, p.C, make_slots<A>(p1 - p0, p0),
            [=](Vec<A> v, auto rows, int64_t l, auto tag)
                CBAM_INLINE_LAMBDA { return f(v, rows, p0 + l, tag); },
            fetch);
      }
    });
  }

  // The output of the channels [c0, c1), once s.s repeats where map_flat asks for it.
  void apply_rows(int64_t c0, int64_t c1, const Sample<A>& s, bool fetch = false) const {
    if constexpr (!kChannelsLast) {
      const T* in = x(s.n);
      T* to = out(s.n);
      with_output(s, [&](auto write_as, auto f) {
        constexpr Write kWrite = decltype(write_as)::value;
        if (period) return map_flat<kWrite>(in, to, c0, c1, p.P, period, f, fetch);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t p0 = t * tile;
          map_rows<kWrite>(
              in + p0, to + p0, p.P, c0, c1, make_slots<A>(tile_end(t) - p0, p0),
              [=](Vec<A> v, auto rows, int64_t l, auto tag)
                  CBAM_INLINE_LAMBDA { return f(v, rows, p0 + l, tag); },
              fetch);
        }
      });
    }
  }
};
