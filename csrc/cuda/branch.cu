// The functions of the backend contract for a branch onto a stream.
#include "branch.cuh"
#include "finish.h"
#include "functions.h"

namespace fastnorm::cuda {
namespace {

// Blocks that a multiprocessor is given, and the fewest rows of a thread that are worth a partial row of their own.
constexpr int BRANCH_BLOCKS = 8, BRANCH_ROWS = 4;

template <class T>
constexpr int WHOLE_UNIT = UNIT<WIDE<T>>;

Division division(int64_t step, int64_t by) { return {by, step / by, step % by}; }

template <class T>
Target target(Array a) {
  return {a.data, a.dtype != dtype_of<T>()};
}

template <class A>
Drop<A> drop_of(const Dropout& d) {
  return {d.seed, d.least, static_cast<A>(d.scale)};
}

template <class... P>
bool all_aligned(P... pointers) {
  return (... && aligned(pointers));
}

// Units that lie in one row, as far as there are scales, and begin at multiples of 16 bytes.
template <class T>
bool whole_units(const Rows& g, const void* row_scale, const void* column_scale) {
  constexpr int U = WHOLE_UNIT<T>;
  return g.M * g.N % U == 0 && (!row_scale || g.M / g.P * g.N % U == 0) && (!column_scale || g.N % U == 0);
}

template <class T, int V>
Error apply(const Place& place, const Rows& g, BranchApply<T> p) {
  const int64_t blocks = std::min<int64_t>(ceil_div(p.n, UNIT<V> * BRANCH_THREADS),
                                           int64_t{multiprocessors(place.device)} * BRANCH_BLOCKS);
  p.step = blocks * BRANCH_THREADS * UNIT<V>;
  p.parts = division(p.step, g.M / g.P * g.N);
  p.columns = division(p.step, g.N);
  return launch(place, &branch_apply_kernel<T, V>, static_cast<unsigned>(blocks), BRANCH_THREADS, 0, p);
}

// out = addend + in * factor
template <class T>
Error apply(const Place& place, const Rows& g, ConstArray in, ConstArray addend, const void* row_scale,
            const void* column_scale, const Dropout& dropout, Array out) {
  using A = Acc<T>;
  const BranchApply<T> p{g.M * g.N, 0, {}, {}, source<T>(in), source<T>(addend), target<T>(out),
                         static_cast<const A*>(row_scale), static_cast<const A*>(column_scale), drop_of<A>(dropout)};
  const bool whole = whole_units<T>(g, row_scale, column_scale) && all_aligned(in.data, addend.data, column_scale, out.data);
  return whole ? apply<T, WHOLE_UNIT<T>>(place, g, p) : apply<T, 1>(place, g, p);
}

template <class T, int V>
Error summed(const Place& place, const Rows& g, BranchBackward<T> p, Array dcolumn_scale) {
  using A = Acc<T>;
  constexpr int U = UNIT<V>;
  p.width = std::min(WARP, bit_ceil(ceil_div(g.N, U)));
  p.chunks = ceil_div(g.N, p.width * U);
  const int64_t H = BRANCH_THREADS / p.width, wanted = int64_t{multiprocessors(place.device)} * BRANCH_BLOCKS / p.chunks;
  p.share = ceil_div(g.M, std::max<int64_t>(1, std::min(wanted, ceil_div(g.M, BRANCH_ROWS * H))));
  const int64_t P = ceil_div(g.M, p.share);
  if (P * p.chunks > MOST_BLOCKS) return "CUDA error: more blocks than a grid has room for";
  p.parts = division(H, g.M / g.P);
  p.partial = place.take<A>(P * g.N);
  if (Error e = launch(place, &branch_bwd_kernel<T, V>, static_cast<unsigned>(P * p.chunks), BRANCH_THREADS,
                       BRANCH_THREADS * U * sizeof(A), p))
    return e;
  return finish<A>(place, {p.partial, nullptr, P, g.N, 0, dcolumn_scale, {}, {}, nullptr, nullptr, 1});
}

}  // namespace

Error branch_fwd(const Place& place, Rows g, ConstArray x, ConstArray addend, const void* row_scale, const void* column_scale,
                 Dropout dropout, Array h) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    return apply<std::remove_pointer_t<decltype(t)>>(place, g, x, addend, row_scale, column_scale, dropout, h);
  });
}

Error branch_bwd(const Place& place, Rows g, ConstArray dh, ConstArray x, const void* row_scale, const void* column_scale,
                 Dropout dropout, Array dx, Array dcolumn_scale) {
  if (!dx.data && !dcolumn_scale.data) return nullptr;
  if (Error e = follow(place.device)) return e;
  return with_type(dx.data ? dx.dtype : x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    if (!dcolumn_scale.data) return apply<T>(place, g, dh, {}, row_scale, column_scale, dropout, dx);
    const BranchBackward<T> p{g.M, g.N, 0, 0, 0, {}, source<T>(dh), source<T>(x), target<T>(dx),
                              static_cast<const A*>(row_scale), static_cast<const A*>(column_scale), drop_of<A>(dropout),
                              nullptr};
    const bool whole = g.N % WHOLE_UNIT<T> == 0 && all_aligned(dh.data, x.data, column_scale, dx.data);
    return whole ? summed<T, WHOLE_UNIT<T>>(place, g, p, dcolumn_scale) : summed<T, 1>(place, g, p, dcolumn_scale);
  });
}

}  // namespace fastnorm::cuda
