// Vectors of the accumulate dtype: loads and stores that convert the 16-bit types in registers, tails, sums over lanes.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "../norm_math.h"
#include "kernels.h"

#define FN_INLINE inline __attribute__((always_inline))
#define FN_LAMBDA __attribute__((always_inline))

namespace fastnorm {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
using Vec = at::vec::Vectorized<Acc<T>>;
template <class V>
constexpr int64_t lanes = V::size();
using Floats = at::vec::Vectorized<float>;
using Doubles = at::vec::Vectorized<double>;

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

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
using Bits16 = __m256i;
FN_INLINE Bits16 load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FN_INLINE void store_bits(void* p, Bits16 v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
#else
using Register = __m256;
using Bits16 = __m128i;
FN_INLINE Bits16 load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FN_INLINE void store_bits(void* p, Bits16 v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
#endif
// 16 bits of the type that the first argument points to, as floats, and back (round to nearest even).
#if defined(CPU_CAPABILITY_AVX512)
FN_INLINE Floats widen(const BFloat16*, Bits16 bits) {  // each word to the upper half of its lane, in one shuffle
  const __m512i from =
      _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(bits)));
}
#else
FN_INLINE Floats widen(const BFloat16*, Bits16 bits) {
  Register v;
  at::vec::cvtbf16_fp32(bits, v);
  return v;
}
#endif
FN_INLINE Floats widen(const Half*, Bits16 bits) {
  Register v;
  at::vec::cvtfp16_fp32(bits, v);
  return v;
}
#if defined(__AVX512BF16__)
FN_INLINE Bits16 narrow(const BFloat16*, Floats v) { return reinterpret_cast<Bits16>(_mm512_cvtneps_pbh(Register(v))); }
#else
FN_INLINE Bits16 narrow(const BFloat16*, Floats v) { return at::vec::cvtfp32_bf16(Register(v)); }
#endif
FN_INLINE Bits16 narrow(const Half*, Floats v) { return at::vec::cvtfp32_fp16(Register(v)); }

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
FN_INLINE Floats load(const BFloat16* p) { return load_each(p); }
FN_INLINE Floats load(const Half* p) { return load_each(p); }
FN_INLINE void store(BFloat16* p, Floats v) { store_each(p, v); }
FN_INLINE void store(Half* p, Floats v) { store_each(p, v); }
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
FN_INLINE std::array<Floats, 2> load_lot(const BFloat16* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
constexpr int64_t LOT<BFloat16> = 2;
FN_INLINE std::array<Floats, 2> load_lot(const BFloat16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
#endif

// Element by element the order of load_lot's vectors, for what belongs to them: whole lots, and the rest as it is.
template <class T, class A>
void in_lots(const A* __restrict from, int64_t n, A* __restrict to) {
  constexpr int64_t W = lanes<Vec<T>>, L = LOT<T>;
  int64_t i = 0;
  for (; i + L * W <= n; i += L * W)
    repeat<L>([&](auto l) FN_LAMBDA {
      for (int64_t k = 0; k < W; ++k) to[i + static_cast<int64_t>(l) * W + k] = from[i + k * L + static_cast<int64_t>(l)];
    });
  std::copy(from + i, from + n, to + i);
}

// ---------------------------------------------------------------- tails

// The first `count` elements; the other lanes are zero and are not touched in memory.
template <class T>
FN_INLINE Vec<T> load(const T* p, int64_t count) {
  constexpr int64_t W = lanes<Vec<T>>;
  if (count == W) return load(p);
  if constexpr (std::is_same_v<T, Acc<T>>) return Vec<T>::loadu(p, count);
#if defined(CPU_CAPABILITY_AVX512)
  else
    return widen(p, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
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
  if constexpr (std::is_same_v<T, Acc<T>>) return v.store(p, count);
#if defined(CPU_CAPABILITY_AVX512)
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), narrow(p, v));
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
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16> && J % 2 == 0) {
    repeat<J / 2>([&](auto j) {
      _mm512_storeu_si512(p + 32 * j, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[2 * j + 1], v[2 * j])));
    });
    return;
  }
#endif
  repeat<J>([&](auto j) { store(p + j * lanes<Vec<T>>, v[j], count); });
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

// Asks for the cache lines of J vectors, which will be written soon.
template <class T, size_t J>
FN_INLINE void prefetch_for_write(const T* p) {
  constexpr size_t LINE = 64, BYTES = J * lanes<Vec<T>> * sizeof(T);
  repeat<(BYTES + LINE - 1) / LINE>([&](auto k)
                                        FN_LAMBDA { __builtin_prefetch(reinterpret_cast<const char*>(p) + k * LINE, 1); });
}

// v with zeros in the lanes that do not exist.
template <class V>
FN_INLINE V only(V v, int64_t count) {
  if (count == lanes<V>) return v;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, Floats>)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count) - 1), v);
  else
#endif
    return V::set(V(0), v, count);
}

