// Batch norm and what comes after it, y = act(z + residual), in the two passes of the plain norm.
#include "channel.h"
#include "epilogue.h"

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
    activate_all(epilogue, z);
    return z;
  }
};
template <class T, size_t P_>
struct ReluActivated : OneByOne<T, ReluActivated<T, P_>> {  // the same, which is too little for several rows of vectors at once
  static constexpr size_t P = P_, K = 3;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, P>& in, const std::array<V, 3>& c) {
    return activate(Activation::relu, before_end<T, 0>(in, c), V(0));
  }
};

}  // namespace

void channel_fused_fwd(Channels g, const ChannelsInput& x, const ChannelsInput& residual, ConstArray weight, ConstArray bias,
                       Epilogue epilogue, Array running_mean, Array running_var, int64_t* tracked, bool training,
                       double momentum, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto run = [&](const auto& in, const auto& value) {
      forward<T>(g, in, value, weight, bias, running_mean, running_var, tracked, training, momentum, eps, as<T>(y.data),
                 as<A>(mean), as<A>(rstd));
    };
    const bool relu = epilogue.activation == Activation::relu;
    constexpr bool BY_ROWS = sizeof(T) > 2;  // 4 % slower with a residual of 16 bits
    if (residual.data && relu && BY_ROWS)
      run(Inputs<2>{&x, &residual}, ReluActivated<T, 2>{});
    else if (residual.data)
      run(Inputs<2>{&x, &residual}, Activated<T, 2>{epilogue});
    else if (relu)
      run(Inputs<1>{&x}, ReluActivated<T, 1>{});
    else
      run(Inputs<1>{&x}, Activated<T, 1>{epilogue});
  });
}

}  // namespace fastnorm::cpu
