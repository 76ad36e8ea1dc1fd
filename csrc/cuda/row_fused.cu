// The functions of the backend contract for rows with what surrounds their norm.
#include "row.h"

namespace fastnorm::cuda {
namespace {

bool one_stride(const RowsInput& in) { return !in.data || in.columns.rank == 1; }

template <class T, int V>
FusedRowReader<T, V> fused(const RowsInput& in) {
  return {static_cast<const T*>(in.data), in.rows, in.columns, whole<V>(in)};
}

// As with_window; of two doubles a window of every tensor is more than the registers of sm_120 hold.
template <class T, class F>
Error with_backward_window(int64_t N, bool one_stride, const F& f) {
  if constexpr (sizeof(T) == 8)
    return f(std::integral_constant<int, 1>{});
  else
    return with_window<T>(N, one_stride, f);
}

}  // namespace

Error row_fused_fwd(const Place& place, Rows g, const RowsInput& x, const RowsInput& addend, const RowsInput& residual,
                    ConstArray weight, ConstArray bias, Epilogue epilogue, bool centre, double eps, Array h, Array y,
                    void* mean, void* rstd) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    return with_window<T>(g.N, one_stride(x) && one_stride(addend) && one_stride(residual), [&](auto window) {
      constexpr int V = window.value;
      const FusedRowForward<T, V> p{g, 0, fused<T, V>(x), fused<T, V>(addend), fused<T, V>(residual), source<T>(weight),
                                    source<T>(bias), epilogue.activation, static_cast<A>(epilogue.alpha), static_cast<A>(eps),
                                    centre, static_cast<T*>(h.data), static_cast<T*>(y.data), static_cast<A*>(mean),
                                    static_cast<A*>(rstd)};
      return forward<T, V>(place, p);
    });
  });
}

Error row_fused_bwd(const Place& place, Rows g, const RowsInput& dy, const RowsInput& dh, const RowsInput& x,
                    const RowsInput& residual, ConstArray weight, ConstArray bias, Epilogue epilogue, bool centre,
                    const void* mean, const void* rstd, Array dx, Array dweight, Array dbias, Array dresidual) {
  if (Error e = follow(place.device)) return e;
  return with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const bool windows = one_stride(x) && one_stride(dy) && one_stride(dh) && one_stride(residual);
    return with_backward_window<T>(g.N, windows, [&](auto window) {
      constexpr int V = window.value;
      const bool read = epilogue.activation != Activation::identity;  // what z is made of
      const FusedRowBackward<T, V> p{g, 0, 1, g.M / g.P, fused<T, V>(dy), fused<T, V>(x), fused<T, V>(dh),
                                     fused<T, V>(read ? residual : RowsInput{}), source<T>(weight),
                                     source<T>(read ? bias : ConstArray{}), epilogue.activation,
                                     static_cast<A>(epilogue.alpha), centre, static_cast<const A*>(mean),
                                     static_cast<const A*>(rstd), nullptr, static_cast<T*>(dx.data),
                                     static_cast<T*>(dresidual.data), nullptr, nullptr};
      return backward<T, V>(place, p, dweight, dbias);
    });
  });
}

}  // namespace fastnorm::cuda