// The vectors of P inputs at element i.
template <class T, size_t P>
FN_INLINE std::array<Vec<T>, P> load_inputs(const std::array<const T*, P>& at, int64_t i, int64_t count) {
  std::array<Vec<T>, P> v;
  repeat<P>([&](auto p) FN_LAMBDA { v[p] = load(at[p] + i, count); });
  return v;
}

// ---------------------------------------------------------------- sums

// All lanes, in double.
#if defined(CPU_CAPABILITY_AVX512)
FN_INLINE double total(Floats v) {
  const __m512 f = v;
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(f)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(f, 1))));
}
FN_INLINE double total(Doubles v) { return _mm512_reduce_add_pd(v); }
#else
template <class V>
FN_INLINE double total(V v) {
  typename V::value_type lane[lanes<V>];
  v.store(lane);
  double sum[2] = {};
  for (int64_t k = 0; k < lanes<V>; ++k) sum[k % 2] += static_cast<double>(lane[k]);
  return sum[0] + sum[1];
}
#endif

// The totals of eight vectors, by a tree that is the same for each of them.
template <class V>
FN_INLINE void totals(const V (&v)[8], double (&out)[8]) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, Floats>) {
    // Each step adds the halves of two vectors into one; what is left at the end are pairs, which double adds.
    __m512 a[4], b[2];
    repeat<4>([&](auto k) FN_LAMBDA {
      const __m512 x = v[2 * k], y = v[2 * k + 1];
      a[k] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    });
    repeat<2>([&](auto k) FN_LAMBDA {
      const __m512d x = _mm512_castps_pd(a[2 * k]), y = _mm512_castps_pd(a[2 * k + 1]);
      b[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    });
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(c)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(c, 1));
    const __m512d even = _mm512_shuffle_f64x2(low, high, 0x44), odd = _mm512_shuffle_f64x2(low, high, 0xee);
    _mm512_storeu_pd(out, _mm512_add_pd(even, odd));
    return;
  }
#endif
  repeat<8>([&](auto k) FN_LAMBDA { out[k] = total(v[k]); });
}

// A sum of vectors with what its additions rounded away (Knuth's two-sum): good to one rounding, whatever the number of terms.
template <class V>
struct Sum {
  V value{0}, lost{0};

  FN_INLINE void add(V v) {
    const V s = value + v, t = s - value;
    lost = lost + ((value - (s - t)) + (v - t));
    value = s;
  }
  FN_INLINE double total() const {
    const double l = fastnorm::total(lost);
    return fastnorm::total(value) + (std::isfinite(l) ? l : 0.0);  // what an infinite sum lost is not a number
  }
};

// K sums each for R rows at once, every row's in CHAINS parts, which hide the latency of an addition where there are few rows.
template <class V, size_t R, size_t K, size_t CHAINS>
struct Chains {
  V s[CHAINS][R][K];

  FN_INLINE Chains() { clear(); }
  FN_INLINE void clear() {
    repeat<CHAINS>([&](auto c) FN_LAMBDA {
      repeat<R>([&](auto r) FN_LAMBDA { repeat<K>([&](auto k) FN_LAMBDA { s[c][r][k] = V(0); }); });
    });
  }
  FN_INLINE V whole(size_t r, size_t k) const {
    V v = s[0][r][k];
    repeat<CHAINS - 1>([&](auto c) FN_LAMBDA { v = v + s[c + 1][r][k]; });
    return v;
  }
};

// Plain additions into one chain before they go to a Sum. Equal terms round alike, so the error of plain additions grows with
// their number, not with its root: 16 of them cost 5e-7 at worst, 1e-8 usually.
constexpr int64_t PLAIN = 16;

template <class T, size_t CHAINS>
constexpr int64_t GROUP = PLAIN * static_cast<int64_t>(CHAINS) * lanes<Vec<T>>;  // elements

#if defined(__AVX512BF16__)
template <class T>
FN_INLINE __m512bh load_pairs(const T* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
FN_INLINE __m512bh pairs_of_ones() { return reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80)); }
#endif

// x and x * x. Where the processor has an instruction for it, bfloat16 is not even widened.
template <class T>
struct Powers {
  using V = Vec<T>;
  template <class R>
  FN_INLINE std::array<V, 2> operator()(R, int64_t, int64_t, const std::array<V, 1>& x) const {
    return {x[0], x[0] * x[0]};
  }
#if defined(__AVX512BF16__)
  FN_INLINE void add_lot(const std::array<const T*, 1>& at, int64_t i, V (&s)[2]) const {
    const __m512bh x = load_pairs(at[0] + i);
    s[0] = _mm512_dpbf16_ps(s[0], x, pairs_of_ones());
    s[1] = _mm512_dpbf16_ps(s[1], x, x);
  }
#endif
};
// dz and dz * x, likewise.
template <class T>
struct Products {
  using V = Vec<T>;
  template <class R>
  FN_INLINE std::array<V, 2> operator()(R, int64_t, int64_t, const std::array<V, 2>& v) const {
    return {v[0], v[0] * v[1]};
  }
#if defined(__AVX512BF16__)
  FN_INLINE void add_lot(const std::array<const T*, 2>& at, int64_t i, V (&s)[2]) const {
    const __m512bh dz = load_pairs(at[0] + i);
    s[0] = _mm512_dpbf16_ps(s[0], dz, pairs_of_ones());
    s[1] = _mm512_dpbf16_ps(s[1], dz, load_pairs(at[1] + i));
  }
#endif
};
// Whether F adds a lot by itself.
template <class F>
constexpr bool FUSED = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool FUSED<Powers<BFloat16>> = true;
template <>
constexpr bool FUSED<Products<BFloat16>> = true;
#endif

