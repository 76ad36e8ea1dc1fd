// Layer norm backward, and what is fused with it: the sums of a block of rows, then dx and their part of dweight and dbias.
#include <numeric>

#include "row_fused.h"
#include "row_masked.h"

namespace fastnorm::cpu {

// Only where FUSED is dz another than dy, made by `slopes`, is dh added to dx, or is a row not `centred` and its c2 zero; only
// where MASKED do some columns not count.
template <class T, bool FUSED, bool MASKED = false>
struct RowBackward {
  using A = Acc<T>;
  using V = Vec<T>;
  using Place = std::array<const T*, 2>;  // dz, x
  Rows g;
  const RowsInput &dy, &x, &dh;
  ConstArray weight;
  bool centred;
  const Slopes<T>* slopes;
  const A *mean, *rstd;
  T* dx;
  Array dweight, dbias;
  RowMask mask{};
  int64_t row_bytes = g.N * static_cast<int64_t>(sizeof(T));
  bool far = 3 * g.M * row_bytes >= CACHES;  // dz and x come from memory
  bool stream = streams(dx, g.N * sizeof(T), (dh.data ? 4 : 3) * g.M * g.N * static_cast<int64_t>(sizeof(T)));

  // Adds the sums of g * (x - high) and of g over one piece of R rows; w, in lots, starts with the piece.
  template <size_t R, size_t CHAINS>
  void add_sums(const std::array<Place, R>& at, int64_t m, int64_t n, const A* w, double* sum_gd, double* sum_g) const {
    double sums[R][2];
    V high[R];
    repeat<R>([&](auto k) FN_LAMBDA { high[k] = V(mean[m + k]); });
    const auto terms = [&](V gi, V x, auto k) FN_LAMBDA { return std::array<V, 2>{gi * (x - high[k]), gi}; };
    if (w)
      sum_up<2, CHAINS>(
          at, n,
          [&](auto k, int64_t i, int64_t count, const std::array<V, 2>& v)
              FN_LAMBDA { return terms(v[0] * load(w + i, count), v[1], k); },
          sums);
    else
      sum_up<2, CHAINS>(
          at, n, [&](auto k, int64_t, int64_t, const std::array<V, 2>& v) FN_LAMBDA { return terms(v[0], v[1], k); }, sums);
    for (size_t k = 0; k < R; ++k) sum_gd[k] += sums[k][0], sum_g[k] += sums[k][1];
  }

  // What is constant along the rows of a block: c1 * rstd^2, c2 * rstd and rstd. In rows with a rstd at the ends of the range
  // of A rstd is zero here, and c1 is multiplied by it once.
  struct Constants {
    A c1[MAX_BLOCK], c2[MAX_BLOCK], rstd[MAX_BLOCK];
    bool extreme;
  };

  // Of rows [m, m + rows), from their sums, which are divided by `n`, where that is not N; by nothing where n is 0.
  void set_constants(int64_t m, int64_t rows, const double* sum_gd, const double* sum_g, Constants& c,
                     const double* n = nullptr) const {
    constexpr double LEAST = 1e-12, MOST = 1e12;
    const double one_by_N = 1.0 / static_cast<double>(g.N);
    const A *low = mean + g.M + m, *r = rstd + m;
    bool any = false;
    for (int64_t k = 0; k < rows; ++k) {
      const double rstd_k = static_cast<double>(r[k]), by_N = rstd_k * (!n ? one_by_N : n[k] > 0 ? 1 / n[k] : 0);
      const bool extreme = (rstd_k < LEAST) | (rstd_k > MOST);
      c.c1[k] = static_cast<A>((sum_gd[k] - static_cast<double>(low[k]) * sum_g[k]) * by_N * rstd_k * (extreme ? 1.0 : rstd_k));
      c.c2[k] = centred ? static_cast<A>(sum_g[k] * by_N) : A(0);
      c.rstd[k] = extreme ? A(0) : r[k];
      any |= extreme;
    }
    c.extreme = any;
  }

