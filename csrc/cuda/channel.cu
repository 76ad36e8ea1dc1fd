// Batch norm's functions of the backend contract.
#include "channel.h"

namespace fastnorm::cuda {
namespace {

// The statistics of all shares, merged.
template <class T, int V, bool LAST>
Error merged_statistics(const Place& place, const Launched& l, ChannelForward<T> p) {
  p.g = l.g;
  p.partial = place.take<Acc<T>>(4 * l.g.P * l.g.C);
  if (Error e = l(place, &channel_stats_kernel<T, V, LAST>, p, sums_bytes<T, V, LAST>())) return e;
  return merge_shares<Acc<T>>(place, {p.partial, l.g.P, l.g.units, l.g.per_share, Sweep<V, LAST>::per_unit(), 0, p.settled});
}

}  // namespace

Error channel_stats(const Place& place, Channels g, const ChannelsInput& x, void* mean, void* deviation) {
  return dispatch(place, g, x.dtype, one_stride(x), [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    ChannelForward<T> p{{}, view<T>(g, x), {}, {}, {}, nullptr, nullptr, nullptr, settled<A>(g.C, {}, {}, 0, mean, nullptr)};
    p.settled.deviation = static_cast<A*>(deviation);
    return merged_statistics<T, V.value, LAST.value>(
        place, plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false), p);
  });
}

Error channel_apply(const Place& place, Channels g, const ChannelsInput& x, const void* mean, const void* rstd,
                    ConstArray weight, ConstArray bias, Array y) {
  return dispatch(place, g, x.dtype, one_stride(x), [&](auto* t, auto V, auto LAST) {
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
  return dispatch(place, g, x.dtype, one_stride(x, dy), [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    constexpr DType acc = dtype_of<Acc<T>>();
    return summed<T, V.value, LAST.value>(place, g, gradients_of<T>(g, dy, x, {}, mean, rstd, {}), {sum_dz_x_hat, acc},
                                          {sum_dz, acc}, nullptr, nullptr);
  });
}

Error channel_grad(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean,
                   const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx) {
  return dispatch(place, g, x.dtype, one_stride(x, dy), [&](auto* t, auto V, auto LAST) {
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
  return dispatch(place, g, x.dtype, one_stride(x), [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr bool last = LAST.value;
    ChannelForward<T> p{{}, view<T>(g, x), view<T>(g, y), weight, bias, nullptr, nullptr, nullptr, {}};
    p.settled = settled<A>(g.C, running_mean, running_var, eps, mean, rstd);
    if (!training) return applied<T, V.value, last>(place, g, p);
    p.settled = trained(p.settled, tracked, momentum);
    const Launched l = plan(g, V, last, sizeof(T), multiprocessors(place.device), true);
    if (l.whole) {
      p.g = l.g;
      return l(place, &channel_fwd_kernel<T, V.value, last, false>, p, sums_bytes<T, V.value, last>());
    }
    if (Error e = merged_statistics<T, V.value, last>(place, l, p)) return e;
    p.mean = static_cast<A*>(mean);
    p.rstd = static_cast<A*>(rstd);
    p.settled = {};
    return applied<T, V.value, last>(place, g, p);
  });
}

Error channel_settle(const Place& place, const Channels& g, const ChannelsInput& x, Array running_mean, Array running_var,
                     int64_t* tracked, double momentum, double eps, void* mean, void* rstd) {
  return dispatch(place, g, x.dtype, one_stride(x), [&](auto* t, auto V, auto LAST) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    ChannelForward<T> p{{}, view<T>(g, x), {}, {}, {}, nullptr, nullptr, nullptr, {}};
    p.settled = trained(settled<A>(g.C, running_mean, running_var, eps, mean, rstd), tracked, momentum);
    return merged_statistics<T, V.value, LAST.value>(
        place, plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false), p);
  });
}

Error channel_bwd(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight,
                  const void* mean, const void* rstd, bool training, Array dx, Array dweight, Array dbias) {
  return dispatch(place, g, x.dtype, one_stride(x, dy), [&](auto* t, auto V, auto LAST) -> Error {
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
      return l(place, &channel_bwd_kernel<T, V.value, last, false>, p, sums_bytes<T, V.value, last>());
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
