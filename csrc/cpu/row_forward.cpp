// Layer norm forward, and what is fused with it: the moments of a block of rows, then y.
#include <cstring>
#include <tuple>

#include "row_fused.h"
#include "row_masked.h"

namespace fastnorm::cpu {

// x_hat of the rows of a block, from x, each row's mean pair, its rstd and its m2.
template <class T>
struct WideXHats {
  using A = Acc<T>;
  using V = Vec<T>;
  const A *high, *low, *rstd;
  WideXHats(const A* h, const A* l, const A* r, const double*, int64_t) : high(h), low(l), rstd(r) {}
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
  HalfXHats(const float* high, const float*, const float* rstd, const double* m2, int64_t rows) {
    for (int64_t k = 0; k < rows; ++k) slope[k] = m2[k] == 0 ? cut(rstd[k]) : rstd[k];
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
  RowMask mask{};
  // x and y, and with them the addend and h, or the residual.
  int64_t bytes = (h ? 4 : residual.data ? 3 : 2) * g.M * g.N * static_cast<int64_t>(sizeof(T));
  bool stream = streams(y, g.N * sizeof(T), bytes);

  // `n`: what the moments of each row are of, where it is not all of it.
  void save(int64_t m, int64_t rows, const BlockMoments& moments, const double* n = nullptr) const {
    const double share = 1 / static_cast<double>(g.N);
    double variance[MAX_BLOCK];
    for (int64_t k = 0; k < rows; ++k) {
      const Pair<A> centre(moments.mean[k]);
      mean[m + k] = centre.high;
      mean[g.M + m + k] = centre.low;
      variance[k] = (n ? moments.m2[k] / n[k] : moments.m2[k] * share) + eps;
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
  void normalize_block(const T* const* x, const T* const* residuals, const double* m2, int64_t m, int64_t rows, int64_t i0,
                       int64_t n, const Parameter* w, const Parameter* b) const {
    const XHats<T> x_hats(mean + m, mean + g.M + m, rstd + m, m2, rows);
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
          activate_all<Activation::gelu>(epilogue, v);
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

  // Makes h and its moments in one pass, where h is not rounded and a row is one piece; else false.
  template <class Read>
  bool sum_block(const Read& read, int64_t m, int64_t rows, const T** x, BlockMoments& moments) const {
    if constexpr (FUSED && std::is_same_v<T, A>) {
      if (!h || g.N > PIECE) return false;
      T* to[MAX_BLOCK];
      const T *first[MAX_BLOCK], *second[MAX_BLOCK];
      for (int64_t k = 0; k < rows; ++k) {
        std::tie(first[k], second[k], to[k]) = read.summands(m + k, k, 0, g.N);
        x[k] = to[k];
      }
      moments_of<T>(Summed<T>{to, first, second}, rows, g.N, centred, moments);
      return true;
    }
    return false;
  }

  template <class Read, class Parameter>
  void block(const Read& read, Counting<T>& counting, int64_t m, int64_t rows, const Parameter* w, const Parameter* b) const {
    const T *x[MAX_BLOCK], *residuals[MAX_BLOCK];
    BlockMoments moments;
    find_residuals(read, m, rows, 0, g.N, residuals);
    if (!sum_block(read, m, rows, x, moments)) {
      for (int64_t k = 0; k < rows; ++k) x[k] = read(m + k, k, 0, g.N);
      moments_of(x, rows, std::min(PIECE, g.N), centred, moments);
    }
    for (int64_t i = PIECE; i < g.N; i += PIECE) {
      const T* piece[MAX_BLOCK];
      BlockMoments more;
      const int64_t n = std::min(PIECE, g.N - i);
      for (int64_t k = 0; k < rows; ++k) piece[k] = x[k] + i;
      moments_of(piece, rows, n, centred, more);
      for (int64_t k = 0; k < rows; ++k) moments.set(k, merge(moments.get(k, i), more.get(k, n)));
    }
    double n[MAX_BLOCK];
    if (counting) counting.moments(x, m, rows, moments, n);
    save(m, rows, moments, counting ? n : nullptr);
    normalize_block(x, residuals, moments.m2, m, rows, 0, g.N, w, b);
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
        const int64_t rows = g.M / g.P;
        for (int64_t p = 0, m = 0; p < g.P; ++p, m += rows)
          with_parameters<T>(weight, bias, p * g.N + i, n, [&](const auto* w, const auto* b) {
            normalize_block(at + m, residuals + m, moments.m2 + m, m, rows, i, n, w, b);
          });
      }
      if (stream) stream_end();
    });
  }

  void operator()() const {
    if (split_rows(g) && !mask.data) return long_rows();
    // Three quarters of a first-level cache; beside h, which does not stay there anyway, twice as many rows, so that weight and
    // bias are loaded half as often.
    const int64_t BYTES = (h ? 6 : 3) << 13;
    const int64_t fitting = mask.P > 1 ? 1 : block_rows(BYTES, g.N * sizeof(T));
    const int64_t rows = g.M / g.P, each = std::min(rows, fitting), blocks = ceil_div(rows, each);
    with_parameters<T>(weight, bias, 0, g.P * g.N, [&](const auto* w, const auto* b) {
      parallel_for(g.P * blocks, each * g.N, [&](int64_t begin, int64_t end) {
        const auto read = reader(x, h, each, g.N);
        Counting<T> counting(mask, g);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t p = item / blocks, k = item % blocks * each, at = p * g.N;  // in the p-th part of the rows
          block(read, counting, p * rows + k, std::min(each, rows - k), w ? w + at : w, b ? b + at : b);
        }
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

void row_masked_fwd(Rows g, RowMask mask, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y,
                    void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowForward<T, false>{g,    x,   ABSENT,  ABSENT,        weight,      bias,        {},
                         true, eps, nullptr, as<T>(y.data), as<A>(mean), as<A>(rstd), mask}();
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
