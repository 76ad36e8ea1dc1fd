// Channels (B, C, S). Passes are functions, so that a small slab's statistics and result are one launch.
#pragma once

#include "elementary.cuh"
#include "sweep.cuh"

namespace fastnorm::cuda {

// Where the mean is further off the point that sums are taken about, in deviations, they are taken again.
constexpr int FAR = 4;
// One about the first units, one scaled, one about the mean.
constexpr int MOST_PASSES = 3;

// Of this share, for every thread's channels: sums about the mean of the first units, and again about the mean itself where
// that was far off, or scaled where squares overflow. With a mask, of what counts: nothing else enters a sum, and how much does
// is a sum as well.
template <class T, int V, bool LAST, bool CALLED, class M = NoMask>
__device__ __forceinline__ void statistics(const View<const T, CALLED>& x, Sweep<V, LAST>& w,
                                           Statistics<Acc<T>> (&out)[LAST ? V : 1], const M& mask = {}) {
  using A = Acc<T>;
  constexpr int CHANNELS = Sweep<V, LAST>::CHANNELS, MASKED = !std::is_same_v<M, NoMask>;
  A sum[1 + MASKED][CHANNELS] = {}, shift[CHANNELS], scale[CHANNELS], values[V];
  bool counts[V];
  const int64_t first = w.first_units();
  for (; w.more() && w.unit < w.begin + first; w.next()) {
    w.read(x, values);
    w.read(mask, counts);
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = counts[j] ? values[j] : 0;
    w.sum(sum[0], values);
    if constexpr (MASKED) w.count(sum[1], counts);
  }
  block_sum<A, 1 + MASKED, V, LAST>(sum, w);
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) {
    const A mean = sum[0][i] / (MASKED ? at_least_one(sum[MASKED][i]) : static_cast<A>(first * w.per_unit()));
    shift[i] = finite(mean) ? mean : 0;  // x - inf is not a number where x is infinite
    scale[i] = 1;
  }
  for (int pass = 0;; ++pass) {
    A s[2 + MASKED][CHANNELS] = {};
    for (w.restart(); w.more(); w.next()) {
      w.read(x, values);
      w.read(mask, counts);
      A squares[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int i = w.channel(j);
        values[j] = counts[j] ? (values[j] - shift[i]) * scale[i] : 0;
        squares[j] = values[j] * values[j];
      }
      w.sum(s[0], values);
      w.sum(s[1], squares);
      if constexpr (MASKED) w.count(s[2], counts);
    }
    block_sum<A, 2 + MASKED, V, LAST>(s, w);
    bool again = false;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      const A counted = MASKED ? s[1 + MASKED][i] : static_cast<A>((w.end - w.begin) * w.per_unit());
      const A n = MASKED ? at_least_one(counted) : counted;
      const Centred<A> c = about(shift[i], s[0][i], s[1][i], n, scale[i]);
      out[i] = {counted, c};
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

template <class T, bool CALLED = false>
struct ChannelForward {
  static constexpr bool FUSED = false;

  Shares g;
  View<const T, CALLED> x;
  View<T, CALLED> y;
  ConstArray weight, bias;
  const Acc<T>*mean, *rstd;
  Acc<T>* partial;         // (4, P, C), of the statistics alone
  Settled<Acc<T>> settled;  // of a whole training or evaluation
};

template <class T>
struct FusedChannelForward : ChannelForward<T, true> {
  static constexpr bool FUSED = true;

  View<const T, true> residual;
  Activation activation;
  Acc<T> alpha;
};

template <class T, bool FUSED>
using ChannelForwardOf = std::conditional_t<FUSED, FusedChannelForward<T>, ChannelForward<T>>;

template <class A>
__device__ __forceinline__ A or_else(ConstArray p, int64_t c, A absent) {
  return p.data ? element<A>(p, c) : absent;
}

template <class T, int V, bool LAST, class P>
__device__ __forceinline__ void apply(const P& p, Sweep<V, LAST>& w, const Factors<Acc<T>> (&f)[LAST ? V : 1]) {
  for (; w.more(); w.next()) {
    Acc<T> values[V];
    [[maybe_unused]] Bits<T, V> residual{};
    if constexpr (P::FUSED) residual = w.fetch(p.residual);
    w.read(p.x, values);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto& k = f[w.channel(j)];
      values[j] = affine(normalize(values[j], k.high, k.low, k.rstd), k.weight, k.bias);
    }
    if constexpr (P::FUSED) {
      if (p.residual.data) add_widened<T, V>(values, residual);
      with_activation(p.activation, [&](auto activation) { activate_all(activation, values, p.alpha); });
    }
    w.write(p.y, values);
  }
}

// Those of this share, and how much counts where there is a plane for it.
template <class A, int V, bool LAST>
__device__ __forceinline__ void keep_statistics(A* partial, const Sweep<V, LAST>& w, const Statistics<A> (&s)[LAST ? V : 1],
                                                bool counted) {
  if (!w.leads()) return;
  const int64_t plane = w.g.P * w.g.C;
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    A* const to = partial + w.share * w.g.C + w.c + i;
    to[0] = s[i].c.high;
    to[plane] = s[i].c.low;
    to[2 * plane] = s[i].c.m2;
    to[3 * plane] = s[i].c.scale;
    if (counted) to[4 * plane] = s[i].n;
  }
}

