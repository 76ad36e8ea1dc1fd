// Vectors of the accumulate dtype: loads and stores that convert the 16-bit types in registers, and tails.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "functions.h"
#include "registers.h"

namespace fastnorm {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
using Vec = at::vec::Vectorized<Acc<T>>;
template <class V>
constexpr int64_t lanes = V::size();

// Calls f with a null pointer of the C++ type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
  }
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, double>     ? DType::f64
                           : std::is_same_v<T, float>    ? DType::f32
                           : std::is_same_v<T, BFloat16> ? DType::bf16
                                                         : DType::f16;

// f(std::integral_constant<size_t, I>) for I < N, written out: arrays of vectors whose indices are constants live in registers.
template <class F, size_t... I>
FN_INLINE void repeat(const F& f, std::index_sequence<I...>) {
  (f(std::integral_constant<size_t, I>{}), ...);
}
template <size_t N, class F>
FN_INLINE void repeat(const F& f) {
  repeat(f, std::make_index_sequence<N>{});
}

// ---------------------------------------------------------------- whole vectors

FN_INLINE Doubles load(const double* p) { return Doubles::loadu(p); }
FN_INLINE Floats load(const float* p) { return Floats::loadu(p); }
FN_INLINE void store(double* p, Doubles v) { v.store(p); }
FN_INLINE void store(float* p, Floats v) { v.store(p); }

#if defined(FN_REGISTERS)
FN_INLINE Floats load(const BFloat16* p) { return widen(p, load_bits(p)); }
FN_INLINE Floats load(const Half* p) { return widen(p, load_bits(p)); }
FN_INLINE void store(BFloat16* p, Floats v) { store_bits(p, narrow(p, v)); }
FN_INLINE void store(Half* p, Floats v) { store_bits(p, narrow(p, v)); }
#else
template <class T>
FN_INLINE Floats load_each(const T* p) {
  float v[lanes<Floats>];
  std::copy_n(p, lanes<Floats>, v);
  return load(v);
}
template <class T>
FN_INLINE void store_each(T* p, Floats v) {
  float f[lanes<Floats>];
  v.store(f);
  std::copy_n(f, lanes<Floats>, p);
}
FN_INLINE Floats power_of_two(Floats n) {
  constexpr int64_t W = lanes<Floats>;
  uint32_t bits[W];
  float v[W];
  n.store(v);
  std::memcpy(bits, v, sizeof bits);
  for (int64_t k = 0; k < W; ++k) bits[k] = (bits[k] << 23) + (127u << 23);
  std::memcpy(v, bits, sizeof v);
  return load(v);
}
FN_INLINE Floats load(const BFloat16* p) { return load_each(p); }
FN_INLINE Floats load(const Half* p) { return load_each(p); }
FN_INLINE void store(BFloat16* p, Floats v) { store_each(p, v); }
FN_INLINE void store(Half* p, Floats v) { store_each(p, v); }
#endif

// v itself, in a register from here on: gcc would load again what is used twice.
#if defined(CPU_CAPABILITY_AVX512)
FN_INLINE Doubles loaded(Doubles v) { return v; }
FN_INLINE Floats loaded(Floats v) {
  Register r = v;
  asm("" : "+v"(r));
  return r;
}
#else
template <class V>
FN_INLINE V loaded(V v) {
  return v;
}
#endif

// ---------------------------------------------------------------- several vectors, in any order

