// The order of the stages and their split over threads.
//
// Samples in plenty: threads draw groups of samples and work alone, stage after stage in cache; but where the
// MLP's matrices are large, threads have a group each in forward and share the MLP of all of them. A group is
// one sample, or as many as make reading the MLP's weights worth it. The samples left over by an even split
// (all of them in a batch of 1) are shared by all threads, stage by stage. All of it is one region of the
// pool of threads, since entering one costs as much as a stage of a small sample.

template <class T, bool kChannelsLast>
struct Schedule : Backward<T, kChannelsLast> {
  using Base = Backward<T, kChannelsLast>;
  using Base::apply, Base::apply_rows, Base::backward, Base::blend, Base::by_chunks, Base::by_rows,
      Base::call, Base::count_chunks, Base::dx, Base::dx_chunks, Base::even, Base::gate_logits_gradient,
      Base::group, Base::L, Base::load_gate, Base::load_pool_gradients, Base::load_saved,
      Base::logits_gradient, Base::maps_gradient, Base::merge_chunks, Base::merge_products, Base::merge_rest,
      Base::mlp, Base::mlp_backward, Base::mlp_backward_hidden, Base::mlp_backward_input, Base::mlp_gate,
      Base::mlp_hidden, Base::norm_gradient, Base::p, Base::pad, Base::period, Base::planes_gradient,
      Base::pool, Base::pool_chunk, Base::prepare, Base::products, Base::products_chunk, Base::repeat,
      Base::repeat_for_dx, Base::rest_chunk, Base::rest_of_gate_gradient, Base::row_chunks, Base::round,
      Base::rounds, Base::run_team, Base::spatial_gate, Base::spatial_pool, Base::tile, Base::tile_dgate,
      Base::tile_end, Base::tiles, Base::together, Base::weight_gradients;
  using Base::Base;
  using typename Base::A;

