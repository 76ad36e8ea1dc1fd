// Rows (M, N): layer norm on the CPU. What both directions share: how rows are cut into blocks and read.
//
// A block of rows is read from memory once. The first pass takes each row's sums; the second goes over the block again, in
// cache now, a few vectors of columns at a time: weight, bias and the sums of their gradients stay in registers for all rows of
// the block. A row's arithmetic depends on N alone: it is the same in every batch and in every place of it.
#pragma once

#include "loops.h"

namespace fastnorm::cpu {

constexpr int64_t PIECE = 8192;      // elements of a row that are summed together; longer rows are sums of pieces
constexpr int64_t LONG = 4 * PIECE;  // from here on few rows are split over the threads
constexpr int64_t FEW = 64;          // what few rows are
constexpr int64_t SHORT = 512;       // up to here four rows are summed at once, beyond it four parts of one row
constexpr int64_t MAX_BLOCK = 64;    // rows of a block

// Rows of a block whose inputs take this many bytes, at least four.
inline int64_t block_rows(int64_t bytes, int64_t row_bytes) { return std::clamp<int64_t>(bytes / row_bytes, 4, MAX_BLOCK); }

inline const RowsInput ABSENT{};

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

inline bool split_rows(Rows g) { return g.N >= LONG && g.M < FEW; }

}  // namespace fastnorm::cpu
