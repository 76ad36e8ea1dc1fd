// Groups of neighbouring channels of a sample (group norm), ended by an activation: P * S dense elements each. In a sweep the
// groups are what channels are to batch norm, and a group's own channels are its samples. CROSSED: a unit's elements are of
// several channels, and a group is one run of them all.
//
// Where a group's elements and those of a channel go depends on P and S alone, so that a sample does not depend on its batch.
#pragma once

#include "channel.cuh"

namespace fastnorm::cuda {

constexpr int GROUP_THREADS = 256;

// The channels of a block's group.
template <class T>
struct GroupChannels {
  Source weight, bias;
  int64_t first, S;  // number of the first one, elements of each

  __device__ __forceinline__ Acc<T> weight_of(int64_t i) const { return weight.data ? load_one<T>(weight, first + i) : 1; }
  __device__ __forceinline__ Acc<T> bias_of(int64_t i) const { return bias.data ? load_one<T>(bias, first + i) : 0; }
  // Of a unit's elements.
  template <bool CROSSED, int V>
  __device__ __forceinline__ void load(const Sweep<V, false>& at, Acc<T> (&w)[V], Acc<T> (&b)[V]) const {
    int64_t i = CROSSED ? at.s * V / S : at.b, left = CROSSED ? (i + 1) * S - at.s * V : V;
    w[0] = weight_of(i), b[0] = bias_of(i);
#pragma unroll
    for (int j = 1; j < V; ++j) {
      w[j] = w[j - 1], b[j] = b[j - 1];
      if (!CROSSED || --left > 0) continue;
      left = S;
      ++i;
      w[j] = weight_of(i), b[j] = bias_of(i);
    }
  }
};

// ---------------------------------------------------------------- forward

template <class T>
struct GroupForward {
  Shares g;
  Groups of;
  View<const T, true> x;
  View<T, true> y;
  Source weight, bias;
  Activation activation;
  Acc<T> alpha;
  const Acc<T>*mean, *rstd;
  Settled<Acc<T>> settled;  // of a whole group
};

// Those of the block's group m.
template <class T, class P>
__device__ __forceinline__ GroupChannels<T> channels_of(const P& p, int64_t m) {
  return {p.weight, p.bias, m % (p.of.C / p.of.P) * p.of.P, p.of.S};
}

template <class T, int V, bool CROSSED>
__device__ __forceinline__ void apply_group(const GroupForward<T>& p, Sweep<V, false>& w, Acc<T> high, Acc<T> low,
                                            Acc<T> rstd) {
  const auto channels = channels_of<T>(p, w.c);
  for (; w.more(); w.next()) {
    const auto bits = w.fetch(p.x);
    Acc<T> z[V], weight[V], bias[V];
    channels.template load<CROSSED>(w, weight, bias);
    widen<T, V>(z, bits);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = affine(normalize(z[j], high, low, rstd), weight[j], bias[j]);
    with_activation(p.activation, [&](auto activation) { activate_all(activation, z, p.alpha); });
    w.write(p.y, z);
  }
}

// A group to a block.
template <class T, int V, bool CROSSED>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_fwd_kernel(const __grid_constant__ GroupForward<T> p) {
  Sweep<V, false> w(p.g);
  Statistics<Acc<T>> s[1];
  statistics<T, V, false>(p.x, w, s);
  const Acc<T> rstd = p.settled.settle(s[0], w.c, w.leads());
  apply_group<T, V, CROSSED>(p, w, s[0].c.high, s[0].c.low, rstd);
}

// A share of a group whose statistics are there.
template <class T, int V, bool CROSSED>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_apply_kernel(const __grid_constant__ GroupForward<T> p) {
  Sweep<V, false> w(p.g);
  apply_group<T, V, CROSSED>(p, w, p.mean[w.c], p.mean[p.g.C + w.c], p.rstd[w.c]);
}

// ---------------------------------------------------------------- backward

template <class T>
struct GroupBackward {
  Shares g;
  Groups of;
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

template <class A>
struct GroupStatistics {
  A high, low, rstd;
};

template <class T, int V>
__device__ __forceinline__ void differentiate(const GroupBackward<T>& p, const GroupStatistics<Acc<T>>& s,
                                              const Acc<T> (&weight)[V], const Acc<T> (&bias)[V], const Bits<T, V>& dy,
                                              const Bits<T, V>& x, Acc<T> (&dz)[V], Acc<T> (&x_hat)[V]) {
  Acc<T> z[V];
  widen<T, V>(dz, dy);
  widen<T, V>(x_hat, x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    x_hat[j] = normalize(x_hat[j], s.high, s.low, s.rstd);
    z[j] = affine(x_hat[j], weight[j], bias[j]);
  }
  with_activation(p.activation, [&](auto activation) { times_slope(activation, dz, z, p.alpha); });
}

// A thread's terms in the sums of dz * x_hat and of dz, of units that begin at `from` and are a channel's.
template <class T, int V>
__device__ __forceinline__ void channel_terms(const GroupBackward<T>& p, const Team& team, const GroupStatistics<Acc<T>>& s,
                                              Acc<T> weight, Acc<T> bias, int64_t from, int64_t begin, int64_t end,
                                              Acc<T> (&sums)[2]) {
  Acc<T> w[V], b[V];
#pragma unroll
  for (int j = 0; j < V; ++j) w[j] = weight, b[j] = bias;
  for (int64_t unit = begin + team.lane; unit < end; unit += team.size) {
    const int64_t at = from + unit * V;
    const auto dy = fetch<T, V>(p.dy.data + at, p.dy.whole, 1), x = fetch<T, V>(p.x.data + at, p.x.whole, 1);
    Acc<T> dz[V], x_hat[V];
    differentiate<T, V>(p, s, w, b, dy, x, dz, x_hat);
    sums[1] += pairwise_sum(dz);
#pragma unroll
    for (int j = 0; j < V; ++j) x_hat[j] *= dz[j];
    sums[0] += pairwise_sum(x_hat);
  }
}

template <class T, int V, bool CROSSED>
__device__ __forceinline__ void group_gradient(const GroupBackward<T>& p, Sweep<V, false>& w, const GroupChannels<T>& channels,
                                               const GroupStatistics<Acc<T>>& s, Acc<T> (&c)[2]) {
  for (Acc<T>& sum : c) sum /= static_cast<Acc<T>>(p.of.P * p.of.S);
  for (; w.more(); w.next()) {
    const auto dy = w.fetch(p.dy), x = w.fetch(p.x);
    Acc<T> dz[V], x_hat[V], weight[V], bias[V];
    channels.template load<CROSSED>(w, weight, bias);
    differentiate<T, V>(p, s, weight, bias, dy, x, dz, x_hat);
#pragma unroll
    for (int j = 0; j < V; ++j) dz[j] = grad_input(dz[j] * weight[j], x_hat[j], s.rstd, c[0], c[1]);
    w.write(p.dx, dz);
  }
}

// A group to a block, whose teams take turns with its channels.
template <class T, int V, bool CROSSED>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_bwd_kernel(const __grid_constant__ GroupBackward<T> p) {
  using A = Acc<T>;
  constexpr int UNIT = CROSSED ? 1 : V;  // of a channel
  Sweep<V, false> w(p.g);
  const Team team(p.team);
  const auto channels = channels_of<T>(p, w.c);
  const GroupStatistics<A> s{p.mean[w.c], p.mean[p.g.C + w.c], p.rstd[w.c]};
  A c[2] = {0, 0};
  int parity = 0;
  for (int64_t first = 0; first < p.of.P; first += team.rows, parity ^= 1) {
    const int64_t i = first + team.row, row = w.c * p.of.P + i;
    const bool inside = i < p.of.P;
    const A weight = inside ? channels.weight_of(i) : 0;
    A sums[2] = {0, 0};
    if (inside) channel_terms<T, UNIT>(p, team, s, weight, channels.bias_of(i), row * p.of.S, 0, p.of.S / UNIT, sums);
    team_sum(sums, team.size, shared<A>() + parity * TEAM_SHARED<2>);
    if (!inside || team.lane > 0) continue;
    for (int k = 0; k < 2; ++k) {
      if (p.partial) p.partial[k * p.rows + row] = sums[k];
      c[k] += weight * sums[k];
    }
  }
  if (!p.dx.data) return;
  exact_block_sum(c, shared<A>() + 2 * TEAM_SHARED<2>);
  group_gradient<T, V, CROSSED>(p, w, channels, s, c);
}

// Shares of channels, one to a team.
template <class T, int V>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_sums_kernel(const __grid_constant__ GroupBackward<T> p) {
  using A = Acc<T>;
  const Team team(p.team);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * team.rows + team.row;
  A sums[2] = {0, 0};
  if (row < p.rows) {
    const int64_t c = row % p.of.C, place = row / p.of.C, channel = place / p.channel_shares * p.of.C + c, m = channel / p.of.P;
    const int64_t begin = place % p.channel_shares * p.share, units = p.of.S / V;
    const GroupChannels<T> all{p.weight, p.bias, 0, p.of.S};
    channel_terms<T, V>(p, team, {p.mean[m], p.mean[p.g.C + m], p.rstd[m]}, all.weight_of(c), all.bias_of(c), channel * p.of.S,
                        begin, begin + p.share < units ? begin + p.share : units, sums);
  }
  team_sum(sums, team.size, shared<A>());
  if (row < p.rows && team.lane == 0)
    for (int k = 0; k < 2; ++k) p.partial[k * p.rows + row] = sums[k];
}

// dx of a share of a group, of whose channels the sums are there: few beside the share's elements.
template <class T, int V, bool CROSSED>
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_grad_kernel(const __grid_constant__ GroupBackward<T> p) {
  using A = Acc<T>;
  Sweep<V, false> w(p.g);
  const auto channels = channels_of<T>(p, w.c);
  const int64_t sample = w.c / (p.of.C / p.of.P);
  A c[2] = {0, 0};
  for (int64_t share = 0; share < p.channel_shares; ++share) {
    const A* const from = p.partial + (sample * p.channel_shares + share) * p.of.C + channels.first;
    for (int64_t i = threadIdx.x; i < p.of.P; i += blockDim.x)
      for (int k = 0; k < 2; ++k) c[k] += channels.weight_of(i) * from[k * p.rows + i];
  }
  exact_block_sum(c, shared<A>());
  group_gradient<T, V, CROSSED>(p, w, channels, {p.mean[w.c], p.mean[p.g.C + w.c], p.rstd[w.c]}, c);
}

}  // namespace fastnorm::cuda
