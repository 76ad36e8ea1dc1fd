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

// at_most_zero(z, yes, no): yes where z <= 0, else (for NaN, too) no. sigmoid, tanh, exp, expm1. cdf and pdf: of the standard
// normal distribution.
template <class V>
struct Elementary;

// tanh's form of gelu: 0.5 * (1 + tanh(u / 2)) = sigmoid(u), with u = 2 sqrt(2 / pi) * (z + 0.044715 z^3).
template <class V>
struct GeluTanh {
  V sigmoid, du;
  explicit FN_HD GeluTanh(V z) {
    constexpr double k = 1.5957691216057308, cubic = 0.044715;
    sigmoid = Elementary<V>::sigmoid(V(k) * (z + V(cubic) * (z * z * z)));
    du = V(k) * (V(1) + V(3 * cubic) * (z * z));
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
      const V s = E::sigmoid(z);
      return s * (one + z * (one - s));
    }
    case Activation::gelu:
      return E::cdf(z) + z * E::pdf(z);
    case Activation::gelu_tanh: {
      const GeluTanh<V> g(z);
      return g.sigmoid * (one + z * (one - g.sigmoid) * g.du);
    }
    case Activation::sigmoid: {
      const V s = E::sigmoid(z);
      return s * (one - s);
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
