// The two small networks: the MLP on (samples, channels) and the convolution on two maps.
// The MLP's matrices are read as they are, in A or in a 16-bit type.

// Vectors that share each load of a matrix, and vectors of lanes that share each load of a factor: as many as
// leave room for their accumulators.
constexpr int kTogether = kVectorBytes == 64 ? 4 : 2;

// The sum over the lanes of each of n vectors, by the same trees for every n.
template <class A, int n>
CBAM_INLINE void sum_each(const Vec<A> (&v)[n], A (&out)[n]) {
  constexpr int L = kLanes<A>;
  if constexpr (n == 1 || n == 4) {
    sum_lanes<A>(v, out);
  } else {
    for (int k = 0; k < n; k += L) {
      Vec<A> part[L];
      for (int u = 0; u < L; ++u) part[u] = k + u < n ? v[k + u] : Vec<A>{};
      const Vec<A> total = fold_to_lanes<A>(part, Plus{});
      k + L <= n ? store(out + k, total) : store_first(out + k, total, n - k);
    }
  }
}

// f(first, number as a constant) for groups of kTogether of [0, count), and then of two and of one.
template <class F>
CBAM_INLINE void for_together(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) f(i, Rows<kTogether>{});
  if (kTogether > 2 && i + 2 <= count) {
    f(i, Rows<2>{});
    i += 2;
  }
  for (; i < count; ++i) f(i, Rows<1>{});
}

// sums(first vector, first row, of M vectors by R rows) of w[r][c] * v[i][c] over the columns [c0, c1), for
// the rows [r0, r1) of a panel that stays in the first-level cache while the vectors v pass. v begins at
// column c0. `ahead`: elements from a row to the one that is fetched ahead meanwhile, 0 for none.
template <class W, class A, class Sums>
CBAM_INLINE void panel_sums(const W* w, int64_t r0, int64_t r1, int64_t cols, int64_t c0, int64_t c1,
                            const A* v, int64_t v_stride, int count, int64_t ahead, Sums sums) {
  constexpr int L = kLanes<A>, kLine = 64 / int(sizeof(W));
  for_together(count, [&](int64_t first, auto vectors) CBAM_INLINE_LAMBDA {
    constexpr int M = decltype(vectors)::value;
    const A* in = v + first * v_stride - c0;
    for_blocks(r0, r1, [&](int64_t r, auto block) CBAM_INLINE_LAMBDA {
      constexpr int R = decltype(block)::value;
      const RowPointers<const W, R> ws(w, cols, r, 1);
      Vec<A> acc[M * R];
      for (auto& a : acc) a = Vec<A>{};
      auto take = [&](auto fetch) CBAM_INLINE_LAMBDA {
        Vec<A> k[R];
        for (int u = 0; u < R; ++u) k[u] = in_register(fetch(ws.row[u]));
        for (int i = 0; i < M; ++i) {
          const Vec<A> of = in_register(fetch(in + i * v_stride));
          for (int u = 0; u < R; ++u) acc[i * R + u] += k[u] * of;
        }
      };
      int64_t c = c0;
      for (; c + L <= c1; c += L) {
        if (ahead && !first && c % kLine < L) {
          for (int u = 0; u < R; ++u) __builtin_prefetch(ws.row[u] + ahead + c);
        }
        take([c](auto* row) CBAM_INLINE_LAMBDA { return load(row + c); });
      }
      // The rest with zeros beside it: left to itself, a compiler rounds it as suits the number of vectors.
      const int rest = int(c1 - c);
      if (rest) take([=](auto* row) CBAM_INLINE_LAMBDA { return load_first(row + c, rest); });
      A sum[M * R];
      sum_each<A>(acc, sum);
      sums(first, r, Rows<M>{}, Rows<R>{}, sum);
    });
  });
}

