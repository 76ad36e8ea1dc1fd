// What surrounds a norm over rows: a sum before it, and in backward dz of what comes after it. Both are made where they are
// read from then on, a few rows ahead of the norm's own loops.
#pragma once

#include <tuple>

#include "epilogue.h"
#include "row.h"

namespace fastnorm::cpu {

// Dense rows of a result.
inline RowsInput dense_rows(Rows g, ConstArray of) {
  RowsInput in;
  static_cast<ConstArray&>(in) = of;
  in.rows.push(g.M, g.N);
  in.columns.push(g.N, 1);
  return in;
}

// Reads what is normalised, x, or h = x + addend, which it stores; and the residual.
template <class T>
class FusedReader {
 public:
  FusedReader(const RowsInput& x, const RowsInput& addend, const RowsInput& residual, T* h, Rows g, int64_t rows,
              int64_t elements)
      : x_(x, rows, elements), addend_(addend, rows, elements), residual_(residual, rows, elements), h_(h), N_(g.N) {}
  const T* operator()(int64_t m, int64_t slot, int64_t begin, int64_t n) const {
    using V = Vec<T>;
    if (!h_) return x_(m, slot, begin, n);
    const T *x, *addend;
    T* h;
    std::tie(x, addend, h) = summands(m, slot, begin, n);
    for_groups<V, 4>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
      constexpr int64_t W = lanes<V>;
      std::array<V, J> v;
      repeat<J>([&](auto j) FN_LAMBDA { v[j] = load(x + i + j * W, count) + load(addend + i + j * W, count); });
      store_all<T, J>(h + i, v, count);
    });
    return h;
  }
  // Of h, where there is one: x, the addend, and where their sum belongs.
  FN_INLINE std::tuple<const T*, const T*, T*> summands(int64_t m, int64_t slot, int64_t begin, int64_t n) const {
    return {x_(m, slot, begin, n), addend_(m, slot, begin, n), h_ + m * N_ + begin};
  }
  FN_INLINE const T* residual(int64_t m, int64_t slot, int64_t begin, int64_t n) const { return residual_(m, slot, begin, n); }

 private:
  Reader<T> x_, addend_, residual_;
  T* h_;
  int64_t N_;
};

// dz = dy * act'(z + residual), in `out` where dresidual is wanted.
template <class T>
struct Slopes {
  using A = Acc<T>;
  Rows g;
  const RowsInput& residual;
  Widened<A> weight, bias;
  Epilogue epilogue;
  const A *mean, *rstd;
  T* out;

  // Elements [begin, begin + n) of row m, where all pointers but weight and bias are; residual_m may be null.
  void operator()(int64_t m, int64_t begin, int64_t n, const T* dy_m, const T* x_m, const T* residual_m, T* dz_m) const {
    using V = Vec<T>;
    const V high(mean[m]), low(mean[g.M + m]), r(rstd[m]);
    const int64_t parameter = m / (g.M / g.P) * g.N + begin;
    const A *w = weight ? weight + parameter : nullptr, *b = bias ? bias + parameter : nullptr;
    for_groups<V, 4>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
      constexpr int64_t W = lanes<V>;
      std::array<V, J> dy, z;
      repeat<J>([&](auto j) FN_LAMBDA {
        const int64_t at = i + j * W;
        dy[j] = load(dy_m + at, count);
        z[j] = affine(normalize(load(x_m + at, count), high, low, r), w ? load(w + at, count) : V(1),
                      b ? load(b + at, count) : V(0));
        if (residual_m) z[j] = z[j] + load(residual_m + at, count);
      });
      grad_all<Activation::gelu>(epilogue, dy, z);
      store_all<T, J>(dz_m + i, z, count);
    });
  }
};

// Reads dy in the place of dz, and x.
template <class T>
struct PairReader {
  PairReader(const RowsInput& dy, const RowsInput& x, int64_t rows, int64_t elements)
      : dy_(dy, rows, elements), x_(x, rows, elements) {}
  FN_INLINE std::array<const T*, 2> operator()(int64_t m, int64_t slot, int64_t begin, int64_t n) const {
    return {dy_(m, slot, begin, n), x_(m, slot, begin, n)};
  }

 private:
  Reader<T> dy_, x_;
};

// Makes dz, where it is another than dy, in dresidual or in a scratch, and reads x.
template <class T>
class SlopeReader {
 public:
  SlopeReader(const RowsInput& dy, const RowsInput& x, const Slopes<T>* slopes, int64_t rows, int64_t elements)
      : SlopeReader(dy, x, slopes, rows, elements, slopes ? slopes->out : nullptr) {}
  SlopeReader(const RowsInput& dy, const RowsInput& x, const Slopes<T>* slopes, int64_t rows, int64_t elements, T* out)
      : pair_(dy, x, rows, elements),
        residual_(slopes ? slopes->residual : ABSENT, rows, elements),
        slopes_(slopes),
        out_(out),
        elements_(elements),
        scratch_(!slopes || out ? 0 : rows * elements) {}
  std::array<const T*, 2> operator()(int64_t m, int64_t slot, int64_t begin, int64_t n) const {
    const auto [dy, x] = pair_(m, slot, begin, n);
    if (!slopes_) return {dy, x};
    const T* residual = slopes_->residual.data ? residual_(m, slot, begin, n) : nullptr;
    T* dz = out_ ? out_ + m * slopes_->g.N + begin : scratch_ + slot * elements_;
    (*slopes_)(m, begin, n, dy, x, residual, dz);
    return {dz, x};
  }

 private:
  PairReader<T> pair_;
  Reader<T> residual_;
  const Slopes<T>* slopes_;
  T* out_;
  int64_t elements_;
  Buffer<T> scratch_;
};

}  // namespace fastnorm::cpu
