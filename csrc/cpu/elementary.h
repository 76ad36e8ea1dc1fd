// What ../activations.h asks of vectors: of doubles what at::vec has, of floats what is quicker than a call and as good.
#pragma once

#include "vectors.h"

namespace fastnorm {

// e^x = 2^n * (1 + r * ratio) for a finite x: a whole n, whose lowest bits are those of `shifted`, and |r| <= log(2) / 2.
struct ReducedExp {
  Floats shifted, n, r, ratio;
  explicit FN_INLINE ReducedExp(Floats x) {
    using V = Floats;
    constexpr float log2_e = 1.44269504f, log_2 = 0.693359375f, log_2_rest = -2.12194440e-4f;
    constexpr float whole = 12582912;  // a sum with it is rounded to a whole number
    constexpr float p[] = {1, 0.49999994f, 0.166665211f, 0.041668389f, 0.00836874545f, 0.00138145406f};
    shifted = x * V(log2_e) + V(whole);
    n = shifted - V(whole);
    r = (x - n * V(log_2)) - n * V(log_2_rest);
    ratio = V(p[5]);
    repeat<5>([&](auto k) FN_LAMBDA { ratio = ratio * r + V(p[4 - k]); });
  }
};
// e^z = power * (1 + rest), for z up to 88.
struct SplitExp {
  Floats power, rest;
  explicit FN_INLINE SplitExp(Floats z) {
    constexpr float zero = -88;  // from here on n is -127, and its power of two is zero
    const ReducedExp e(at::vec::clamp_min(z, Floats(zero)));
    power = power_of_two(e.shifted);
    rest = e.ratio * e.r;
  }
};

template <class A>
struct Elementary<at::vec::Vectorized<A>> {
  using V = at::vec::Vectorized<A>;
  static constexpr bool FLOAT = std::is_same_v<A, float>;

  FN_INLINE static V at_most_zero(V z, V yes, V no) { return V::blendv(no, yes, z <= V(0)); }

  FN_INLINE static V exp(V z) {
    if constexpr (FLOAT) {
      const SplitExp e(z);
      return e.power * e.rest + e.power;
    } else {
      return z.exp();
    }
  }
  FN_INLINE static V expm1(V z) {
    if constexpr (FLOAT) {
      const SplitExp e(z);
      return e.power * e.rest + (e.power - V(1));
    } else {
      return z.expm1();
    }
  }
  FN_INLINE static V tanh(V z) {
    if constexpr (FLOAT) {
      const V e = expm1(V(-2) * z.abs()), least = e / (V(2) + e);
      return at_most_zero(z, least, least.neg());
    } else {
      return z.tanh();
    }
  }
#if defined(FN_SCALES)
  // 1 + e^-z up to infinity, so that the sigmoid need not tell z's signs apart.
  FN_INLINE static V sigmoid(V z, V& exp) {
    if constexpr (FLOAT) {
      constexpr float most = 105;  // where e^z is zero or infinite
      const ReducedExp e(at::vec::clamp(z.neg(), V(-most), V(most)));
      exp = scaled(e.ratio * e.r + V(1), e.n);
    } else {
      exp = z.neg().exp();
    }
    return V(1) / (V(1) + exp);
  }
  FN_INLINE static V sigmoid(V z) {
    V exp;
    return sigmoid(z, exp);
  }
  FN_INLINE static SigmoidAndRest<V> sigmoid_and_rest(V z) {
    V exp;
    const V s = sigmoid(z, exp);
    return {s, at_most_zero(z, V(1) - s, s * exp)};  // good at both ends
  }
#else
  // Near 1 as good as at its other end: slopes have 1 - sigmoid in them.
  FN_INLINE static V sigmoid(V z) {
    const V e = exp(z.abs().neg()), least = e / (V(1) + e);
    return at_most_zero(z, least, V(1) - least);
  }
  FN_INLINE static SigmoidAndRest<V> sigmoid_and_rest(V z) {
    const V s = sigmoid(z);
    return {s, V(1) - s};
  }
#endif

  // float: 1/2 + z * r(z^2) with a quotient of polynomials for r, good to 1e-7. It has left the range from 0 to 1 where z^2 is
  // cut off, and ends there; `level` is r's value at that place, so that what the quotient adds to it, and its rounding, are
  // small.
  FN_INLINE static V cdf(V z) {
    if constexpr (FLOAT) {
      constexpr float most = 31.9225f, level = 0.088495575f;
      constexpr float p[] = {0.31044671f,   0.01060147f,    0.0022885229f, -1.5493905e-06f,
                             1.2674153e-06f, -1.2561496e-07f, -7.8043891e-11f};
      constexpr float q[] = {1, 0.24832577f, 0.028430333f, 0.0019313035f, 8.201431e-05f, 2.0280906e-06f};
      const V t = at::vec::clamp_max(z * z, V(most));
      V above(p[6]), below(q[5]);
      repeat<6>([&](auto k) FN_LAMBDA { above = above * t + V(p[5 - k]); });
      repeat<5>([&](auto k) FN_LAMBDA { below = below * t + V(q[4 - k]); });
      return at::vec::clamp(z * (above / below + V(level)) + V(0.5), V(0), V(1));
    } else {
      constexpr double root_half = 0.7071067811865476;
      return V(0.5) * (V(1) + (z * V(root_half)).erf());
    }
  }

  // float: 1/2 + z * r(z^2) likewise, with no exp beside cdf's quotient; good to 2e-7, and 1 or 0 to 4e-8 from 6 on.
  FN_INLINE static V gelu_slope(V z) {
    if constexpr (FLOAT) {
      constexpr float most = 6;
      constexpr float p[] = {0.797884531f,  -0.0223739672f, 0.0138574392f,  0.0002026822f,
                             3.40917814e-05f, 9.2239321e-07f, 1.70451112e-08f};
      constexpr float q[] = {1,              0.305291352f,   0.0441325831f,  0.0039713657f,
                             0.00024531139f, 1.03070516e-05f, 3.38938975e-07f, 1.31471461e-09f};
      const V u = at::vec::clamp(z, V(-most), V(most)), t = u * u;
      V above(p[6]), below(q[7]);
      repeat<6>([&](auto k) FN_LAMBDA { above = above * t + V(p[5 - k]); });
      repeat<7>([&](auto k) FN_LAMBDA { below = below * t + V(q[6 - k]); });
      return u * (above / below) + V(0.5);
    } else {
      constexpr double one_by_root_2_pi = 0.3989422804014327;
      return cdf(z) + z * (V(one_by_root_2_pi) * exp(V(-0.5) * (z * z)));
    }
  }
};

}  // namespace fastnorm
