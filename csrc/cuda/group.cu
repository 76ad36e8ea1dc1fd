// The functions of the backend contract for groups of channels.
#include "channel.h"
#include "group.cuh"

namespace fastnorm::cuda {
namespace {

// A block has a whole group of up to so many bytes, which L1 holds from one sweep to the next; of larger ones it has a share.
constexpr int64_t GROUP_BYTES = 64 << 10, SHARE_BYTES = 32 << 10;
// Units of a thread for which a block of more threads is not worth its barriers.
constexpr int GROUP_UNITS = 2;

int group_threads(int64_t units) {
  return static_cast<int>(std::min<int64_t>(ceil_div(units, GROUP_UNITS * WARP) * WARP, GROUP_THREADS));
}

// Threads that add up a channel of so many units, where a block has so many channels.
int channel_team(int64_t units, int64_t channels, int threads) {
  return units <= WARP ? bit_ceil(units) : channels * WARP >= threads ? WARP : threads;
}

bool whole_group(const Groups& g, size_t itemsize) { return g.count() * static_cast<int64_t>(itemsize) <= GROUP_BYTES; }

// What a sweep has shares of.
template <class T, int V, bool CROSSED>
Shares shares_of(const Groups& g, bool whole) {
  Shares s{CROSSED ? 1 : g.P, g.M(), CROSSED ? g.count() : g.S, 1, 0, g.count() / V, 1};
  if (!whole) s.P = ceil_div(g.count() * static_cast<int64_t>(sizeof(T)), SHARE_BYTES);
  s.per_share = ceil_div(s.units, s.P);
  s.P = ceil_div(s.units, s.per_share);
  return s;
}

template <class T>
View<T, true> view(const Groups& g, const void* data) {
  View<T, true> v{static_cast<T*>(const_cast<void*>(data)), g.S, g.count(), {}, {}, aligned(data)};
  v.space.push(g.count(), 1);
  return v;
}

template <class P>
Error start(const Place& place, void (*kernel)(P), int64_t blocks, int threads, size_t shared_bytes, const P& p) {
  if (blocks > MOST_BLOCKS) return "CUDA error: more blocks than a grid has room for";
  return launch(place, kernel, static_cast<unsigned>(blocks), threads, shared_bytes, p);
}

// f(null pointer to the element type, V, whether units are CROSSED) as constants.
template <class F>
Error with_units(const Place& place, DType dtype, const Groups& g, const F& f) {
  if (Error e = follow(place.device)) return e;
  return with_type(dtype, [&](auto* t) {
    constexpr int V = WIDE<std::remove_pointer_t<decltype(t)>>;
    if (g.S % V == 0) return f(t, std::integral_constant<int, V>{}, std::false_type{});
    if (g.count() % V == 0) return f(t, std::integral_constant<int, V>{}, std::true_type{});
    return f(t, std::integral_constant<int, 1>{}, std::false_type{});
  });
}

}  // namespace

Error group_fwd(const Place& place, Groups g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps,
                Array y, void* mean, void* rstd) {
  return with_units(place, x.dtype, g, [&](auto* t, auto unit, auto crossed) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr int V = unit.value;
    constexpr bool CROSSED = crossed.value;
    const bool whole = whole_group(g, sizeof(T));
    const Shares s = shares_of<T, V, CROSSED>(g, whole);
    const auto made = settled<A>(g.M(), {}, {}, eps, mean, rstd);
    const GroupForward<T> p{s, g, view<const T>(g, x.data), view<T>(g, y.data), source<T>(weight), source<T>(bias),
                            epilogue.activation, static_cast<A>(epilogue.alpha), made.mean, made.rstd, made};
    constexpr size_t bytes = sums_bytes<T, V, false>();
    if (whole) return start(place, &group_fwd_kernel<T, V, CROSSED>, s.C, group_threads(s.units), bytes, p);
    ChannelForward<T> statistics{};
    statistics.g = s;
    statistics.x = {p.x.data, p.x.sample, p.x.channel, p.x.space, p.x.positions, p.x.whole};
    statistics.partial = place.take<A>(4 * s.P * s.C);
    if (Error e = start(place, &channel_stats_kernel<T, V, false>, s.C * s.P, CHANNEL_THREADS, bytes, statistics)) return e;
    if (Error e = merge_shares<A>(place, {statistics.partial, s.P, s.units, s.per_share, V, 0, made})) return e;
    return start(place, &group_apply_kernel<T, V, CROSSED>, s.C * s.P, GROUP_THREADS, 0, p);
  });
}

Error group_bwd(const Place& place, Groups g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias,
                Epilogue epilogue, const void* mean, const void* rstd, Array dx, Array dweight, Array dbias) {
  const bool sums = dweight.data || dbias.data;
  if (!dx.data && !sums) return nullptr;
  return with_units(place, x.dtype, g, [&](auto* t, auto unit, auto crossed) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr int V = unit.value;
    constexpr bool CROSSED = crossed.value;
    constexpr int UNIT = CROSSED ? 1 : V;  // of a channel
    const bool whole = whole_group(g, sizeof(T));
    const Shares s = shares_of<T, V, CROSSED>(g, whole);
    const int64_t units = g.S / UNIT, parts = whole ? 1 : ceil_div(g.S * static_cast<int64_t>(sizeof(T)), SHARE_BYTES);
    const int64_t per_part = ceil_div(units, parts), channel_shares = ceil_div(units, per_part);
    const int threads = whole ? group_threads(s.units) : GROUP_THREADS;
    GroupBackward<T> p{s, g, channel_team(per_part, whole ? g.P : g.C, threads), view<const T>(g, dy.data),
                       view<const T>(g, x.data), view<T>(g, dx.data), source<T>(weight), source<T>(bias), epilogue.activation,
                       static_cast<A>(epilogue.alpha), static_cast<const A*>(mean), static_cast<const A*>(rstd), nullptr,
                       g.B * channel_shares * g.C, channel_shares, per_part};
    if (sums || !whole) p.partial = place.take<A>(2 * p.rows);
    constexpr size_t bytes = (2 * TEAM_SHARED<2> + TEAM_SHARED<4>) * sizeof(A);
    if (Error e = whole ? start(place, &group_bwd_kernel<T, V, CROSSED>, s.C, threads, bytes, p)
                        : start(place, &group_sums_kernel<T, UNIT>, ceil_div(p.rows, threads / p.team), threads, bytes, p))
      return e;
    if (sums) {
      const Finish<A> f{dweight.data ? p.partial : nullptr, dbias.data ? p.partial + p.rows : nullptr, g.B * channel_shares,
                        g.C, 0, dweight, dbias, {}, nullptr, nullptr, 1};
      if (Error e = finish<A>(place, f)) return e;
    }
    if (whole || !dx.data) return nullptr;
    return start(place, &group_grad_kernel<T, V, CROSSED>, s.C * s.P, threads, TEAM_SHARED<4> * sizeof(A), p);
  });
}

}  // namespace fastnorm::cuda
