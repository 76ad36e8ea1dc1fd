// A branch onto a stream: dropout and scales of dense elements, and the sum; their gradients.
//
// A unit is UNIT neighbouring elements, whole groups of the four that one counter of philox.h decides over. Its accesses are
// 16 bytes each, or, where V is 1, its elements are read and written one by one.
#pragma once

#include "../norm_math.h"
#include "../philox.h"
#include "reduce.cuh"

namespace fastnorm::cuda {

constexpr int BRANCH_THREADS = 256;
constexpr int WORDS = 4;  // of a counter

template <int V>
constexpr int UNIT = V < WORDS ? WORDS : V;

// ---------------------------------------------------------------- a unit in memory

// As it lies in memory, in T or, `wide`, in Acc<T>: only `values` waits for it, see Bits.
template <class T, int V>
class Unit {
  static constexpr int NARROW = V * sizeof(T) / sizeof(uint4), ALL = V * sizeof(Acc<T>) / sizeof(uint4);
  uint4 bits_[ALL];

 public:
  __device__ __forceinline__ void fetch(Source from, int64_t i, int64_t) {
    const int64_t bytes = i * static_cast<int64_t>(from.wide ? sizeof(Acc<T>) : sizeof(T));
    const auto* const at = reinterpret_cast<const uint4*>(static_cast<const char*>(from.data) + bytes);
#pragma unroll
    for (int k = 0; k < ALL; ++k)
      if (k < NARROW || from.wide) bits_[k] = at[k];
  }
  __device__ __forceinline__ void values(bool wide, Acc<T> (&out)[V]) const {
    T narrow[V];
    memcpy(narrow, bits_, sizeof narrow);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widened(narrow[j]);
    if (ALL > NARROW && wide) memcpy(out, bits_, sizeof out);
  }
};

// One by one, `left` of them; the others are 0.
template <class T>
class Unit<T, 1> {
  Acc<T> values_[WORDS];

 public:
  __device__ __forceinline__ void fetch(Source from, int64_t i, int64_t left) {
#pragma unroll
    for (int j = 0; j < WORDS; ++j) values_[j] = j < left ? load_one<T>(from, i + j) : 0;
  }
  __device__ __forceinline__ void values(bool, Acc<T> (&out)[WORDS]) const {
#pragma unroll
    for (int j = 0; j < WORDS; ++j) out[j] = values_[j];
  }
};

template <class T, int V>
__device__ __forceinline__ void store_unit(Target to, int64_t i, int64_t left, const Acc<T> (&values)[UNIT<V>]) {
  if constexpr (V > 1) {
    store<T, V>(to, i, values);
  } else {
#pragma unroll
    for (int j = 0; j < WORDS; ++j) {
      const Acc<T> one[1] = {values[j]};
      if (j < left) store<T, 1>(to, i + j, one);
    }
  }
}

// ---------------------------------------------------------------- factors

// An index that goes up in equal steps, divided by a number: a thread divides its first one, and adds from there on.
struct Division {
  int64_t by, steps, rest;  // a step, divided
};
struct Quotient {
  int64_t whole, rest;

  __device__ __forceinline__ Quotient(const Division& d, int64_t i) : whole(i / d.by), rest(i % d.by) {}
  __device__ __forceinline__ void next(const Division& d) {
    whole += d.steps;
    rest += d.rest;
    if (rest >= d.by) rest -= d.by, ++whole;
  }
};

// Dropout with its scale in the dtype of the arithmetic, and the seed in memory; null: everything is kept.
template <class A>
struct Drop {
  const int64_t* seed;
  uint32_t least;
  A scale;

  __device__ __forceinline__ uint64_t key() const { return seed ? static_cast<uint64_t>(*seed) : 0; }
};

// Whether the elements of `n / WORDS` counters are kept, a bit each.
template <int n>
__device__ __forceinline__ unsigned kept_of(uint64_t counter, uint64_t key, uint32_t least) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < n; i += WORDS, ++counter) {
    uint64_t words[WORDS] = {counter, counter >> 32, 0, 0};
    philox(words, key);
#pragma unroll
    for (int j = 0; j < WORDS; ++j) bits |= static_cast<uint32_t>(words[j]) >= least ? 1u << (i + j) : 0;
  }
  return bits;
}

// Of the n elements from i on, of which `left` are asked for. ALIGNED: i is the first one of its counter.
template <int n, bool ALIGNED, class A>
__device__ __forceinline__ unsigned kept(const Drop<A>& drop, uint64_t key, int64_t i, int64_t left) {
  if (!drop.seed) return ~0u;
  const uint64_t counter = static_cast<uint64_t>(i) / WORDS;
  const unsigned bits = kept_of<n>(counter, key, drop.least);
  const int first = static_cast<int>(i % WORDS);
  if (ALIGNED || first == 0) return bits;
  if (first + left <= n) return bits >> first;
  return (bits | kept_of<WORDS>(counter + n / WORDS, key, drop.least) << n) >> first;
}

// What is dropped is not looked at: nothing that is infinite leaves a NaN.
template <class A, int n>
__device__ __forceinline__ void keep(A (&values)[n], unsigned kept) {
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = kept >> j & 1 ? values[j] : 0;
}

// ---------------------------------------------------------------- element by element

// h = addend + x * factor, or without an addend: the forward, and the backward by x alone.
template <class T>
struct BranchApply {
  int64_t n, step;          // elements of all, and of all threads at once
  Division parts, columns;  // of an element: by those that share a row scale, and by those of a row
  Source x, addend;
  Target h;
  const Acc<T>*row_scale, *column_scale;
  Drop<Acc<T>> drop;
};

