// Channels (B, C, S). A block goes through a share of the positions of its channels: runs of one channel, or positions whose
// channels lie side by side (LAST). Passes are functions, so that a small slab's statistics and result are one launch.
#pragma once

#include "finish.cuh"

namespace fastnorm::cuda {

constexpr int CHANNEL_THREADS = 256;
// Units of a thread whose mean its block's sums are taken about, see `statistics`.
constexpr int FIRST = 4;
// Where the mean is further off the point that sums are taken about, in deviations, they are taken again.
constexpr int FAR = 4;
// One about the first units, one scaled, one about the mean.
constexpr int MOST_PASSES = 3;

template <class T>
struct View {
  T* data;
  int64_t sample, channel;
  Walk space, positions;  // units of several positions: one stride along the space
  bool whole;             // every unit is elements side by side, at a multiple of 16 bytes
};

struct Shares {
  int64_t B, C, S;
  int64_t P, per_share, units;  // shares of a channel, units of a share and of a channel
  int width;                    // LAST: vectors of channels side by side in a block
};

// A thread's units: V elements of one channel, or one element of V channels.
template <int V, bool LAST>
struct Sweep {
  static constexpr int CHANNELS = LAST ? V : 1;  // of a thread
  const Shares& g;
  int64_t c, share, begin, end, unit, b = 0, s = 0;
  int step, samples = 0, rest = 0;

  __device__ __forceinline__ explicit Sweep(const Shares& shares) : g(shares) {
    const int64_t block = blockIdx.x / g.P;
    share = blockIdx.x % g.P;
    begin = share * g.per_share;
    end = begin + g.per_share < g.units ? begin + g.per_share : g.units;
    c = LAST ? (block * g.width + threadIdx.x % g.width) * V : block;
    step = LAST ? blockDim.x / g.width : blockDim.x;
    if (!LAST) {
      const int64_t run = g.S / V;
      samples = static_cast<int>(step / run);
      rest = static_cast<int>(step % run);
    }
    restart();
  }
  __device__ __forceinline__ void restart() {
    unit = begin + (LAST ? threadIdx.x / g.width : threadIdx.x);
    if (LAST) return;
    b = unit / (g.S / V);
    s = unit % (g.S / V);
  }
  __device__ __forceinline__ bool inside() const { return c < g.C; }
  __device__ __forceinline__ bool more() const { return inside() && unit < end; }
  __device__ __forceinline__ void next() {
    unit += step;
    if (LAST) return;
    b += samples;
    s += rest;
    if (s >= g.S / V) s -= g.S / V, ++b;
  }
  // Where the unit begins in v, and the way from there to its element j.
  template <class T>
  __device__ __forceinline__ T* begins(const View<T>& v) const {
    return v.data + c * v.channel + (LAST ? v.positions.offset(unit) : b * v.sample);
  }
  template <class T>
  __device__ __forceinline__ void read(const View<const T>& v, Acc<T> (&out)[V]) const {
    const T* const from = begins(v);
    if (V > 1 && v.whole) return load<T, V>(out, from + (LAST ? 0 : s * V));
#pragma unroll
    for (int j = 0; j < V; ++j)
      out[j] = widened(from[LAST ? j * v.channel : V == 1 ? v.space.offset(s) : (s * V + j) * v.space.stride[0]]);
  }
  template <class T>
  __device__ __forceinline__ void write(const View<T>& v, const Acc<T> (&values)[V]) const {
    store<T, V>(begins(v) + (LAST ? 0 : s * V), values);
  }
  // The element j of a unit belongs to this one of the thread's channels.
  __device__ static constexpr int channel(int j) { return LAST ? j : 0; }
  // Adds a unit to the sums of its channels.
  template <class A>
  __device__ static __forceinline__ void sum(A (&to)[CHANNELS], const A (&values)[V]) {
    if constexpr (LAST) {
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] += values[j];
    } else {
      to[0] += pairwise_sum(values);
    }
  }
  // Elements of each channel in the first units of this share, and in all of them.
  __device__ __forceinline__ int64_t first_units() const {
    const int64_t n = static_cast<int64_t>(step) * FIRST;
    return end - begin < n ? end - begin : n;
  }
  __device__ static constexpr int per_unit() { return LAST ? 1 : V; }
  // One thread for each channel of the block.
  __device__ __forceinline__ bool leads() const { return inside() && (LAST ? threadIdx.x < g.width : threadIdx.x == 0); }
};

