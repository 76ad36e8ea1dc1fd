// Batch norm's functions of the backend contract: which kernel, over how many shares of the positions.
#include "channel.cuh"

#include "finish.h"
#include "functions.h"

namespace fastnorm::cuda {
namespace {

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

Launched plan(const Channels& g, int V, bool last, size_t itemsize, int sms, bool whole_if_small) {
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

template <class T>
View<const T> view(const Channels& g, const ChannelsInput& in) {
  constexpr int V = WIDE<T>;
  const bool side_by_side = g.last ? in.channel == 1 && multiples(in.positions, V)
                                   : in.space.dense() && in.sample % V == 0 && in.channel % V == 0;
  return {static_cast<const T*>(in.data), in.sample, in.channel, in.space, in.positions, side_by_side && aligned(in.data)};
}

// A dense result.
template <class T>
View<T> view(const Channels& g, Array out) {
  View<T> v{static_cast<T*>(out.data), g.S * g.C, g.last ? 1 : g.S, {}, {}, true};
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
Settled<A> settled(int64_t C, void* mean, void* rstd, double eps) {
  return {static_cast<A*>(mean), nullptr, static_cast<A*>(rstd), {}, {}, nullptr, static_cast<A>(eps), 0, 1, C};
}

// The statistics of all shares, merged.
template <class T, int V, bool LAST>
Error merged_statistics(const Place& place, const Launched& l, ChannelForward<T> p) {
  p.g = l.g;
  p.partial = place.take<Acc<T>>(4 * l.g.P * l.g.C);
  if (Error e = l(place, &channel_stats_kernel<T, V, LAST>, p, sums_bytes<T, V, LAST>())) return e;
  return merge_shares<Acc<T>>(place, {p.partial, l.g.P, l.g.units, l.g.per_share, Sweep<V, LAST>::per_unit(), 0, p.settled});
}

template <class T, int V, bool LAST>
Error applied(const Place& place, const Channels& g, ChannelForward<T> p) {
  const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
  p.g = l.g;
  return l(place, &channel_apply_kernel<T, V, LAST>, p);
}

// Partial sums, or none; then what is made of them.
template <class T, int V, bool LAST>
Error summed(const Place& place, const Channels& g, ChannelBackward<T> p, Array dweight, Array dbias, Acc<T>* c1, Acc<T>* c2) {
  using A = Acc<T>;
  const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
  const int64_t n = l.g.P * l.g.C;
  p.g = l.g;
  p.partial = place.take<A>(2 * n);
  if (Error e = l(place, &channel_sums_kernel<T, V, LAST>, p, sums_bytes<T, V, LAST>())) return e;
  return finish<A>(place, {p.partial, p.partial + n, l.g.P, l.g.C, 0, dweight, dbias, p.weight, c1, c2, p.count});
}

template <class T, int V, bool LAST>
Error derived(const Place& place, const Channels& g, ChannelBackward<T> p) {
  const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
  p.g = l.g;
  return l(place, &channel_grad_kernel<T, V, LAST>, p);
}

// f(type, V, LAST) on the device of the call, for its inputs, of which there may be one.
template <class F>
Error dispatch(const Place& place, const Channels& g, const ChannelsInput& x, const ChannelsInput& dy, const F& f) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return with_unit<T>(g, x.space.rank <= 1 && dy.space.rank <= 1, [&](auto V, auto LAST) { return f(t, V, LAST); });
  });
}

template <class T>
ChannelBackward<T> gradients_of(const Channels& g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight,
                                const void* mean, const void* rstd, Array dx) {
  using A = Acc<T>;
  return {{}, view<T>(g, dy), view<T>(g, x), view<T>(g, dx), weight, static_cast<const A*>(mean), static_cast<const A*>(rstd),
          nullptr, nullptr, nullptr, {}, {}, g.count()};
}

}  // namespace

Error channel_stats(const Place& place, Channels g, const ChannelsInput& x, void* mean, void* deviation) {
  return dispatch(place, g, x, x, [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    ChannelForward<T> p{{}, view<T>(g, x), {}, {}, {}, nullptr, nullptr, nullptr, settled<A>(g.C, mean, nullptr, 0)};
    p.settled.deviation = static_cast<A*>(deviation);
    return merged_statistics<T, V.value, LAST.value>(
        place, plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false), p);
  });
}

