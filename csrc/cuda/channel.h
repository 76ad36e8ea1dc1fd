// The host's side of channel.cuh: which kernel, over how many shares of the positions.
#pragma once

#include "channel.cuh"
#include "finish.h"
#include "functions.h"

namespace fastnorm::cuda {

// Blocks that a multiprocessor is given, and the fewest units of a thread that are worth a share of their own.
constexpr int BLOCKS = 8, UNITS = 4;
// A block has all positions of its channels, and training is one launch, where a thread has no more units than FEW_UNITS, or
// where there are channels for every multiprocessor and L1 holds a channel until it is read again.
constexpr int FEW_UNITS = 8, L1_BYTES = 96 << 10;

struct Launched {
  Shares g;
  int64_t blocks;
  bool whole;  // one share

  template <class P>
  Error operator()(const Place& place, void (*kernel)(P), const P& p, size_t shared_bytes = 0) const {
    if (blocks > MOST_BLOCKS) return "CUDA error: more blocks than a grid has room for";
    return launch(place, kernel, static_cast<unsigned>(blocks), CHANNEL_THREADS, shared_bytes, p);
  }
};

inline Launched plan(const Channels& g, int V, bool last, size_t itemsize, int sms, bool whole_if_small) {
  Shares s{g.B, g.C, g.S, 1, 0, 0, 1};
  s.units = last ? g.count() : g.B * (g.S / V);
  if (last) s.width = std::min(WARP, bit_ceil(g.C / V));
  const int64_t step = last ? CHANNEL_THREADS / s.width : CHANNEL_THREADS;
  const int64_t side_by_side = last ? ceil_div(g.C / V, s.width) : g.C;
  const int64_t slab = g.count() * (last ? s.width * V : 1) * static_cast<int64_t>(itemsize);
  const bool small = s.units <= FEW_UNITS * step || (side_by_side >= sms && slab <= L1_BYTES);
  if (!(whole_if_small && small))
    s.P = std::max<int64_t>(1, std::min(ceil_div(int64_t{sms} * BLOCKS, side_by_side), ceil_div(s.units, UNITS * step)));
  s.per_share = ceil_div(s.units, s.P);
  s.P = ceil_div(s.units, s.per_share);
  return {s, side_by_side * s.P, s.P == 1};
}

// f(V, whether channels lie side by side) as constants: the elements of a unit, in the order of the result's memory.
template <class T, class F>
Error with_unit(const Channels& g, bool one_stride, const F& f) {
  using Wide = std::integral_constant<int, WIDE<T>>;
  using One = std::integral_constant<int, 1>;
  if (g.last) return g.C % WIDE<T> == 0 ? f(Wide{}, std::true_type{}) : f(One{}, std::true_type{});
  return g.S % WIDE<T> == 0 && one_stride ? f(Wide{}, std::false_type{}) : f(One{}, std::false_type{});
}

template <class T, bool CALLED = false>
View<const T, CALLED> view(const Channels& g, const ChannelsInput& in) {
  constexpr int V = WIDE<T>;
  const bool side_by_side = g.last ? in.channel == 1 && multiples(in.positions, V)
                                   : in.space.dense() && in.sample % V == 0 && in.channel % V == 0;
  return {static_cast<const T*>(in.data), in.sample, in.channel, in.space, in.positions, side_by_side && aligned(in.data)};
}

// A dense result.
template <class T, bool CALLED = false>
View<T, CALLED> view(const Channels& g, Array out) {
  View<T, CALLED> v{static_cast<T*>(out.data), g.S * g.C, g.last ? 1 : g.S, {}, {}, true};
  v.positions.push(g.B, g.S * g.C);
  v.positions.push(g.S, g.last ? g.C : 1);
  return v;
}

// Of the sums of a block.
template <class T, int V, bool LAST>
constexpr size_t sums_bytes() {
  return sizeof(Acc<T>) * (LAST ? 2 * CHANNEL_THREADS * V : 2 * TEAM_SHARED<2>);
}

template <class A>
Settled<A> settled(int64_t C, Array running_mean, Array running_var, double eps, void* mean, void* rstd) {
  return {static_cast<A*>(mean), nullptr, static_cast<A*>(rstd), running_mean, running_var, nullptr, static_cast<A>(eps), 0, 1,
          C};
}

// What training adds to it.
template <class A>
Settled<A> trained(Settled<A> s, int64_t* tracked, double momentum) {
  s.tracked = tracked;
  s.momentum = static_cast<A>(momentum);
  s.kept = static_cast<A>(1 - momentum);
  return s;
}

template <class T, int V, bool LAST, class P>
Error applied(const Place& place, const Channels& g, P p) {
  const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
  p.g = l.g;
  return l(place, &channel_apply_kernel<T, V, LAST, P::FUSED>, p);
}

// Partial sums, or none; then what is made of them.
template <class T, int V, bool LAST, class P>
Error summed(const Place& place, const Channels& g, P p, Array dweight, Array dbias, Acc<T>* c1, Acc<T>* c2) {
  using A = Acc<T>;
  const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
  const int64_t n = l.g.P * l.g.C;
  p.g = l.g;
  p.partial = place.take<A>(2 * n);
  if (Error e = l(place, &channel_sums_kernel<T, V, LAST, P::FUSED>, p, sums_bytes<T, V, LAST>())) return e;
  return finish<A>(place, {p.partial, p.partial + n, l.g.P, l.g.C, 0, dweight, dbias, p.weight, c1, c2, p.count});
}

template <class T, int V, bool LAST, class P>
Error derived(const Place& place, const Channels& g, P p) {
  const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
  p.g = l.g;
  return l(place, &channel_grad_kernel<T, V, LAST, P::FUSED>, p);
}

template <class... Inputs>
bool one_stride(const Inputs&... in) {
  return (... && (in.space.rank <= 1));
}

// f(type, V, LAST) on the device of the call.
template <class F>
Error dispatch(const Place& place, const Channels& g, DType dtype, bool one_stride, const F& f) {
  if (Error e = follow(place.device)) return e;
  return with_type(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return with_unit<T>(g, one_stride, [&](auto V, auto LAST) { return f(t, V, LAST); });
  });
}

template <class T, bool CALLED = false>
ChannelBackward<T, CALLED> gradients_of(const Channels& g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight,
                                const void* mean, const void* rstd, Array dx) {
  using A = Acc<T>;
  return {{}, view<T, CALLED>(g, dy), view<T, CALLED>(g, x), view<T, CALLED>(g, dx), weight, static_cast<const A*>(mean),
          static_cast<const A*>(rstd), nullptr, nullptr, nullptr, {}, {}, g.count()};
}

// Of channel.cu: the statistics of training in launches of their own, and all that is made of them.
Error channel_settle(const Place& place, const Channels& g, const ChannelsInput& x, Array running_mean, Array running_var,
                     int64_t* tracked, double momentum, double eps, void* mean, void* rstd);

}  // namespace fastnorm::cuda
