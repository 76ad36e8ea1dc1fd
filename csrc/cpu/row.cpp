// Rows (M, N): layer norm on the CPU.
//
// A block of rows is read from memory once. The first pass takes each row's sums; the second goes over the block again, in
// cache now, a few vectors of columns at a time: weight, bias and the sums of their gradients stay in registers for all rows of
// the block. A row's arithmetic depends on N alone: it is the same in every batch and in every place of it.
#include <numeric>

#include "loops.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t PIECE = 8192;      // elements of a row that are summed together; longer rows are sums of pieces
constexpr int64_t LONG = 4 * PIECE;  // from here on few rows are split over the threads
constexpr int64_t FEW = 64;          // what few rows are
constexpr int64_t SHORT = 512;       // up to here four rows are summed at once, beyond it four parts of one row
constexpr int64_t MAX_BLOCK = 64;    // rows of a block

// Rows of a block whose inputs take this many bytes, at least four.
int64_t block_rows(int64_t bytes, int64_t row_bytes) { return std::clamp<int64_t>(bytes / row_bytes, 4, MAX_BLOCK); }

// Where rows are read: in place where their elements are neighbours, else from copies of the rows of a block.
template <class T>
class Reader {
 public:
  Reader(const RowsInput& x, int64_t rows, int64_t elements)
      : p_(static_cast<const T*>(x.data)),
        x_(x),
        stride_(x.rows.rank == 1 ? x.rows.stride[0] : 0),
        plain_(x.columns.dense() && x.rows.rank <= 1),
        elements_(elements),
        copies_(x.columns.dense() ? 0 : rows * elements) {}
  // Elements [begin, begin + n) of row m; slot tells rows apart that are read together.
  FN_INLINE const T* operator()(int64_t m, int64_t slot, int64_t begin, int64_t n) const {
    return plain_ ? p_ + m * stride_ + begin : otherwise(m, slot, begin, n);
  }

 private:
  const T* otherwise(int64_t m, int64_t slot, int64_t begin, int64_t n) const {
    const T* row = p_ + x_.rows.offset(m);
    if (x_.columns.dense()) return row + begin;
    gather(row, x_.columns, begin, n, copies_ + slot * elements_);
    return copies_ + slot * elements_;
  }

  const T* p_;
  const RowsInput& x_;
  int64_t stride_;
  bool plain_;
  int64_t elements_;
  Buffer<T> copies_;
};

// f(std::integral_constant<size_t, R>, std::integral_constant<size_t, CHAINS>, k) for every row k of a block, R rows at a time.
template <class F>
FN_INLINE void for_sums(int64_t N, int64_t rows, const F& f) {
  constexpr std::integral_constant<size_t, 1> one;
  constexpr std::integral_constant<size_t, 4> four;
  int64_t k = 0;
  if (N > SHORT) {
    for (; k < rows; ++k) f(one, four, k);
    return;
  }
  for (; k + 4 <= rows; k += 4) f(four, one, k);
  for (; k < rows; ++k) f(one, one, k);
}

// x_hat of one row.
template <class T>
struct XHat {
  using V = Vec<T>;
  V high, low, rstd;
  FN_INLINE XHat(Acc<T> h, Acc<T> l, Acc<T> r) : high(h), low(l), rstd(r) {}
  FN_INLINE V operator()(V x) const { return sizeof(T) == 2 ? normalize(x, high, rstd) : normalize(x, high, low, rstd); }
};

bool split_rows(Rows g) { return g.N >= LONG && g.M < FEW; }

// ---------------------------------------------------------------- forward

template <class T>
Moments<double> moments_about_mean(const T* row, int64_t n, double mean) {
  using V = Vec<T>;
  const Acc<T> shift = static_cast<Acc<T>>(mean);
  double sums[1][2];
  const auto terms = [s = V(shift)](auto, int64_t, int64_t count, const std::array<V, 1>& x) FN_LAMBDA {
    const V d = only(x[0] - s, count);
    return std::array<V, 2>{d, d * d};
  };
  sum_up<2, 4>(std::array<std::array<const T*, 1>, 1>{{{row}}}, n, terms, sums);
  return moments_about(static_cast<double>(shift), static_cast<double>(n), sums[0][0], sums[0][1]);
}

