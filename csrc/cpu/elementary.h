// What ../activations.h asks of vectors.
#pragma once

#include "vectors.h"

namespace fastnorm {

template <class A>
struct Elementary<at::vec::Vectorized<A>> {
  using V = at::vec::Vectorized<A>;

  FN_INLINE static V at_most_zero(V z, V yes, V no) { return V::blendv(no, yes, z <= V(0)); }
  FN_INLINE static V exp(V z) { return z.exp(); }
  FN_INLINE static V expm1(V z) { return z.expm1(); }
  FN_INLINE static V tanh(V z) { return z.tanh(); }
  // Near 1 as good as at its other end: slopes have 1 - sigmoid in them.
  FN_INLINE static V sigmoid(V z) {
    const V e = z.abs().neg().exp(), least = e / (V(1) + e);
    return at_most_zero(z, least, V(1) - least);
  }
  FN_INLINE static V pdf(V z) {
    constexpr double one_by_root_2_pi = 0.3989422804014327;
    return V(one_by_root_2_pi) * (V(-0.5) * (z * z)).exp();
  }

  // float: 1/2 + z * r(z^2) with a quotient of polynomials for r, good to 1e-7. It has left the range from 0 to 1 where z^2 is
  // cut off, and ends there; `level` is r's value at that place, so that what the quotient adds to it, and its rounding, are small.
  FN_INLINE static V cdf(V z) {
    if constexpr (std::is_same_v<A, double>) {
      constexpr double root_half = 0.7071067811865476;
      return V(0.5) * (V(1) + (z * V(root_half)).erf());
    } else {
      constexpr float most = 31.9225f, level = 0.088495575f;
      constexpr float p[] = {0.31044671f,   0.01060147f,    0.0022885229f, -1.5493905e-06f,
                             1.2674153e-06f, -1.2561496e-07f, -7.8043891e-11f};
      constexpr float q[] = {1, 0.24832577f, 0.028430333f, 0.0019313035f, 8.201431e-05f, 2.0280906e-06f};
      const V t = at::vec::clamp_max(z * z, V(most));
      V above(p[6]), below(q[5]);
      repeat<6>([&](auto k) FN_LAMBDA { above = above * t + V(p[5 - k]); });
      repeat<5>([&](auto k) FN_LAMBDA { below = below * t + V(q[4 - k]); });
      return at::vec::clamp(z * (above / below + V(level)) + V(0.5), V(0), V(1));
    }
  }
};

}  // namespace fastnorm
