// Groups of neighbouring channels of a sample (group norm), ended by an activation: P * S dense elements each. In a sweep the
// groups are what channels are to batch norm, and a group's own channels are its samples.
//
// Where a group's elements and those of a channel go depends on P and S alone, so that a sample does not depend on its batch.
#pragma once

#include "channel.cuh"

namespace fastnorm::cuda {

constexpr int GROUP_THREADS = 256;

// Weight and bias of the channels of a block's group.
template <class T>
struct GroupFactors {
  Source weight, bias;
  int64_t first;  // channel

  __device__ __forceinline__ Acc<T> weight_of(int64_t i) const { return weight.data ? load_one<T>(weight, first + i) : 1; }
  __device__ __forceinline__ Acc<T> bias_of(int64_t i) const { return bias.data ? load_one<T>(bias, first + i) : 0; }
};

// ---------------------------------------------------------------- forward

template <class T>
struct GroupForward {
  Shares g;
  int64_t groups;  // of a sample
  View<const T, true> x;
  View<T, true> y;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha;
  const Acc<T>*mean, *rstd;
  Settled<Acc<T>> settled;  // of a whole group
};

template <class T, int V>
__device__ __forceinline__ void apply_group(const GroupForward<T>& p, Sweep<V, false>& w, Acc<T> high, Acc<T> low, Acc<T> rstd) {
  const GroupFactors<T> f{p.weight, p.bias, w.c % p.groups * p.g.B};
  for (; w.more(); w.next()) {
    const auto bits = w.fetch(p.x);
    const Acc<T> weight = f.weight_of(w.b), bias = f.bias_of(w.b);
    Acc<T> z[V];
    widen<T, V>(z, bits);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = affine(normalize(z[j], high, low, rstd), weight, bias);
    with_activation(p.activation, [&](auto activation) { activate_all(activation, z, p.alpha); });
    w.write(p.y, z);
  }
}

// A group to a block.
template <class T, int V>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_fwd_kernel(const __grid_constant__ GroupForward<T> p) {
  Sweep<V, false> w(p.g);
  Statistics<Acc<T>> s[1];
  statistics<T, V, false>(p.x, w, s);
  const Acc<T> rstd = p.settled.settle(s[0], w.c, w.leads());
  apply_group<T, V>(p, w, s[0].c.high, s[0].c.low, rstd);
}

// A share of a group whose statistics are there.
template <class T, int V>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_apply_kernel(const __grid_constant__ GroupForward<T> p) {
  Sweep<V, false> w(p.g);
  apply_group<T, V>(p, w, p.mean[w.c], p.mean[p.g.C + w.c], p.rstd[w.c]);
}

// ---------------------------------------------------------------- backward

template <class T>
struct GroupBackward {
  Shares g;
  int64_t groups;
  int team;  // of a channel, or of a share of it
  View<const T, true> dy, x;
  View<T, true> dx;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha;
  const Acc<T>*mean, *rstd;
  Acc<T>* partial;               // (2, B, channel_shares, C): sums of dz * x_hat and of dz; null where nobody asks for them
  int64_t rows;                  // B * channel_shares * C
  int64_t channel_shares, share;  // units of a share
};

template <class T, int V>
__device__ __forceinline__ void differentiate(const GroupBackward<T>& p, const Factors<Acc<T>>& f, const Bits<T, V>& dy,
                                              const Bits<T, V>& x, Acc<T> (&dz)[V], Acc<T> (&x_hat)[V]) {
  Acc<T> z[V];
  widen<T, V>(dz, dy);
  widen<T, V>(x_hat, x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    x_hat[j] = normalize(x_hat[j], f.high, f.low, f.rstd);
    z[j] = affine(x_hat[j], f.weight, f.bias);
  }
  with_activation(p.activation, [&](auto activation) { times_slope(activation, dz, z, p.alpha); });
}

// Of the units [begin, end) of the channel i of the group m, for all threads of a team: sums of dz * x_hat and of dz.
template <class T, int V>
__device__ __forceinline__ void channel_terms(const GroupBackward<T>& p, const Team& team, int64_t m, int64_t i,
                                              const Factors<Acc<T>>& f, int64_t begin, int64_t end, Acc<T> (&sums)[2]) {
  const int64_t from = m * p.x.channel + i * p.x.sample;
  for (int64_t unit = begin + team.lane; unit < end; unit += team.size) {
    const int64_t at = from + unit * V;
    const auto dy = fetch<T, V>(p.dy.data + at, p.dy.whole, 1), x = fetch<T, V>(p.x.data + at, p.x.whole, 1);
    Acc<T> dz[V], x_hat[V];
    differentiate<T, V>(p, f, dy, x, dz, x_hat);
    sums[1] += pairwise_sum(dz);
#pragma unroll
    for (int j = 0; j < V; ++j) x_hat[j] *= dz[j];
    sums[0] += pairwise_sum(x_hat);
  }
}

template <class T, int V>
__device__ __forceinline__ void group_gradient(const GroupBackward<T>& p, Sweep<V, false>& w, const GroupFactors<T>& factors,
                                               Factors<Acc<T>> f, Acc<T> c1, Acc<T> c2) {
  for (; w.more(); w.next()) {
    const auto dy = w.fetch(p.dy), x = w.fetch(p.x);
    f.weight = factors.weight_of(w.b);
    f.bias = factors.bias_of(w.b);
    Acc<T> dz[V], x_hat[V];
    differentiate<T, V>(p, f, dy, x, dz, x_hat);
#pragma unroll
    for (int j = 0; j < V; ++j) dz[j] = grad_input(dz[j] * f.weight, x_hat[j], f.rstd, c1, c2);
    w.write(p.dx, dz);
  }
}

// A group to a block, whose teams take turns with its channels.
template <class T, int V>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_bwd_kernel(const __grid_constant__ GroupBackward<T> p) {
  using A = Acc<T>;
  Sweep<V, false> w(p.g);
  const Team team(p.team);
  const GroupFactors<T> factors{p.weight, p.bias, w.c % p.groups * p.g.B};
  Factors<A> f{p.mean[w.c], p.mean[p.g.C + w.c], p.rstd[w.c], 1, 0};
  A c[2] = {0, 0};
  int parity = 0;
  for (int64_t first = 0; first < p.g.B; first += team.rows, parity ^= 1) {
    const int64_t i = first + team.row;
    const bool inside = i < p.g.B;
    A sums[2] = {0, 0};
    if (inside) {
      f.weight = factors.weight_of(i);
      f.bias = factors.bias_of(i);
      channel_terms<T, V>(p, team, w.c, i, f, 0, p.g.S / V, sums);
    }
    team_sum(sums, team.size, shared<A>() + parity * TEAM_SHARED<2>);
    if (!inside || team.lane > 0) continue;
    if (p.partial)
      for (int k = 0; k < 2; ++k) p.partial[k * p.rows + w.c * p.g.B + i] = sums[k];
    for (int k = 0; k < 2; ++k) c[k] += f.weight * sums[k];
  }
  if (!p.dx.data) return;
  exact_block_sum(c, shared<A>() + 2 * TEAM_SHARED<2>);
  const A n = static_cast<A>(p.g.B * p.g.S);
  group_gradient<T, V>(p, w, factors, f, c[0] / n, c[1] / n);
}

// Shares of channels, one to a team.
template <class T, int V>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_sums_kernel(const __grid_constant__ GroupBackward<T> p) {
  using A = Acc<T>;
  const Team team(p.team);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * team.rows + team.row, C = p.groups * p.g.B;
  A sums[2] = {0, 0};
  if (row < p.rows) {
    const int64_t c = row % C, place = row / C, m = place / p.channel_shares * p.groups + c / p.g.B;
    const int64_t begin = place % p.channel_shares * p.share, units = p.g.S / V;
    const GroupFactors<T> factors{p.weight, p.bias, 0};
    const Factors<A> f{p.mean[m], p.mean[p.g.C + m], p.rstd[m], factors.weight_of(c), factors.bias_of(c)};
    channel_terms<T, V>(p, team, m, c % p.g.B, f, begin, begin + p.share < units ? begin + p.share : units, sums);
  }
  team_sum(sums, team.size, shared<A>());
  if (row < p.rows && team.lane == 0)
    for (int k = 0; k < 2; ++k) p.partial[k * p.rows + row] = sums[k];
}

// dx of a share of a group, of whose channels the sums are there: few beside the share's elements.
template <class T, int V>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_grad_kernel(const __grid_constant__ GroupBackward<T> p) {
  using A = Acc<T>;
  Sweep<V, false> w(p.g);
  const int64_t group = w.c % p.groups, sample = w.c / p.groups, C = p.groups * p.g.B;
  const GroupFactors<T> factors{p.weight, p.bias, group * p.g.B};
  A c[2] = {0, 0};
  for (int64_t share = 0; share < p.channel_shares; ++share) {
    const A* const from = p.partial + (sample * p.channel_shares + share) * C + group * p.g.B;
    for (int64_t i = threadIdx.x; i < p.g.B; i += blockDim.x)
      for (int k = 0; k < 2; ++k) c[k] += factors.weight_of(i) * from[k * p.rows + i];
  }
  exact_block_sum(c, shared<A>());
  const A n = static_cast<A>(p.g.B * p.g.S);
  group_gradient<T, V>(p, w, factors, {p.mean[w.c], p.mean[p.g.C + w.c], p.rstd[w.c], 1, 0}, c[0] / n, c[1] / n);
}

}  // namespace fastnorm::cuda
