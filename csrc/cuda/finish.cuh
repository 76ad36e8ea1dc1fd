// Partial rows, one of every block of the launch before, become results: in a fixed order, by threads that lie W columns by H.
#pragma once

#include "reduce.cuh"

namespace fastnorm::cuda {

constexpr int FINISH_THREADS = 256;

// A thread's column, and the partial rows h, h + H, ... that it goes through first.
struct Columns {
  int W, H, h;
  int64_t column;
  bool inside;
  __device__ Columns(int width, int64_t N)
      : W(width), H(blockDim.x / width), h(threadIdx.x / width),
        column(static_cast<int64_t>(blockIdx.x) * width + threadIdx.x % width), inside(column < N) {}
};

template <class A>
struct Finish {
  const A *partial_dweight, *partial_dbias;  // (P, N), or null
  int64_t P, N;
  int width;
  Array dweight, dbias;
  ConstArray weight;  // for c1 and c2
  A *c1, *c2;         // means over `count` elements, or null
  int64_t count;
};

// The sum of a column of `partial`, for the threads with h = 0.
template <class A>
__device__ __forceinline__ A column_sum(const A* partial, int64_t P, int64_t N, const Columns& at, A* place) {
  A sum = 0, lost = 0;
  if (at.inside)
    for (int64_t p = at.h; p < P; p += at.H) add(sum, lost, partial[p * N + at.column]);
  place[threadIdx.x] = sum;
  place[blockDim.x + threadIdx.x] = lost;
  __syncthreads();
  if (at.h == 0)
    for (int i = 1; i < at.H; ++i) {
      const int other = threadIdx.x + i * at.W;
      add(sum, lost, place[other]);
      lost += place[blockDim.x + other];
    }
  return with_lost(sum, lost);
}

template <class A>
__global__ void __launch_bounds__(FINISH_THREADS, 1) finish_kernel(const __grid_constant__ Finish<A> p) {
  const Columns at(p.width, p.N);
  const bool mine = at.inside && at.h == 0;
  const auto finish = [&](const A* partial, Array to, A* mean, A* place) {
    if (!partial) return;
    const A sum = column_sum(partial, p.P, p.N, at, place);
    if (!mine) return;
    if (to.data) set_element(to, at.column, sum);
    if (mean) mean[at.column] = (p.weight.data ? element<A>(p.weight, at.column) * sum : sum) / static_cast<A>(p.count);
  };
  finish(p.partial_dweight, p.dweight, p.c1, shared<A>());
  finish(p.partial_dbias, p.dbias, p.c2, shared<A>() + 2 * FINISH_THREADS);
}

// ---------------------------------------------------------------- statistics of channels

// Of `n` elements of a channel.
template <class A>
struct Statistics {
  A n;
  Centred<A> c;
};

// Those of two shares of a channel. Their means are compared before they are added: what they have in common costs no digit.
template <class A>
__device__ __forceinline__ Statistics<A> merged(const Statistics<A>& a, const Statistics<A>& b) {
  if (b.n == 0) return a;
  if (a.n == 0) return b;
  if (!finite(a.c.high)) return {a.n + b.n, {a.c.high + b.c.high, 0, a.c.m2, 1}};  // inf - inf would be none
  for (A scale = a.c.scale < b.c.scale ? a.c.scale : b.c.scale;; scale = SCALE) {
    const auto moments = [&](const Statistics<A>& s) {
      const A d = ((s.c.high - a.c.high) + (s.c.low - a.c.low)) * scale, ratio = scale / s.c.scale;
      return Moments<A>{s.n, d, s.c.m2 * ratio * ratio};
    };
    const Moments<A> m = merge(moments(a), moments(b));
    if (infinite(m.m2) && scale == 1) continue;  // the square of what is between the means overflows
    A high = a.c.high, low = a.c.low;
    add(high, low, m.mean / scale);
    return {m.n, {high, finite(high) ? low : 0, m.m2, scale}};
  }
}

// What is made of a channel's statistics. `deviation` alone, or the others.
template <class A>
struct Settled {
  A *mean, *deviation, *rstd;  // (2, C), (C,), (C,)
  Array running_mean, running_var;
  int64_t* tracked;
  A eps, momentum, kept;  // kept = 1 - momentum
  int64_t C;
  A* count = nullptr;  // of the first channel, beside `deviation`: how much counts, or null

  // The channel's rstd; stored, with all the rest, where it is `mine`.
  __device__ __forceinline__ A settle(const Statistics<A>& s, int64_t c, bool mine) const {
    Centred<A> m = s.c;
    m.m2 += m.high - m.high;  // beside an infinite mean there is no variance
    const A r = deviation ? 0 : rstd_of(m.m2, s.n, m.scale, eps);
    if (!mine) return r;
    mean[c] = m.high;
    mean[C + c] = m.low;
    if (c == 0 && count) *count = s.n;
    if (deviation) return deviation[c] = sqrt(m.m2 / at_least_one(s.n)) / m.scale;
    rstd[c] = r;
    update(running_mean, c, m.high + m.low);
    update(running_var, c, m.m2 / (s.n - 1) / m.scale / m.scale);
    if (c == 0 && tracked) ++*tracked;
    return r;
  }
  __device__ __forceinline__ void update(Array running, int64_t c, A value) const {
    if (running.data) set_element(running, c, kept * element<A>(ConstArray(running), c) + momentum * value);
  }
};

// Of (P, C) shares, which have as many elements of a channel as they have units, or, `counted`, as they say themselves.
template <class A>
struct Merge {
  const A* partial;  // (4, P, C): high, low, m2, scale; or (5, P, C)
  int64_t P, units, per_share, unit;  // elements: `unit` of every unit
  int width;
  Settled<A> settled;
  bool counted = false;
};

template <class A>
__global__ void __launch_bounds__(FINISH_THREADS, 1) merge_kernel(const __grid_constant__ Merge<A> p) {
  const int64_t C = p.settled.C, plane = p.P * C;
  const Columns at(p.width, C);
  Statistics<A> all{0, {0, 0, 0, 1}};
  if (at.inside)
    for (int64_t i = at.h; i < p.P; i += at.H) {
      const A* from = p.partial + i * C + at.column;
      const int64_t left = p.units - i * p.per_share, units = left < p.per_share ? left : p.per_share;
      const A n = p.counted ? from[4 * plane] : static_cast<A>(units * p.unit);
      all = merged(all, {n, {from[0], from[plane], from[2 * plane], from[3 * plane]}});
    }
  auto* const place = shared<Statistics<A>>();
  place[threadIdx.x] = all;
  __syncthreads();
  if (!at.inside || at.h > 0) return;
  for (int i = 1; i < at.H; ++i) all = merged(all, place[threadIdx.x + i * at.W]);
  p.settled.settle(all, at.column, true);
}

}  // namespace fastnorm::cuda