// y[i][r] = sum_c w[r][c] * v[i][c] for i < count; v rows are v_stride apart, y rows y_stride.
// Rows of more than 64 vectors go by strips, whose sums join in y, and the strips of four vectors v and more
// are copied next to each other: rows of w and of v that are a multiple of 4 KiB apart compete for the same
// few lines of the first-level cache. Of short rows, a panel has as many as a vector has lanes, for the same
// reason: rows of y do it too, and it is noticed where there is a store a number (measured, (2048, 128), 8
// vectors on a Xeon: 63 us to 44, of 4 vectors 26 to 23).
template <class W, class A>
void matvec(const W* w, int64_t rows, int64_t cols, const A* v, int64_t v_stride, int count, A* y,
            int64_t y_stride) {
  constexpr int L = kLanes<A>, kMost = std::max(L, kBlock), kVectors = 16;
  constexpr int64_t kStrip = 32 * L;
  if (cols <= 2 * kStrip) {
    const int64_t bytes = cols * int64_t(sizeof(W)), panel = bytes * L <= (16 << 10) ? kMost : kBlock;
    const int64_t ahead = bytes <= kLongRow ? (count > 1 ? panel : kBlock) * cols
                                            : 0;  // longer ones would push out this panel's
    A total[kTogether][kMost];
    for (int64_t r0 = 0; r0 < rows; r0 += panel) {
      const int64_t r1 = std::min(r0 + panel, rows);
      panel_sums(w, r0, r1, cols, 0, cols, v, v_stride, count, ahead,
                 [&](int64_t first, int64_t r, auto vectors, auto block, auto& sum) CBAM_INLINE_LAMBDA {
                   constexpr int M = decltype(vectors)::value, R = decltype(block)::value;
                   for (int i = 0; i < M * R; ++i) total[i / R][r - r0 + i % R] = sum[i];
                   if (r + R < r1) return;
                   for (int i = 0; i < M; ++i)
                     std::copy_n(total[i], r1 - r0, y + (first + i) * y_stride + r0);
                 });
    }
    return;
  }
  // A strip of a panel, with `some` vectors from i0 on, whose strips are `stride` apart.
  auto strip = [&](int64_t r0, int64_t c0, const A* in, int64_t stride, int i0, int some) {
    panel_sums(w, r0, std::min(r0 + kBlock, rows), cols, c0, std::min(c0 + kStrip, cols), in, stride, some,
               kFetch.matrices ? 2 * kBlock * cols : 0,
               [&](int64_t first, int64_t r, auto vectors, auto block, auto& sum) CBAM_INLINE_LAMBDA {
                 constexpr int M = decltype(vectors)::value, R = decltype(block)::value;
                 for (int i = 0; i < M * R; ++i) {
                   A& to = y[(i0 + first + i / R) * y_stride + r + i % R];
                   to = c0 ? to + sum[i] : sum[i];
                 }
               });
  };
  if (count < 4) {  // the copies would not pay; the same sums in the order of memory
    for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
      for (int64_t c0 = 0; c0 < cols; c0 += kStrip) strip(r0, c0, v + c0, v_stride, 0, count);
    }
    return;
  }
  alignas(64) A strips[kVectors * kStrip];
  for (int i0 = 0; i0 < count; i0 += kVectors) {
    const int some = std::min(kVectors, count - i0);
    for (int64_t c0 = 0; c0 < cols; c0 += kStrip) {
      const int64_t width = std::min(kStrip, cols - c0);
      for (int i = 0; i < some; ++i) std::copy_n(v + (i0 + i) * v_stride + c0, width, strips + i * kStrip);
      for (int64_t r0 = 0; r0 < rows; r0 += kBlock) strip(r0, c0, strips, kStrip, i0, some);
    }
  }
}

