// The functions of the backend contract for layer norm over channels.
#include "finish.h"
#include "functions.h"
#include "position.cuh"

namespace fastnorm::cuda {
namespace {

// What a block reads for its positions, which L1 holds from one pass to the next, as long as a channel's run of it is not
// shorter than a sector of memory; and the longest run that is worth having.
constexpr int64_t POSITION_BYTES = 64 << 10, SECTOR = 32, RUN = 256;
// Channels that a thread has at least, where there are so many.
constexpr int POSITION_CHANNELS = 4;
// Threads that a backward has on a multiprocessor, and the most partial sums of parameters: each thread keeps to fixed shares.
constexpr int POSITION_RESIDENT = 1024;
constexpr int64_t PARTIAL_BYTES = 4 << 20, KEPT_BYTES = 16 << 10;

struct PositionShape {
  Tiles t;
  int threads;
};

// `tensors` are read by a block.
PositionShape shape_of(const Positions& g, int V, int64_t itemsize, int tensors) {
  const int64_t bytes = V * itemsize, run = g.S / V, units = g.B * run;
  int64_t W = std::min<int64_t>(RUN / bytes, WARP);
  while (W * bytes > SECTOR && W * bytes * g.C * tensors > POSITION_BYTES) W /= 2;
  W = std::min<int64_t>(W, std::max(2, bit_ceil(std::min<int64_t>(run, WARP))));
  const int64_t H = bit_ceil(std::min<int64_t>(ceil_div(g.C, POSITION_CHANNELS), POSITION_THREADS));
  const int width = static_cast<int>(W), high = static_cast<int>(std::clamp<int64_t>(H, WARP / W, POSITION_THREADS / W));
  return {{g, width, units, ceil_div(units, W)}, width * high};
}

// f(null pointer to the element type, V) as constants: a unit's elements lie side by side.
template <class F>
Error with_positions(const Place& place, DType dtype, const Positions& g, const F& f) {
  if (Error e = follow(place.device)) return e;
  return with_type(dtype, [&](auto* t) {
    constexpr int V = WIDE<std::remove_pointer_t<decltype(t)>>;
    return g.S % V == 0 ? f(t, std::integral_constant<int, V>{}) : f(t, std::integral_constant<int, 1>{});
  });
}

}  // namespace

Error position_fwd(const Place& place, Positions g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue,
                   double eps, Array y, void* mean, void* rstd) {
  return with_positions(place, x.dtype, g, [&](auto* t, auto unit) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr int V = unit.value;
    const PositionShape s = shape_of(g, V, sizeof(T), 1);
    if (s.t.tiles > MOST_BLOCKS) return "CUDA error: more blocks than a grid has room for";
    const PositionForward<T> p{s.t, static_cast<const T*>(x.data), aligned(x.data), static_cast<T*>(y.data),
                               source<T>(weight), source<T>(bias), epilogue.activation, static_cast<A>(epilogue.alpha),
                               static_cast<A>(eps), static_cast<A*>(mean), static_cast<A*>(rstd)};
    return launch(place, &position_fwd_kernel<T, V>, static_cast<unsigned>(s.t.tiles), s.threads,
                  position_shared(s.t.width, V, s.threads) * sizeof(A), p);
  });
}

Error position_bwd(const Place& place, Positions g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias,
                   Epilogue epilogue, const void* mean, const void* rstd, Array dx, Array dweight, Array dbias) {
  const bool sums = dweight.data || dbias.data;
  if (!dx.data && !sums) return nullptr;
  return with_positions(place, x.dtype, g, [&](auto* t, auto unit) -> Error {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    constexpr int V = unit.value;
    const PositionShape s = shape_of(g, V, sizeof(T), 2);
    const int64_t row = 2 * g.C * static_cast<int64_t>(sizeof(A)), sms = multiprocessors(place.device);
    // Without sums over positions there is nothing to keep from tile to tile.
    const int64_t most = sums ? std::max(std::min(sms * POSITION_RESIDENT / s.threads, PARTIAL_BYTES / row), sms) : MOST_BLOCKS;
    const int64_t share = ceil_div(s.t.tiles, most), P = ceil_div(s.t.tiles, share);
    const int values = position_shared(s.t.width, V, s.threads);
    const bool kept = sums && share > 1 && row <= KEPT_BYTES;
    PositionBackward<T> p{s.t, static_cast<const T*>(dy.data), static_cast<const T*>(x.data), aligned(dy.data),
                          aligned(x.data), static_cast<T*>(dx.data), source<T>(weight), source<T>(bias),
                          epilogue.activation, static_cast<A>(epilogue.alpha), static_cast<const A*>(mean),
                          static_cast<const A*>(rstd), nullptr, P, share, kept ? values : 0};
    if (sums) p.partial = place.take<A>(2 * P * g.C);
    const size_t bytes = values * sizeof(A) + (kept ? row : 0);
    if (Error e = launch(place, &position_bwd_kernel<T, V>, static_cast<unsigned>(P), s.threads, bytes, p)) return e;
    if (!sums) return nullptr;
    return finish<A>(place, {dweight.data ? p.partial : nullptr, dbias.data ? p.partial + P * g.C : nullptr, P, g.C, 0, dweight,
                             dbias, {}, nullptr, nullptr, 1});
  });
}

}  // namespace fastnorm::cuda
