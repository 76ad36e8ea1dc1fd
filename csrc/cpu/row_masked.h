// Rows of which some columns do not count.
#pragma once

#include "row_moments.h"

namespace fastnorm::cpu {

// A thread's view of a mask, row by row.
template <class T>
class Counting {
 public:
  using A = Acc<T>;
  using V = Vec<T>;

  Counting(const RowMask& mask, Rows g)
      : mask_(mask), g_(g), on_(in_part() ? g.N : 0), lots_(in_part() && LOT<T> > 1 ? g.N : 0) {}
  explicit operator bool() const { return mask_.data; }
  // Whether a row can count in part: such rows are taken one by one.
  bool in_part() const { return mask_.data && mask_.P > 1; }

  // How many columns of row m do.
  int64_t find(int64_t m) {
    const int64_t r = m / (g_.M / mask_.R);
    if (r == found_) return count_;
    const bool* ones = mask_.data + r * mask_.P;
    const int64_t each = g_.N / mask_.P;
    found_ = r;
    count_ = count_ones(ones, mask_.P) * each;
    if (partial()) {
      for (int64_t p = 0; p < mask_.P; ++p) std::fill_n(on_ + p * each, each, ones[p] ? A(1) : A(0));
      if constexpr (LOT<T> > 1) in_lots<T>(static_cast<const A*>(on_), g_.N, static_cast<A*>(lots_));
    }
    return count_;
  }
  bool partial() const { return 0 < count_ && count_ < g_.N; }
  // Of a row found to count in part: 1 for a column that counts, else 0.
  const A* on() const { return partial() ? on_ + 0 : nullptr; }

  // The moments of what counts of the rows [m, m + rows) of a block, and how many columns that are. Where none does, mean 0,
  // and m2 and count 1.
  void moments(const T* const* x, int64_t m, int64_t rows, BlockMoments& out, double* n) {
    for (int64_t k = 0; k < rows; ++k) {
      n[k] = static_cast<double>(find(m + k));
      if (partial()) out.set(k, moments_of_part(x[k]));
      if (count_ == 0) out.set(k, {n[k] = 1, 0, 1});
    }
  }

 private:
  Moments<double> moments_of_part(const T* row) const {
    const double n = static_cast<double>(count_);
    auto moments = about(row, 0);
    if (!unfit<T>(moments)) return moments;
    if (std::isfinite(moments.m2)) return about(row, static_cast<A>(moments.mean));
    std::vector<double> counting;
    for (int64_t i = 0; i < g_.N; ++i)
      if (on_[i] != A(0)) counting.push_back(static_cast<double>(row[i]));
    return moments_in_double(static_cast<int64_t>(n), [&](int64_t i) { return counting[i]; });
  }
  // From sums of d = x - shift and d * d.
  Moments<double> about(const T* row, A shift) const {
    const A* on = LOT<T> > 1 ? lots_ : on_;
    double sums[1][2];
    const auto terms = [s = V(shift), on](auto, int64_t i, int64_t count, const std::array<V, 1>& x) FN_LAMBDA {
      const V d = V::blendv(V(0), x[0] - s, load(on + i, count) != V(0));
      return std::array<V, 2>{d, d * d};
    };
    sum_up<2, 4>(std::array<std::array<const T*, 1>, 1>{{{row}}}, g_.N, terms, sums);
    return moments_about(static_cast<double>(shift), static_cast<double>(count_), sums[0][0], sums[0][1]);
  }

  RowMask mask_;
  Rows g_;
  int64_t found_ = -1, count_ = 0;
  Buffer<A> on_, lots_;
};

}  // namespace fastnorm::cpu