  // dx of elements [i0, i0 + n) of rows [m, m + rows), and their part of dw and db; w, dw, db and `on`, which columns count or
  // null, start at i0.
  template <class Parameter>
  void grad_block(const Place* at, const T* const* dh_at, int64_t m, int64_t rows, int64_t i0, int64_t n, const Constants& c,
                  const Parameter* w, A* dw, A* db, [[maybe_unused]] const A* on = nullptr) const {
    const A *high = mean + m, *low = high + g.M;
    const int64_t N = g.N;
    for_groups<V, 8>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
      constexpr int64_t W = lanes<V>;
      V wi[J], dwi[J], dbi[J];
      repeat<J>([&](auto j) FN_LAMBDA { wi[j] = w ? load(w + i + j * W, count) : V(1), dwi[j] = V(0), dbi[j] = V(0); });
      T* out = dx ? dx + m * N + i0 + i : nullptr;
      for (int64_t k = 0; k < rows; ++k) {
        const V h(high[k]), l(low[k]), rk(c.rstd[k]), c1k(c.c1[k]), c2k(c.c2[k]);
        const T *dy_k = at[k][0] + i, *x_k = at[k][1] + i;
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA {
          const V dz = load(dy_k + j * W, count), x = load(x_k + j * W, count);
          const V d = sizeof(T) == 2 ? x - h : centre(x, h, l), dz_rstd = dz * rk;
          v[j] = grad_input_scaled(dz_rstd, wi[j], d, c1k, c2k);
          if constexpr (MASKED)
            if (on) v[j] = V::blendv(dz_rstd * wi[j], v[j], load(on + i + j * W, count) != V(0));
          dwi[j] = dwi[j] + dz_rstd * d;
          dbi[j] = dbi[j] + dz;
        });
        if (!out) continue;
        if constexpr (FUSED)
          if (dh.data) repeat<J>([&](auto j) FN_LAMBDA { v[j] = v[j] + load(dh_at[k] + i + j * W, count); });
        put_all<T, J>(out + k * N, v, count, stream);
        if (J > 1 && !stream)
          prefetch<true>(out + k * N + J * W, J * W * sizeof(T));  // the way over the rows hides it from the processor
      }
      repeat<J>([&](auto j) FN_LAMBDA {
        if (dw) store(dw + i + j * W, load(dw + i + j * W) + dwi[j]);
        if (db) store(db + i + j * W, load(db + i + j * W) + dbi[j]);
      });
    });
    for (int64_t k = 0; c.extreme && k < rows; ++k)
      if (c.rstd[k] != rstd[m + k])
        grad_extreme(at[k], FUSED && dh.data ? dh_at[k] : nullptr, m + k, i0, n, c.c1[k], c.c2[k], w, dw, on);
  }

  // dx and dw of a row that the constants leave out, in steps that stay inside the range of A. Of db nothing is left out.
  template <class Parameter>
  void grad_extreme(const Place& at, const T* dh_m, int64_t m, int64_t i0, int64_t n, A c1, A c2, const Parameter* w, A* dw,
                    const A* on) const {
    for (int64_t i = 0; i < n; ++i) {
      const A dz = static_cast<A>(at[0][i]), weight_i = w ? static_cast<A>(w[i]) : A(1);
      const A x_hat = normalize(static_cast<A>(at[1][i]), mean[m], mean[g.M + m], rstd[m]);
      const A dx_i = dz * weight_i * rstd[m] - (on && on[i] == A(0) ? A(0) : c2 + x_hat * c1);
      if (dx) dx[m * g.N + i0 + i] = static_cast<T>(dh_m ? dx_i + static_cast<A>(dh_m[i]) : dx_i);
      if (dw) dw[i] += dz * x_hat;
    }
  }

  // A thread's reader of dz and x.
  auto reader(int64_t rows) const {
    if constexpr (FUSED)
      return SlopeReader<T>(dy, x, slopes, rows, g.N);
    else
      return PairReader<T>(dy, x, rows, g.N);
  }

  // Pointers to elements [i, i + n) of dh in rows [m, m + rows).
  void find_dh(const Reader<T>& read, int64_t m, int64_t rows, int64_t i, int64_t n, const T** at) const {
    for (int64_t k = 0; FUSED && dh.data && k < rows; ++k) at[k] = read(m + k, k, i, n);
  }

  // w, and once more in lots.
  template <class Read, class Parameter>
  void block(const Read& read, const Reader<T>& read_dh, Counting<T>& counting, int64_t m, int64_t rows, const Parameter* w,
             const A* lots, A* dw, A* db) const {
    Place at[MAX_BLOCK];
    const T* dh_at[MAX_BLOCK];
    double sum_gd[MAX_BLOCK], sum_g[MAX_BLOCK];
    Constants c;
    for (int64_t k = 0; k < rows; ++k) at[k] = read(m + k, k, 0, g.N);
    find_dh(read_dh, m, rows, 0, g.N, dh_at);
    for (int64_t k = 0; k < rows; ++k) sum_gd[k] = sum_g[k] = 0;
    if (dx)
      for_rows(rows, [&](auto R, auto CHAINS, int64_t k) {
        for (size_t r = 0; FUSED && dh.data && r < R; ++r) prefetch<false>(dh_at[k + r], g.N * sizeof(T));
        for (int64_t i = 0; i < g.N; i += PIECE) {
          std::array<Place, R> piece;
          for (size_t r = 0; r < R; ++r) piece[r] = {at[k + r][0] + i, at[k + r][1] + i};
          this->template add_sums<R, CHAINS>(piece, m + k, std::min(PIECE, g.N - i), lots ? lots + i : lots, sum_gd + k,
                                             sum_g + k);
        }
      });
    double n[MAX_BLOCK];
    for (int64_t k = 0; MASKED && k < rows; ++k) n[k] = static_cast<double>(counting.find(m + k));
    set_constants(m, rows, sum_gd, sum_g, c, MASKED ? n : nullptr);
    grad_block(at, dh_at, m, rows, 0, g.N, c, w, dw, db, MASKED ? counting.on() : nullptr);
  }

  // Few long rows: the sums of all of them piece by piece, then each piece of all rows, so that dweight is whole at once.
  void long_rows(const RowsInput& dz) const {
    const int64_t pieces = ceil_div(g.N, PIECE), rows = g.M / g.P;
    std::vector<double> sum_gd(g.M * pieces, 0.0), sum_g(g.M * pieces, 0.0);
    if (dx)
      parallel_for(pieces, 2 * g.M * PIECE, [&](int64_t begin, int64_t end) {
        const PairReader<T> read(dz, x, 1, PIECE);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item * PIECE, n = std::min(PIECE, g.N - i);
          for (int64_t p = 0; p < g.P; ++p) {
            const InLots<T> w(weight, n, p * g.N + i);
            for (int64_t m = p * rows; m < (p + 1) * rows; ++m)
              this->template add_sums<1, 4>({read(m, 0, i, n)}, m, n, w, &sum_gd[m * pieces + item], &sum_g[m * pieces + item]);
          }
        }
      });
    for (int64_t m = 0; m < g.M; ++m) {
      for (auto* sum : {&sum_gd, &sum_g}) {
        const auto first = sum->begin() + m * pieces;
        (*sum)[m] = std::accumulate(first, first + pieces, 0.0);
      }
    }
    std::vector<Constants> constants(g.P);
    for (int64_t p = 0, m = 0; p < g.P; ++p, m += rows) set_constants(m, rows, &sum_gd[m], &sum_g[m], constants[p]);
    parallel_for(pieces, 2 * g.M * PIECE, [&](int64_t begin, int64_t end) {
      const PairReader<T> read(dz, x, g.M, PIECE);
      const Reader<T> read_dh(dh, g.M, PIECE);
      const Buffer<A> partial(2 * PIECE);
      A *dw = dweight.data ? partial + 0 : nullptr, *db = dbias.data ? partial + PIECE : nullptr;
      for (int64_t item = end - 1; item >= begin; --item) {  // what was read last is in cache
        const int64_t i = item * PIECE, n = std::min(PIECE, g.N - i);
        Place at[FEW];
        const T* dh_at[FEW];
        for (int64_t m = 0; m < g.M; ++m) at[m] = read(m, m, i, n);
        find_dh(read_dh, 0, g.M, i, n, dh_at);
        for (int64_t p = 0, m = 0; p < g.P; ++p, m += rows) {
          const int64_t parameter = p * g.N + i;
          std::fill_n(static_cast<A*>(partial), 2 * PIECE, A(0));
          with_parameters<T>(weight, {}, parameter, n, [&](const auto* w, const auto*) {
            grad_block(at + m, dh_at + m, m, rows, i, n, constants[p], w, dw, db);
          });
          if (dw) set_elements(dweight, parameter, n, dw);
          if (db) set_elements(dbias, parameter, n, db);
        }
      }
      if (stream) stream_end();
    });
  }

  // The same with dz made beforehand.
  void long_rows_of_slopes() const {
    const Buffer<T> own(slopes->out ? 0 : g.M * g.N);
    T* dz = slopes->out ? slopes->out : own;
    parallel_for(ceil_div(g.N, PIECE), 2 * g.M * PIECE, [&](int64_t begin, int64_t end) {
      const SlopeReader<T> read(dy, x, slopes, 1, PIECE, dz);
      for (int64_t i = begin * PIECE; i < std::min(g.N, end * PIECE); i += PIECE)
        for (int64_t m = 0; m < g.M; ++m) read(m, 0, i, std::min(PIECE, g.N - i));
    });
    long_rows(dense_rows(g, {dz, dtype_of<T>}));
  }

  // As for_sums, and each row by itself where short ones come from memory: the processor fetches two streams ahead, and not
  // eight. Every row is summed in the same order either way.
  template <class F>
  void for_rows(int64_t rows, const F& f) const {
    constexpr std::integral_constant<size_t, 1> one;
    if (!far || row_bytes < 512 || g.N > SHORT) return for_sums(g.N, rows, f);
    for (int64_t k = 0; k < rows; ++k) f(one, one, k);
  }

  // What dz and x of a block take: well inside a second-level cache, half as much beside dh; of short rows inside the first
  // level; and little where those come from memory, so that reads and writes take turns.
  int64_t block_bytes() const {
    constexpr int64_t BYTES = 1 << 17;
    if (row_bytes <= 1024 && far) return BYTES / 32;
    return g.N <= SHORT ? BYTES / 8 : dh.data ? BYTES / 2 : BYTES;
  }

  void operator()() const {
    if (split_rows(g) && !MASKED) {
      if constexpr (FUSED)
        if (slopes) return long_rows_of_slopes();
      return long_rows(dy);
    }
    // Segments depend on the shape alone, so the sums do not depend on the threads; at most 128 rows, so that plain
    // additions will do; long rows in longer segments, whose partial sums are then little beside them, but in enough for many
    // threads. Each part of the rows has its own.
    const int64_t rows = g.M / g.P, least = g.N >= 2048 ? 16 : 32;
    const int64_t long_each = std::min(g.N / 64, ceil_div(rows, 16));
    const int64_t rows_each = std::clamp<int64_t>(std::max(ceil_div(rows, 32), long_each), least, 128);
    const int64_t segments = ceil_div(rows, rows_each), width = ceil_div(g.N, 64) * 64;
    const int64_t block_each = mask.P > 1 ? 1 : block_rows(block_bytes(), 2 * g.N * sizeof(T));
    const bool sums = dweight.data || dbias.data, at_once = segments == 1;
    const Buffer<A> partial(sums && !at_once ? g.P * segments * 2 * width : 0);
    std::vector<InLots<T>> lots(g.P);
    parallel_for(g.P, g.N, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) lots[p] = InLots<T>(weight, g.N, p * g.N);
    });
    with_parameters<T>(weight, {}, 0, g.P * g.N, [&](const auto* w, const auto*) {
      parallel_for(g.P * segments, 2 * std::min(rows, rows_each) * g.N, [&](int64_t begin, int64_t end) {
        const auto read = reader(block_each);
        const Reader<T> read_dh(dh, block_each, g.N);
        Counting<T> counting(mask, g);
        const Buffer<A> own(sums && at_once ? 2 * width : 0);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t p = item / segments, first = p * rows + item % segments * rows_each;
          const int64_t last = std::min((p + 1) * rows, first + rows_each);
          A* dw = !sums ? nullptr : at_once ? own : partial + 2 * width * item;
          if (sums) std::fill_n(dw, 2 * width, A(0));
          for (int64_t m = first; m < last; m += block_each)
            block(read, read_dh, counting, m, std::min(block_each, last - m), w ? w + p * g.N : w, lots[p],
                  dweight.data ? dw : nullptr, dbias.data ? dw + width : nullptr);
          if (at_once && dweight.data) set_elements(dweight, p * g.N, g.N, dw);
          if (at_once && dbias.data) set_elements(dbias, p * g.N, g.N, dw + width);
        }
        if (stream) stream_end();
      });
    });
    if (!sums || at_once) return;
    constexpr int64_t COLUMNS = 512;
    const int64_t cuts = ceil_div(g.N, COLUMNS);
    parallel_for(g.P * cuts, segments * COLUMNS, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t p = item / cuts, i = item % cuts * COLUMNS, n = std::min(COLUMNS, g.N - i);
        const A* of = partial + 2 * width * segments * p + i;
        finish(of, segments, width, dweight, p * g.N + i, n);
        finish(of + width, segments, width, dbias, p * g.N + i, n);
      }
    });
  }

  // Elements [i, i + n) of a gradient: the sum over the segments.
  static void finish(const A* partial, int64_t segments, int64_t width, Array out, int64_t i, int64_t n) {
    if (!out.data) return;
    std::vector<double> sum(n, 0.0);
    for (int64_t k = 0; k < segments; ++k)
      for (int64_t j = 0; j < n; ++j) sum[j] += static_cast<double>(partial[2 * width * k + j]);
    set_elements(out, i, n, sum.data());
  }
};

