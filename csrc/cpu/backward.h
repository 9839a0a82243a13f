// Backward of one sample, on top of the stages of block.h.
//
// x and dy are read together once (products), x once more (the rest of the channel gate's gradient)
// and dy once more for dx; the second reads come from cache.

template <class T, bool kChannelsLast>
struct Backward : Block<T, kChannelsLast> {
  using Base = Block<T, kChannelsLast>;
  using Base::Base;
  using Base::call, Base::chunk_end, Base::chunk_part, Base::dy, Base::element, Base::L, Base::load_gate,
      Base::mlp_hidden, Base::out, Base::p, Base::pad, Base::passes, Base::period, Base::place_maps,
      Base::pools_count, Base::repeat, Base::row_chunks, Base::streams, Base::tile, Base::tile_dgate,
      Base::tile_end, Base::tiles, Base::with_matrix, Base::x;
  using typename Base::A;
  using typename Base::Int;

  // The lanes of a tile's rows: its positions, in channels-last all channels.
  Slots<A> lanes_of(int64_t p0, int64_t p1) const {
    return kChannelsLast ? make_slots<A>(p.C, 0) : make_slots<A>(p1 - p0, p0);
  }

  // Brings what forward saved for sample n next to the kernels.
  void load_saved(int64_t n, Sample<A>& s, Stage stage) const {
    load_gate(n, s);
    if (!p.spatial) return;
    std::copy_n(static_cast<const A*>(p.spatial_gate) + n * p.P, p.P, s.s);
    if (stage == Stage::kScale) return;
    const A* q = static_cast<const A*>(p.spatial_pool) + n * 2 * p.P;
    std::copy_n(q, p.P, s.q_max);
    std::copy_n(q + p.P, p.P, s.q_mean);
    place_maps(0, p.P, s);
    for (int64_t i = 0; i < p.P; ++i)
      s.q_index[i] = Int(index_at(p.spatial_index, p.wide_spatial_index, n * p.P + i));
  }

