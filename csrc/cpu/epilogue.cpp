// The activations that take longer than a call.
#include "epilogue.h"

namespace fastnorm::cpu {
namespace {

// f(std::integral_constant<Activation, A>) with the activation, so that its constants stay in registers over a loop.
template <class F>
void with_activation(Activation activation, const F& f) {
  const auto each = [&](auto... a) { ((a == activation ? f(a) : void()), ...); };
  using A = Activation;
  each(std::integral_constant<A, A::leaky_relu>{}, std::integral_constant<A, A::silu>{}, std::integral_constant<A, A::gelu>{},
       std::integral_constant<A, A::gelu_tanh>{}, std::integral_constant<A, A::sigmoid>{}, std::integral_constant<A, A::tanh>{},
       std::integral_constant<A, A::elu>{});
}

template <class V>
void activate_each(const Epilogue& epilogue, V* z, int64_t n) {
  const V alpha(static_cast<typename V::value_type>(epilogue.alpha));
  with_activation(epilogue.activation, [&](auto activation) {
    for (int64_t k = 0; k < n; ++k) z[k] = activate(activation(), z[k], alpha);
  });
}

template <class V>
void grad_each(const Epilogue& epilogue, const V* dy, V* z, int64_t n) {
  const V alpha(static_cast<typename V::value_type>(epilogue.alpha));
  with_activation(epilogue.activation, [&](auto activation) {
    for (int64_t k = 0; k < n; ++k) z[k] = dy[k] * slope(activation(), z[k], alpha);
  });
}

}  // namespace

void activate_others(const Epilogue& epilogue, Floats* z, int64_t n) { activate_each(epilogue, z, n); }
void activate_others(const Epilogue& epilogue, Doubles* z, int64_t n) { activate_each(epilogue, z, n); }
void grad_others(const Epilogue& epilogue, const Floats* dy, Floats* z, int64_t n) { grad_each(epilogue, dy, z, n); }
void grad_others(const Epilogue& epilogue, const Doubles* dy, Doubles* z, int64_t n) { grad_each(epilogue, dy, z, n); }

}  // namespace fastnorm::cpu
