// What is added up over a channel, and what is done to each of its elements: the two passes of every norm over channels.
#pragma once

#include "loops.h"

namespace fastnorm::cpu {

// Sums over a channel: two terms for each element, from the first P inputs and K constants of the channel, a shift first.
template <class T>
struct StatisticsTerms {  // d and d * d, with d = x - shift
  static constexpr size_t P = 1, K = 1;
  static constexpr bool GUESS = true;  // the shift is any number near the mean, still to be found
  using V = Vec<T>;
  using Plain = Products<T, 1>;  // the same for shift = 0
  FN_INLINE static std::array<V, 2> terms(const std::array<V, 1>& v, const std::array<V, 1>& c, int64_t count) {
    const V d = only(v[0] - c[0], count);
    return {d, d * d};
  }
};
template <class T>
struct GradientTerms {  // dz and dz * (x - shift); lanes that do not exist have dz = 0
  static constexpr size_t P = 2, K = 1;
  static constexpr bool GUESS = false;
  using V = Vec<T>;
  using Plain = Products<T, 2>;
  FN_INLINE static std::array<V, 2> terms(const std::array<V, 2>& v, const std::array<V, 1>& c, int64_t) {
    return {v[0], v[0] * (v[1] - c[0])};
  }
};

// Element by element: a value from P inputs and K constants of the channel, for J vectors at a time; constants[j] belongs to
// in[j]. Where a channel's constants meet, they are multiplied beforehand, in `Constants`; the low part of the mean is in the
// last of them.
template <class T, size_t P, size_t J>
using InputGroup = std::array<std::array<Vec<T>, P>, J>;

// What makes its vectors one by one, by Value::value.
template <class T, class Value>
struct OneByOne {
  static constexpr bool TOGETHER = false;  // nothing is gained by more than a few vectors at once
  template <size_t P, size_t J, class C>
  FN_INLINE std::array<Vec<T>, J> operator()(const InputGroup<T, P, J>& in, const C& constants) const {
    std::array<Vec<T>, J> out;
    repeat<J>([&](auto j) FN_LAMBDA { out[j] = Value::value(in[j], constants[j]); });
    return out;
  }
};
// Whether a value is to be told what it has made and where that was put: it has a type of this name then.
template <class Value, class = void>
constexpr bool TAKES_NOTE = false;
template <class Value>
constexpr bool TAKES_NOTE<Value, std::void_t<typename Value::TakesNote>> = true;
template <class Value, class T, size_t J>
FN_INLINE void note(const Value& value, const T* at, const std::array<Vec<T>, J>& made, int64_t count) {
  if constexpr (TAKES_NOTE<Value>) value.made(at, made, count);
}
template <class T>
struct Standardize : OneByOne<T, Standardize<T>> {  // high, rstd * weight, bias - low * rstd * weight
  static constexpr size_t P = 1, K = 3;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, 1>& x, const std::array<V, 3>& c) { return affine(x[0] - c[0], c[1], c[2]); }
};
// From Standardize's constants: z of the AT-th input, with the residual, which follows it where there is one.
template <class T, size_t AT, size_t P>
FN_INLINE Vec<T> before_end(const std::array<Vec<T>, P>& in, const std::array<Vec<T>, 3>& c) {
  const Vec<T> z = Standardize<T>::value({in[AT]}, c);
  if constexpr (P == AT + 2)
    return z + in[AT + 1];
  else
    return z;
}
template <class T>
struct Gradient : OneByOne<T, Gradient<T>> {
  // high, rstd * weight, mean(dz * x_hat) * rstd, mean(dz) - low * mean(dz * x_hat) * rstd
  static constexpr size_t P = 2, K = 4;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, 2>& v, const std::array<V, 4>& c) {
    return grad_input(v[0], v[1] - c[0], c[1], c[2], c[3]);
  }
};
template <class T>
struct WeightedGradient : OneByOne<T, WeightedGradient<T>> {
  // the same with g = dz * weight: high, rstd, c1 * rstd, c2 - low * c1 * rstd, weight
  static constexpr size_t P = 2, K = 5;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, 2>& v, const std::array<V, 5>& c) {
    return grad_input(v[0] * c[4], v[1] - c[0], c[1], c[2], c[3]);
  }
};
template <class T>
struct Scale : OneByOne<T, Scale<T>> {  // rstd * weight: x is not read, so what is not finite in it stays out of dx
  static constexpr size_t P = 1, K = 1;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, 1>& dz, const std::array<V, 1>& c) { return dz[0] * c[0]; }
};

// K arrays over the channels.
template <class A, size_t K>
class Constants {
 public:
  explicit Constants(int64_t C) : width_(ceil_div(C, 16) * 16), all_(width_ * K) {}
  A* operator[](size_t k) const { return all_ + width_ * static_cast<int64_t>(k); }

 private:
  int64_t width_;
  Buffer<A> all_;
};

// How many deviations off the mean a channel's shift may be; running_var and dweight are float beside inputs of 16 bits.
template <class T>
constexpr double DEVIATIONS = std::is_same_v<T, BFloat16> ? 8 : 4;

// Whether sums are taken about zero where that is near enough: bfloat16's are much faster there, and itself is coarser.
template <class T>
constexpr bool PLAIN_FIRST = std::is_same_v<T, BFloat16>;

template <size_t P>
using Inputs = std::array<const ChannelsInput*, P>;
template <class T>
const T* data(const ChannelsInput& in) {
  return static_cast<const T*>(in.data);
}

// What a sweep does before it takes the sums of a part of its inputs: nothing, or it makes that part.
struct Nothing {
  template <class... Part>
  void operator()(Part...) const {}
};

// Inputs of a thread's part of the work that stay in its second-level cache between two passes; a size that all processors of
// the last ten years have.
constexpr int64_t CACHE = 1 << 19;
// Bytes side by side below which going through memory twice is faster than once in such parts.
constexpr int64_t NARROWEST = 1024;

}  // namespace fastnorm::cpu