  // ds of tile t, and the tile's part of sum_p dy x s.
  void products(int64_t t, Worker<A>& w, Sample<A>& s) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    const auto slots = lanes_of(p0, p1);
    std::fill_n(w.part, slots.size() * L, A(0));
    std::fill_n(w.sum, slots.size() * L, A(0));
    if constexpr (kChannelsLast) {
      weigh_product(x(s.n), dy(s.n), p.C, p0, p1, slots, s.s, s.gate, s.ds, w.part, w.sum);
    } else {
      weigh_product(x(s.n) + p0, dy(s.n) + p0, p.P, 0, p.C, slots, s.gate, s.s + p0, tile_dgate(s, t), w.part,
                    w.sum);
    }
    put_products(t, slots, w, s);
  }
  void put_products(int64_t t, const Slots<A>& slots, Worker<A>& w, Sample<A>& s) const {
    if constexpr (kChannelsLast) {
      unslot(slots, w.sum, tile_dgate(s, t));
    } else {
      for_slots(slots, [&](int64_t l, int64_t k, auto tag) {
        write<Write::kCached>(s.ds + t * tile + l, load(w.sum + k * L), tag);
      });
    }
  }

  // The same of a sample that is one tile, by chunks of rows: a chunk's part of the sums over rows, which one
  // member then adds up in the order in which `products` does.
  void products_chunk(int64_t k, Worker<A>& w, Sample<A>& s) const {
    const auto slots = lanes_of(0, p.P);
    std::fill_n(w.part, slots.size() * L, A(0));
    std::fill_n(chunk_part(k), slots.size() * L, A(0));
    weigh_product(x(s.n), dy(s.n), kChannelsLast ? p.C : p.P, k * kShare, chunk_end(k), slots,
                  kChannelsLast ? s.s : s.gate, kChannelsLast ? s.gate : s.s,
                  kChannelsLast ? s.ds : tile_dgate(s, 0), w.part, chunk_part(k));
  }
  void merge_products(Worker<A>& w, Sample<A>& s) const {
    const auto slots = lanes_of(0, p.P);
    std::fill_n(w.sum, slots.size() * L, A(0));
    for (int64_t k = 0; k < row_chunks(); ++k) fold(slots, chunk_part(k), w.sum);
    put_products(0, slots, w, s);
  }

  // Gradient of the logits of tile t, into the padded map (times the folded norm's scale).
  void logits_gradient(int64_t t, Sample<A>& s, Stage stage) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    A* given = p.dz ? static_cast<A*>(p.dz) + s.n * p.P : nullptr;
    for (int64_t i = p0; stage != Stage::kAttention && i < p1; ++i) {
      s.ds[i] = s.ds[i] * s.s[i] * (A(1) - s.s[i]);
      if (stage == Stage::kScale) given[i] = s.ds[i];
    }
    if (stage == Stage::kScale) return;
    if (stage == Stage::kAttention) std::copy(given + p0, given + p1, s.ds + p0);
    pad.for_pieces(p0, p1, [&](int64_t pos, int64_t flat, int64_t count) {
      for (int64_t i = 0; i < count; ++i) s.dz[flat + pad.center + i] = A(p.scale) * s.ds[pos + i];
    });
  }

  // dq of the positions [p0, p1); needs dz of the positions around them.
  void maps_gradient(int64_t p0, int64_t p1, Worker<A>& w, Sample<A>& s) const {
    const int64_t i0 = pad.flat(p0), i1 = pad.flat(p1 - 1) + 1;
    A* flat[2] = {w.flat - i0, w.flat + pad.size + 8 * L - i0};
    const A* dz[1] = {s.dz};
    convolve<1, 2>(pad, dz, static_cast<const A*>(p.planes), true, i0, i1, flat);
    pad.for_pieces(p0, p1, [&](int64_t pos, int64_t f, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        A share = p.ties == kSplit ? A(s.q_index[pos + i]) : A(1);
        s.dq_max[pos + i] = flat[0][f + i] / share;
        s.dq_mean[pos + i] = flat[1][f + i] / A(p.C);
      }
    });
  }

  // Adds to the tile's part of dgate what comes through the spatial pools: sum_p x dq.
  void rest_of_gate_gradient(int64_t t, Worker<A>& w, Sample<A>& s) const {
    const int64_t p0 = t * tile, p1 = tile_end(t);
    if constexpr (kChannelsLast) {
      const auto slots = lanes_of(p0, p1);
      sum_rest(p0, p1, slots, ColumnSums<A>{w.part, w.sum, w.levels}, s);
      add_rest(t, slots, w, s);
    } else {
      add_rest(t, 0, p.C, s);
    }
    add_maxima(t, 0, p.C, w, s);
  }

  // Its chunks of a sample that is one tile, and what is left to one member after them.
  void rest_chunk(int64_t k, Worker<A>& w, Sample<A>& s) const {
    if constexpr (kChannelsLast) {
      sum_rest(k * kShare, chunk_end(k), lanes_of(0, p.P), ColumnSums<A>{w.part, chunk_part(k), nullptr}, s);
      for (int64_t pos = k * kShare; p.ties != kSplit && pos < chunk_end(k); ++pos) {
        call.maxima[pos] = at_maximum(pos, s);
      }
    } else {
      add_rest(0, k * kShare, chunk_end(k), s);
      add_maxima(0, k * kShare, chunk_end(k), w, s);
    }
  }
  void merge_rest(Worker<A>& w, Sample<A>& s) const {
    if constexpr (kChannelsLast) {
      const auto slots = lanes_of(0, p.P);
      const ColumnSums<A> sums{w.part, w.sum, w.levels};
      sums.begin(slots);
      for (int64_t k = 0; k < row_chunks(); ++k) sums.join(slots, k, chunk_part(k));
      sums.end(slots);
      add_rest(0, slots, w, s);
      add_maxima(0, 0, p.C, w, s, call.maxima);
    }
  }

  // channels_last: the sum over the positions [p0, p1), in slot order; then to its channels.
  void sum_rest(int64_t p0, int64_t p1, const Slots<A>& slots, const ColumnSums<A>& sums,
                const Sample<A>& s) const {
    if (p.ties == kSplit) {
      sum_columns(x(s.n), p.C, p0, p1, slots, sums, kShare, [&](Vec<A> v, int64_t r, int64_t l) {
        return v * share_of(v * load(s.gate + l), splat<A>(s.q_max[r]), splat<A>(s.dq_max[r]),
                            splat<A>(s.dq_mean[r]));
      });
    } else {
      sum_columns(x(s.n), p.C, p0, p1, slots, sums, kShare,
                  [&](Vec<A> v, int64_t r, int64_t) { return v * s.dq_mean[r]; });
    }
  }
  void add_rest(int64_t t, const Slots<A>& slots, Worker<A>& w, Sample<A>& s) const {
    A* dgate = tile_dgate(s, t);
    unslot(slots, w.sum, w.max);
    for (int64_t c = 0; c < p.C; ++c) dgate[c] += w.max[c];
  }

  // Contiguous: of the channels [c0, c1).
  void add_rest(int64_t t, int64_t c0, int64_t c1, Sample<A>& s) const {
    const int64_t p0 = t * tile;
    const auto slots = lanes_of(p0, tile_end(t));
    if (p.ties == kSplit) {
      sum_rows(x(s.n) + p0, p.P, c0, c1, slots, tile_dgate(s, t), [&](Vec<A> v, int64_t r, int64_t l) {
        return v * share_of(v * s.gate[r], load(s.q_max + p0 + l), load(s.dq_max + p0 + l),
                            load(s.dq_mean + p0 + l));
      });
    } else {
      sum_rows(x(s.n) + p0, p.P, c0, c1, slots, tile_dgate(s, t),
               [&](Vec<A> v, int64_t, int64_t l) { return v * load(s.dq_mean + p0 + l); });
    }
  }

  // What the positions' maxima give to their channels in [c0, c1). Term by term in no favourable order, so in
  // double: with few channels these are long sums. `maxima`: x there, where it is at hand.
  void add_maxima(int64_t t, int64_t c0, int64_t c1, Worker<A>& w, Sample<A>& s,
                  const double* maxima = nullptr) const {
    if (p.ties == kSplit) return;
    A* dgate = tile_dgate(s, t);
    std::fill(w.gathered + c0, w.gathered + c1, 0.0);
    for (int64_t pos = t * tile; pos < tile_end(t); ++pos) {
      const int64_t c = s.q_index[pos];
      if (c < c0 || c >= c1) continue;
      // One expression, or a compiler may round the product in one of two, and bits would hang on threads.
      w.gathered[c] += double(s.dq_max[pos]) * (maxima ? maxima[pos] : at_maximum(pos, s));
    }
    for (int64_t c = c0; c < c1; ++c) dgate[c] += A(w.gathered[c]);
  }
  double at_maximum(int64_t pos, const Sample<A>& s) const {
    return double(load_one(x(s.n) + element(s.q_index[pos], pos)));
  }

  // dq of one element where the maximum's gradient is shared: its share where it equals the maximum.
  // A NaN maximum equals nothing, and its share (x / 0) times 0 is the NaN that amax gives.
  static CBAM_INLINE Vec<A> share_of(Vec<A> gated, Vec<A> max, Vec<A> share, Vec<A> mean) {
    return mean + (gated == max ? share : share * A(0));
  }

  // Gradient of the convolution's weights (the tiles [t0, t1) of taps of both planes) for this sample.
  void planes_gradient(int64_t t0, int64_t t1, const Sample<A>& s) const {
    correlate(pad, s.dz + pad.center, s.maps, t0, t1, call.dplanes + s.n * 2 * pad.taps());
  }

  // Sums over positions of dlogits, and of dlogits times the convolution's output.
  void norm_gradient(Worker<A>& w, const Sample<A>& s) const {
    double* sums = call.dnorm + s.n * 2;
    sums[0] = sums[1] = 0;
    A* flat[1] = {w.flat};
    convolve<2, 1>(pad, s.maps, static_cast<const A*>(p.planes), false, 0, pad.flat(p.P - 1) + 1, flat);
    pad.for_pieces(0, p.P, [&](int64_t pos, int64_t f, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        sums[0] += double(s.ds[pos + i]);
        sums[1] += double(s.ds[pos + i]) * double(w.flat[f + i]);
      }
    });
  }

  // dlogits of the channel gate from the tiles' parts, in tile order; or dgate itself for kScale.
  void gate_logits_gradient(const Sample<A>& s, Stage stage) const {
    if (!p.pools) return;
    const A* given = stage == Stage::kAttention ? static_cast<const A*>(p.dgate) + s.n * p.C : nullptr;
    A* to = (stage == Stage::kScale ? static_cast<A*>(p.dgate) : call.dlogits) + s.n * p.C;
    const A* g = stage == Stage::kScale ? nullptr : call.gate + s.n * p.C;
    auto finish = [=](int64_t c, A sum) { to[c] = g ? sum * g[c] * (A(1) - g[c]) : sum; };
    if (!given && tiles == 1) {
      const A* one = tile_dgate(s, 0);
      for (int64_t c = 0; c < p.C; ++c) finish(c, one[c]);
      return;
    }
    for (int64_t c = 0; c < p.C; ++c) {
      double sum = given ? double(given[c]) : 0.0;
      for (int64_t t = 0; t < tiles; ++t) sum += double(tile_dgate(s, t)[c]);
      finish(c, A(sum));
    }
  }

  // The MLP's backward for the samples [n0, n1), whose pools are blended: dpooled from dlogits, in two steps
  // that threads may share, the units [j0, j1) of the hidden layer, then the channels [c0, c1). Parts begin
  // at multiples of L.
  void mlp_backward_hidden(int64_t n0, int64_t n1, int64_t j0, int64_t j1) const {
    const int64_t h = p.hidden, M = passes, C = p.C;
    if (!h) return;
    mlp_hidden(n0, n1, j0, j1);
    with_matrix(p.w2, [&](auto* w2) {
      matvec_transposed(w2, C, h, j0, j1, call.dlogits + n0 * C, C, int(n1 - n0), call.dhidden + n0 * M * h,
                        M * h);
    });
    for (int64_t n = n0; n < n1; ++n) {
      for (int64_t j = j0; j < j1; ++j) {
        const A d = call.dhidden[n * M * h + j];
        // ReLU's backward lets the gradient through where the result is not <= 0, NaN included.
        for (int64_t k = 0; k < M; ++k) {
          const int64_t i = (n * M + k) * h + j;
          call.dhidden[i] = call.hidden[i] <= A(0) ? A(0) : d;
        }
      }
    }
  }
  void mlp_backward_input(int64_t n0, int64_t n1, int64_t c0, int64_t c1) const {
    const int64_t h = p.hidden, M = passes, C = p.C;
    if (h) {
      with_matrix(p.w1, [&](auto* w1) {
        matvec_transposed(w1, h, C, c0, c1, call.dhidden + n0 * M * h, h, int((n1 - n0) * M),
                          call.dpooled + n0 * M * C, C);
      });
      return;
    }
    with_matrix(p.w2, [&](auto* w2) {
      matvec_transposed(w2, C, C, c0, c1, call.dlogits + n0 * C, C, int(n1 - n0), call.dpooled + n0 * M * C,
                        M * C);
    });
    for (int64_t n = n0; n < n1; ++n) {
      const A* first = call.dpooled + n * M * C;
      for (int64_t k = 1; k < M; ++k) std::copy(first + c0, first + c1, call.dpooled + (n * M + k) * C + c0);
    }
  }
  void mlp_backward(int64_t n0, int64_t n1) const {
    mlp_backward_hidden(n0, n1, 0, p.hidden);
    mlp_backward_input(n0, n1, 0, p.C);
  }

  // The pools' gradients of the sample, in the terms in which dx uses them.
  void load_pool_gradients(Sample<A>& s) const {
    if (!p.pools) return;
    const int64_t C = p.C;
    const A* d = call.dpooled + s.n * passes * C;
    const A* pooled = call.pooled + s.n * pools_count * C;
    const bool blend = p.pools & kBlend;
    const A weight = blend ? A(0.5) : A(1);
    auto next = [&] {
      if (!blend) d += C;
      pooled += C;
    };
    if (p.pools & kAvg) {
      for (int64_t c = 0; c < C; ++c) s.da[c] = weight * d[c] / A(p.P);
      next();
    } else {
      std::fill_n(s.da, C, A(0));
    }
    if (p.pools & kMax) {
      auto widen = [&](auto* index) {
        for (int64_t c = 0; c < C; ++c) s.p_index[c] = Int(index[s.n * C + c]);
      };
      p.wide_pool_index ? widen(static_cast<const int32_t*>(p.pool_index))
                        : widen(static_cast<const int16_t*>(p.pool_index));
      for (int64_t c = 0; c < C; ++c) s.dm[c] = weight * d[c];
      for (int64_t c = 0; p.ties == kSplit && c < C; ++c) s.dm[c] /= A(s.p_index[c]);
      std::copy_n(pooled, C, s.peak);
      next();
    }
    if (p.pools & kLp) {
      for (int64_t c = 0; c < C; ++c) s.dlp[c] = pooled[c] == A(0) ? A(0) : d[c] / pooled[c];
      next();
    }
    if (p.pools & kLse) {
      for (int64_t c = 0; c < C; ++c) {
        s.dlse[c] = d[c];
        s.partition[c] = pooled[c];
      }
    }
  }

  // Whether dx needs x again: shared ties, lp and lse.
  bool reads_x_again() const { return p.ties == kSplit || p.pools & (kLp | kLse); }

  // Whether dy is read from beyond the second-level cache: of what products read of a sample's x and dy it
  // still has as much as fits, and where products were another call (kAttention), nothing. (Asking for the
  // bytes of a group of samples gained nothing at (2048, 7, 7).)
  bool fetches_dy() const { return p.dgate || 2 * p.C * p.P * int64_t(sizeof(T)) > p.second_level; }

  // What only one element of a channel or of a position receives is added by computing that element anew, so
  // that it is rounded once. For positions this spares the loop over dy two of four loads and a comparison
  // (measured at 7x7 and 14x14 with 512 channels and more: a quarter of dx contiguous, 5 to 15 %
  // channels_last). kOnTheWay does it in the loop, which is cheaper with few channels, and where the output
  // was streamed and a line of it would have to come back.
  template <Write kWrite, bool kOnTheWay, bool kResidual>
  void dx_as(int64_t p0, int64_t p1, int64_t c0, int64_t c1, const Sample<A>& s) const {
    const A *gate = s.gate, *sp = s.s, *da = s.da, *dq_max = s.dq_max, *dq_mean = s.dq_mean;
    const Int* q_index = s.q_index;
    const bool fetch = fetches_dy();
    if constexpr (kChannelsLast) {
      map_rows<kWrite>(
          dy(s.n), out(s.n), p.C, p0, p1, make_slots<A>(p.C, 0),
          [=](Vec<A> d, auto rows, int64_t l, auto) {
            Vec<A> inner = d * rows(sp) + rows(dq_mean);
            if constexpr (kOnTheWay) {
              VecInt<A> hit = iota<A>() + splat_int<A>(l) == splat_int<A>(q_index[rows.r]);
              inner = hit ? inner + rows(dq_max) : inner;
            }
            Vec<A> v = load(gate + l) * inner + load(da + l);
            return kResidual ? v + d : v;
          },
          fetch);
    } else {
      auto f = [=](Vec<A> d, auto rows, int64_t l, auto) {
        Vec<A> inner = d * load(sp + l) + load(dq_mean + l);
        if constexpr (kOnTheWay) {
          VecInt<A> hit = load(q_index + l) == rows.template index<A>();
          inner = hit ? inner + load(dq_max + l) : inner;
        }
        Vec<A> v = rows(gate) * inner + rows(da);
        return kResidual ? v + d : v;
      };
      if (period) {
        map_flat<kWrite>(dy(s.n), out(s.n), c0, c1, p.P, period, f, fetch);
      } else {
        map_rows<kWrite>(
            dy(s.n) + p0, out(s.n) + p0, p.P, c0, c1, make_slots<A>(p1 - p0, p0),
            [=](Vec<A> d, auto rows, int64_t l, auto tag) { return f(d, rows, p0 + l, tag); }, fetch);
      }
    }
    const T* d = dy(s.n);
    T* to = out(s.n);
    auto recompute = [=](int64_t c, int64_t pos, A dmax, A dm) {
      const A g = load_one(d + element(c, pos));
      const A v = gate[c] * (g * sp[pos] + dq_mean[pos] + dmax) + da[c] + dm;
      store_one(to + element(c, pos), kResidual ? v + g : v);
    };
    const bool pool_max = p.pools & kMax;
    // A last slot that was moved left has written the end of the tile before anew.
    const Slots<A> slots = make_slots<A>(p1 - p0, p0);
    const int64_t first =
        !kChannelsLast && slots.tail_count ? p0 + std::min<int64_t>(0, slots.tail_start) : p0;
    if constexpr (!kOnTheWay) {
      for (int64_t pos = first; pos < p1; ++pos) {
        const int64_t c = q_index[pos];
        if (c >= c0 && c < c1 && (!pool_max || s.p_index[c] != pos)) recompute(c, pos, dq_max[pos], A(0));
      }
    }
    for (int64_t c = c0; pool_max && c < c1; ++c) {
      const int64_t pos = s.p_index[c];
      if (pos < first || pos >= p1) continue;
      recompute(c, pos, q_index[pos] == c ? dq_max[pos] : A(0), s.dm[c]);
    }
  }

  // The general form, for ties shared evenly and the lp and lse pools; reads x, too.
  void dx_with_x(int64_t p0, int64_t p1, int64_t c0, int64_t c1, const Sample<A>& s) const {
    const bool split = p.ties == kSplit, spatial = p.spatial, residual = p.residual;
    const int pools = p.pools;
    const Vec<A> zero{};
    auto value = [=](Vec<A> d, Vec<A> v, Vec<A> gate, Vec<A> sp, Vec<A> mean, Vec<A> dmax, Vec<A> qmax,
                     VecInt<A> q_hit, Vec<A> da, Vec<A> dm, Vec<A> peak, VecInt<A> p_hit, Vec<A> dlp,
                     Vec<A> dlse, Vec<A> lse) CBAM_INLINE_LAMBDA {
      Vec<A> inner = d * sp;
      if (spatial) inner += split ? share_of(v * gate, qmax, dmax, mean) : mean + (q_hit ? dmax : zero);
      Vec<A> r = gate * inner;
      if (pools) r += da;
      if (pools & kMax) r += split ? share_of(v, peak, dm, zero) : (p_hit ? dm : zero);
      if (pools & kLp) r += dlp * v;
      if (pools & kLse) r += dlse * exp(v - lse);
      return residual ? r + d : r;
    };
    auto pick = [](const A* a, int64_t i) { return a ? splat<A>(a[i]) : Vec<A>{}; };
    auto lanes = [](const A* a, int64_t i) { return a ? load(a + i) : Vec<A>{}; };
    const A* q_max = p.spatial ? s.q_max : nullptr;
    if constexpr (kChannelsLast) {
      const T* xs = x(s.n);
      map_rows<Write::kCached>(
          dy(s.n), out(s.n), p.C, p0, p1, make_slots<A>(p.C, 0),
          [&](Vec<A> d, auto rows, int64_t l, auto tag) {
            const int64_t r = rows.r;
            return value(d, load(xs + r * p.C + l, tag), load(s.gate + l), splat<A>(s.s[r]),
                         splat<A>(s.dq_mean[r]), splat<A>(s.dq_max[r]), pick(q_max, r),
                         iota<A>() + splat_int<A>(l) == splat_int<A>(s.q_index[r]), lanes(s.da, l),
                         lanes(s.dm, l), lanes(s.peak, l), load(s.p_index + l) == splat_int<A>(r),
                         lanes(s.dlp, l), lanes(s.dlse, l), lanes(s.partition, l));
          },
          fetches_dy());
    } else {
      const T* xs = x(s.n) + p0;
      map_rows<Write::kCached>(
          dy(s.n) + p0, out(s.n) + p0, p.P, c0, c1, make_slots<A>(p1 - p0, p0),
          [&](Vec<A> d, auto rows, int64_t l, auto tag) {
            const int64_t r = rows.r;
            return value(d, load(xs + r * p.P + l, tag), splat<A>(s.gate[r]), load(s.s + p0 + l),
                         load(s.dq_mean + p0 + l), load(s.dq_max + p0 + l), lanes(q_max, p0 + l),
                         load(s.q_index + p0 + l) == splat_int<A>(r), pick(s.da, r), pick(s.dm, r),
                         pick(s.peak, r), iota<A>() + splat_int<A>(p0 + l) == splat_int<A>(s.p_index[r]),
                         pick(s.dlp, r), pick(s.dlse, r), pick(s.partition, r));
          },
          fetches_dy());
    }
  }

  // dx of tile t, once `repeat_for_dx` has been called for the sample.
  void dx(int64_t t, const Sample<A>& s) const { dx(t * tile, tile_end(t), 0, p.C, s); }

  // The same of chunks of the rows of a sample that is one tile.
  void dx_chunks(int64_t k0, int64_t k1, const Sample<A>& s) const {
    const int64_t r0 = k0 * kShare, r1 = chunk_end(k1 - 1);
    kChannelsLast ? dx(r0, r1, 0, p.C, s) : dx(0, p.P, r0, r1, s);
  }

  void dx(int64_t p0, int64_t p1, int64_t c0, int64_t c1, const Sample<A>& s) const {
    auto as = [&](auto write_as, auto on_the_way) {
      constexpr Write kWrite = decltype(write_as)::value;
      constexpr bool kOnTheWay = decltype(on_the_way)::value;
      p.residual ? dx_as<kWrite, kOnTheWay, true>(p0, p1, c0, c1, s)
                 : dx_as<kWrite, kOnTheWay, false>(p0, p1, c0, c1, s);
    };
    using Cached = typename Base::template WriteAs<Write::kCached>;
    using Streamed = typename Base::template WriteAs<Write::kStreamed>;
    if (reads_x_again()) return dx_with_x(p0, p1, c0, c1, s);
    if (streams) {
      as(Streamed{}, std::true_type{});
    } else if (adds_on_the_way()) {
      as(Cached{}, std::true_type{});
    } else {
      as(Cached{}, std::false_type{});
    }
  }
  bool adds_on_the_way() const { return streams || !p.spatial || p.C < 256; }

  // What dx_as asks of the arrays of positions.
  void repeat_for_dx(Sample<A>& s) const {
    if (!period || reads_x_again()) return;
    repeat(s.s), repeat(s.dq_mean);
    if (adds_on_the_way()) repeat(s.dq_max), repeat(s.q_index);
  }

  // Gradients of the weights, summed over samples in order; rows are shared among threads.
  void weight_gradients(Member& m) const {
    const int64_t N = p.N, C = p.C, h = p.hidden, M = passes;
    auto as = [](void* q) { return static_cast<A*>(q); };
    if (p.pools) {
      const A* in = call.blend ? call.blend : call.pooled;
      const int64_t width = h ? h : C;
      const A* second = h ? call.hidden_sum : call.blend;
      m.in_parts(C, [&](int64_t r0, int64_t r1) {
        outer_products(r0, r1, width, N, call.dlogits, C, second, width, as(p.dw2));
      });
      if (h) {
        m.in_parts(h, [&](int64_t r0, int64_t r1) {
          outer_products(r0, r1, C, N * M, call.dhidden, h, in, C, as(p.dw1));
        });
      }
      auto sum_into = [&m](A* to, int64_t width, const A* rows, int64_t count, A weight) {
        m.alone([=] {
          std::fill_n(to, width, A(0));
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t c = 0; c < width; ++c) to[c] += rows[i * width + c];
          }
          for (int64_t c = 0; c < width; ++c) to[c] *= weight;
        });
      };
      if (p.db2) sum_into(as(p.db2), C, call.dlogits, N, A(M));
      if (p.db1) sum_into(as(p.db1), h, call.dhidden, N * M, A(1));
    }
    auto sum_planes = [&] {
      A* dk = as(p.dplanes);
      const int64_t taps = 2 * pad.taps();
      std::fill_n(dk, taps, A(0));
      if (p.dnorm) p.dnorm[0] = p.dnorm[1] = 0;
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t t = 0; t < taps; ++t) dk[t] += call.dplanes[n * taps + t];
        if (p.dnorm) {
          p.dnorm[0] += call.dnorm[n * 2];
          p.dnorm[1] += call.dnorm[n * 2 + 1];
        }
      }
    };
    if (p.spatial) m.alone(sum_planes);
  }
};