Error channel_apply(const Place& place, Channels g, const ChannelsInput& x, const void* mean, const void* rstd,
                    ConstArray weight, ConstArray bias, Array y) {
  return dispatch(place, g, x, x, [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    ChannelForward<T> p{{}, view<T>(g, x), view<T>(g, y), weight, bias, nullptr, nullptr, nullptr, {}};
    p.mean = static_cast<const A*>(mean);
    p.rstd = static_cast<const A*>(rstd);
    return applied<T, V.value, LAST.value>(place, g, p);
  });
}

Error channel_sums(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean,
                   const void* rstd, void* sum_dz, void* sum_dz_x_hat) {
  return dispatch(place, g, x, dy, [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    constexpr DType acc = dtype_of<Acc<T>>();
    return summed<T, V.value, LAST.value>(place, g, gradients_of<T>(g, dy, x, {}, mean, rstd, {}), {sum_dz_x_hat, acc},
                                          {sum_dz, acc}, nullptr, nullptr);
  });
}

Error channel_grad(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean,
                   const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx) {
  return dispatch(place, g, x, dy, [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    auto p = gradients_of<T>(g, dy, x, weight, mean, rstd, dx);
    p.c1 = static_cast<const Acc<T>*>(c1);
    p.c2 = static_cast<const Acc<T>*>(c2);
    return derived<T, V.value, LAST.value>(place, g, p);
  });
}

Error channel_fwd(const Place& place, Channels g, const ChannelsInput& x, ConstArray weight, ConstArray bias,
                  Array running_mean, Array running_var, int64_t* tracked, bool training, double momentum, double eps, Array y,
                  void* mean, void* rstd) {
  return dispatch(place, g, x, x, [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr bool last = LAST.value;
    ChannelForward<T> p{{}, view<T>(g, x), view<T>(g, y), weight, bias, nullptr, nullptr, nullptr, {}};
    p.settled = settled<A>(g.C, mean, rstd, eps);
    p.settled.running_mean = running_mean;
    p.settled.running_var = running_var;
    if (!training) return applied<T, V.value, last>(place, g, p);
    p.settled.tracked = tracked;
    p.settled.momentum = static_cast<A>(momentum);
    p.settled.kept = static_cast<A>(1 - momentum);
    const Launched l = plan(g, V, last, sizeof(T), multiprocessors(place.device), true);
    if (l.whole) {
      p.g = l.g;
      return l(place, &channel_fwd_kernel<T, V.value, last>, p, sums_bytes<T, V.value, last>());
    }
    if (Error e = merged_statistics<T, V.value, last>(place, l, p)) return e;
    p.mean = static_cast<A*>(mean);
    p.rstd = static_cast<A*>(rstd);
    p.settled = {};
    return applied<T, V.value, last>(place, g, p);
  });
}

Error channel_bwd(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight,
                  const void* mean, const void* rstd, bool training, Array dx, Array dweight, Array dbias) {
  return dispatch(place, g, x, dy, [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr bool last = LAST.value;
    auto p = gradients_of<T>(g, dy, x, weight, mean, rstd, dx);
    const bool through_statistics = training && dx.data;
    const Launched l = plan(g, V, last, sizeof(T), multiprocessors(place.device), true);
    if (through_statistics && l.whole) {
      p.g = l.g;
      p.dweight = dweight;
      p.dbias = dbias;
      return l(place, &channel_bwd_kernel<T, V.value, last>, p, sums_bytes<T, V.value, last>());
    }
    if (through_statistics || dweight.data || dbias.data) {
      A* const means = through_statistics ? place.take<A>(2 * g.C) : nullptr;
      A* const other = means ? means + g.C : nullptr;
      if (Error e = summed<T, V.value, last>(place, g, p, dweight, dbias, means, other)) return e;
      p.c1 = means;
      p.c2 = other;
    }
    return dx.data ? derived<T, V.value, last>(place, g, p) : nullptr;
  });
}

}  // namespace fastnorm::cuda