// Adds f(r, i, count, inputs) -> std::array<V, K> for the elements [i, n); `at[r]` points to the P inputs of row r. Element i
// is the i-th in the order of lots; lanes that do not exist are zeros in the inputs, and f makes zeros of them.
template <class T, size_t R, size_t K, size_t CHAINS, size_t P, class F>
FN_INLINE void add_up(Chains<Vec<T>, R, K, CHAINS>& to, const std::array<std::array<const T*, P>, R>& at, int64_t i, int64_t n,
                      const F& f) {
  using V = Vec<T>;
  constexpr int64_t LOTS = LOT<T>, W = lanes<V>, STEP = static_cast<int64_t>(CHAINS) * LOTS * W;
  Chains<V, R, K, CHAINS> c = to;  // in registers
  const auto add = [&](auto chain, auto r, int64_t j, int64_t count, const std::array<V, P>& v) FN_LAMBDA {
    const std::array<V, K> t = f(r, j, count, v);
    repeat<K>([&](auto k) FN_LAMBDA { c.s[chain][r][k] = c.s[chain][r][k] + t[k]; });
  };
  const auto add_lots = [&](auto chain, auto r, int64_t j) FN_LAMBDA {
    if constexpr (FUSED<F>) {
      f.add_lot(at[r], j, c.s[chain][r]);
    } else if constexpr (LOTS == 1) {
      add(chain, r, j, W, load_inputs<T, P>(at[r], j, W));
    } else {
      std::array<std::array<V, LOTS>, P> lots;
      repeat<P>([&](auto p) FN_LAMBDA { lots[p] = load_lot(at[r][p] + j); });
      repeat<LOTS>([&](auto l) FN_LAMBDA {
        std::array<V, P> v;
        repeat<P>([&](auto p) FN_LAMBDA { v[p] = lots[p][l]; });
        add(chain, r, j + static_cast<int64_t>(l) * W, W, v);
      });
    }
  };
  for (; i + STEP <= n; i += STEP)
    repeat<CHAINS>([&](auto chain) FN_LAMBDA {
      repeat<R>([&](auto r) FN_LAMBDA { add_lots(chain, r, i + static_cast<int64_t>(chain) * LOTS * W); });
    });
  const auto add_one = [&](auto chain, int64_t count) FN_LAMBDA {
    repeat<R>([&](auto r) FN_LAMBDA { add(chain, r, i, count, load_inputs<T, P>(at[r], i, count)); });
  };
  repeat<CHAINS - 1>([&](auto chain) FN_LAMBDA {
    if (i + LOTS * W > n) return;
    repeat<R>([&](auto r) FN_LAMBDA { add_lots(chain, r, i); });
    i += LOTS * W;
  });
  repeat<LOTS - 1>([&](auto) FN_LAMBDA {
    if (i + W > n) return;
    add_one(std::integral_constant<size_t, CHAINS - 1>{}, W);
    i += W;
  });
  if (i < n) add_one(std::integral_constant<size_t, CHAINS - 1>{}, n - i);
  to = c;
}

// The K sums of f over [0, n) for each of R rows.
template <size_t K, size_t CHAINS, class T, size_t R, size_t P, class F>
FN_INLINE void sum_up(const std::array<std::array<const T*, P>, R>& at, int64_t n, const F& f, double (&out)[R][K]) {
  using V = Vec<T>;
  static_assert(R * K <= 8);
  Chains<V, R, K, CHAINS> chains;
  if (n <= GROUP<T, CHAINS>) {
    add_up(chains, at, 0, n, f);
    if constexpr (CHAINS == 1) {
      V v[8];
      double sums[8];
      repeat<8>([&](auto i) FN_LAMBDA { v[i] = chains.s[0][i / K % R][i % K]; });
      totals(v, sums);
      repeat<R * K>([&](auto i) FN_LAMBDA { out[i / K][i % K] = sums[i]; });
    } else {
      repeat<R * K>([&](auto i) FN_LAMBDA { out[i / K][i % K] = total(chains.whole(i / K, i % K)); });
    }
    return;
  }
  Sum<V> sum[R][K];
  for (int64_t i = 0; i < n; i += GROUP<T, CHAINS>) {
    add_up(chains, at, i, std::min(n, i + GROUP<T, CHAINS>), f);
    repeat<R * K>([&](auto j) FN_LAMBDA { sum[j / K][j % K].add(chains.whole(j / K, j % K)); });
    chains.clear();
  }
  repeat<R * K>([&](auto j) FN_LAMBDA { out[j / K][j % K] = sum[j / K][j % K].total(); });
}

}  // namespace fastnorm