// Of a unit that begins in a column of a part. V > 1: it ends in the same row, as far as there are scales.
template <class T, int V>
__device__ __forceinline__ void load_factors(const BranchApply<T>& p, Quotient part, Quotient column, int64_t left,
                                             Acc<T> (&out)[UNIT<V>]) {
  using A = Acc<T>;
  A columns[UNIT<V>];
  if constexpr (V > 1) load_or<A, V>(columns, {p.column_scale, false}, column.rest, 1);
  const A first = p.row_scale ? p.row_scale[part.whole] * p.drop.scale : p.drop.scale;
#pragma unroll
  for (int j = 0; j < UNIT<V>; ++j) {
    if constexpr (V > 1) {
      out[j] = first * columns[j];
      continue;
    }
    out[j] = p.drop.scale;
    if (j >= left) continue;
    if (p.row_scale) out[j] *= p.row_scale[part.whole];
    if (p.column_scale) out[j] *= p.column_scale[column.rest];
    if (++part.rest == p.parts.by) part.rest = 0, ++part.whole;
    if (++column.rest == p.columns.by) column.rest = 0;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(BRANCH_THREADS, 4) branch_apply_kernel(const __grid_constant__ BranchApply<T> p) {
  using A = Acc<T>;
  constexpr int U = UNIT<V>;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * BRANCH_THREADS + threadIdx.x) * U;
  if (i >= p.n) return;
  const uint64_t key = p.drop.key();
  Quotient part(p.parts, i), column(p.columns, i);
  for (; i < p.n; i += p.step, part.next(p.parts), column.next(p.columns)) {
    const int64_t left = p.n - i;
    Unit<T, V> x, addend;
    x.fetch(p.x, i, left);
    if (p.addend.data) addend.fetch(p.addend, i, left);
    A u[U], factor[U], onto[U];
    load_factors<T, V>(p, part, column, left, factor);
    const unsigned bits = kept<U, true>(p.drop, key, i, left);
    x.values(p.x.wide, u);
    keep(u, bits);
#pragma unroll
    for (int j = 0; j < U; ++j) onto[j] = A(-0.0);  // which changes no sum
    if (p.addend.data) addend.values(p.addend.wide, onto);
#pragma unroll
    for (int j = 0; j < U; ++j) u[j] = affine(u[j], factor[j], onto[j]);
    store_unit<T, V>(p.h, i, left, u);
  }
}

// ---------------------------------------------------------------- with sums over rows

// A block has W units side by side and H threads for each: every H-th of its rows is a thread's.
template <class T>
struct BranchBackward {
  int64_t M, N;
  int64_t share, chunks;  // rows of a block, and blocks side by side
  int width;              // W, a power of two up to a warp
  Division parts;         // of a row, in steps of H: by the rows that share a row scale
  Source dh, x;
  Target dx;  // or null
  const Acc<T>*row_scale, *column_scale;
  Drop<Acc<T>> drop;
  Acc<T>* partial;  // (blocks / chunks, N)
};

// The sums of the block's columns over its H threads each, to one partial row.
template <class A, int U>
__device__ __forceinline__ void store_sums(const A (&sums)[U], int W, A* to, int64_t columns) {
  A* const place = shared<A>();
#pragma unroll
  for (int j = 0; j < U; ++j) place[threadIdx.x * U + j] = sums[j];
  __syncthreads();
  for (int k = threadIdx.x; k < W * U && k < columns; k += BRANCH_THREADS) {
    A total = 0, lost = 0;
    for (int other = k; other < BRANCH_THREADS * U; other += W * U) add(total, lost, place[other]);
    to[k] = with_lost(total, lost);
  }
}

// Of doubles, fewer blocks at once: they take more registers.
template <class T, int V>
__global__ void __launch_bounds__(BRANCH_THREADS, sizeof(T) == 8 ? 2 : 3)
    branch_bwd_kernel(const __grid_constant__ BranchBackward<T> p) {
  using A = Acc<T>;
  constexpr int U = UNIT<V>;
  const int W = p.width, H = BRANCH_THREADS / W;
  const int64_t block = blockIdx.x / p.chunks, begin = block * p.share;
  const int64_t end = begin + p.share < p.M ? begin + p.share : p.M;
  const int64_t first = blockIdx.x % p.chunks * W * U, n = first + threadIdx.x % W * U, left = p.N - n;
  const uint64_t key = p.drop.key();
  A sums[U] = {}, columns[U];
  Unit<A, V == 1 ? 1 : U> scales;
#pragma unroll
  for (int j = 0; j < U; ++j) columns[j] = 1;
  if (p.column_scale && left > 0) {
    scales.fetch({p.column_scale, false}, n, left);
    scales.values(false, columns);
  }
  int64_t m = begin + threadIdx.x / W;
  Quotient part(p.parts, m);
  for (; m < end && left > 0; m += H, part.next(p.parts)) {
    const int64_t i = m * p.N + n;
    Unit<T, V> dh, x;
    dh.fetch(p.dh, i, left);
    x.fetch(p.x, i, left);
    const A factor = p.row_scale ? p.row_scale[part.whole] * p.drop.scale : p.drop.scale;
    const unsigned bits = kept<U, (V > 1)>(p.drop, key, i, left);
    A u[U], terms[U];
    dh.values(p.dh.wide, u);
    x.values(p.x.wide, terms);
    keep(u, bits);
#pragma unroll
    for (int j = 0; j < U; ++j) {
      u[j] *= factor;
      sums[j] += u[j] * terms[j];
      u[j] *= columns[j];
    }
    if (p.dx.data) store_unit<T, V>(p.dx, i, left, u);
  }
  store_sums(sums, W, p.partial + block * p.N + first, p.N - first);
}

}  // namespace fastnorm::cuda
