// What every CPU kernel is made of: types, vectors with a remainder, sums and threads. The remainder loops stand here only.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../norm_math.h"
#include "kernels.h"

namespace fastnorm {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

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

// ---------------------------------------------------------------- loads and stores, converting 16-bit types in registers

inline at::vec::Vectorized<double> load(const double* p) { return at::vec::Vectorized<double>::loadu(p); }
inline at::vec::Vectorized<float> load(const float* p) { return at::vec::Vectorized<float>::loadu(p); }
inline void store(double* p, at::vec::Vectorized<double> v) { v.store(p); }
inline void store(float* p, at::vec::Vectorized<float> v) { v.store(p); }

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
using Bits16 = __m256i;
using Floats = __m512;
inline Bits16 load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bits(void* p, Bits16 v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
#else
using Bits16 = __m128i;
using Floats = __m256;
inline Bits16 load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_bits(void* p, Bits16 v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
#endif
// 16 bits of the type that the first argument points to, as floats, and back (round to nearest even).
inline at::vec::Vectorized<float> widen(const BFloat16*, Bits16 bits) {
  Floats v;
  at::vec::cvtbf16_fp32(bits, v);
  return v;
}
inline at::vec::Vectorized<float> widen(const Half*, Bits16 bits) {
  Floats v;
  at::vec::cvtfp16_fp32(bits, v);
  return v;
}
inline Bits16 narrow(const BFloat16*, at::vec::Vectorized<float> v) { return at::vec::cvtfp32_bf16(Floats(v)); }
inline Bits16 narrow(const Half*, at::vec::Vectorized<float> v) { return at::vec::cvtfp32_fp16(Floats(v)); }

inline at::vec::Vectorized<float> load(const BFloat16* p) { return widen(p, load_bits(p)); }
inline at::vec::Vectorized<float> load(const Half* p) { return widen(p, load_bits(p)); }
inline void store(BFloat16* p, at::vec::Vectorized<float> v) { store_bits(p, narrow(p, v)); }
inline void store(Half* p, at::vec::Vectorized<float> v) { store_bits(p, narrow(p, v)); }
#else
template <class T>
at::vec::Vectorized<float> load_each(const T* p) {
  float v[lanes<at::vec::Vectorized<float>>];
  std::copy_n(p, lanes<at::vec::Vectorized<float>>, v);
  return load(v);
}
template <class T>
void store_each(T* p, at::vec::Vectorized<float> v) {
  float f[lanes<at::vec::Vectorized<float>>];
  v.store(f);
  std::copy_n(f, lanes<at::vec::Vectorized<float>>, p);
}
inline at::vec::Vectorized<float> load(const BFloat16* p) { return load_each(p); }
inline at::vec::Vectorized<float> load(const Half* p) { return load_each(p); }
inline void store(BFloat16* p, at::vec::Vectorized<float> v) { store_each(p, v); }
inline void store(Half* p, at::vec::Vectorized<float> v) { store_each(p, v); }
#endif

// The first `count` elements; the other lanes are zero and are not touched in memory.
template <class T>
inline Vec<T> load(const T* p, int64_t count) {
  constexpr int64_t W = lanes<Vec<T>>;
  if (count == W) return load(p);
  if constexpr (std::is_same_v<T, Acc<T>>) return Vec<T>::loadu(p, count);
#if defined(CPU_CAPABILITY_AVX512)
  else
    return widen(p, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
#else
  T v[W] = {};
  std::copy_n(p, count, v);
  return load(v);
#endif
}
template <class T>
inline void store(T* p, Vec<T> v, int64_t count) {
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

// ---------------------------------------------------------------- loops

// f(i, count) for vectors that cover [0, n); count is the number of lanes that exist.
template <class V, class F>
inline void for_vectors(int64_t n, const F& f) {
  constexpr int64_t W = lanes<V>;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}

// A sum of vectors with what its additions rounded away (Knuth's two-sum): good to one rounding, whatever the number of terms.
template <class V>
struct Sum {
  V value{0}, lost{0};

  void add(V v) {
    const V s = value + v, t = s - value;
    lost = lost + ((value - (s - t)) + (v - t));
    value = s;
  }
  // One double per lane. What an infinite sum lost is not a number.
  void store(double* out) const {
    typename V::value_type v[lanes<V>], l[lanes<V>];
    value.store(v);
    lost.store(l);
    for (int64_t k = 0; k < lanes<V>; ++k)
      out[k] = static_cast<double>(v[k]) + (std::isfinite(v[k]) ? static_cast<double>(l[k]) : 0.0);
  }
  // All lanes, in double: a float tree over the lanes would round more than all additions before it.
  double total() const {
    double lane[lanes<V>], sum[4] = {};
    store(lane);
    for (int64_t k = 0; k < lanes<V>; ++k) sum[k % 4] += lane[k];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

// Adds K quantities over [0, n) to `total`, f(i, count) -> std::array<V, K>. Four chains hide the latency of an addition;
// eight vectors are added plainly before each two-sum.
template <class V, size_t K, class F>
inline void add_sums(std::array<Sum<V>, K>& total, int64_t n, const F& f) {
  constexpr int64_t W = lanes<V>, GROUP = 8 * W;
  for (int64_t start = 0; start < n; start += GROUP) {
    const int64_t end = std::min(n, start + GROUP);
    V s[4][K];
    for (auto& chain : s)
      for (auto& v : chain) v = V(0);
    const auto add = [&](int chain, const std::array<V, K>& t) {
      for (size_t k = 0; k < K; ++k) s[chain][k] = s[chain][k] + t[k];
    };
    int64_t i = start;
    for (; i + 4 * W <= end; i += 4 * W)
      for (int chain = 0; chain < 4; ++chain) add(chain, f(i + chain * W, W));
    for (; i + W <= end; i += W) add(0, f(i, W));
    if (i < end) {
      auto t = f(i, end - i);
      for (auto& v : t) v = V::set(V(0), v, end - i);
      add(1, t);
    }
    for (size_t k = 0; k < K; ++k) total[k].add((s[0][k] + s[1][k]) + (s[2][k] + s[3][k]));
  }
}

// The sums of K quantities over `runs` runs of n elements, f(offset, count) -> std::array<V, K>.
template <class V, size_t K, class F>
inline std::array<double, K> sums_over(int64_t runs, int64_t run_stride, int64_t n, const F& f) {
  std::array<Sum<V>, K> total;
  for (int64_t r = 0; r < runs; ++r)
    add_sums<V, K>(total, n, [&](int64_t i, int64_t count) { return f(r * run_stride + i, count); });
  std::array<double, K> out;
  for (size_t k = 0; k < K; ++k) out[k] = total[k].total();
  return out;
}

// f(begin, end) on torch's own threads. The split of the work must not show in the result: callers give items of fixed size.
template <class F>
void parallel_for(int64_t items, int64_t elements_per_item, const F& f) {
  constexpr int64_t GRAIN = 32768;  // elements below which a second thread costs more than it brings
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements_per_item));
  if (items <= grain) return f(0, items);
  torch_parallel_for(
      0, items, grain, [](int64_t begin, int64_t end, void* g) { (*static_cast<const F*>(g))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- statistics

// A mean as the pair that the contract asks for; the low part of a double mean is zero.
template <class A>
struct Pair {
  A high, low;
  explicit Pair(double mean)
      : high(static_cast<A>(mean)), low(static_cast<A>(mean - static_cast<double>(static_cast<A>(mean)))) {}
};

// Two passes in double: where the squares overflow float (|x| > 1e19), and for what is not finite.
template <class T>
Moments<double> moments_in_double(const T* p, int64_t runs, int64_t run_stride, int64_t n, int64_t stride) {
  double sum = 0, m2 = 0;
  const double count = static_cast<double>(runs * n);
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(p[r * run_stride + i * stride]);
  const double mean = sum / count;
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t i = 0; i < n; ++i) {
      const double d = static_cast<double>(p[r * run_stride + i * stride]) - mean;
      m2 += d * d;
    }
  return {count, mean, m2};
}

// From sums of d = x - high and d * d.
inline Moments<double> moments_about(double n, double high, double sum_d, double sum_dd) {
  return {n, high + sum_d / n, std::max(sum_dd - sum_d * (sum_d / n), 0.0)};
}

// Moments of `runs` runs of n contiguous elements: a mean, then sums about it, while the data is in cache.
template <class T>
Moments<double> moments_of(const T* p, int64_t runs, int64_t run_stride, int64_t n) {
  using V = Vec<T>;
  const double count = static_cast<double>(runs * n);
  const auto sum = sums_over<V, 1>(runs, run_stride, n, [&](int64_t i, int64_t c) { return std::array<V, 1>{load(p + i, c)}; });
  const auto high = static_cast<Acc<T>>(sum[0] / count);
  const auto [sum_d, sum_dd] = sums_over<V, 2>(runs, run_stride, n, [&](int64_t i, int64_t c) {
    const V d = load(p + i, c) - V(high);
    return std::array<V, 2>{d, d * d};
  });
  if (!std::isfinite(sum_dd)) return moments_in_double(p, runs, run_stride, n, int64_t{1});
  return moments_about(count, static_cast<double>(high), sum_d, sum_dd);
}

// ---------------------------------------------------------------- small arrays of any dtype

inline double element(ConstArray a, int64_t i) {
  double v = 0;
  with_type(a.dtype, [&](auto* t) { v = static_cast<double>(static_cast<decltype(t)>(const_cast<void*>(a.data))[i]); });
  return v;
}
inline void set_element(Array a, int64_t i, double v) {
  with_type(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    static_cast<T*>(a.data)[i] = static_cast<T>(static_cast<Acc<T>>(v));
  });
}

// A parameter in the accumulate dtype: itself where it is that already, else a converted copy; null where there is none.
template <class A>
class Widened {
 public:
  Widened(ConstArray a, int64_t n) {
    if (!a.data) return;
    if (a.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32)) {
      data_ = static_cast<const A*>(a.data);
      return;
    }
    own_.resize(n);
    data_ = own_.data();
    with_type(a.dtype, [&](auto* t) { std::copy_n(static_cast<decltype(t)>(const_cast<void*>(a.data)), n, own_.begin()); });
  }
  // With `absent` in the place of every element of a parameter that is not there.
  Widened(ConstArray a, int64_t n, A absent) : Widened(a, n) {
    if (data_) return;
    own_.assign(n, absent);
    data_ = own_.data();
  }
  Widened(const Widened&) = delete;
  operator const A*() const { return data_; }

 private:
  const A* data_ = nullptr;
  std::vector<A> own_;
};

}  // namespace fastnorm
