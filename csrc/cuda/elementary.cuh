// What the activations are made of, for float and double, and which of them it is, as a constant.
#pragma once

#include <cmath>
#include <type_traits>

#include "values.cuh"

namespace fastnorm {

template <class V>
struct Elementary {
  static FN_HD V exp(V z) { return std::exp(z); }
  static FN_HD V expm1(V z) { return std::expm1(z); }
  static FN_HD V tanh(V z) { return std::tanh(z); }
  static FN_HD V sigmoid(V z) { return V(1) / (V(1) + std::exp(-z)); }
  static FN_HD SigmoidAndRest<V> sigmoid_and_rest(V z) {
    const V s = sigmoid(z);
    return {s, V(1) - s};
  }
  static FN_HD V cdf(V z) { return V(0.5) * (V(1) + std::erf(V(0.70710678118654752) * z)); }
  static FN_HD V gelu_slope(V z) { return cdf(z) + z * (V(0.39894228040143268) * std::exp(V(-0.5) * (z * z))); }
  static FN_HD V at_most_zero(V z, V yes, V no) { return z <= V(0) ? yes : no; }
};

namespace cuda {

// f(constant): one branch for all elements that f goes through.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  using A = Activation;
  switch (activation) {
    case A::relu:
      return f(std::integral_constant<A, A::relu>{});
    case A::leaky_relu:
      return f(std::integral_constant<A, A::leaky_relu>{});
    case A::silu:
      return f(std::integral_constant<A, A::silu>{});
    case A::gelu:
      return f(std::integral_constant<A, A::gelu>{});
    case A::gelu_tanh:
      return f(std::integral_constant<A, A::gelu_tanh>{});
    case A::sigmoid:
      return f(std::integral_constant<A, A::sigmoid>{});
    case A::tanh:
      return f(std::integral_constant<A, A::tanh>{});
    case A::elu:
      return f(std::integral_constant<A, A::elu>{});
    default:
      return f(std::integral_constant<A, A::identity>{});
  }
}

template <Activation activation, class V, int n>
__device__ __forceinline__ void activate_all(std::integral_constant<Activation, activation>, V (&z)[n], V alpha) {
#pragma unroll
  for (int j = 0; j < n; ++j) z[j] = activate(activation, z[j], alpha);
}
template <Activation activation, class V, int n>
__device__ __forceinline__ void times_slope(std::integral_constant<Activation, activation>, V (&dy)[n], const V (&z)[n],
                                            V alpha) {
#pragma unroll
  for (int j = 0; j < n; ++j) dy[j] *= slope(activation, z[j], alpha);
}

}  // namespace cuda
}  // namespace fastnorm
