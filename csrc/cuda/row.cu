// Layer norm's functions of the backend contract.
#include "row.h"

namespace fastnorm::cuda {

Error row_fwd(const Place& place, Rows g, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y,
              void* mean, void* rstd) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    return with_window<T>(g.N, x.columns.rank == 1, [&](auto window) {
      constexpr int V = window.value;
      const RowForward<T, V> p{g, 0, reader<T, V>(x), source<T>(weight), source<T>(bias), static_cast<A>(eps),
                               {y.data, y.dtype != x.dtype}, static_cast<A*>(mean), static_cast<A*>(rstd)};
      return forward<T, V>(place, p);
    });
  });
}

Error row_bwd(const Place& place, Rows g, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean,
              const void* rstd, Array dx, Array dweight, Array dbias) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    return with_window<T>(g.N, x.columns.rank == 1 && dy.columns.rank == 1, [&](auto window) {
      constexpr int V = window.value;
      const RowBackward<T, V> p{g, 0, reader<T, V>(dy), reader<T, V>(x), source<T>(weight), static_cast<const A*>(mean),
                                static_cast<const A*>(rstd), nullptr, static_cast<T*>(dx.data), nullptr, nullptr};
      return backward<T, V>(place, p, dweight, dbias);
    });
  });
}

}  // namespace fastnorm::cuda
