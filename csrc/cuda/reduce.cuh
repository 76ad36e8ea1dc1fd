// Sums over the threads of a block, in an order that nothing but their number decides, and what is made of sums.
#pragma once

#include <cmath>

#include "values.cuh"

namespace fastnorm::cuda {

constexpr int WARP = 32, MOST_WARPS = 16, MOST_THREADS = WARP * MOST_WARPS;
constexpr unsigned ALL_LANES = 0xffffffffu;

// A thread's place among the threads that share a row: a power of two up to a warp, several rows a block, or whole warps.
struct Team {
  int size, lane, row, rows;
  __device__ explicit Team(int n)
      : size(n), lane(threadIdx.x % n), row(threadIdx.x / n), rows(blockDim.x / n) {}
};

// Shared memory that one team_sum of n values takes, in values. Two that follow one another need places of their own: the
// barrier of the second is the first one's second.
template <int n>
constexpr int TEAM_SHARED = n * MOST_WARPS;

// Every thread of a team gets the sums of its team. All threads of the block take part.
template <class A, int n>
__device__ __forceinline__ void team_sum(A (&v)[n], int size, A* place) {
  for (int step = (size < WARP ? size : WARP) / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += __shfl_xor_sync(ALL_LANES, v[i], step);
  if (size <= WARP) return;
  const int warp = threadIdx.x / WARP, warps = size / WARP;
  if (threadIdx.x % WARP == 0)
#pragma unroll
    for (int i = 0; i < n; ++i) place[i * MOST_WARPS + warp] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    A total = 0;
    for (int w = 0; w < warps; ++w) total += place[i * MOST_WARPS + w];
    v[i] = total;
  }
}

// The sum of `a` and `b`, and what its rounding took away, exactly (Knuth). No product is in it that could be fused.
template <class A>
__device__ __forceinline__ void add(A& a, A& lost, A b) {
  const A total = a + b, part = total - a;
  lost += (a - (total - part)) + (b - part);
  a = total;
}

template <class A>
__device__ __forceinline__ bool finite(A v) {
  return v - v == 0;
}
template <class A>
__device__ __forceinline__ bool infinite(A v) {
  return !finite(v) && v == v;
}

// A sum and what its roundings took away.
template <class A>
__device__ __forceinline__ A with_lost(A sum, A lost) {
  return finite(sum) ? sum + lost : sum;
}

// As team_sum, over all threads of a block of several warps, with what the sums lose on their way.
template <class A, int n>
__device__ __forceinline__ void exact_block_sum(A (&v)[n], A* place) {
  A lost[n] = {};
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A other = __shfl_xor_sync(ALL_LANES, v[i], step);
      lost[i] += __shfl_xor_sync(ALL_LANES, lost[i], step);
      add(v[i], lost[i], other);
    }
  if (threadIdx.x % WARP == 0)
#pragma unroll
    for (int i = 0; i < n; ++i) {
      place[2 * i * MOST_WARPS + threadIdx.x / WARP] = v[i];
      place[(2 * i + 1) * MOST_WARPS + threadIdx.x / WARP] = lost[i];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    v[i] = lost[i] = 0;
    for (int w = 0; w < blockDim.x / WARP; ++w) {
      add(v[i], lost[i], place[2 * i * MOST_WARPS + w]);
      lost[i] += place[(2 * i + 1) * MOST_WARPS + w];
    }
    v[i] = with_lost(v[i], lost[i]);
  }
}

// The sum of neighbours.
template <class A, int V>
__device__ __forceinline__ A pairwise_sum(const A (&v)[V]) {
  A part[V];
#pragma unroll
  for (int j = 0; j < V; ++j) part[j] = v[j];
#pragma unroll
  for (int n = V / 2; n > 0; n /= 2)
#pragma unroll
    for (int j = 0; j < n; ++j) part[j] += part[j + n];
  return part[0];
}

// The square of a deviation of 1e30 overflows float: from there on it is taken after this scaling, which is exact.
constexpr float SCALE = 1.0f / 1267650600228229401496703205376.0f;  // 2^-100

// The mean, high + low, and the sum of squares about it, in units of scale^-2.
template <class A>
struct Centred {
  A high, low, m2, scale;
};

// From s1 = sum((x - shift) * scale) and s2, the sum of its squares, of n elements. s2 - s1^2 / n costs as many units of the
// last place as the mean is squared deviations off the shift.
template <class A>
__device__ __forceinline__ Centred<A> about(A shift, A s1, A s2, A n, A scale) {
  const A delta = s1 / n, m2 = finite(s2) ? s2 - s1 * delta : s2, step = delta / scale, high = shift + step;
  const A low = finite(high) ? (shift - high) + step : 0;  // the mean of an infinite row is infinite
  return {high, low, m2 < 0 ? 0 : m2, scale};
}

// A count, for a division: where nothing counts, what is divided is 0.
template <class A>
__device__ __forceinline__ A at_least_one(A count) {
  return count > 1 ? count : 1;
}

// A Newton step takes what three operations have rounded to one unit of the last place; from an infinite root it has no number.
template <class A>
__device__ __forceinline__ A rstd_of(A m2, A n, A scale, A eps) {
  const A var = m2 / n + eps * scale * scale, root = 1 / sqrt(var);
  const A step = root / 2 * fma(-var * root, root, A(1));
  return scale * (step == step ? root + step : root);
}

}  // namespace fastnorm::cuda