template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_stats_kernel(const __grid_constant__ ChannelForward<T> p) {
  Sweep<V, LAST> w(p.g);
  Statistics<Acc<T>> s[LAST ? V : 1];
  statistics<T, V, LAST>(p.x, w, s);
  keep_statistics<Acc<T>, V, LAST>(p.partial, w, s, false);
}

// y, with the statistics given or, in evaluation, the running ones.
template <class T, int V, bool LAST, bool FUSED>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_apply_kernel(const __grid_constant__ ChannelForwardOf<T, FUSED> p) {
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
template <class T, int V, bool LAST, bool FUSED>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_fwd_kernel(const __grid_constant__ ChannelForwardOf<T, FUSED> p) {
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

template <class T, bool CALLED = false>
struct ChannelBackward {
  static constexpr bool FUSED = false, MASKED = false;

  Shares g;
  View<const T, CALLED> dy, x;
  View<T, CALLED> dx;
  ConstArray weight;
  const Acc<T>*mean, *rstd, *c1, *c2;  // no c1 and c2 in evaluation
  Acc<T>* partial;                     // (2, P, C): sums of dz * x_hat and of dz, of the sums alone
  Array dweight, dbias;                // of a whole backward
  int64_t count;
};

template <class T>
struct FusedChannelBackward : ChannelBackward<T, true> {
  static constexpr bool FUSED = true;

  ConstArray bias;
  View<const T, true> residual;
  View<T, true> dresidual;
  Activation activation;
  Acc<T> alpha;
};

template <class T, bool FUSED>
using ChannelBackwardOf = std::conditional_t<FUSED, FusedChannelBackward<T>, ChannelBackward<T>>;

template <class T, int V, bool LAST, class P>
__device__ __forceinline__ void load_factors(const P& p, const Sweep<V, LAST>& w, Factors<Acc<T>> (&f)[LAST ? V : 1]) {
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    const int64_t c = w.inside() ? w.c + i : 0;
    f[i] = {p.mean[c], p.mean[p.g.C + c], p.rstd[c], or_else<Acc<T>>(p.weight, c, 1), 0};
    if constexpr (P::FUSED) f[i].bias = or_else<Acc<T>>(p.bias, c, 0);
  }
}

// x and dz of a unit.
template <class T, int V, bool LAST>
__device__ __forceinline__ void read_dz(const FusedChannelBackward<T>& p, const Sweep<V, LAST>& w,
                                        const Factors<Acc<T>> (&f)[LAST ? V : 1], Acc<T> (&x)[V], Acc<T> (&dz)[V]) {
  const auto dy = w.fetch(p.dy), residual = w.fetch(p.residual);
  w.read(p.x, x);
  widen<T, V>(dz, dy);
  Acc<T> z[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const auto& k = f[w.channel(j)];
    z[j] = affine(normalize(x[j], k.high, k.low, k.rstd), k.weight, k.bias);
  }
  if (p.residual.data) add_widened<T, V>(z, residual);
  with_activation(p.activation, [&](auto activation) { times_slope(activation, dz, z, p.alpha); });
}

// sums[0]: dz * x_hat, sums[1]: dz, of this share. `keep`: dz becomes dresidual where that is wanted.
template <class T, int V, bool LAST, class P>
__device__ __forceinline__ void gradient_sums(const P& p, Sweep<V, LAST>& w, const Factors<Acc<T>> (&f)[LAST ? V : 1],
                                              Acc<T> (&sums)[2][Sweep<V, LAST>::CHANNELS], [[maybe_unused]] bool keep) {
  for (; w.more(); w.next()) {
    Acc<T> x[V], dz[V];
    if constexpr (P::FUSED) {
      read_dz<T, V, LAST>(p, w, f, x, dz);
      if (keep && p.dresidual.data) w.write(p.dresidual, dz);
    } else {
      w.read(p.x, x);
      w.read(p.dy, dz);
    }
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

// dx and dresidual.
template <class T, int V, bool LAST, class P>
__device__ __forceinline__ void gradient(const P& p, Sweep<V, LAST>& w, const Factors<Acc<T>> (&f)[LAST ? V : 1],
                                         const Acc<T> (&means)[2][Sweep<V, LAST>::CHANNELS], bool through_statistics) {
  for (; w.more(); w.next()) {
    Acc<T> x[V], dz[V];
    if constexpr (P::FUSED) {
      read_dz<T, V, LAST>(p, w, f, x, dz);
      if (p.dresidual.data) w.write(p.dresidual, dz);
      if (!p.dx.data) continue;
    } else {
      w.read(p.dy, dz);
      if (through_statistics) w.read(p.x, x);
    }
    [[maybe_unused]] bool counts[V];
    if constexpr (P::MASKED) w.read(p.mask, counts);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int i = w.channel(j);
      const Acc<T> g = dz[j] * f[i].weight;
      dz[j] = through_statistics && (!P::MASKED || counts[j])
                  ? grad_input(g, normalize(x[j], f[i].high, f[i].low, f[i].rstd), f[i].rstd, means[0][i], means[1][i])
                  : g * f[i].rstd;
    }
    w.write(p.dx, dz);
  }
}

template <class T, int V, bool LAST, bool FUSED>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_sums_kernel(const __grid_constant__ ChannelBackwardOf<T, FUSED> p) {
  Sweep<V, LAST> w(p.g);
  Factors<Acc<T>> f[LAST ? V : 1];
  load_factors<T, V, LAST>(p, w, f);
  Acc<T> sums[2][LAST ? V : 1] = {};
  gradient_sums<T, V, LAST>(p, w, f, sums, true);
  if (!w.leads()) return;
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    Acc<T>* const to = p.partial + w.share * p.g.C + w.c + i;
    to[0] = sums[0][i];
    to[p.g.P * p.g.C] = sums[1][i];
  }
}

template <class T, int V, bool LAST, class P>
__device__ __forceinline__ void derive(const P& p) {
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

template <class T, int V, bool LAST, bool FUSED>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_grad_kernel(const __grid_constant__ ChannelBackwardOf<T, FUSED> p) {
  derive<T, V, LAST>(p);
}

// All of a backward through the statistics, where a block has all positions of its channels.
template <class T, int V, bool LAST, bool FUSED>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1) channel_bwd_kernel(const __grid_constant__ ChannelBackwardOf<T, FUSED> p) {
  Sweep<V, LAST> w(p.g);
  Factors<Acc<T>> f[LAST ? V : 1];
  load_factors<T, V, LAST>(p, w, f);
  Acc<T> sums[2][LAST ? V : 1] = {};
  gradient_sums<T, V, LAST>(p, w, f, sums, false);
#pragma unroll
  for (int i = 0; i < w.CHANNELS; ++i) {
    if (w.leads() && p.dweight.data) set_element(p.dweight, w.c + i, sums[0][i]);
    if (w.leads() && p.dbias.data) set_element(p.dbias, w.c + i, sums[1][i]);
    for (auto& sum : sums) sum[i] = f[i].weight * sum[i] / static_cast<Acc<T>>(p.count);
  }
  gradient<T, V, LAST>(p, w, f, sums, true);
}

}  // namespace fastnorm::cuda