// y[i][c] = sum_r w[r][c] * v[i][r] for the columns [c0, c1): the transposed product, in an order that
// depends on the matrix's size alone. Rows are taken in blocks, whose sums join the total, and of a block a
// strip of U vectors at a time. The first vectors v leave a copy of it for the others: its rows may be a
// multiple of 4 KiB apart and then do not stay in the first-level cache together.
template <class W, class A>
void matvec_transposed(const W* w, int64_t rows, int64_t cols, int64_t c0, int64_t c1, const A* v,
                       int64_t v_stride, int count, A* y, int64_t y_stride) {
  constexpr int L = kLanes<A>, U = 4, kMost = 128;
  const int64_t block =
      std::min<int64_t>(std::max<int64_t>((16 << 10) / (cols * int64_t(sizeof(W))), 16), kMost);
  alignas(64) A strips[kMost * U * L];
  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t r1 = std::min(r0 + block, rows);
    auto strip = [&](int64_t c, auto width) CBAM_INLINE_LAMBDA {
      constexpr int S = decltype(width)::value;
      for_together(count, [&](int64_t first, auto vectors) CBAM_INLINE_LAMBDA {
        constexpr int M = decltype(vectors)::value;
        Vec<A> acc[M][S];
        for (int i = 0; i < M; ++i) {
          for (int u = 0; u < S; ++u) acc[i][u] = Vec<A>{};
        }
        auto go = [&](auto* from, int64_t stride, bool leave, bool fetch) CBAM_INLINE_LAMBDA {
          A* copy = strips;
          for (int64_t r = r0; r < r1; ++r, from += stride, copy += S * L) {
            Vec<A> k[S];
            for (int u = 0; fetch && u < S; ++u) __builtin_prefetch(from + u * L + 16 * stride, 0, 2);
            for (int u = 0; u < S; ++u) k[u] = in_register(load(from + u * L));
            for (int u = 0; leave && u < S; ++u) store(copy + u * L, k[u]);
            for (int i = 0; i < M; ++i) {
              const Vec<A> in = splat<A>(v[(first + i) * v_stride + r]);
              for (int u = 0; u < S; ++u) acc[i][u] += k[u] * in;
            }
          }
        };
        if (first) {
          go(static_cast<const A*>(strips), S * L, false, false);
        } else {
          decided(kFetch.matrices, [&](auto fetch) CBAM_INLINE_LAMBDA {
            if (count > M)
              go(w + r0 * cols + c, cols, true, fetch);
            else
              go(w + r0 * cols + c, cols, false, fetch);
          });
        }
        for (int i = 0; i < M; ++i) {
          for (int u = 0; u < S; ++u) {
            A* to = y + (first + i) * y_stride + c + u * L;
            store(to, r0 ? load(to) + acc[i][u] : acc[i][u]);
          }
        }
      });
    };
    int64_t c = c0;
    for (; c + U * L <= c1; c += U * L) strip(c, Rows<U>{});
    for (; c + L <= c1; c += L) strip(c, Rows<1>{});
    for (; c < c1; ++c) {
      for (int i = 0; i < count; ++i) {
        A acc = 0;
        for (int64_t r = r0; r < r1; ++r) acc += load_one(w + r * cols + c) * v[i * v_stride + r];
        A& to = y[i * y_stride + c];
        to = r0 ? to + acc : acc;
      }
    }
  }
}