  // Runs first(t) over the tiles, and second(t) as soon as first has passed t by a halo.
  template <class First, class Second>
  void chase(First first, Second second) const {
    int64_t done = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      first(t);
      const int64_t ready = tile_end(t);
      while (done < tiles && (ready == p.P || tile_end(done) + pad.halo() <= ready)) second(done++);
    }
  }

  // f(tile) over the tiles of a shared sample.
  template <class F>
  void each_tile(Member& m, F f) const {
    m.in_parts(tiles, [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t) f(t);
    });
  }

  // Whether a call begins with the last samples, so that of tensors larger than the caches it finds what the
  // op before it left there: the end of dy, and the end of x where that op went from its beginning. (Measured
  // on Zen 4, training steps of 8 x (256, 56, 56): 0.93 to 0.94 of the time.)
  bool from_the_end(Stage stage) const {
    return backward ? stage != Stage::kAttention : stage == Stage::kAttention;
  }

  // The group that is drawn as the i-th. From the end they go in turns of one a thread, so that a thread that
  // keeps up with the others comes by the samples that it had before; those of an incomplete turn go last.
  int64_t drawn(int64_t i, int64_t groups, bool from_the_end) const {
    const int64_t turns = groups / p.threads, turn = i / p.threads;
    return from_the_end && turn < turns ? (turns - 1 - turn) * p.threads + i % p.threads : i;
  }

  // groups(member, worker, reversed) for the samples that threads share out evenly; team(member, worker, n)
  // for those that are left over; then last(member).
  template <class Groups, class Team, class Last>
  void run_samples(Stage stage, Groups groups, Team team, Last last) const {
    const bool reversed = from_the_end(stage);
    run_team([&](Member& m) {
      Worker<A> w = call.workers[m.index];
      for (int64_t n = p.N; reversed && n-- > even();) team(m, w, n);
      groups(m, w, reversed);
      for (int64_t n = even(); !reversed && n < p.N; ++n) team(m, w, n);
      last(m);
    });
  }

  // f(n0, n1) over groups, each by the thread that draws it.
  template <class F>
  void draw_groups(Member& m, bool reversed, F f) const {
    const int64_t groups = (even() + group - 1) / group;
    m.draw(groups, [&](int64_t i) {
      const int64_t n0 = drawn(i, groups, reversed) * group;
      f(n0, std::min(even(), n0 + group));
    });
  }

  // A round of samples at a time: first(n0, n1, place) over each thread's part, `place` being that of its
  // arrays in call.samples, shared(n0, n1) over all of them, second(n0, n1, place).
  template <class First, class Shared, class Second>
  void take_rounds(Member& m, bool reversed, First first, Shared shared, Second second) const {
    for (int64_t i = 0; i < rounds(); ++i) {
      const int64_t n0 = (reversed ? rounds() - 1 - i : i) * round(), n1 = std::min(n0 + round(), even());
      const int64_t each = (n1 - n0) / p.threads;  // both are multiples
      auto of_part = [&](auto f) {
        m.phase(p.threads, [&](int64_t part) { f(n0 + part * each, n0 + (part + 1) * each, part * group); });
      };
      of_part(first);
      shared(n0, n1);
      of_part(second);
    }
  }

  // The spatial gate and the output of a sample whose channel gate is known. The pools run ahead of
  // the output by a halo, and the output of a tile is written while a later tile is pooled.
  void forward_tiles(Worker<A>& w, Sample<A>& s, Stage stage) const {
    const bool pooled = p.spatial && stage != Stage::kScale, written = stage != Stage::kAttention;
    int64_t gated = 0, done = 0;  // tiles
    for (int64_t t = 0; t < tiles; ++t) {
      if (pooled) {
        const bool both = written && done < gated;
        spatial_pool(t, both ? done : -1, w, s);
        done += both;
      }
      const int64_t ready = tile_end(t);
      for (; gated < tiles && (ready == p.P || tile_end(gated) + pad.halo() <= ready); ++gated) {
        if (p.spatial) spatial_gate(gated * tile, tile_end(gated), w, s, stage);
      }
    }
    for (; written && done < tiles; ++done) apply(done, s);
  }

  void forward(Stage stage) {
    prepare();
    const bool pools = p.pools && stage != Stage::kScale;
    auto groups = [&](Member& m, Worker<A>& w, bool reversed) {
      auto first = [&](int64_t n0, int64_t n1, int64_t place) {
        for (int64_t n = n0; pools && n < n1; ++n) {
          pool(n, 0, p.C, w, call.samples[place]);
          blend(n, n + 1, 0, p.C);
        }
      };
      auto second = [&](int64_t n0, int64_t n1, int64_t place) {
        Sample<A>& s = call.samples[place];
        for (int64_t n = n1; n-- > n0;) {  // the last one read is still in cache
          load_gate(n, s);
          forward_tiles(w, s, stage);
        }
      };
      if (together) {
        auto shared = [&](int64_t n0, int64_t n1) {
          if (pools) share_mlp(m, n0, n1);
        };
        return take_rounds(m, reversed, first, shared, second);
      }
      draw_groups(m, reversed, [&](int64_t n0, int64_t n1) {
        first(n0, n1, m.index * group);
        if (pools) mlp(n0, n1);
        second(n0, n1, m.index * group);
      });
    };
    run_samples(
        stage, groups, [&](Member& m, Worker<A>& w, int64_t n) { share_forward(m, w, n, stage); },
        [](Member&) {});
  }

  // The MLP of samples whose pools are known, by all members.
  void share_mlp(Member& m, int64_t n0, int64_t n1) const {
    m.in_parts(p.hidden, [&](int64_t j0, int64_t j1) { mlp_hidden(n0, n1, j0, j1); }, kBlock);
    m.in_parts(p.C, [&](int64_t c0, int64_t c1) { mlp_gate(n0, n1, c0, c1); }, L);
  }

  // A sample of all members, phase by phase.
  void share_forward(Member& m, Worker<A>& w, int64_t n, Stage stage) const {
    const bool pooled = p.spatial && stage != Stage::kScale, written = stage != Stage::kAttention;
    const int64_t step = by_rows ? kChunk : kChannelsLast ? L : kBlock;
    Sample<A> s = call.samples[p.threads * group];
    s.n = n;
    if (p.pools && stage != Stage::kScale) {
      auto pool_channels = [&](int64_t c0, int64_t c1) {
        pool(n, c0, c1, w, s);
        blend(n, n + 1, c0, c1);
      };
      m.in_parts(p.C, pool_channels, step);
      m.in_parts(p.hidden, [&](int64_t j0, int64_t j1) { mlp_hidden(n, n + 1, j0, j1); }, kBlock);
      auto gate_channels = [&](int64_t c0, int64_t c1) {
        mlp_gate(n, n + 1, c0, c1);
        std::copy(call.gate + n * p.C + c0, call.gate + n * p.C + c1, s.gate + c0);
      };
      m.in_parts(p.C, gate_channels, step);
    } else {
      m.alone([&] { load_gate(n, s); });
    }
    if (by_rows && pooled) {
      m.in_parts(count_chunks(p), [&](int64_t k0, int64_t k1) {
        for (int64_t k = k0; k < k1; ++k) pool_chunk(k, w, s);
      });
      each_tile(m, [&](int64_t t) { merge_chunks(t, w, s); });
    } else if (pooled) {
      each_tile(m, [&](int64_t t) { spatial_pool(t, -1, w, s); });
    }
    if (by_rows) {
      if (p.spatial) {
        auto gate_positions = [&](int64_t p0, int64_t p1) {
          spatial_gate(p0, p1, w, s, stage);
          if (period) repeat(s.s, p0, p1);
        };
        m.in_parts(p.P, gate_positions, kShare);
      }
      // A member's own part of x, read a third time, or by a call that only scales the first.
      const bool fetch = !pooled || p.C * p.P * int64_t(sizeof(T)) > p.threads * p.second_level;
      if (written) m.in_parts(p.C, [&](int64_t c0, int64_t c1) { apply_rows(c0, c1, s, fetch); }, step);
    } else if (p.spatial || written) {
      each_tile(m, [&](int64_t t) {
        if (p.spatial) spatial_gate(t * tile, tile_end(t), w, s, stage);
        if (written) apply(t, s);
      });
    }
  }

  void backward_pass(Stage stage) {
    prepare();
    const bool products_needed = stage != Stage::kAttention, rest = stage != Stage::kScale;
    auto first_half = [&](int64_t t, Worker<A>& w, Sample<A>& s, bool in_chunks = false) {
      if (products_needed) {
        in_chunks ? merge_products(w, s) : products(t, w, s);
      } else {
        std::fill_n(tile_dgate(s, t), p.C, A(0));
      }
      if (p.spatial) logits_gradient(t, s, stage);
    };
    auto second_half = [&](int64_t t, Worker<A>& w, Sample<A>& s) {
      maps_gradient(t * tile, tile_end(t), w, s);
      rest_of_gate_gradient(t, w, s);
    };
    auto groups = [&](Member& m, Worker<A>& w, bool reversed) {
      draw_groups(m, reversed, [&](int64_t n0, int64_t n1) {
        for (int64_t n = n0; n < n1; ++n) {
          Sample<A>& s = call.samples[m.index * group + n - n0];
          load_saved(n, s, stage);
          chase([&](int64_t t) { first_half(t, w, s); },
                [&](int64_t t) {
                  if (p.spatial && rest) second_half(t, w, s);
                });
          gate_logits_gradient(s, stage);
          if (rest && p.pools) blend(n, n + 1, 0, p.C);
          if (p.spatial && rest) planes_gradient(0, TapTiles(pad).count(pad), s);
          if (p.spatial && rest && p.dnorm) norm_gradient(w, s);
        }
        if (rest && p.pools) mlp_backward(n0, n1);
        for (int64_t n = n1; rest && n-- > n0;) {
          Sample<A>& s = call.samples[m.index * group + n - n0];
          load_pool_gradients(s);
          repeat_for_dx(s);
          for (int64_t t = 0; t < tiles; ++t) dx(t, s);
        }
      });
    };
    run_samples(
        stage, groups,
        [&](Member& m, Worker<A>& w, int64_t n) {
          Sample<A> s = call.samples[p.threads * group];
          const bool shared = Base::matrix_bytes(p) >= 256 << 10;  // worth three more phases
          m.alone([&] { load_saved(n, s, stage); });
          s.n = n;
          auto each_chunk = [&](auto f) {
            m.in_parts(row_chunks(), [&](int64_t k0, int64_t k1) {
              for (int64_t k = k0; k < k1; ++k) f(k);
            });
          };
          auto planes = [&](int64_t t0, int64_t t1) { planes_gradient(t0, t1, s); };
          if (by_chunks) {
            if (products_needed) each_chunk([&](int64_t k) { products_chunk(k, w, s); });
            m.alone([&] { first_half(0, w, s, true); });
          } else {
            each_tile(m, [&](int64_t t) { first_half(t, w, s); });
          }
          if (p.spatial && rest) {
            if (by_chunks) {
              m.in_parts(p.P, [&](int64_t p0, int64_t p1) { maps_gradient(p0, p1, w, s); }, kShare);
              each_chunk([&](int64_t k) { rest_chunk(k, w, s); });
            } else {
              each_tile(m, [&](int64_t t) { second_half(t, w, s); });
            }
            m.in_parts(TapTiles(pad).count(pad), planes);
          }
          m.alone([&] {
            if (by_chunks && p.spatial && rest) merge_rest(w, s);
            if (p.spatial && rest && p.dnorm) norm_gradient(w, s);
            gate_logits_gradient(s, stage);
            if (rest && p.pools) blend(n, n + 1, 0, p.C);
            if (rest && p.pools && !shared) mlp_backward(n, n + 1);
            if (rest && !shared) load_pool_gradients(s);
            if (rest) repeat_for_dx(s);
          });
          if (rest && shared) {
            auto hidden = [&](int64_t j0, int64_t j1) { mlp_backward_hidden(n, n + 1, j0, j1); };
            m.in_parts(p.hidden, hidden, L);
            m.in_parts(p.C, [&](int64_t c0, int64_t c1) { mlp_backward_input(n, n + 1, c0, c1); }, L);
            m.alone([&] { load_pool_gradients(s); });
          }
          if (rest && by_chunks) {
            m.in_parts(row_chunks(), [&](int64_t k0, int64_t k1) { dx_chunks(k0, k1, s); });
          } else if (rest) {
            each_tile(m, [&](int64_t t) { dx(t, s); });
          }
        },
        [&](Member& m) {
          if (rest) weight_gradients(m);
        });
  }
};
