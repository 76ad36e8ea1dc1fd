// y = act(z) and dz = dy * act'(z), a few vectors at a time: what costs next to nothing here, in the loops of the kernels, and
// the rest in epilogue.cpp, once for all of them.
#pragma once

#include "elementary.h"

namespace fastnorm::cpu {

void activate_others(const Epilogue& epilogue, Floats* z, int64_t n);
void activate_others(const Epilogue& epilogue, Doubles* z, int64_t n);
// `z` becomes dz.
void grad_others(const Epilogue& epilogue, const Floats* dy, Floats* z, int64_t n);
void grad_others(const Epilogue& epilogue, const Doubles* dy, Doubles* z, int64_t n);

template <class V>
FN_INLINE V relu(V z) {
  return at::vec::clamp_min(z, V(0));  // what is not a number stays so
}
template <class V>
FN_INLINE V relu_grad(V dy, V z) {
  return Elementary<V>::at_most_zero(z, V(0), dy);
}

// A copy has an address, and is made where it is needed, so that z itself stays in registers; vector by vector, because gcc
// copies arrays by halves of a vector, which the processor would wait for.
template <class V, size_t J>
struct InMemory {
  V v[J];
  explicit FN_INLINE InMemory(const std::array<V, J>& from) {
    repeat<J>([&](auto j) FN_LAMBDA { v[j] = from[j]; });
  }
  FN_INLINE void read_back(std::array<V, J>& to) const {
    repeat<J>([&](auto j) FN_LAMBDA { to[j] = v[j]; });
  }
};

// HERE: what is worth its room in the caller's loop, for a call keeps none of that loop's vectors in registers. AMONG_ROWS:
// where that loop has several rows of channels at once; 16 registers are too few for anything beside.
constexpr Activation AMONG_ROWS = lanes<Floats> == 16 ? Activation::silu : Activation::identity;
template <Activation A, class V, size_t J>
FN_INLINE bool activated_here(const Epilogue& epilogue, std::array<V, J>& z) {
  if (epilogue.activation != A) return false;
  const V alpha(static_cast<typename V::value_type>(epilogue.alpha));
  repeat<J>([&](auto j) FN_LAMBDA { z[j] = activate(A, z[j], alpha); });
  return true;
}
template <Activation... HERE, class V, size_t J>
FN_INLINE void activate_all(const Epilogue& epilogue, std::array<V, J>& z) {
  if (epilogue.activation == Activation::relu) {
    repeat<J>([&](auto j) FN_LAMBDA { z[j] = relu(z[j]); });
  } else if (epilogue.activation != Activation::identity && !(activated_here<HERE>(epilogue, z) || ...)) {
    InMemory<V, J> copy(z);
    activate_others(epilogue, copy.v, J);
    copy.read_back(z);
  }
}

template <Activation A, class V, size_t J>
FN_INLINE bool graded_here(const Epilogue& epilogue, const std::array<V, J>& dy, std::array<V, J>& z) {
  if (epilogue.activation != A) return false;
  const V alpha(static_cast<typename V::value_type>(epilogue.alpha));
  repeat<J>([&](auto j) FN_LAMBDA { z[j] = dy[j] * slope(A, z[j], alpha); });
  return true;
}
template <Activation... HERE, class V, size_t J>
FN_INLINE void grad_all(const Epilogue& epilogue, const std::array<V, J>& dy, std::array<V, J>& z) {
  if (epilogue.activation == Activation::relu) {
    repeat<J>([&](auto j) FN_LAMBDA { z[j] = relu_grad(dy[j], z[j]); });
  } else if (epilogue.activation == Activation::identity) {
    repeat<J>([&](auto j) FN_LAMBDA { z[j] = dy[j]; });
  } else if (!(graded_here<HERE>(epilogue, dy, z) || ...)) {
    const InMemory<V, J> dy_copy(dy);
    InMemory<V, J> copy(z);
    grad_others(epilogue, dy_copy.v, copy.v, J);
    copy.read_back(z);
  }
}

}  // namespace fastnorm::cpu