// dw[r][c] = sum_i a[i][r] * b[i][c], i in order, for rows [r0, r1): the outer products of a batch.
// b is read from copies of strips of it, as many as stay in the first-level cache beside what is written: its
// rows may be a multiple of 4 KiB apart, and 16 of them (8 samples, 2 pools) would then drive each other out
// (measured, (2048, 128) and (128, 2048), 8 samples: half of the time). A batch of more rows than a strip
// has room for goes in turns, which continue the sums in dw.
template <class A>
void outer_products(int64_t r0, int64_t r1, int64_t cols, int64_t count, const A* a, int64_t a_stride,
                    const A* b, int64_t b_stride, A* dw) {
  constexpr int L = kLanes<A>, U = kTogether, kRoom = (16 << 10) / int(sizeof(A)), kTurn = kRoom / (U * L);
  alignas(64) A strips[kRoom];
  // Strips of V vectors of the columns from c on, in one turn of `rows` rows from i0 on; returns the next
  // column.
  auto strips_of = [&](auto vectors, int64_t c, int64_t i0, int64_t rows) CBAM_INLINE_LAMBDA {
    constexpr int V = decltype(vectors)::value, kWidth = V * L;
    const int64_t wide = std::min(kRoom / (rows * kWidth), (cols - c) / kWidth);
    for (int64_t k = 0; k < wide; ++k) {
      for (int64_t i = 0; i < rows; ++i)
        std::copy_n(b + (i0 + i) * b_stride + c + k * kWidth, kWidth, strips + (k * rows + i) * kWidth);
    }
    for_blocks(r0, r1, [&](int64_t r, auto block) CBAM_INLINE_LAMBDA {
      constexpr int R = decltype(block)::value;
      for (int64_t k = 0; k < wide; ++k) {
        A* to = dw + r * cols + c + k * kWidth;
        Vec<A> acc[R][V];
        for (int u = 0; u < R; ++u) {
          for (int j = 0; j < V; ++j) acc[u][j] = i0 ? load(to + u * cols + j * L) : Vec<A>{};
        }
        for (int64_t i = 0; i < rows; ++i) {
          Vec<A> v[V];
          for (int j = 0; j < V; ++j) v[j] = in_register(load(strips + ((k * rows + i) * V + j) * L));
          for (int u = 0; u < R; ++u) {
            const Vec<A> factor = splat<A>(a[(i0 + i) * a_stride + r + u]);
            for (int j = 0; j < V; ++j) acc[u][j] += v[j] * factor;
          }
        }
        for (int u = 0; u < R; ++u) {
          for (int j = 0; j < V; ++j) store(to + u * cols + j * L, acc[u][j]);
        }
      }
    });
    return c + wide * kWidth;
  };
  if (count == 0) std::fill(dw + r0 * cols, dw + r1 * cols, A(0));
  for (int64_t i0 = 0; i0 < count; i0 += kTurn) {
    const int64_t rows = std::min<int64_t>(kTurn, count - i0);
    int64_t c = 0;
    while (c + U * L <= cols) c = strips_of(Rows<U>{}, c, i0, rows);
    while (c + L <= cols) c = strips_of(Rows<1>{}, c, i0, rows);
    for (; c < cols; ++c) {
      for (int64_t r = r0; r < r1; ++r) {
        A acc = i0 ? dw[r * cols + c] : A(0);
        for (int64_t i = i0; i < i0 + rows; ++i) acc += b[i * b_stride + c] * a[i * a_stride + r];
        dw[r * cols + c] = acc;
      }
    }
  }
}

template <class A>
A relu(A v) {  // keeps NaN
  return v < A(0) ? A(0) : v;
}

// The maps with a border of half a kernel of zeros. Position (d, h, w) of the map is at
// flat(d, h, w) + center; an output at flat index i reads taps i + offset(tap), all >= 0.
struct Padded {
  int64_t D, H, W, kD, kH, kW, pH, pW, size, center;

  explicit Padded(const Problem& p)
      : D(p.D), H(p.H), W(p.W), kD(p.kD), kH(p.kH), kW(p.kW), pH(H + kH - 1), pW(W + kW - 1) {
    size = (D + kD - 1) * pH * pW;
    center = offset(kD / 2, kH / 2, kW / 2);
  }
  int64_t taps() const { return kD * kH * kW; }
  int64_t offset(int64_t d, int64_t h, int64_t w) const { return (d * pH + h) * pW + w; }
  int64_t flat(int64_t p) const { return offset(p / (H * W), p / W % H, p % W); }
  // Positions on both sides whose pooled values an output can read.
  int64_t halo() const { return (kD / 2 * H + kH / 2) * W + kW / 2; }

  // f(position, flat index, count) for each piece of a map's row in the positions [p0, p1).
  template <class F>
  void for_pieces(int64_t p0, int64_t p1, F f) const {
    while (p0 < p1) {
      int64_t n = std::min(p1 - p0, W - p0 % W);
      f(p0, flat(p0), n);
      p0 += n;
    }
  }
};

