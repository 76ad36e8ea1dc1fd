// Constants of channels as constants of the columns of a grid.
#pragma once

#include "channel_ops.h"

namespace fastnorm::cpu {

// K of them for each of `channels` channels from the first on: themselves, or each `fold` times, or all of them `positions`
// times; and in the order of lots where they are for vectors in that order.
template <class T, size_t K, bool LOTS = false>
class ColumnConstants {
 public:
  using A = Acc<T>;

  template <class Of>
  ColumnConstants(int64_t first, int64_t channels, int64_t fold, int64_t positions, const Of& of)
      : line_(ceil_div(channels * fold * positions, 16) * 16),  // whole cache lines
        own_(LOTS || fold * positions > 1 ? static_cast<int64_t>(K + 1) * line_ : 0) {
    A* const spare = own_ + static_cast<int64_t>(K) * line_;
    for (size_t i = 0; i < K; ++i) {
      A* const place = own_ + static_cast<int64_t>(i) * line_;
      at_[i] = of[i] + first;
      if (fold * positions > 1) at_[i] = repeated(at_[i], channels, fold, positions, LOTS ? spare : place);
      if (!LOTS) continue;
      in_lots<T>(at_[i], channels * fold * positions, place);
      for (int64_t c = 0; c < channels * fold * positions; ++c) place[c] = own(place[c]);
      at_[i] = place;
    }
  }
  const std::array<const A*, K>& all() const { return at_; }

 private:
  static const A* repeated(const A* from, int64_t channels, int64_t fold, int64_t positions, A* to) {
    for (int64_t c = 0; fold > 1 && c < channels; ++c) std::fill_n(to + c * fold, fold, from[c]);
    for (int64_t j = 0; positions > 1 && j < positions; ++j) std::copy_n(from, channels, to + j * channels);
    return to;
  }

  int64_t line_;
  Buffer<A> own_;
  std::array<const A*, K> at_;
};

}  // namespace fastnorm::cpu