// In one pass, from plain sums of powers; in a second one, about the mean, where it is too far from zero for that.
template <class T, size_t R, size_t CHAINS>
void moments_of(const std::array<const T*, R>& rows, int64_t n, Moments<double>* out) {
  constexpr double DEVIATIONS = sizeof(T) == 2 ? 8 : 1;  // little beside the rounding of y in each dtype
  std::array<std::array<const T*, 1>, R> at;
  repeat<R>([&](auto r) FN_LAMBDA { at[r] = {rows[r]}; });
  double sums[R][2];
  sum_up<2, CHAINS>(at, n, Products<T, 1>{}, sums);
  for (size_t r = 0; r < R; ++r) {
    out[r] = moments_about(0, static_cast<double>(n), sums[r][0], sums[r][1]);
    if (!std::isfinite(sums[r][1]))
      out[r] = moments_in_double(n, [&](int64_t i) { return static_cast<double>(rows[r][i]); });
    else if (too_far(0, out[r], DEVIATIONS))
      out[r] = moments_about_mean(rows[r], n, out[r].mean);
  }
}

template <class T>
struct Forward {
  using A = Acc<T>;
  using V = Vec<T>;
  Rows g;
  ConstArray weight, bias;
  double eps;
  T* y;
  A *mean, *rstd;

  void save(int64_t m, const Moments<double>& moments) const {
    const Pair<A> centre(moments.mean);
    mean[m] = centre.high;
    mean[g.M + m] = centre.low;
    rstd[m] = static_cast<A>(1.0 / std::sqrt(moments.m2 / moments.n + eps));
  }

  // Elements [i0, i0 + n) of rows [m, m + rows), which x points to; w and b start at i0.
  template <class Parameter>
  void normalize_block(const T* const* x, int64_t m, int64_t rows, int64_t i0, int64_t n, const Parameter* w,
                       const Parameter* b) const {
    const A *high = mean + m, *low = high + g.M, *r = rstd + m;
    const int64_t N = g.N;
    for_groups<V, 8>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
      constexpr int64_t W = lanes<V>;
      V wi[J], bi[J];
      repeat<J>([&](auto j) FN_LAMBDA {
        wi[j] = w ? load(w + i + j * W, count) : V(1);
        bi[j] = b ? load(b + i + j * W, count) : V(0);
      });
      T* out = y + m * N + i0 + i;
      for (int64_t k = 0; k < rows; ++k, out += N) {
        const XHat<T> x_hat(high[k], low[k], r[k]);
        const T* in = x[k] + i;
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA { v[j] = affine(x_hat(load(in + j * W, count)), wi[j], bi[j]); });
        store_all<T, J>(out, v, count);
      }
    });
  }

  template <class Parameter>
  void block(const Reader<T>& read, int64_t m, int64_t rows, const Parameter* w, const Parameter* b) const {
    const T* x[MAX_BLOCK];
    Moments<double> moments[MAX_BLOCK];
    for (int64_t k = 0; k < rows; ++k) x[k] = read(m + k, k, 0, g.N);
    for_sums(g.N, rows, [&](auto R, auto CHAINS, int64_t k) {
      std::array<const T*, R> at;
      for (size_t r = 0; r < R; ++r) at[r] = x[k + r];
      moments_of<T, R, CHAINS>(at, std::min(PIECE, g.N), moments + k);
    });
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t i = PIECE; i < g.N; i += PIECE) {
        Moments<double> more;
        moments_of<T, 1, 4>({x[k] + i}, std::min(PIECE, g.N - i), &more);
        moments[k] = merge(moments[k], more);
      }
    for (int64_t k = 0; k < rows; ++k) save(m + k, moments[k]);
    normalize_block(x, m, rows, 0, g.N, w, b);
  }

  // Few long rows: the statistics of all of them piece by piece, then each piece of all rows.
  void long_rows(const RowsInput& x) const {
    const int64_t pieces = ceil_div(g.N, PIECE);
    std::vector<Moments<double>> partial(g.M * pieces);
    parallel_for(g.M * pieces, PIECE, [&](int64_t begin, int64_t end) {
      const Reader<T> read(x, 1, PIECE);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item % pieces * PIECE, n = std::min(PIECE, g.N - i);
        moments_of<T, 1, 4>({read(item / pieces, 0, i, n)}, n, &partial[item]);
      }
    });
    for (int64_t m = 0; m < g.M; ++m) {
      auto total = partial[m * pieces];
      for (int64_t k = 1; k < pieces; ++k) total = merge(total, partial[m * pieces + k]);
      save(m, total);
    }
    parallel_for(pieces, g.M * PIECE, [&](int64_t begin, int64_t end) {
      const Reader<T> read(x, g.M, PIECE);
      for (int64_t item = end - 1; item >= begin; --item) {  // what was read last is in cache
        const int64_t i = item * PIECE, n = std::min(PIECE, g.N - i);
        const T* at[FEW];
        for (int64_t m = 0; m < g.M; ++m) at[m] = read(m, m, i, n);
        with_parameters<T>(weight, bias, i, n, [&](const auto* w, const auto* b) { normalize_block(at, 0, g.M, i, n, w, b); });
      }
    });
  }

  void operator()(const RowsInput& x) const {
    if (split_rows(g)) return long_rows(x);
    constexpr int64_t BYTES = 1 << 14;  // half of a first-level cache
    const int64_t each = block_rows(BYTES, g.N * sizeof(T));
    with_parameters<T>(weight, bias, 0, g.N, [&](const auto* w, const auto* b) {
      parallel_for(ceil_div(g.M, each), each * g.N, [&](int64_t begin, int64_t end) {
        const Reader<T> read(x, each, g.N);
        for (int64_t k = begin; k < end; ++k) block(read, k * each, std::min(each, g.M - k * each), w, b);
      });
    });
  }
};