// v[i] of every channel: the sums over the block, for each of its threads.
template <class A, int n, int V, bool LAST>
__device__ __forceinline__ void block_sum(A (&v)[n][Sweep<V, LAST>::CHANNELS], const Sweep<V, LAST>& w) {
  A* const place = shared<A>();
  __syncthreads();  // what is there has been read
  if constexpr (!LAST) {
    A flat[n];
#pragma unroll
    for (int i = 0; i < n; ++i) flat[i] = v[i][0];
    exact_block_sum(flat, place);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i][0] = flat[i];
  } else {
    const int row = w.g.width * V, mine = threadIdx.x % w.g.width * V, plane = blockDim.x * V;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) place[i * plane + threadIdx.x * V + j] = v[i][j];
    __syncthreads();
    for (int k = threadIdx.x; k < n * row; k += blockDim.x) {
      A* const from = place + k / row * plane + k % row;
      A total = 0, lost = 0;
      for (int h = 0; h < w.step; ++h) add(total, lost, from[h * row]);
      *from = with_lost(total, lost);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) v[i][j] = place[i * plane + mine + j];
  }
}

// Of this share, for every thread's channels: sums about the mean of the first units, and again about the mean itself where
// that was far off, or scaled where squares overflow.
template <class T, int V, bool LAST>
__device__ __forceinline__ void statistics(const View<const T>& x, Sweep<V, LAST>& w, Statistics<Acc<T>> (&out)[LAST ? V : 1]) {
  using A = Acc<T>;
  constexpr int CHANNELS = Sweep<V, LAST>::CHANNELS;
  A sum[1][CHANNELS] = {}, shift[CHANNELS], scale[CHANNELS], values[V];
  const int64_t first = w.first_units();
  for (; w.more() && w.unit < w.begin + first; w.next()) {
    w.read(x, values);
    w.sum(sum[0], values);
  }
  block_sum<A, 1, V, LAST>(sum, w);
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) {
    shift[i] = sum[0][i] / static_cast<A>(first * w.per_unit());
    scale[i] = 1;
  }
  const A n = static_cast<A>((w.end - w.begin) * w.per_unit());
  for (int pass = 0;; ++pass) {
    A s[2][CHANNELS] = {};
    for (w.restart(); w.more(); w.next()) {
      w.read(x, values);
      A squares[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int i = w.channel(j);
        values[j] = (values[j] - shift[i]) * scale[i];
        squares[j] = values[j] * values[j];
      }
      w.sum(s[0], values);
      w.sum(s[1], squares);
    }
    block_sum<A, 2, V, LAST>(s, w);
    bool again = false;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      const Centred<A> c = about(shift[i], s[0][i], s[1][i], n, scale[i]);
      out[i] = {n, c};
      const A delta = s[0][i] / n;
      const bool overflow = infinite(s[1][i]) && scale[i] == 1, far = delta * delta * n > FAR * FAR * c.m2;
      again = again || (w.inside() && (overflow || far));
      if (overflow)
        scale[i] = SCALE;
      else if (far)
        shift[i] = c.high;
    }
    if (pass == MOST_PASSES - 1 || !__syncthreads_or(again)) break;
  }
  w.restart();
}

template <class A>
struct Factors {
  A high, low, rstd, weight, bias;
};

// ---------------------------------------------------------------- forward

template <class T>
struct ChannelForward {
  Shares g;
  View<const T> x;
  View<T> y;
  ConstArray weight, bias;
  const Acc<T>*mean, *rstd;
  Acc<T>* partial;         // (4, P, C), of the statistics alone
  Settled<Acc<T>> settled;  // of a whole training or evaluation
};

