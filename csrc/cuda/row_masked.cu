// Layer norm's functions of the backend contract for rows of which some columns do not count.
#include "row.h"
#include "row_masked.cuh"

namespace fastnorm::cuda {
namespace {

template <int V>
ColumnMask column_mask(RowMask mask, Rows g) {
  const bool whole = mask.P == g.N && reinterpret_cast<uintptr_t>(mask.data) % V == 0;
  const int64_t columns = g.N / mask.P;
  return {mask.data, g.M / mask.R, columns, mask.P, ~uint64_t{0} / static_cast<uint64_t>(columns), whole};
}

}  // namespace

Error row_masked_fwd(const Place& place, Rows g, RowMask mask, const RowsInput& x, ConstArray weight, ConstArray bias,
                     double eps, Array y, void* mean, void* rstd) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    return with_window<T>(g.N, x.columns.rank == 1, [&](auto window) {
      constexpr int V = window.value;
      const MaskedRowForward<T, V> p{{g, 0, reader<T, V>(x), source<T>(weight), source<T>(bias), static_cast<A>(eps),
                                      {y.data, y.dtype != x.dtype}, static_cast<A*>(mean), static_cast<A*>(rstd)},
                                     column_mask<V>(mask, g)};
      return forward<T, V>(place, p);
    });
  });
}

Error row_masked_bwd(const Place& place, Rows g, RowMask mask, const RowsInput& dy, const RowsInput& x, ConstArray weight,
                     const void* mean, const void* rstd, Array dx, Array dweight, Array dbias) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    return with_window<T>(g.N, x.columns.rank == 1 && dy.columns.rank == 1, [&](auto window) {
      constexpr int V = window.value;
      const MaskedRowBackward<T, V> p{{g, 0, reader<T, V>(dy), reader<T, V>(x), source<T>(weight), static_cast<const A*>(mean),
                                       static_cast<const A*>(rstd), nullptr, static_cast<T*>(dx.data), nullptr, nullptr},
                                      column_mask<V>(mask, g)};
      return backward<T, V>(place, p, dweight, dbias);
    });
  });
}

}  // namespace fastnorm::cuda
