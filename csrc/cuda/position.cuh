// Layer norm over the C channels of every position of a dense (B, C, S), ended by an activation. A unit is V neighbouring
// positions. A block has W units side by side, so that its accesses are long runs, and H threads for each: every H-th channel
// is a thread's.
//
// W and H follow from C and S alone, and they decide the order of a position's sums: a sample does not depend on its batch.
#pragma once

#include "elementary.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {

constexpr int POSITION_THREADS = 256;

struct Tiles {
  Positions g;
  int width;             // W, a power of two from 2 up to a warp
  int64_t units, tiles;  // units of all samples, and the blocks' worth of them
};

// A thread's unit, and its place among those of its block.
template <int V>
struct PositionThread {
  int W, H, w, h;
  int64_t C, S, unit, from;  // from: where the unit begins in the first channel
  bool inside;

  __device__ __forceinline__ PositionThread(const Tiles& t, int64_t tile)
      : W(t.width), H(blockDim.x / t.width), w(threadIdx.x % t.width), h(threadIdx.x / t.width), C(t.g.C), S(t.g.S),
        unit(tile * t.width + w), inside(unit < t.units) {
    const int64_t run = S / V;
    from = unit / run * C * S + unit % run * V;
  }
  __device__ __forceinline__ int64_t offset(int64_t c) const { return from + c * S; }
  __device__ __forceinline__ int64_t position() const { return unit * V; }
};

// f(c, whether there are such elements, what `fetch` has got of them) for each of a thread's channels, of which AT_ONCE are on
// their way together. The threads of a warp go through the same number of them.
template <int AT_ONCE, int V, class Fetch, class F>
__device__ __forceinline__ void each_channel(const PositionThread<V>& at, const Fetch& fetch, const F& f) {
  for (int64_t first = 0; first < at.C; first += AT_ONCE * at.H) {
    decltype(fetch(first)) fetched[AT_ONCE] = {};
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int64_t c = first + k * at.H + at.h;
      if (at.inside && c < at.C) fetched[k] = fetch(c);
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (first + k * at.H >= at.C) break;
      const int64_t c = first + k * at.H + at.h;
      f(c, at.inside && c < at.C, fetched[k]);
    }
  }
}

// Of few sums or of many: loads that are on their way at once, 16 bytes or one element each.
template <int V>
constexpr int AT_ONCE_SUMMED = V == 1 ? 8 : 4;
template <int V>
constexpr int AT_ONCE_ENDED = V == 1 ? 4 : 2;

// Sums of a position, and the shared memory that they take, in values: results first, where no number of sums has its terms.
constexpr int POSITION_SUMS = 2;
constexpr int position_shared(int width, int V, int threads) { return POSITION_SUMS * width * V * (1 + threads / WARP); }

// v[i] of every position: the sums over the threads of its unit, for each of them.
template <class A, int n, int V>
__device__ __forceinline__ void position_sum(A (&v)[n][V], const PositionThread<V>& at, A* total) {
  static_assert(n <= POSITION_SUMS);
  for (int step = WARP / 2; step >= at.W; step /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) v[i][j] += __shfl_xor_sync(ALL_LANES, v[i][j], step);
  const int warps = blockDim.x / WARP, row = at.W * V, sums = n * row;
  if (warps == 1) return;
  A* const place = total + POSITION_SUMS * row;
  if (threadIdx.x % WARP < at.W)
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) place[threadIdx.x / WARP * sums + i * row + at.w * V + j] = v[i][j];
  __syncthreads();
  for (int k = threadIdx.x; k < sums; k += blockDim.x) {
    A sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += place[warp * sums + k];
    total[k] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int j = 0; j < V; ++j) v[i][j] = total[i * row + at.w * V + j];
}

template <class T>
__device__ __forceinline__ Acc<T> parameter_or(Source from, int64_t c, Acc<T> absent) {
  return from.data ? load_one<T>(from, c) : absent;
}

// ---------------------------------------------------------------- forward

template <class T>
struct PositionForward {
  Tiles t;
  const T* x;
  bool whole;  // at a multiple of 16 bytes
  T* y;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha, eps;
  Acc<T>*mean, *rstd;
};