// f(n as a constant) for n in [kFrom, kTo].
template <int kFrom, int kTo, class F>
CBAM_INLINE void with_constant(int64_t n, F&& f) {
  if constexpr (kFrom == kTo) {
    f(Rows<kFrom>{});
  } else if (n == kFrom) {
    f(Rows<kFrom>{});
  } else {
    with_constant<kFrom + 1, kTo>(n, f);
  }
}

// convolve for U vectors of each of R rows, the first from flat index i on. A vector of a map, which seldom
// is aligned, is loaded once for all the rows that it is a neighbour of; a weight once for U vectors. Every
// output is the sum of its taps in order, however the outputs are cut.
template <int kIn, int kOut, int R, int U, class A>
void convolve_rows(const Padded& g, const A* const* maps, const A* weights, bool reversed, int64_t i,
                   A* const* out) {
  constexpr int L = kLanes<A>;
  const int64_t taps = g.taps(), sign = reversed ? -1 : 1;
  Vec<A> acc[R][kOut][U];
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < kOut; ++o) {
      for (int u = 0; u < U; ++u) acc[r][o][u] = Vec<A>{};
    }
  }
  for (int64_t d = 0; d < g.kD; ++d) {
    for (int64_t row = 0; row < g.kH + R - 1; ++row) {  // of the maps; it is tap row - r of output row r
      const int64_t at = i + g.offset(d, row, 0);
      auto take = [&](auto first, auto last) CBAM_INLINE_LAMBDA {
        const int64_t t = (d * g.kH + row - decltype(first)::value) * g.kW;
        const A* k = weights + (reversed ? taps - 1 - t : t);
        for (int64_t w = 0; w < g.kW; ++w, k += sign) {
          for (int m = 0; m < kIn; ++m) {
            Vec<A> v[U];
            for (int u = 0; u < U; ++u) v[u] = in_register(load(maps[m] + at + w + u * L));
            for (int r = decltype(first)::value; r <= decltype(last)::value; ++r) {
              const A* tap = k - (r - decltype(first)::value) * sign * g.kW;
              for (int o = 0; o < kOut; ++o) {
                const Vec<A> weight = splat<A>(tap[(kIn == 2 ? m : o) * taps]);
                for (int u = 0; u < U; ++u) acc[r][o][u] += v[u] * weight;
              }
            }
          }
        }
      };
      with_constant<0, R - 1>(std::max<int64_t>(0, row - g.kH + 1), [&](auto first) CBAM_INLINE_LAMBDA {
        with_constant<decltype(first)::value, R - 1>(
            std::min<int64_t>(R - 1, row), [&](auto last) CBAM_INLINE_LAMBDA { take(first, last); });
      });
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < kOut; ++o) {
      for (int u = 0; u < U; ++u) store(out[o] + i + r * g.pW + u * L, acc[r][o][u]);
    }
  }
}

// out[m][i] for the flat indices [i0, i1): sum over taps of weights on the padded maps.
// kIn maps in and kOut out: (2, 1) forward, (1, 2) for the gradient, with taps in reverse.
// Writes up to four vectors past i1 and reads as far past the maps, so both have that slack.
template <int kIn, int kOut, class A>
void convolve(const Padded& g, const A* const* maps, const A* weights, bool reversed, int64_t i0, int64_t i1,
              A* const* out) {
  constexpr bool kLarge = kVectorBytes == 64;
  constexpr int L = kLanes<A>, R = kLarge ? 4 : 2, U = kLarge ? 4 / kOut : 4, kAlone = 4;
  int64_t i = i0;
  // Rows together, unless filling up their last vectors costs more than sharing the loads gains. (Measured on
  // a 56 x 56 map: 0.6 of the time with 64-byte vectors, where every load that is not aligned crosses a line;
  // 0.75 with 32-byte ones, and the gradient, which has eight sums at work with one row, gains nothing.)
  const int64_t vectors = (g.pW + L - 1) / L, pieces = (vectors + U - 1) / U;
  const bool pays = kLarge ? 2 * vectors * L <= 3 * g.pW : kVectorBytes == 32 && kOut == 1 && vectors > 6;
  for (; pays && g.kH > 1 && i + R * g.pW <= i1; i += R * g.pW) {
    for (int64_t k = 0, j = 0; k < pieces; ++k) {
      const int64_t most = (vectors - j + pieces - k - 1) / (pieces - k);  // of equal size
      with_constant<1, U>(most, [&](auto width) CBAM_INLINE_LAMBDA {
        convolve_rows<kIn, kOut, R, decltype(width)::value>(g, maps, weights, reversed, i + j * L, out);
      });
      j += most;
    }
  }
  for (; i < i1; i += kAlone * L) convolve_rows<kIn, kOut, 1, kAlone>(g, maps, weights, reversed, i, out);
}