void row_bwd(Rows g, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean, const void* rstd, Array dx,
             Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowBackward<T, false>{g,       dy,          x,           ABSENT,        weight,  true,
                          nullptr, as<A>(mean), as<A>(rstd), as<T>(dx.data), dweight, dbias}();
  });
}

void row_masked_bwd(Rows g, RowMask mask, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean,
                    const void* rstd, Array dx, Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowBackward<T, false, true>{g,       dy,          x,           ABSENT,        weight,  true, nullptr,
                                as<A>(mean), as<A>(rstd), as<T>(dx.data), dweight, dbias, mask}();
  });
}

void row_fused_bwd(Rows g, const RowsInput& dy, const RowsInput& dh, const RowsInput& x, const RowsInput& residual,
                   ConstArray weight, ConstArray bias, Epilogue epilogue, bool centre, const void* mean, const void* rstd,
                   Array dx, Array dweight, Array dbias, Array dresidual) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto run = [&](const Slopes<T>* slopes) {
      RowBackward<T, true>{g,      dy,          x,           dh,            weight,  centre,
                           slopes, as<A>(mean), as<A>(rstd), as<T>(dx.data), dweight, dbias}();
    };
    if (epilogue.activation == Activation::identity && !dresidual.data) return run(nullptr);
    const int64_t n = g.P * g.N;
    const Slopes<T> slopes{g,           residual,    Widened<A>(weight, n), Widened<A>(bias, n), epilogue,
                           as<A>(mean), as<A>(rstd), as<T>(dresidual.data)};
    run(&slopes);
  });
}

}  // namespace fastnorm::cpu
