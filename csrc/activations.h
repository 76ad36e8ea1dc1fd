// What a norm can end in: y = act(z + residual). Same names as fastnorm/activations.py; templated on the value type V as
// norm_math.h is. `Elementary<V>` has the functions that every kind of V brings along: cpu/elementary.h, cuda/elementary.cuh.
#pragma once

#include "norm_math.h"

namespace fastnorm {

enum class Activation : int8_t { identity, relu, leaky_relu, silu, gelu, gelu_tanh, sigmoid, tanh, elu };

struct Epilogue {
  Activation activation = Activation::identity;
  double alpha = 0;
};

// at_most_zero(z, yes, no): yes where z <= 0, else (for NaN, too) no. sigmoid, tanh, exp, expm1. sigmoid_and_rest: that and
// 1 - it. cdf: of the standard normal distribution; gelu_slope: cdf(z) + z * pdf(z).
template <class V>
struct Elementary;
template <class V>
struct SigmoidAndRest {
  V sigmoid, rest;
};

// tanh's form of gelu: 0.5 * (1 + tanh(u / 2)) = sigmoid(u), with u = 2 sqrt(2 / pi) * (z + 0.044715 z^3), and its derivative.
template <class V>
struct GeluTanh {
  V sigmoid, slope;
  explicit FN_HD GeluTanh(V z) {
    using E = Elementary<V>;
    constexpr double k = 1.5957691216057308, cubic = 0.044715, most = 1e4;
    // A larger square changes nothing but what is infinite: its product with a slope of zero.
    const V square = E::at_most_zero(z * z - V(most), z * z, V(most)), u = V(k) * (z + V(cubic) * (z * square));
    sigmoid = E::sigmoid(u);
    // sigmoid(-u) and not 1 - sigmoid: z * du would enlarge the rounding of that.
    slope = sigmoid * E::sigmoid(-u) * (V(k) * (V(1) + V(3 * cubic) * square));
  }
};

template <class V>
FN_HD V activate(Activation activation, V z, V alpha) {
  using E = Elementary<V>;
  switch (activation) {
    case Activation::relu:
      return E::at_most_zero(z, V(0), z);
    case Activation::leaky_relu:
      return E::at_most_zero(z, z * alpha, z);
    case Activation::silu:
      return z * E::sigmoid(z);
    case Activation::gelu:
      return z * E::cdf(z);
    case Activation::gelu_tanh:
      return z * GeluTanh<V>(z).sigmoid;
    case Activation::sigmoid:
      return E::sigmoid(z);
    case Activation::tanh:
      return E::tanh(z);
    case Activation::elu:
      return E::at_most_zero(z, alpha * E::expm1(z), z);
    default:
      return z;
  }
}

// The derivative; at a kink it is torch's.
template <class V>
FN_HD V slope(Activation activation, V z, V alpha) {
  using E = Elementary<V>;
  const V one(1);
  switch (activation) {
    case Activation::relu:
      return E::at_most_zero(z, V(0), one);
    case Activation::leaky_relu:
      return E::at_most_zero(z, alpha, one);
    case Activation::silu: {
      const auto s = E::sigmoid_and_rest(z);
      return s.sigmoid * (one + z * s.rest);
    }
    case Activation::gelu:
      return E::gelu_slope(z);
    case Activation::gelu_tanh: {
      const GeluTanh<V> g(z);
      return g.sigmoid + z * g.slope;
    }
    case Activation::sigmoid: {
      const auto s = E::sigmoid_and_rest(z);
      return s.sigmoid * s.rest;
    }
    case Activation::tanh: {
      const V t = E::tanh(z);
      return one - t * t;
    }
    case Activation::elu:
      return E::at_most_zero(z, alpha * E::exp(z), one);
    default:
      return one;
  }
}

}  // namespace fastnorm