// Tiles of taps of the gradient of the convolution's weights, each the work of one thread at a time: rows x
// columns of taps that share the loads of dz and of a map.
struct TapTiles {
  static constexpr int kColumns = kTogether;
  int64_t rows, high, wide;  // rows of a full tile; tiles in a plane of taps

  explicit TapTiles(const Padded& g)
      : rows(std::min<int64_t>(4, g.kH / 2 + 1)),  // as far above its first row dz has a border of zeros
        high((g.kH + rows - 1) / rows),
        wide((g.kW + kColumns - 1) / kColumns) {}
  int64_t count(const Padded& g) const { return 2 * g.kD * high * wide; }
};

// dk[tap] = sum over positions of dz * map shifted by the tap, for the tiles [t0, t1).
// dz is flat, with zeros between the rows and a border of them around.
template <class A>
void correlate(const Padded& g, const A* dz, const A* const* maps, int64_t t0, int64_t t1, A* dk) {
  constexpr int L = kLanes<A>;
  const TapTiles tiles(g);
  const int64_t end = g.offset(g.D - 1, g.H - 1, g.W);
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t w = t % tiles.wide * TapTiles::kColumns, h = t / tiles.wide % tiles.high * tiles.rows;
    const int64_t plane = t / (tiles.wide * tiles.high), d = plane % g.kD;
    const A* map = maps[plane / g.kD] + g.offset(d, h, w);
    A* to = dk + (plane * g.kH + h) * g.kW + w;
    with_constant<1, 4>(std::min(tiles.rows, g.kH - h), [&](auto high) CBAM_INLINE_LAMBDA {
      with_constant<1, TapTiles::kColumns>(
          std::min<int64_t>(TapTiles::kColumns, g.kW - w), [&](auto wide) CBAM_INLINE_LAMBDA {
            constexpr int H = decltype(high)::value, W = decltype(wide)::value;
            Vec<A> acc[H * W];
            for (auto& a : acc) a = Vec<A>{};
            for (int64_t i = 0; i < end + (H - 1) * g.pW; i += L) {
              Vec<A> rows[H];
              for (int r = 0; r < H; ++r) rows[r] = in_register(load(dz + i - r * g.pW));
              for (int c = 0; c < W; ++c) {
                const Vec<A> v = in_register(load(map + i + c));
                for (int r = 0; r < H; ++r) acc[r * W + c] += v * rows[r];
              }
            }
            A total[H * W];
            sum_each<A>(acc, total);
            for (int r = 0; r < H; ++r) {
              for (int c = 0; c < W; ++c) {
                A& sum = total[r * W + c];
                if (!(std::abs(sum) <= std::numeric_limits<A>::max())) {
                  // A zero beside the map may have met an infinity; sum over true positions alone.
                  sum = 0;
                  g.for_pieces(0, g.D * g.H * g.W, [&](int64_t, int64_t f, int64_t n) {
                    for (int64_t x = 0; x < n; ++x) sum += dz[f + x] * map[f + x + r * g.pW + c];
                  });
                }
                to[r * g.kW + c] = sum;
              }
            }
          });
    });
  }
}