// LOT vectors that hold the elements from p on in an order of their own, for what is only added up: bfloat16 comes apart
// into its even and odd elements without a shuffle.
template <class T>
constexpr int64_t LOT = 1;
template <class T>
FN_INLINE std::array<Vec<T>, 1> load_lot(const T* p) {
  return {load(p)};
}
#if defined(CPU_CAPABILITY_AVX512)
template <>
constexpr int64_t LOT<BFloat16> = 2;
FN_INLINE std::array<Floats, 2> lot_of(const BFloat16*, __m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
FN_INLINE std::array<Floats, 2> load_lot(const BFloat16* p) { return lot_of(p, _mm512_loadu_si512(p)); }
#elif defined(CPU_CAPABILITY_AVX2)
template <>
constexpr int64_t LOT<BFloat16> = 2;
FN_INLINE std::array<Floats, 2> lot_of(const BFloat16*, __m256i pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
FN_INLINE std::array<Floats, 2> load_lot(const BFloat16* p) {
  return lot_of(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

// Element by element the order of load_lot's vectors, for what belongs to them: whole lots, and the rest as it is.
template <class T, class S>
void in_lots(const S* __restrict from, int64_t n, Acc<T>* __restrict to) {
  constexpr int64_t W = lanes<Vec<T>>, L = LOT<T>;
  int64_t i = 0;
  for (; i + L * W <= n; i += L * W) {
    if constexpr (std::is_same_v<S, T>) {
      const auto lot = load_lot(from + i);
      repeat<L>([&](auto l) FN_LAMBDA { store(to + i + static_cast<int64_t>(l) * W, lot[l]); });
    } else {
      for (int64_t k = 0; k < L * W; ++k) to[i + k % L * W + k / L] = static_cast<Acc<T>>(from[i + k]);
    }
  }
  for (; i < n; ++i) to[i] = static_cast<Acc<T>>(from[i]);
}

// ---------------------------------------------------------------- tails

// The first `count` elements; the other lanes are zero and are not touched in memory.
template <class T>
FN_INLINE Vec<T> load(const T* p, int64_t count) {
  constexpr int64_t W = lanes<Vec<T>>;
  if (count == W) return load(p);
#if defined(FN_REGISTERS)
  if constexpr (std::is_same_v<T, Acc<T>>)
    return load_first(p, count);
  else
    return widen(p, load_bits(p, count));
#else
  if (count > W) __builtin_unreachable();  // gcc warns of it
  T v[W] = {};
  std::copy_n(p, count, v);
  return load(v);
#endif
}
template <class T>
FN_INLINE void store(T* p, Vec<T> v, int64_t count) {
  constexpr int64_t W = lanes<Vec<T>>;
  if (count == W) return store(p, v);
#if defined(FN_REGISTERS)
  if constexpr (std::is_same_v<T, Acc<T>>)
    store_first(p, v, count);
  else
    store_bits(p, narrow(p, v), count);
#else
  T t[W];
  store(t, v);
  std::copy_n(t, count, p);
#endif
}

// The mean of the first of n elements at(i): a number near the mean of all, a shift that their variance is well computed about.
template <class A, class F>
FN_INLINE A near(int64_t n, const F& at) {
  const auto element = [&](int64_t i) { return static_cast<A>(at(i)); };
  return n < 4 ? element(0) : (element(0) + element(1) + element(2) + element(3)) * A(0.25);
}

// J neighbouring vectors, the last (and only) one of `count` lanes.
template <class T, size_t J>
FN_INLINE void store_all(T* p, const std::array<Vec<T>, J>& v, int64_t count) {
  constexpr int64_t W = lanes<Vec<T>>;
#if defined(FN_REGISTERS)
  if constexpr (BY_TWO<T> && J % 2 == 0) {
    repeat<J / 2>([&](auto j) FN_LAMBDA { store_bits(p + 2 * W * j, narrow_two(p, v[2 * j], v[2 * j + 1])); });
    return;
  }
#endif
  repeat<J>([&](auto j) FN_LAMBDA { store(p + j * W, v[j], count); });
}

// The same past the caches, whole cache lines of them; others may read them after stream_end(). put_all: the one or the other.
#if defined(CPU_CAPABILITY_AVX512)
FN_INLINE void stream(float* p, Floats v) { _mm512_stream_ps(p, v); }
FN_INLINE void stream(double* p, Doubles v) { _mm512_stream_pd(p, v); }
#elif defined(CPU_CAPABILITY_AVX2)
FN_INLINE void stream(float* p, Floats v) { _mm256_stream_ps(p, v); }
FN_INLINE void stream(double* p, Doubles v) { _mm256_stream_pd(p, v); }
#endif
#if defined(FN_REGISTERS)
template <class T>
FN_INLINE void stream(T* p, Floats v) {
  stream_bits(p, narrow(p, v));
}
#else
template <class T>
FN_INLINE void stream(T* p, Vec<T> v) {
  store(p, v);
}
#endif
template <class T, size_t J>
FN_INLINE void stream_all(T* p, const std::array<Vec<T>, J>& v) {
  constexpr int64_t W = lanes<Vec<T>>;
#if defined(FN_REGISTERS)
  if constexpr (sizeof(T) == 2 && J % 2 == 0) {
    repeat<J / 2>([&](auto j) FN_LAMBDA { stream_bits(p + 2 * W * j, narrow_two(p, v[2 * j], v[2 * j + 1])); });
    return;
  }
#endif
  repeat<J>([&](auto j) FN_LAMBDA { stream(p + j * W, v[j]); });
}
template <class T, size_t J>
FN_INLINE void put_all(T* p, const std::array<Vec<T>, J>& v, int64_t count, bool stream) {
  constexpr int64_t W = lanes<Vec<T>>;
  if (stream && J * W * sizeof(T) % 64 == 0 && (J > 1 || count == W))
    stream_all<T, J>(p, v);
  else
    store_all<T, J>(p, v, count);
}
inline void stream_end() {
#if defined(FN_REGISTERS)
  _mm_sfence();
#endif
}

// The vectors of P inputs at element i.
template <class T, size_t P>
FN_INLINE std::array<Vec<T>, P> load_inputs(const std::array<const T*, P>& at, int64_t i, int64_t count) {
  std::array<Vec<T>, P> v;
  repeat<P>([&](auto p) FN_LAMBDA { v[p] = load(at[p] + i, count); });
  return v;
}

// Whether whole lots are stored as quickly as they are loaded, so that element by element the order of lots is the better one.
template <class T>
constexpr bool LOTS_STORED = false;
#if defined(CPU_CAPABILITY_AVX2)
template <>
constexpr bool LOTS_STORED<BFloat16> = true;
// Of results of inputs of 16 bits and of `own` constants.
FN_INLINE __m256i narrow_lot(Floats even, Floats odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded_own(even), 16), rounded_own(odd), 0xaa);
}
#endif
template <class T, size_t J>
constexpr bool IN_LOTS = LOTS_STORED<T> && J % LOT<T> == 0;

// A constant whose NaN, if it is one, is the processor's own: one from a user's float could be rounded to a number.
template <class A>
FN_INLINE A own(A constant) {
  return constant == constant ? constant : std::numeric_limits<A>::quiet_NaN();
}

// J vectors of each of P inputs from element i on, in lots where J is whole ones; and their like stored, as by put_all.
template <class T, size_t P, size_t J>
FN_INLINE std::array<std::array<Vec<T>, P>, J> load_group(const std::array<const T*, P>& at, int64_t i, int64_t count) {
  constexpr int64_t W = lanes<Vec<T>>, L = LOT<T>;
  std::array<std::array<Vec<T>, P>, J> in;
  if constexpr (IN_LOTS<T, J>) {
    repeat<J / L>([&](auto j) FN_LAMBDA {
      repeat<P>([&](auto p) FN_LAMBDA {
        const auto lot = load_lot(at[p] + i + static_cast<int64_t>(j) * L * W);
        repeat<L>([&](auto l) FN_LAMBDA { in[j * L + l][p] = lot[l]; });
      });
    });
  } else {
    repeat<J>([&](auto j) FN_LAMBDA { in[j] = load_inputs<T, P>(at, i + static_cast<int64_t>(j) * W, count); });
  }
  return in;
}
template <class T, size_t J>
FN_INLINE void put_group(T* p, const std::array<Vec<T>, J>& v, int64_t count, bool stream) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (IN_LOTS<T, J>) {
    constexpr int64_t W = lanes<Vec<T>>;
    const bool past = stream && J * W * sizeof(T) % 64 == 0;
    repeat<J / 2>([&](auto j) FN_LAMBDA {
      const __m256i bits = narrow_lot(v[2 * j], v[2 * j + 1]);
      past ? stream_bits(p + 2 * W * j, bits) : store_bits(p + 2 * W * j, bits);
    });
    return;
  }
#endif
  put_all<T, J>(p, v, count, stream);
}

// f(i, count) for vectors that cover [0, n); count is the number of lanes that exist.
template <class V, class F>
FN_INLINE void for_vectors(int64_t n, const F& f) {
  constexpr int64_t W = lanes<V>;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}

// f(std::integral_constant<size_t, J>, i, count) for vectors that cover [0, n): MOST at a time, then four, then one, the last
// of `count` lanes.
template <class V, int64_t MOST, class F>
FN_INLINE void for_groups(int64_t n, const F& f) {
  constexpr int64_t W = lanes<V>;
  int64_t i = 0;
  for (; i + MOST * W <= n; i += MOST * W) f(std::integral_constant<size_t, MOST>{}, i, W);
  if constexpr (MOST > 4)
    for (; i + 4 * W <= n; i += 4 * W) f(std::integral_constant<size_t, 4>{}, i, W);
  for (; i < n; i += W) f(std::integral_constant<size_t, 1>{}, i, std::min(W, n - i));
}

// Asks for the cache lines of so many bytes, to be read or to be written.
template <bool WRITE>
FN_INLINE void prefetch(const void* p, int64_t bytes) {
  constexpr int64_t LINE = 64;
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(static_cast<const char*>(p) + i, WRITE, 3);
}

// v with zeros in the lanes that do not exist.
template <class V>
FN_INLINE V only(V v, int64_t count) {
  if (count == lanes<V>) return v;
#if defined(FN_REGISTERS)
  return keep_first(v, count);
#else
  return V::set(V(0), v, count);
#endif
}

}  // namespace fastnorm
