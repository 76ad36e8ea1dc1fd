// The math of the project in C++, templated on the value type V: float in device code and in scalar code, a vector of lanes
// in the CPU's loops. Includes no framework, so that every compiler can take it. Same names as fastnorm/reference.py.
#pragma once

#ifdef __CUDACC__
#define FN_HD __host__ __device__ __forceinline__
#else
#define FN_HD inline __attribute__((always_inline))  // a call keeps no vector in registers
#endif

namespace fastnorm {

// x - mean. The mean is a pair: at mean/std = 1e4 one float32 cannot hold it.
template <class V>
FN_HD V centre(V x, V mean_high, V mean_low) {
  return (x - mean_high) - mean_low;
}

// x_hat
template <class V>
FN_HD V normalize(V x, V mean_high, V mean_low, V rstd) {
  return centre(x, mean_high, mean_low) * rstd;
}

template <class V>
FN_HD V affine(V x_hat, V weight, V bias) {
  return x_hat * weight + bias;
}

// The derivative of a norm by its input: g = dz * weight, c1 = mean(g * x_hat), c2 = mean(g); c1 = c2 = 0 in evaluation.
// The small terms are added first: one rounding less at g's size.
template <class V>
FN_HD V grad_input(V g, V x_hat, V rstd, V c1, V c2) {
  return (g - (c2 + x_hat * c1)) * rstd;
}

// The same with rstd in every factor, for rows: d = x - mean, c1 * rstd^2 and c2 * rstd. For a rstd whose square is far from
// the ends of V's range.
template <class V>
FN_HD V grad_input_scaled(V dz_rstd, V weight, V d, V c1_rstd2, V c2_rstd) {
  return dz_rstd * weight - (c2_rstd + d * c1_rstd2);
}

// count, mean and sum of squares about the mean.
template <class V>
struct Moments {
  V n, mean, m2;
};

// Chan, Golub and LeVeque (1979); needs a.n + b.n > 0.
template <class V>
FN_HD Moments<V> merge(Moments<V> a, Moments<V> b) {
  V n = a.n + b.n, d = b.mean - a.mean, r = b.n / n;
  return {n, a.mean + d * r, a.m2 + b.m2 + d * d * (a.n * r)};
}

}  // namespace fastnorm
