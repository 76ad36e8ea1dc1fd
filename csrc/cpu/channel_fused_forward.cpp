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
    repeat<J>([&](auto j) FN_LAMBDA {
      z[j] = Standardize<T>::value({in[j][0]}, c[j]);
      if constexpr (P == 2) z[j] = z[j] + in[j][1];
    });
    activate_all(epilogue, z);
    return z;
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
    if (residual.data)
      run(Inputs<2>{&x, &residual}, Activated<T, 2>{epilogue});
    else
      run(Inputs<1>{&x}, Activated<T, 1>{epilogue});
  });
}

}  // namespace fastnorm::cpu
