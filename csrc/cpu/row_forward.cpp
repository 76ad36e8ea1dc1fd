// Layer norm forward, and what is fused with it: the moments of a block of rows, then y.
#include <cstring>
#include <limits>

#include "row_fused.h"

namespace fastnorm::cpu {

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

// Moments of the rows of a block: arrays, so that several rows are finished at once.
struct BlockMoments {
  double mean[MAX_BLOCK], m2[MAX_BLOCK];
  Moments<double> get(int64_t k, int64_t n) const { return {static_cast<double>(n), mean[k], m2[k]}; }
  void set(int64_t k, const Moments<double>& m) { mean[k] = m.mean, m2[k] = m.m2; }
};

static_assert(FEW <= MAX_BLOCK);

// Whether the moments of n elements from sums about zero are not to be trusted.
template <class T>
bool unfit(const Moments<double>& m) {
  constexpr double DEVIATIONS = sizeof(T) == 2 ? 8 : 1;  // little beside the rounding of y in each dtype
  return !(m.m2 <= std::numeric_limits<double>::max()) | too_far(0, m, DEVIATIONS);
}

// In one pass, from plain sums of powers; in a second one, about the mean, where it is too far from zero for that. Without
// `centre` the mean is zero.
template <class T>
void moments_of(const T* const* rows, int64_t count, int64_t n, bool centre, BlockMoments& out) {
  double sum[MAX_BLOCK], squares[MAX_BLOCK];
  for_sums(n, count, [&](auto R, auto CHAINS, int64_t k) {
    std::array<std::array<const T*, 1>, R> at;
    double sums[R][2];
    for (size_t r = 0; r < R; ++r) at[r] = {rows[k + r]};
    sum_up<2, CHAINS>(at, n, Products<T, 1>{}, sums);
    for (size_t r = 0; r < R; ++r) sum[k + r] = sums[r][0], squares[k + r] = sums[r][1];
  });
  // Two plain loops, which become vectors. That this product is not the quotient counts where the mean is far from zero only.
  const double share = 1 / static_cast<double>(n);
  for (int64_t k = 0; k < count; ++k) {
    out.mean[k] = centre ? sum[k] * share : 0.0;
    out.m2[k] = std::max(squares[k] - sum[k] * out.mean[k], 0.0);
  }
  int64_t again = 0;
  for (int64_t k = 0; k < count; ++k) again += unfit<T>(out.get(k, n)) ? 1 : 0;
  if (again == 0) return;
  for (int64_t k = 0; k < count; ++k) {
    const auto m = out.get(k, n);
    if (!unfit<T>(m)) continue;
    if (!std::isfinite(m.m2))
      out.set(k, moments_in_double(n, [&](int64_t i) { return static_cast<double>(rows[k][i]); }, centre));
    else
      out.set(k, moments_about_mean(rows[k], n, m.mean));
  }
}

// x_hat of the rows of a block, from x, each row's mean pair and its rstd.
template <class T>
struct WideXHats {
  using A = Acc<T>;
  using V = Vec<T>;
  const A *high, *low, *rstd;
  WideXHats(const A* h, const A* l, const A* r, const BlockMoments&, int64_t) : high(h), low(l), rstd(r) {}
  FN_INLINE auto operator[](int64_t k) const {
    return [h = V(high[k]), l = V(low[k]), r = V(rstd[k])](V x) FN_LAMBDA { return normalize(x, h, l, r); };
  }
};

// The same for an x of 16 bits, in which the mean's low part is lost: x * slope + shift, one operation instead of two. x_hat of
// a constant row has to be zero, so there the slope is cut to 13 bits, whose product with such an x is exact.
template <class T>
struct HalfXHats {
  using V = Vec<T>;
  float slope[MAX_BLOCK], shift[MAX_BLOCK];
  HalfXHats(const float* high, const float*, const float* rstd, const BlockMoments& moments, int64_t rows) {
    for (int64_t k = 0; k < rows; ++k) slope[k] = moments.m2[k] == 0 ? cut(rstd[k]) : rstd[k];
    for (int64_t k = 0; k < rows; ++k) shift[k] = -high[k] * slope[k];
  }
  static float cut(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= ~0x7ffu;
    std::memcpy(&v, &bits, sizeof bits);
    return v;
  }
  FN_INLINE auto operator[](int64_t k) const {
    return [s = V(slope[k]), t = V(shift[k])](V x) FN_LAMBDA { return affine(x, s, t); };
  }
};
template <class T>
using XHats = std::conditional_t<sizeof(T) == 2, HalfXHats<T>, WideXHats<T>>;

// Only where FUSED is anything beside x, weight and bias read, or h written; what is absent has a null pointer.
template <class T, bool FUSED>
struct RowForward {
  using A = Acc<T>;
  using V = Vec<T>;
  Rows g;
  const RowsInput &x, &addend, &residual;
  ConstArray weight, bias;
  Epilogue epilogue;
  bool centred;
  double eps;
  T *h, *y;
  A *mean, *rstd;
  bool stream = streams(y, g.N * sizeof(T), 2 * g.M * g.N * sizeof(T));

  void save(int64_t m, int64_t rows, const BlockMoments& moments) const {
    const double share = 1 / static_cast<double>(g.N);
    double variance[MAX_BLOCK];
    for (int64_t k = 0; k < rows; ++k) {
      const Pair<A> centre(moments.mean[k]);
      mean[m + k] = centre.high;
      mean[g.M + m + k] = centre.low;
      variance[k] = moments.m2[k] * share + eps;
    }
    reciprocal_roots(variance, rows, rstd + m);
  }

  // A thread's reader of what is normalised, which writes h where it is given.
  auto reader(const RowsInput& from, T* to, int64_t rows, int64_t elements) const {
    if constexpr (FUSED)
      return FusedReader<T>(from, addend, residual, to, g, rows, elements);
    else
      return Reader<T>(from, rows, elements);
  }