template <class A>
__device__ __forceinline__ A or_else(ConstArray p, int64_t c, A absent) {
  return p.data ? element<A>(p, c) : absent;
}

template <class T, int V, bool LAST>
__device__ __forceinline__ void apply(const ChannelForward<T>& p, Sweep<V, LAST>& w,
                                      const Factors<Acc<T>> (&f)[LAST ? V : 1]) {
  for (; w.more(); w.next()) {
    Acc<T> values[V];
    w.read(p.x, values);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto& k = f[w.channel(j)];
      values[j] = affine(normalize(values[j], k.high, k.low, k.rstd), k.weight, k.bias);
    }
    w.write(p.y, values);
  }
}

template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_stats_kernel(const __grid_constant__ ChannelForward<T> p) {
  using A = Acc<T>;
  Sweep<V, LAST> w(p.g);
  Statistics<A> s[LAST ? V : 1];
  statistics<T, V, LAST>(p.x, w, s);
  if (!w.leads()) return;
  const int64_t plane = p.g.P * p.g.C;
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    A* const to = p.partial + w.share * p.g.C + w.c + i;
    to[0] = s[i].c.high;
    to[plane] = s[i].c.low;
    to[2 * plane] = s[i].c.m2;
    to[3 * plane] = s[i].c.scale;
  }
}

// y, with the statistics given or, in evaluation, the running ones.
template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_apply_kernel(const __grid_constant__ ChannelForward<T> p) {
  using A = Acc<T>;
  Sweep<V, LAST> w(p.g);
  if (!w.inside()) return;
  Factors<A> f[LAST ? V : 1];
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    const int64_t c = w.c + i;
    if (p.settled.running_mean.data) {
      const Statistics<A> s{1, {element<A>(p.settled.running_mean, c), 0, element<A>(p.settled.running_var, c), 1}};
      f[i].high = s.c.high;
      f[i].low = 0;
      f[i].rstd = rstd_of(s.c.m2, s.n, s.c.scale, p.settled.eps);
      if (w.share == 0 && w.leads()) {
        p.settled.mean[c] = f[i].high;
        p.settled.mean[p.g.C + c] = 0;
        p.settled.rstd[c] = f[i].rstd;
      }
    } else {
      f[i].high = p.mean[c];
      f[i].low = p.mean[p.g.C + c];
      f[i].rstd = p.rstd[c];
    }
    f[i].weight = or_else<A>(p.weight, c, 1);
    f[i].bias = or_else<A>(p.bias, c, 0);
  }
  apply<T, V, LAST>(p, w, f);
}

// All of training, where a block has all positions of its channels.
template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_fwd_kernel(const __grid_constant__ ChannelForward<T> p) {
  using A = Acc<T>;
  Sweep<V, LAST> w(p.g);
  Statistics<A> s[LAST ? V : 1];
  statistics<T, V, LAST>(p.x, w, s);
  if (!w.inside()) return;
  Factors<A> f[LAST ? V : 1];
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    const int64_t c = w.c + i;
    f[i].high = s[i].c.high;
    f[i].low = s[i].c.low;
    f[i].rstd = p.settled.settle(s[i], c, w.leads());
    f[i].weight = or_else<A>(p.weight, c, 1);
    f[i].bias = or_else<A>(p.bias, c, 0);
  }
  apply<T, V, LAST>(p, w, f);
}

// ---------------------------------------------------------------- backward

template <class T>
struct ChannelBackward {
  Shares g;
  View<const T> dy, x;
  View<T> dx;
  ConstArray weight;
  const Acc<T>*mean, *rstd, *c1, *c2;  // no c1 and c2 in evaluation
  Acc<T>* partial;                     // (2, P, C): sums of dz * x_hat and of dz, of the sums alone
  Array dweight, dbias;                // of a whole backward
  int64_t count;
};

template <class T, int V, bool LAST>
__device__ __forceinline__ void load_factors(const ChannelBackward<T>& p, const Sweep<V, LAST>& w,
                                             Factors<Acc<T>> (&f)[LAST ? V : 1]) {
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    const int64_t c = w.inside() ? w.c + i : 0;
    f[i] = {p.mean[c], p.mean[p.g.C + c], p.rstd[c], or_else<Acc<T>>(p.weight, c, 1), 0};
  }
}

