// The host's side of row.cuh: which kernel, with how many threads.
#pragma once

#include "finish.h"
#include "functions.h"
#include "row.cuh"

namespace fastnorm::cuda {

// Threads of a block of rows that are no longer than a warp.
constexpr int SHORT_THREADS = 128;
// Windows that a thread of a forward holds.
constexpr int FEW = 1, SOME = 4, MANY = 8;
// Windows that a thread of a backward has: 8 elements, or 4 of eight bytes. The registers have room for twice as many; of
// halves, for four times as many where they hold sums alone, of float for three times. What is fused takes some of them, and so
// does a mask.
template <class T, int V>
constexpr int HELD = (sizeof(T) == 8 ? 4 : 8) / V;
template <class T, int V, class P>
constexpr int SUMMED = (sizeof(T) == 2 && !P::FUSED && !P::MASKED ? 4 : 3) * HELD<T, V>;
// Threads that a backward has on a multiprocessor, and those of a block that has some columns of a long row.
constexpr int BACKWARD_THREADS = 512, COLUMN_THREADS = 256;

struct Shape {
  int team, threads;
  int rows() const { return threads / team; }
};

// A team for rows of so many windows, of which a thread has K.
inline Shape shape(int64_t windows, int K) {
  const int64_t threads = K == 0 ? MOST_THREADS : ceil_div(windows, K);
  const int team = static_cast<int>(windows <= WARP ? bit_ceil(windows) : ceil_div(threads, WARP) * WARP);
  return {std::min(team, MOST_THREADS), team <= WARP ? SHORT_THREADS : std::min(team, MOST_THREADS)};
}

template <int V>
bool whole(const RowsInput& in) {
  return aligned(in.data) && in.columns.dense() && multiples(in.rows, V);
}

template <class T, int V>
RowReader<T, V> reader(const RowsInput& in) {
  return {source<T>(in), in.rows, in.columns, whole<V>(in)};
}

// f(V): the elements of a window, as a constant.
template <class T, class F>
Error with_window(int64_t N, bool one_stride, const F& f) {
  return N % WIDE<T> == 0 && one_stride ? f(std::integral_constant<int, WIDE<T>>{}) : f(std::integral_constant<int, 1>{});
}

// ---------------------------------------------------------------- forward

template <class T, int V, int K, class P>
Error forward(const Place& place, P p) {
  const Shape s = shape(p.g.N / V, K);
  p.team = s.team;
  const int64_t blocks = std::min(ceil_div(p.g.M, s.rows()), MOST_BLOCKS);
  return launch(place, &row_fwd_kernel<T, V, K, P>, static_cast<unsigned>(blocks), s.threads,
                TEAM_SHARED<FORWARD_SUMS<P> + 4> * sizeof(Acc<T>), p);
}

template <class T, int V, class P>
Error forward(const Place& place, const P& p) {
  const int64_t windows = p.g.N / V;
  if (V > 1 && windows <= FEW * MOST_THREADS) return forward<T, V, V == 1 ? MANY : FEW>(place, p);
  if (V > 1 && windows <= SOME * MOST_THREADS) return forward<T, V, V == 1 ? MANY : SOME>(place, p);
  if constexpr (V == 1 || !P::FUSED) {
    if (windows <= MANY * MOST_THREADS) return forward<T, V, MANY>(place, p);
  }
  return forward<T, V, 0>(place, p);
}

// ---------------------------------------------------------------- backward

template <class T, int V, int K, Way WAY, class P>
Error backward(const Place& place, P p, int64_t most_programs, Array dweight, Array dbias) {
  using A = Acc<T>;
  const int64_t windows = p.g.N / V;
  Shape s = shape(windows, K);
  if (WAY == Way::given) s = {COLUMN_THREADS, COLUMN_THREADS};
  p.team = s.team;
  const int64_t chunks = WAY == Way::given ? ceil_div(windows, int64_t{K} * s.team) : 1, blocks = chunks * p.g.P;
  if (blocks > MOST_BLOCKS) return "CUDA error: more blocks than a grid has room for";
  if constexpr (P::FUSED) p.chunks = static_cast<unsigned>(chunks);
  const bool sums = dweight.data || dbias.data;
  // Without sums over rows there is nothing to keep from row to row.
  const int64_t wanted = sums ? std::max<int64_t>(most_programs * (BACKWARD_THREADS / s.threads) / blocks, 1) : 65535;
  const int64_t programs = std::min({ceil_div(p.g.M / p.g.P, s.rows()), wanted, int64_t{65535}});
  const int64_t width = p.g.P * p.g.N;
  if (sums) {
    A* const partial = place.take<A>((dweight.data && dbias.data ? 2 : 1) * programs * width);
    if (dweight.data) p.dweight = partial;
    if (dbias.data) p.dbias = dweight.data ? partial + programs * width : partial;
  }
  const size_t shared_values = 2 * TEAM_SHARED<BACKWARD_SUMS<P>> + (s.rows() > 1 ? static_cast<size_t>(s.rows() * p.g.N) : 0);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(programs));
  if (Error e = launch(place, &row_bwd_kernel<T, V, K, WAY, P>, grid, s.threads, shared_values * sizeof(A), p)) return e;
  if (!sums) return nullptr;
  return finish<A>(place, {p.dweight, p.dbias, programs, width, 0, dweight, dbias, {}, nullptr, nullptr, 1});
}

template <class T, int V, class P>
Error backward(const Place& place, P p, Array dweight, Array dbias) {
  constexpr int K = HELD<T, V>;
  const int64_t windows = p.g.N / V, sms = multiprocessors(place.device);
  if (windows <= int64_t{K} * MOST_THREADS) return backward<T, V, K, Way::held>(place, p, sms, dweight, dbias);
  if constexpr (V > 1) {
    if (windows <= int64_t{2} * K * MOST_THREADS) return backward<T, V, 2 * K, Way::held>(place, p, sms, dweight, dbias);
  }
  if constexpr (V > 1 && sizeof(T) < 8) {
    constexpr int LONG = SUMMED<T, V, P>;
    if (windows <= int64_t{LONG} * MOST_THREADS) return backward<T, V, LONG, Way::again>(place, p, sms, dweight, dbias);
  }
  if (p.dx) {
    p.team = MOST_THREADS;
    p.means = place.take<Acc<T>>(2 * p.g.M);
    const int64_t blocks = std::min(p.g.M, MOST_BLOCKS);
    if (Error e = launch(place, &row_means_kernel<T, V, P>, static_cast<unsigned>(blocks), MOST_THREADS,
                         2 * TEAM_SHARED<BACKWARD_SUMS<P>> * sizeof(Acc<T>), p))
      return e;
  }
  return backward<T, V, K, Way::given>(place, p, sms, dweight, dbias);
}

}  // namespace fastnorm::cuda
