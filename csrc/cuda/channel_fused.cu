// The functions of the backend contract for channels with what surrounds their norm.
#include "channel.h"

namespace fastnorm::cuda {
namespace {

// A result, read.
ChannelsInput as_input(const Channels& g, Array dense) {
  ChannelsInput in;
  static_cast<ConstArray&>(in) = dense;
  in.sample = g.S * g.C;
  in.channel = g.last ? 1 : g.S;
  in.space.push(g.S, g.last ? g.C : 1);
  in.positions.push(g.B, g.S * g.C);
  in.positions.push(g.S, g.last ? g.C : 1);
  return in;
}

}  // namespace

Error channel_fused_fwd(const Place& place, Channels g, const ChannelsInput& x, const ChannelsInput& residual,
                        ConstArray weight, ConstArray bias, Epilogue epilogue, Array running_mean, Array running_var,
                        int64_t* tracked, bool training, double momentum, double eps, Array y, uint8_t*, void* mean,
                        void* rstd) {
  return dispatch(place, g, x.dtype, one_stride(x, residual), [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr bool last = LAST.value;
    FusedChannelForward<T> p{{{}, view<T, true>(g, x), view<T, true>(g, y), weight, bias, nullptr, nullptr, nullptr, {}},
                             view<T, true>(g, residual), epilogue.activation, static_cast<A>(epilogue.alpha)};
    p.settled = settled<A>(g.C, running_mean, running_var, eps, mean, rstd);
    if (!training) return applied<T, V.value, last>(place, g, p);
    const Launched l = plan(g, V, last, sizeof(T), multiprocessors(place.device), true);
    if (l.whole) {
      p.g = l.g;
      p.settled = trained(p.settled, tracked, momentum);
      return l(place, &channel_fwd_kernel<T, V.value, last, true>, p, sums_bytes<T, V.value, last>());
    }
    if (Error e = channel_settle(place, g, x, running_mean, running_var, tracked, momentum, eps, mean, rstd)) return e;
    p.mean = static_cast<A*>(mean);
    p.rstd = static_cast<A*>(rstd);
    p.settled = {};
    return applied<T, V.value, last>(place, g, p);
  });
}

Error channel_fused_bwd(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x,
                        const ChannelsInput& residual, const uint8_t*, ConstArray weight, ConstArray bias,
                        Epilogue epilogue, const void* mean, const void* rstd, bool training, Array dx, Array dweight,
                        Array dbias, Array dresidual) {
  return dispatch(place, g, x.dtype, one_stride(x, dy, residual), [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr bool last = LAST.value;
    const auto& added = epilogue.activation == Activation::identity ? ChannelsInput{} : residual;
    FusedChannelBackward<T> p{gradients_of<T, true>(g, dy, x, weight, mean, rstd, dx), bias, view<T, true>(g, added),
                              view<T, true>(g, dresidual), epilogue.activation, static_cast<A>(epilogue.alpha)};
    const bool through_statistics = training && dx.data;
    const Launched l = plan(g, V, last, sizeof(T), multiprocessors(place.device), true);
    if (through_statistics && l.whole) {
      p.g = l.g;
      p.dweight = dweight;
      p.dbias = dbias;
      return l(place, &channel_bwd_kernel<T, V.value, last, true>, p, sums_bytes<T, V.value, last>());
    }
    if (!through_statistics && !dweight.data && !dbias.data)
      return dx.data || dresidual.data ? derived<T, V.value, last>(place, g, p) : nullptr;
    A* const means = through_statistics ? place.take<A>(2 * g.C) : nullptr;
    A* const other = means ? means + g.C : nullptr;
    if (Error e = summed<T, V.value, last>(place, g, p, dweight, dbias, means, other)) return e;
    if (!dx.data) return nullptr;
    // One tensor less to read, and no slope: the sums have left dz there.
    if (dresidual.data) return channel_grad(place, g, as_input(g, dresidual), x, mean, rstd, weight, means, other, dx);
    p.c1 = means;
    p.c2 = other;
    return derived<T, V.value, last>(place, g, p);
  });
}

}  // namespace fastnorm::cuda
