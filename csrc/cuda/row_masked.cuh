// Rows of which some columns do not count: a mask beside what row.cuh's kernels are told of every row.
#pragma once

#include "row.cuh"

namespace fastnorm::cuda {

// See RowMask: a byte for so many rows and columns, P of them to a row.
struct ColumnMask {
  const bool* data;
  int64_t rows, columns, P;
  uint64_t inverse;  // (2^64 - 1) / columns
  bool whole;        // a byte for each column, and a window's begin at a multiple of their number

  // The bytes of row m.
  __device__ __forceinline__ const bool* row(int64_t m) const { return data + m / rows * P; }
  // Which elements of window i count, a bit each.
  template <int V>
  __device__ __forceinline__ unsigned window(const bool* ones, int64_t i) const {
    if (P == 1) return *ones ? (1u << V) - 1 : 0;
    unsigned bits = 0;
    if (V > 1 && whole) {
      using Bytes = std::conditional_t<V == 8, uint64_t, std::conditional_t<V == 4, uint32_t, uint16_t>>;
      const Bytes bytes = reinterpret_cast<const Bytes*>(ones)[i];
#pragma unroll
      for (int j = 0; j < V; ++j) bits |= static_cast<unsigned>(bytes >> 8 * j & 1) << j;
      return bits;
    }
    // The quotient, or one less: the product is off by less than a divisor's worth.
    int64_t at = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(i * V), inverse));
    int64_t left = columns - (i * V - at * columns);
    if (left <= 0) ++at, left += columns;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      bits |= static_cast<unsigned>(ones[at]) << j;
      if (--left == 0) ++at, left = columns;
    }
    return bits;
  }
};

template <class T, int V>
struct MaskedRowForward : RowForward<T, V> {
  static constexpr bool MASKED = true;

  ColumnMask mask;
};

template <class T, int V>
struct MaskedRowBackward : RowBackward<T, V> {
  static constexpr bool MASKED = true;

  ColumnMask mask;
};

}  // namespace fastnorm::cuda