// The mean of every position, and the sum of squares about it.
template <class T, int V, class Fetch>
__device__ __forceinline__ void position_statistics(const PositionThread<V>& at, const Fetch& fetch,
                                                    Centred<Acc<T>> (&out)[V]) {
  using A = Acc<T>;
  const A n = static_cast<A>(at.C);
  A shift[1][V] = {};
  each_channel<AT_ONCE_SUMMED<V>>(at, fetch, [&](int64_t, bool valid, const Bits<T, V>& bits) {
    if (valid) add_widened<T, V>(shift[0], bits);
  });
  position_sum(shift, at, shared<A>());
#pragma unroll
  for (int j = 0; j < V; ++j) shift[0][j] /= n;
  const auto squares = [&](A scale, A (&s)[2][V]) {
    each_channel<AT_ONCE_SUMMED<V>>(at, fetch, [&](int64_t, bool valid, const Bits<T, V>& bits) {
      if (!valid) return;
      A values[V];
      widen<T, V>(values, bits);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = (values[j] - shift[0][j]) * scale;
        s[0][j] += d;
        s[1][j] += d * d;
      }
    });
    position_sum(s, at, shared<A>());
  };
  A s[2][V] = {};
  squares(1, s);
  bool overflow = false;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    out[j] = about(shift[0][j], s[0][j], s[1][j], n, A(1));
    overflow = overflow || (at.inside && infinite(s[1][j]));
  }
  if (!__syncthreads_or(overflow)) return;
  A scaled[2][V] = {};
  squares(SCALE, scaled);
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (infinite(s[1][j])) out[j] = about(shift[0][j], scaled[0][j], scaled[1][j], n, A(SCALE));
}

template <class T, int V>
__global__ void __launch_bounds__(POSITION_THREADS, 2) position_fwd_kernel(const __grid_constant__ PositionForward<T> p) {
  using A = Acc<T>;
  const PositionThread<V> at(p.t, blockIdx.x);
  const auto fetch = [&](int64_t c) { return cuda::fetch<T, V>(p.x + at.offset(c), p.whole, 1); };
  Centred<A> s[V];
  A rstd[V];
  position_statistics<T, V>(at, fetch, s);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    rstd[j] = rstd_of(s[j].m2, static_cast<A>(at.C), s[j].scale, p.eps);
    if (!at.inside || at.h > 0) continue;
    p.mean[at.position() + j] = s[j].high;
    p.mean[p.t.units * V + at.position() + j] = s[j].low;
    p.rstd[at.position() + j] = rstd[j];
  }
  each_channel<AT_ONCE_ENDED<V>>(at, fetch, [&](int64_t c, bool valid, const Bits<T, V>& bits) {
    if (!valid) return;
    const A weight = parameter_or<T>(p.weight, c, 1), bias = parameter_or<T>(p.bias, c, 0);
    A z[V];
    widen<T, V>(z, bits);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = affine(normalize(z[j], s[j].high, s[j].low, rstd[j]), weight, bias);
    with_activation(p.activation, [&](auto activation) { activate_all(activation, z, p.alpha); });
    store<T, V>(p.y + at.offset(c), z);
  });
}

// ---------------------------------------------------------------- backward

template <class T>
struct PositionBackward {
  Tiles t;
  const T *dy, *x;
  bool whole_dy, whole_x;
  T* dx;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha;
  const Acc<T>*mean, *rstd;
  Acc<T>* partial;    // (2, P, C): sums of dz * x_hat and of dz; null where nobody asks for them
  int64_t P, share;   // blocks, and the tiles of one
  int kept;           // where a block's sums of some tiles lie in shared memory, in values; 0: they are in `partial`
};