// ---------------------------------------------------------------- backward

template <class T>
struct Backward {
  using A = Acc<T>;
  using V = Vec<T>;
  using Place = std::array<const T*, 2>;  // dy, x
  Rows g;
  ConstArray weight;
  const A *mean, *rstd;
  T* dx;
  Array dweight, dbias;

  // Adds the sums of g * (x - high) and of g over one piece of R rows; w, in lots, starts with the piece.
  template <size_t R, size_t CHAINS>
  void add_sums(const std::array<Place, R>& at, int64_t m, int64_t n, const A* w, double* sum_gd, double* sum_g) const {
    V high[R];
    double piece[R][2];
    repeat<R>([&](auto k) FN_LAMBDA { high[k] = V(mean[m + k]); });
    const auto terms = [&](V gi, V x, auto k) FN_LAMBDA { return std::array<V, 2>{gi * (x - high[k]), gi}; };
    if (w)
      sum_up<2, CHAINS>(
          at, n,
          [&](auto k, int64_t i, int64_t count, const std::array<V, 2>& v)
              FN_LAMBDA { return terms(v[0] * load(w + i, count), v[1], k); },
          piece);
    else
      sum_up<2, CHAINS>(
          at, n, [&](auto k, int64_t, int64_t, const std::array<V, 2>& v) FN_LAMBDA { return terms(v[0], v[1], k); }, piece);
    for (size_t k = 0; k < R; ++k) sum_gd[k] += piece[k][0], sum_g[k] += piece[k][1];
  }

  // c1 * rstd and c2 * rstd of rows [m, m + rows) from their sums.
  void means(int64_t m, int64_t rows, const double* sum_gd, const double* sum_g, A* c1, A* c2) const {
    const double one_by_N = 1.0 / static_cast<double>(g.N);
    const A *low = mean + g.M + m, *r = rstd + m;
    for (int64_t k = 0; k < rows; ++k) {
      const double rstd_k = static_cast<double>(r[k]), by_N = rstd_k * one_by_N;
      c1[k] = static_cast<A>((sum_gd[k] - static_cast<double>(low[k]) * sum_g[k]) * by_N * rstd_k);
      c2[k] = static_cast<A>(sum_g[k] * by_N);
    }
  }