  // Elements [i0, i0 + n) of rows [m, m + rows), which x and the residuals point to; w and b start at i0.
  template <class Parameter>
  void normalize_block(const T* const* x, const T* const* residuals, const BlockMoments& moments, int64_t m, int64_t rows,
                       int64_t i0, int64_t n, const Parameter* w, const Parameter* b) const {
    const XHats<T> x_hats(mean + m, mean + g.M + m, rstd + m, moments, rows);
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
        const auto x_hat = x_hats[k];
        const T* in = x[k] + i;
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA { v[j] = affine(x_hat(load(in + j * W, count)), wi[j], bi[j]); });
        if constexpr (FUSED) {
          if (residual.data) repeat<J>([&](auto j) FN_LAMBDA { v[j] = v[j] + load(residuals[k] + i + j * W, count); });
          activate_all(epilogue, v);
        }
        put_all<T, J>(out, v, count, stream);
      }
    });
  }

  // Pointers to the residuals of rows [m, m + rows), elements [i, i + n).
  template <class Read>
  void find_residuals(const Read& read, int64_t m, int64_t rows, int64_t i, int64_t n, const T** residuals) const {
    if constexpr (FUSED)
      for (int64_t k = 0; residual.data && k < rows; ++k) residuals[k] = read.residual(m + k, k, i, n);
  }

  template <class Read, class Parameter>
  void block(const Read& read, int64_t m, int64_t rows, const Parameter* w, const Parameter* b) const {
    const T *x[MAX_BLOCK], *residuals[MAX_BLOCK];
    for (int64_t k = 0; k < rows; ++k) x[k] = read(m + k, k, 0, g.N);
    find_residuals(read, m, rows, 0, g.N, residuals);
    BlockMoments moments;
    moments_of(x, rows, std::min(PIECE, g.N), centred, moments);
    for (int64_t i = PIECE; i < g.N; i += PIECE) {
      const T* piece[MAX_BLOCK];
      BlockMoments more;
      const int64_t n = std::min(PIECE, g.N - i);
      for (int64_t k = 0; k < rows; ++k) piece[k] = x[k] + i;
      moments_of(piece, rows, n, centred, more);
      for (int64_t k = 0; k < rows; ++k) moments.set(k, merge(moments.get(k, i), more.get(k, n)));
    }
    save(m, rows, moments);
    normalize_block(x, residuals, moments, m, rows, 0, g.N, w, b);
  }

  // Few long rows: the statistics of all of them piece by piece, then each piece of all rows.
  void long_rows() const {
    const int64_t pieces = ceil_div(g.N, PIECE);
    std::vector<Moments<double>> partial(g.M * pieces);
    parallel_for(g.M * pieces, PIECE, [&](int64_t begin, int64_t end) {
      const auto read = reader(x, h, 1, PIECE);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item % pieces * PIECE, n = std::min(PIECE, g.N - i);
        const T* piece = read(item / pieces, 0, i, n);
        BlockMoments moments;
        moments_of(&piece, 1, n, centred, moments);
        partial[item] = moments.get(0, n);
      }
    });
    BlockMoments moments{};
    for (int64_t m = 0; m < g.M; ++m) {
      auto total = partial[m * pieces];
      for (int64_t k = 1; k < pieces; ++k) total = merge(total, partial[m * pieces + k]);
      moments.set(m, total);
    }
    save(0, g.M, moments);
    const RowsInput stored = h ? dense_rows(g, {h, dtype_of<T>}) : x;
    parallel_for(pieces, g.M * PIECE, [&](int64_t begin, int64_t end) {
      const auto read = reader(stored, nullptr, g.M, PIECE);
      for (int64_t item = end - 1; item >= begin; --item) {  // what was read last is in cache
        const int64_t i = item * PIECE, n = std::min(PIECE, g.N - i);
        const T *at[FEW], *residuals[FEW];
        for (int64_t m = 0; m < g.M; ++m) at[m] = read(m, m, i, n);
        find_residuals(read, 0, g.M, i, n, residuals);
        with_parameters<T>(weight, bias, i, n, [&](const auto* w, const auto* b) {
          normalize_block(at, residuals, moments, 0, g.M, i, n, w, b);
        });
      }
      if (stream) stream_end();
    });
  }

  void operator()() const {
    if (split_rows(g)) return long_rows();
    constexpr int64_t BYTES = 1 << 14;  // half of a first-level cache
    const int64_t each = block_rows(BYTES, g.N * sizeof(T));
    with_parameters<T>(weight, bias, 0, g.N, [&](const auto* w, const auto* b) {
      parallel_for(ceil_div(g.M, each), each * g.N, [&](int64_t begin, int64_t end) {
        const auto read = reader(x, h, each, g.N);
        for (int64_t k = begin; k < end; ++k) block(read, k * each, std::min(each, g.M - k * each), w, b);
        if (stream) stream_end();
      });
    });
  }
};

void row_fwd(Rows g, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowForward<T, false>{g,    x,   ABSENT,  ABSENT,        weight,      bias,       {},
                         true, eps, nullptr, as<T>(y.data), as<A>(mean), as<A>(rstd)}();
  });
}

void row_fused_fwd(Rows g, const RowsInput& x, const RowsInput& addend, const RowsInput& residual, ConstArray weight,
                   ConstArray bias, Epilogue epilogue, bool centre, double eps, Array h, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowForward<T, true>{g,      x,   addend,        residual,      weight,      bias,       epilogue,
                        centre, eps, as<T>(h.data), as<T>(y.data), as<A>(mean), as<A>(rstd)}();
  });
}

}  // namespace fastnorm::cpu
