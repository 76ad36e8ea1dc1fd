// The activations that take longer than a call.
#include "epilogue.h"

namespace fastnorm::cpu {
namespace {

template <class V>
void activate_each(const Epilogue& epilogue, V* z, int64_t n) {
  const V alpha(static_cast<typename V::value_type>(epilogue.alpha));
  for (int64_t k = 0; k < n; ++k) z[k] = activate(epilogue.activation, z[k], alpha);
}

template <class V>
void grad_each(const Epilogue& epilogue, const V* dy, V* z, int64_t n) {
  const V alpha(static_cast<typename V::value_type>(epilogue.alpha));
  for (int64_t k = 0; k < n; ++k) z[k] = dy[k] * slope(epilogue.activation, z[k], alpha);
}

}  // namespace

void activate_others(const Epilogue& epilogue, Floats* z, int64_t n) { activate_each(epilogue, z, n); }
void activate_others(const Epilogue& epilogue, Doubles* z, int64_t n) { activate_each(epilogue, z, n); }
void grad_others(const Epilogue& epilogue, const Floats* dy, Floats* z, int64_t n) { grad_each(epilogue, dy, z, n); }
void grad_others(const Epilogue& epilogue, const Doubles* dy, Doubles* z, int64_t n) { grad_each(epilogue, dy, z, n); }

}  // namespace fastnorm::cpu
