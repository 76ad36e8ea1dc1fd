// The moments of rows, of a few at once.
#pragma once

#include <limits>

#include "row.h"

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

// Rows as they are.
template <class T>
struct Given {
  static constexpr size_t P = 1;
  const T* const* rows;
  FN_INLINE std::array<const T*, 1> at(int64_t k) const { return {rows[k]}; }
  auto terms(int64_t) const { return Products<T, 1>{}; }
};
// Rows that are made, and stored in `rows`, of two others: their moments are then those of what is in registers.
template <class T>
struct Summed {
  static_assert(std::is_same_v<T, Acc<T>>, "the moments are of what is stored");
  static constexpr size_t P = 2;
  using V = Vec<T>;
  T* const* rows;
  const T *const *first, *const *second;
  FN_INLINE std::array<const T*, 2> at(int64_t k) const { return {first[k], second[k]}; }
  auto terms(int64_t k) const {
    return [to = rows + k](auto r, int64_t i, int64_t count, const std::array<V, 2>& v) FN_LAMBDA {
      const V h = v[0] + v[1];
      store(to[r] + i, h, count);
      return std::array<V, 2>{h, h * h};
    };
  }
};

// In one pass, from plain sums of powers; in a second one, about the mean, where it is too far from zero for that. Without
// `centre` the mean is zero.
template <class T, class Source>
void moments_of(const Source& source, int64_t count, int64_t n, bool centre, BlockMoments& out) {
  const auto* rows = source.rows;
  double sum[MAX_BLOCK], squares[MAX_BLOCK];
  for_sums(n, count, [&](auto R, auto CHAINS, int64_t k) {
    std::array<std::array<const T*, Source::P>, R> at;
    double sums[R][2];
    for (size_t r = 0; r < R; ++r) at[r] = source.at(k + static_cast<int64_t>(r));
    sum_up<2, CHAINS>(at, n, source.terms(k), sums);
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
template <class T>
void moments_of(const T* const* rows, int64_t count, int64_t n, bool centre, BlockMoments& out) {
  moments_of<T>(Given<T>{rows}, count, n, centre, out);
}

}  // namespace fastnorm::cpu