  // dx of elements [i0, i0 + n) of rows [m, m + rows), and their part of dw and db; w, dw and db start at i0.
  template <class Parameter>
  void grad_block(const Place* at, int64_t m, int64_t rows, int64_t i0, int64_t n, const A* c1, const A* c2, const Parameter* w,
                  A* dw, A* db) const {
    const A *high = mean + m, *low = high + g.M, *r = rstd + m;
    const int64_t N = g.N;
    for_groups<V, 4>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
      constexpr int64_t W = lanes<V>;
      V wi[J], dwi[J], dbi[J];
      repeat<J>([&](auto j) FN_LAMBDA { wi[j] = w ? load(w + i + j * W, count) : V(1), dwi[j] = V(0), dbi[j] = V(0); });
      T* out = dx ? dx + m * N + i0 + i : nullptr;
      for (int64_t k = 0; k < rows; ++k) {
        const XHat<T> x_hat(high[k], low[k], r[k]);
        const V rk(r[k]), c1k(c1[k]), c2k(c2[k]);
        const T *dy_k = at[k][0] + i, *x_k = at[k][1] + i;
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA {
          const V dz = load(dy_k + j * W, count), h = x_hat(load(x_k + j * W, count));
          v[j] = grad_input_scaled(dz * wi[j], h, rk, c1k, c2k);
          dwi[j] = dwi[j] + dz * h;
          dbi[j] = dbi[j] + dz;
        });
        if (out) store_all<T, J>(out + k * N, v, count);
        if (out && J > 1) prefetch_for_write<T, J>(out + k * N + J * W);  // the way over the rows hides it from the processor
      }
      repeat<J>([&](auto j) FN_LAMBDA {
        if (dw) store(dw + i + j * W, load(dw + i + j * W) + dwi[j]);
        if (db) store(db + i + j * W, load(db + i + j * W) + dbi[j]);
      });
    });
  }

  void block(const Reader<T>& dy, const Reader<T>& x, int64_t m, int64_t rows, const InLots<T>& weights, A* dw, A* db) const {
    const A* lots = weights;
    Place at[MAX_BLOCK];
    double sum_gd[MAX_BLOCK], sum_g[MAX_BLOCK];
    A c1[MAX_BLOCK], c2[MAX_BLOCK];
    for (int64_t k = 0; k < rows; ++k) at[k] = {dy(m + k, k, 0, g.N), x(m + k, k, 0, g.N)};
    for (int64_t k = 0; k < rows; ++k) sum_gd[k] = sum_g[k] = 0;
    if (dx)
      for_sums(g.N, rows, [&](auto R, auto CHAINS, int64_t k) {
        for (int64_t i = 0; i < g.N; i += PIECE) {
          std::array<Place, R> piece;
          for (size_t r = 0; r < R; ++r) piece[r] = {at[k + r][0] + i, at[k + r][1] + i};
          this->template add_sums<R, CHAINS>(piece, m + k, std::min(PIECE, g.N - i), lots ? lots + i : lots, sum_gd + k,
                                             sum_g + k);
        }
      });
    means(m, rows, sum_gd, sum_g, c1, c2);
    grad_block(at, m, rows, 0, g.N, c1, c2, weights.in_order(), dw, db);
  }

  // Few long rows: the sums of all of them piece by piece, then each piece of all rows, so that dweight is whole at once.
  void long_rows(const RowsInput& dy, const RowsInput& x) const {
    const int64_t pieces = ceil_div(g.N, PIECE);
    std::vector<double> sum_gd(g.M * pieces, 0.0), sum_g(g.M * pieces, 0.0);
    if (dx)
      parallel_for(g.M * pieces, 2 * PIECE, [&](int64_t begin, int64_t end) {
        const Reader<T> read_dy(dy, 1, PIECE), read_x(x, 1, PIECE);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t m = item / pieces, i = item % pieces * PIECE, n = std::min(PIECE, g.N - i);
          this->template add_sums<1, 4>({Place{read_dy(m, 0, i, n), read_x(m, 0, i, n)}}, m, n, InLots<T>(weight, n, i),
                                        &sum_gd[item], &sum_g[item]);
        }
      });
    for (int64_t m = 0; m < g.M; ++m) {
      for (auto* sum : {&sum_gd, &sum_g}) {
        const auto first = sum->begin() + m * pieces;
        (*sum)[m] = std::accumulate(first, first + pieces, 0.0);
      }
    }
    std::vector<A> c1(g.M), c2(g.M);
    means(0, g.M, sum_gd.data(), sum_g.data(), c1.data(), c2.data());
    parallel_for(pieces, 2 * g.M * PIECE, [&](int64_t begin, int64_t end) {
      const Reader<T> read_dy(dy, g.M, PIECE), read_x(x, g.M, PIECE);
      const Buffer<A> partial(2 * PIECE);
      A *dw = dweight.data ? partial + 0 : nullptr, *db = dbias.data ? partial + PIECE : nullptr;
      for (int64_t item = end - 1; item >= begin; --item) {  // what was read last is in cache
        const int64_t i = item * PIECE, n = std::min(PIECE, g.N - i);
        Place at[FEW];
        for (int64_t m = 0; m < g.M; ++m) at[m] = {read_dy(m, m, i, n), read_x(m, m, i, n)};
        std::fill_n(static_cast<A*>(partial), 2 * PIECE, A(0));
        with_parameters<T>(weight, {}, i, n,
                           [&](const auto* w, const auto*) { grad_block(at, 0, g.M, i, n, c1.data(), c2.data(), w, dw, db); });
        if (dw) set_elements(dweight, i, n, dw);
        if (db) set_elements(dbias, i, n, db);
      }
    });
  }

  // What the inputs of a block take: well inside a second-level cache; of short rows inside the first level; and little where
  // those come from memory, so that reads and writes take turns.
  int64_t block_bytes() const {
    constexpr int64_t BYTES = 1 << 17, MEMORY = 32 << 20;
    const int64_t row_bytes = g.N * static_cast<int64_t>(sizeof(T));
    if (row_bytes <= 256 && 3 * g.M * row_bytes > MEMORY) return BYTES / 32;
    return g.N <= SHORT ? BYTES / 8 : BYTES;
  }

  void operator()(const RowsInput& dy, const RowsInput& x) const {
    if (split_rows(g)) return long_rows(dy, x);
    // Segments depend on the shape alone, so the sums do not depend on the threads; at most 128 rows, so that plain
    // additions will do; long rows in longer segments, whose partial sums are then little beside them.
    const int64_t rows_each = std::clamp<int64_t>(std::max(ceil_div(g.M, 32), g.N / 64), 32, 128);
    const int64_t segments = ceil_div(g.M, rows_each), width = ceil_div(g.N, 64) * 64;
    const int64_t block_each = block_rows(block_bytes(), 2 * g.N * sizeof(T));
    const bool sums = dweight.data || dbias.data;
    const Buffer<A> partial(sums ? segments * 2 * width : 0);
    const InLots<T> w(weight, g.N);
    parallel_for(segments, 2 * rows_each * g.N, [&](int64_t begin, int64_t end) {
      const Reader<T> read_dy(dy, block_each, g.N), read_x(x, block_each, g.N);
      for (int64_t k = begin; k < end; ++k) {
        A* dw = sums ? partial + 2 * width * k : nullptr;
        if (sums) std::fill_n(dw, 2 * width, A(0));
        const int64_t last = std::min(g.M, (k + 1) * rows_each);
        for (int64_t m = k * rows_each; m < last; m += block_each)
          block(read_dy, read_x, m, std::min(block_each, last - m), w, dweight.data ? dw : nullptr,
                dbias.data ? dw + width : nullptr);
      }
    });
    if (!sums) return;
    constexpr int64_t COLUMNS = 512;
    parallel_for(ceil_div(g.N, COLUMNS), segments * COLUMNS, [&](int64_t begin, int64_t end) {
      finish(partial, segments, width, dweight, begin * COLUMNS, std::min(g.N, end * COLUMNS));
      finish(partial + width, segments, width, dbias, begin * COLUMNS, std::min(g.N, end * COLUMNS));
    });
  }

  // Columns [begin, end) of a gradient: the sum over the segments.
  static void finish(const A* partial, int64_t segments, int64_t width, Array out, int64_t begin, int64_t end) {
    if (!out.data) return;
    if (segments == 1) return set_elements(out, begin, end - begin, partial + begin);
    std::vector<double> sum(end - begin, 0.0);
    for (int64_t k = 0; k < segments; ++k)
      for (int64_t i = begin; i < end; ++i) sum[i - begin] += static_cast<double>(partial[2 * width * k + i]);
    set_elements(out, begin, end - begin, sum.data());
  }
};

}  // namespace

void row_fwd(Rows g, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    Forward<T>{g, weight, bias, eps, as<T>(y.data), as<A>(mean), as<A>(rstd)}(x);
  });
}

void row_bwd(Rows g, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean, const void* rstd, Array dx,
             Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    Backward<T>{g, weight, as<A>(mean), as<A>(rstd), as<T>(dx.data), dweight, dbias}(dy, x);
  });
}

}  // namespace fastnorm::cpu