// Over the W threads with the same channels: the sum of `a` for those in even places, of `b` for those in odd ones.
template <class A>
__device__ __forceinline__ A sum_of_two(A a, A b, int W) {
  const bool odd = threadIdx.x & 1;
  A sum = odd ? b : a;
  sum += __shfl_xor_sync(ALL_LANES, odd ? a : b, 1);
  for (int step = 2; step < W; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
  return sum;
}

// A block's sums for the parameters, while it goes through its tiles: two threads have those of a channel, one each.
template <class A>
struct ParameterSums {
  A *kept, *result;  // (C,) of this thread's sum, null where it has none; the last tile's go to `result`
  bool first, last;

  __device__ __forceinline__ void add(int64_t c, A sum) const {
    if (!first) sum += kept[c];
    (last ? result : kept)[c] = sum;
  }
};

template <class T, int V>
__device__ __forceinline__ ParameterSums<Acc<T>> sums_of(const PositionBackward<T>& p, const PositionThread<V>& at,
                                                         int64_t tile) {
  if (!p.partial || at.w > 1) return {};
  const int64_t begin = blockIdx.x * p.share;
  Acc<T>* const result = p.partial + (at.w * p.P + blockIdx.x) * at.C;
  return {p.kept ? shared<Acc<T>>() + p.kept + at.w * at.C : result, result, tile == begin,
          tile == begin + p.share - 1 || tile == p.t.tiles - 1};
}

template <class A, int V>
struct PositionStatistics {
  A high[V], low[V], rstd[V];
};

template <class T, int V>
struct FetchedPositions {
  Bits<T, V> dy, x;
};

template <class T, int V>
__device__ __forceinline__ void differentiate(const PositionBackward<T>& p, const PositionStatistics<Acc<T>, V>& s,
                                              Acc<T> weight, Acc<T> bias, const FetchedPositions<T, V>& bits,
                                              Acc<T> (&dz)[V], Acc<T> (&x_hat)[V]) {
  Acc<T> z[V];
  widen<T, V>(dz, bits.dy);
  widen<T, V>(x_hat, bits.x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    x_hat[j] = normalize(x_hat[j], s.high[j], s.low[j], s.rstd[j]);
    z[j] = affine(x_hat[j], weight, bias);
  }
  with_activation(p.activation, [&](auto activation) { times_slope(activation, dz, z, p.alpha); });
}

// c[0] and c[1], the sums of g * x_hat and of g over a thread's channels; and the parameters' sums.
template <class T, int V, class Fetch>
__device__ __forceinline__ void gradient_terms(const PositionBackward<T>& p, const PositionThread<V>& at, int64_t tile,
                                               const PositionStatistics<Acc<T>, V>& s, const Fetch& fetch, Acc<T> (&c)[2][V]) {
  using A = Acc<T>;
  const auto sums = sums_of<T, V>(p, at, tile);
  each_channel<AT_ONCE_ENDED<V>>(at, fetch, [&](int64_t channel, bool valid, const FetchedPositions<T, V>& bits) {
    A dz[V] = {}, terms[V] = {}, weight = 0;
    if (valid) {
      weight = parameter_or<T>(p.weight, channel, 1);
      differentiate<T, V>(p, s, weight, parameter_or<T>(p.bias, channel, 0), bits, dz, terms);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      terms[j] *= dz[j];
      c[0][j] += weight * terms[j];
      c[1][j] += weight * dz[j];
    }
    if (!p.partial) return;
    const A sum = sum_of_two(pairwise_sum(terms), pairwise_sum(dz), at.W);
    if (sums.result && channel < at.C) sums.add(channel, sum);
  });
}

// Blocks of an SM that registers are shared out for: doubles would spill with two, on an sm_120.
template <class T>
constexpr int POSITION_BLOCKS = sizeof(Acc<T>) == 8 ? 1 : 2;

template <class T, int V>
__global__ void __launch_bounds__(POSITION_THREADS, POSITION_BLOCKS<T>)
    position_bwd_kernel(const __grid_constant__ PositionBackward<T> p) {
  using A = Acc<T>;
  const int64_t begin = blockIdx.x * p.share, end = begin + p.share < p.t.tiles ? begin + p.share : p.t.tiles;
  for (int64_t tile = begin; tile < end; ++tile) {
    const PositionThread<V> at(p.t, tile);
    const auto fetch = [&](int64_t c) {
      return FetchedPositions<T, V>{cuda::fetch<T, V>(p.dy + at.offset(c), p.whole_dy, 1),
                                    cuda::fetch<T, V>(p.x + at.offset(c), p.whole_x, 1)};
    };
    PositionStatistics<A, V> s = {};
    if (at.inside)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int64_t m = at.position() + j;
        s.high[j] = p.mean[m], s.low[j] = p.mean[p.t.units * V + m], s.rstd[j] = p.rstd[m];
      }
    A c[2][V] = {};
    gradient_terms<T, V>(p, at, tile, s, fetch, c);
    if (!p.dx) continue;
    position_sum(c, at, shared<A>());
#pragma unroll
    for (int j = 0; j < V; ++j) c[0][j] /= static_cast<A>(at.C), c[1][j] /= static_cast<A>(at.C);
    each_channel<AT_ONCE_ENDED<V>>(at, fetch, [&](int64_t channel, bool valid, const FetchedPositions<T, V>& bits) {
      if (!valid) return;
      const A weight = parameter_or<T>(p.weight, channel, 1);
      A dz[V], x_hat[V];
      differentiate<T, V>(p, s, weight, parameter_or<T>(p.bias, channel, 0), bits, dz, x_hat);
#pragma unroll
      for (int j = 0; j < V; ++j) dz[j] = grad_input(dz[j] * weight, x_hat[j], s.rstd[j], c[0][j], c[1][j]);
      store<T, V>(p.dx + at.offset(channel), dz);
    });
  }
}

}  // namespace fastnorm::cuda
