// Batch norm and what comes after it, y = act(z + residual), in the two passes of the plain norm.
#include "channel.h"
#include "epilogue.h"
#include "kept.h"

namespace fastnorm::cpu {
namespace {

template <class T, size_t P_>
struct Activated {  // y, from Standardize's constants; a residual is the last input where P has room for it
  static constexpr size_t P = P_, K = 3;
  static constexpr bool TOGETHER = true;
  using V = Vec<T>;
  Epilogue epilogue;

  template <size_t J, class C>
  FN_INLINE std::array<V, J> operator()(const InputGroup<T, P, J>& in, const C& c) const {
    std::array<V, J> z;
    repeat<J>([&](auto j) FN_LAMBDA { z[j] = before_end<T, 0>(in[j], c[j]); });
    activate_all<AMONG_ROWS>(epilogue, z);
    return z;
  }
};
template <class T, size_t P_>
struct ReluActivated : OneByOne<T, ReluActivated<T, P_>> {  // the same, which is too little for several rows of vectors at once
  static constexpr size_t P = P_, K = 3;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, P>& in, const std::array<V, 3>& c) { return relu(before_end<T, 0>(in, c)); }
};
template <class T>
struct ReluNoted : ReluActivated<T, 2> {  // the same, and bits for backward
  using TakesNote = void;
  const T* y;
  uint8_t* kept;
  ReluNoted(const T* y_, uint8_t* kept_) : y(y_), kept(kept_) {}
  template <size_t J>
  FN_INLINE void made(const T* at, const std::array<Vec<T>, J>& v, int64_t count) const {
    put_bits<T, J>(kept + (static_cast<size_t>(at - y) >> 3), v, count);
  }
};

}  // namespace

void channel_fused_fwd(Channels g, const ChannelsInput& x, const ChannelsInput& residual, ConstArray weight, ConstArray bias,
                       Epilogue epilogue, Array running_mean, Array running_var, int64_t* tracked, bool training,
                       double momentum, double eps, Array y, uint8_t* kept, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    T* const out = as<T>(y.data);
    const auto run = [&](const auto& in, const auto& value) {
      forward<T>(g, in, value, weight, bias, running_mean, running_var, tracked, training, momentum, eps, out, as<A>(mean),
                 as<A>(rstd));
    };
    const bool relu = epilogue.activation == Activation::relu;
    if (!residual.data) return relu ? run(Inputs<1>{&x}, ReluActivated<T, 1>{}) : run(Inputs<1>{&x}, Activated<T, 1>{epilogue});
    const Inputs<2> both{&x, &residual};
    if (!relu) return run(both, Activated<T, 2>{epilogue});
    if constexpr (WHOLE_BYTES<T>) {
      bool notes = false;
      if (kept) with_sweep<T, 2>(g, both, [&](const auto& sweep) { notes = sweep.in_eights(); });
      if (notes) return run(both, ReluNoted<T>(out, kept));
    }
    run(both, ReluActivated<T, 2>{});
    if (kept) put_bits(out, g.C * g.count(), kept);
  });
}

}  // namespace fastnorm::cpu
