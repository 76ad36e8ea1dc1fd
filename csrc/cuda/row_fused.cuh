// Rows with what surrounds their norm: what row.cuh's kernels do for them beside what they do for all.
#pragma once

#include "elementary.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {

// As RowReader, of x's dtype; without data where there is no such tensor.
template <class T, int V>
struct FusedRowReader {
  const T* from;
  Walk rows, columns;
  bool whole;

  __device__ __forceinline__ int64_t begin(int64_t m) const { return called_offset(rows, m); }
  __device__ __forceinline__ Bits<T, V> fetch(int64_t row, int64_t i) const {
    if (!from) return {};
    const int64_t stride = columns.stride[0];
    return cuda::fetch<T, V>(from + row + (V == 1 ? called_offset(columns, i) : i * V * stride), whole, stride);
  }
};

// Where the elements of weight and bias for the row m begin, see Rows.
__device__ __forceinline__ int64_t part_of(const Rows& g, int64_t m) { return g.P == 1 ? 0 : m / (g.M / g.P) * g.N; }

// Rows are those of h = x + addend where there is an h.
template <class T, int V>
struct FusedRowForward {
  static constexpr bool FUSED = true, MASKED = false;
  struct Begin {
    int64_t x, addend, residual, h, part;
  };
  struct Fetched {
    Bits<T, V> x, addend;
  };
  using Residual = Bits<T, V>;

  Rows g;
  int team;
  FusedRowReader<T, V> x, addend, residual;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha, eps;
  bool centre;
  T *h, *y;
  Acc<T>*mean, *rstd;

  __device__ __forceinline__ Begin begin(int64_t m, bool inside) const {
    if (!inside) return {};
    return {x.begin(m), addend.begin(m), residual.begin(m), m * g.N, part_of(g, m)};
  }
  __device__ __forceinline__ Fetched fetch(const Begin& row, int64_t i) const {
    return {x.fetch(row.x, i), addend.fetch(row.addend, i)};
  }
  __device__ __forceinline__ Residual fetch_residual(const Begin& row, int64_t i) const {
    return residual.fetch(row.residual, i);
  }
  __device__ __forceinline__ void read(Acc<T> (&out)[V], const Fetched& fetched, const Begin& row, int64_t i) const {
    widen<T, V>(out, fetched.x);
    if (!h) return;
    add_widened<T, V>(out, fetched.addend);
    store<T, V>(h + row.h + i * V, out);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widened(rounded<T>(out[j]));
  }
  // A thread gets what it has written itself: that takes no barrier.
  __device__ __forceinline__ void read_again(Acc<T> (&out)[V], const Begin& row, int64_t i) const {
    widen<T, V>(out, h ? cuda::fetch<T, V>(h + row.h + i * V, true, 1) : x.fetch(row.x, i));
  }
  __device__ __forceinline__ void add_residual(Acc<T> (&z)[V], const Residual& fetched) const {
    if (residual.from) add_widened<T, V>(z, fetched);
  }
  __device__ static __forceinline__ int64_t part(const Begin& row) { return row.part; }
  __device__ __forceinline__ void write(int64_t m, int64_t i, const Acc<T> (&values)[V]) const {
    store<T, V>(y + m * g.N + i * V, values);
  }
};

// A block's share in a backward: its rows, its chunk of the columns, and where their part of the weight and their sums begin.
struct BlockRows {
  int64_t begin, end;
  unsigned chunk;
  int64_t part, sums;
};

template <class T, int V>
struct FusedRowBackward {
  static constexpr bool FUSED = true, MASKED = false;
  struct Begin {
    int64_t dy, x, dh, residual, part;
  };

  Rows g;
  int team;
  unsigned chunks;    // of the columns, a block each, see GIVEN
  int64_t part_rows;  // M / P
  FusedRowReader<T, V> dy, x, dh, residual;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha;
  bool centre;
  const Acc<T>*mean, *rstd;
  Acc<T>* means;
  T *dx, *dresidual;
  Acc<T>*dweight, *dbias;

  __device__ __forceinline__ Begin begin(int64_t m, bool inside, int64_t part) const {
    if (!inside) return {};
    return {dy.begin(m), x.begin(m), dh.begin(m), residual.begin(m), part};
  }
  // Rows of one part.
  __device__ __forceinline__ BlockRows block_rows(bool chunked) const {
    const unsigned part = chunked ? blockIdx.x / chunks : blockIdx.x;
    return {part * part_rows, part * part_rows + part_rows, chunked ? blockIdx.x % chunks : 0, part * g.N,
            (blockIdx.y * g.P + part) * g.N};
  }
  __device__ __forceinline__ void read(Acc<T> (&dz)[V], Acc<T> (&x_hat)[V], Acc<T> (&w)[V], const Begin& row, int64_t i,
                                       Acc<T> high, Acc<T> low, Acc<T> r) const {
    const auto dy_bits = dy.fetch(row.dy, i), x_bits = x.fetch(row.x, i), more = residual.fetch(row.residual, i);
    Acc<T> z[V];
    load_or<T, V>(w, weight, row.part + i * V, 1);
    load_or<T, V>(z, bias, row.part + i * V, 0);
    widen<T, V>(dz, dy_bits);
    widen<T, V>(x_hat, x_bits);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      x_hat[j] = normalize(x_hat[j], high, low, r);
      z[j] = affine(x_hat[j], w[j], z[j]);
    }
    if (residual.from) add_widened<T, V>(z, more);
    with_activation(activation, [&](auto constant) { times_slope(constant, dz, z, alpha); });
  }
  __device__ __forceinline__ void add_dh(Acc<T> (&dx)[V], const Begin& row, int64_t i) const {
    if (dh.from) add_widened<T, V>(dx, dh.fetch(row.dh, i));
  }
};

}  // namespace fastnorm::cuda