// sums[0]: dz * x_hat, sums[1]: dz, of this share.
template <class T, int V, bool LAST>
__device__ __forceinline__ void gradient_sums(const ChannelBackward<T>& p, Sweep<V, LAST>& w,
                                              const Factors<Acc<T>> (&f)[LAST ? V : 1],
                                              Acc<T> (&sums)[2][Sweep<V, LAST>::CHANNELS]) {
  for (; w.more(); w.next()) {
    Acc<T> x[V], dz[V];
    w.read(p.x, x);
    w.read(p.dy, dz);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto& k = f[w.channel(j)];
      x[j] = dz[j] * normalize(x[j], k.high, k.low, k.rstd);
    }
    w.sum(sums[0], x);
    w.sum(sums[1], dz);
  }
  block_sum<Acc<T>, 2, V, LAST>(sums, w);
  w.restart();
}

template <class T, int V, bool LAST>
__device__ __forceinline__ void gradient(const ChannelBackward<T>& p, Sweep<V, LAST>& w,
                                         const Factors<Acc<T>> (&f)[LAST ? V : 1],
                                         const Acc<T> (&means)[2][Sweep<V, LAST>::CHANNELS], bool through_statistics) {
  for (; w.more(); w.next()) {
    Acc<T> x[V], dz[V];
    w.read(p.dy, dz);
    if (through_statistics) w.read(p.x, x);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int i = w.channel(j);
      const Acc<T> g = dz[j] * f[i].weight;
      dz[j] = through_statistics
                  ? grad_input(g, normalize(x[j], f[i].high, f[i].low, f[i].rstd), f[i].rstd, means[0][i], means[1][i])
                  : g * f[i].rstd;
    }
    w.write(p.dx, dz);
  }
}

template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_sums_kernel(const __grid_constant__ ChannelBackward<T> p) {
  Sweep<V, LAST> w(p.g);
  Factors<Acc<T>> f[LAST ? V : 1];
  load_factors<T, V, LAST>(p, w, f);
  Acc<T> sums[2][LAST ? V : 1] = {};
  gradient_sums<T, V, LAST>(p, w, f, sums);
  if (!w.leads()) return;
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    Acc<T>* const to = p.partial + w.share * p.g.C + w.c + i;
    to[0] = sums[0][i];
    to[p.g.P * p.g.C] = sums[1][i];
  }
}

template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_grad_kernel(const __grid_constant__ ChannelBackward<T> p) {
  Sweep<V, LAST> w(p.g);
  if (!w.inside()) return;
  Factors<Acc<T>> f[LAST ? V : 1];
  load_factors<T, V, LAST>(p, w, f);
  Acc<T> means[2][LAST ? V : 1] = {};
  if (p.c1)
#pragma unroll
    for (int i = 0; i < w.CHANNELS; ++i) means[0][i] = p.c1[w.c + i], means[1][i] = p.c2[w.c + i];
  gradient<T, V, LAST>(p, w, f, means, p.c1 != nullptr);
}

// All of a backward through the statistics, where a block has all positions of its channels.
template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_bwd_kernel(const __grid_constant__ ChannelBackward<T> p) {
  Sweep<V, LAST> w(p.g);
  Factors<Acc<T>> f[LAST ? V : 1];
  load_factors<T, V, LAST>(p, w, f);
  Acc<T> sums[2][LAST ? V : 1] = {};
  gradient_sums<T, V, LAST>(p, w, f, sums);
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    if (w.leads() && p.dweight.data) set_element(p.dweight, w.c + i, sums[0][i]);
    if (w.leads() && p.dbias.data) set_element(p.dbias, w.c + i, sums[1][i]);
    for (auto& sum : sums) sum[i] = f[i].weight * sum[i] / static_cast<Acc<T>>(p.count);
  }
  gradient<T, V, LAST>(p, w, f, sums, true);
}

}  // namespace fastnorm::cuda
