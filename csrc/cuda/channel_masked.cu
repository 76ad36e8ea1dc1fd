// The functions of the backend contract for channels of which some positions do not count.
#include "channel.h"
#include "channel_masked.cuh"

namespace fastnorm::cuda {
namespace {

Mask mask_of(const bool* data, int V) { return {data, reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(V) == 0}; }

}  // namespace

Error channel_masked_stats(const Place& place, Channels g, const ChannelsInput& x, const bool* mask, void* count, void* mean,
                           void* deviation) {
  return dispatch(place, g, x.dtype, one_stride(x), [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
    A* const partial = place.take<A>(5 * l.g.P * l.g.C);
    const MaskedStatistics<T> p{l.g, view<T>(g, x), mask_of(mask, V), partial};
    // One sum more than channel_stats has.
    constexpr size_t bytes = sums_bytes<T, V.value, LAST.value>() / 2 * 3;
    if (Error e = l(place, &channel_masked_stats_kernel<T, V.value, LAST.value>, p, bytes)) return e;
    Settled<A> made = settled<A>(g.C, {}, {}, 0, mean, nullptr);
    made.deviation = static_cast<A*>(deviation);
    made.count = static_cast<A*>(count);
    return merge_shares<A>(place, {partial, l.g.P, l.g.units, l.g.per_share, 0, 0, made, true});
  });
}

Error channel_masked_grad(const Place& place, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const bool* mask,
                          const void* mean, const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx) {
  return dispatch(place, g, x.dtype, one_stride(x, dy), [&](auto* t, auto V, auto LAST) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    const Launched l = plan(g, V, LAST, sizeof(T), multiprocessors(place.device), false);
    MaskedChannelBackward<T> p{gradients_of<T>(g, dy, x, weight, mean, rstd, dx), mask_of(mask, V)};
    p.g = l.g;
    p.c1 = static_cast<const Acc<T>*>(c1);
    p.c2 = static_cast<const Acc<T>*>(c2);
    return l(place, &channel_masked_grad_kernel<T, V.value, LAST.value>, p);
  });
}

}  // namespace fastnorm::cuda
