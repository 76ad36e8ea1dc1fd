// Sums: over the lanes of a vector, and over rows of elements with an error that does not grow with their number.
#pragma once

#include "vectors.h"

namespace fastnorm {

// All lanes, in double.
#if defined(CPU_CAPABILITY_AVX512)
FN_INLINE double total(Floats v) {
  const __m512 f = v;
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(f)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(f, 1))));
}
FN_INLINE double total(Doubles v) { return _mm512_reduce_add_pd(v); }
#elif defined(CPU_CAPABILITY_AVX2)
FN_INLINE double total(Doubles v) {
  const __m256d d = v;
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(d), _mm256_extractf128_pd(d, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
FN_INLINE Doubles halves(Floats v) {  // the lower and the upper lanes, added in double
  const __m256 f = v;
  return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(f)), _mm256_cvtps_pd(_mm256_extractf128_ps(f, 1)));
}
FN_INLINE double total(Floats v) { return total(halves(v)); }
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
#if defined(FN_REGISTERS)
  if constexpr (std::is_same_v<V, Floats>) {
    // Each step adds the halves of two vectors into one; what is left at the end, double adds.
    Register a[4], b[2];
    repeat<4>([&](auto k)
                  FN_LAMBDA { a[k] = Floats(low_words(v[2 * k], v[2 * k + 1])) + Floats(high_words(v[2 * k], v[2 * k + 1])); });
    repeat<2>([&](auto k)
                  FN_LAMBDA { b[k] = Floats(low_pairs(a[2 * k], a[2 * k + 1])) + Floats(high_pairs(a[2 * k], a[2 * k + 1])); });
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(c)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(c, 1));
    const __m512d even = _mm512_shuffle_f64x2(low, high, 0x44), odd = _mm512_shuffle_f64x2(low, high, 0xee);
    _mm512_storeu_pd(out, _mm512_add_pd(even, odd));
#else
    repeat<2>([&](auto k) FN_LAMBDA { store(out + 4 * k, halves(Floats(b[k]))); });
#endif
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

// Of one input x and x * x, of two dz and dz * x. Where the processor has an instruction for it, bfloat16 is not even widened.
template <class T, size_t P>
struct Products {
  using V = Vec<T>;
  template <class R>
  FN_INLINE std::array<V, 2> operator()(R, int64_t, int64_t, const std::array<V, P>& v) const {
    const V a = loaded(v[0]);
    return {a, a * (P == 1 ? a : v[P - 1])};
  }
#if defined(__AVX512BF16__)
  template <class Read>
  FN_INLINE void add_lot(const Read& read, const std::array<const T*, P>& at, int64_t i, V (&s)[2]) const {
    const auto pairs = [&](size_t p) FN_LAMBDA { return reinterpret_cast<__m512bh>(read.pairs(at, p, i)); };
    const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    s[0] = _mm512_dpbf16_ps(s[0], pairs(0), ones);
    s[1] = _mm512_dpbf16_ps(s[1], pairs(0), pairs(P - 1));
  }
#endif
};
// Whether F adds a lot by itself.
template <class F>
constexpr bool FUSED = false;
#if defined(__AVX512BF16__)
template <size_t P>
constexpr bool FUSED<Products<BFloat16, P>> = true;
#endif

// How the P inputs of a row are read: as they are.
struct AsTheyAre {
  template <class T, size_t P>
  FN_INLINE std::array<Vec<T>, P> vectors(const std::array<const T*, P>& at, int64_t i, int64_t count) const {
    return load_inputs<T, P>(at, i, count);
  }
  template <class T, size_t P>
  FN_INLINE std::array<std::array<Vec<T>, LOT<T>>, P> lots(const std::array<const T*, P>& at, int64_t i) const {
    std::array<std::array<Vec<T>, LOT<T>>, P> lots;
    repeat<P>([&](auto p) FN_LAMBDA { lots[p] = load_lot(at[p] + i); });
    return lots;
  }
#if defined(__AVX512BF16__)
  // A lot of the p-th input, not even widened.
  template <class T, size_t P>
  FN_INLINE __m512i pairs(const std::array<const T*, P>& at, size_t p, int64_t i) const {
    return _mm512_loadu_si512(at[p] + i);
  }
#endif
};

// Adds f(r, i, count, inputs) -> std::array<V, K> for the elements [i, n); `at[r]` points to the P inputs of row r. Element i
// is the i-th in the order of lots; lanes that do not exist are zeros in the inputs, and f makes zeros of them.
template <class T, size_t R, size_t K, size_t CHAINS, size_t P, class F, class Read = AsTheyAre>
FN_INLINE void add_up(Chains<Vec<T>, R, K, CHAINS>& to, const std::array<std::array<const T*, P>, R>& at, int64_t i, int64_t n,
                      const F& f, const Read& read = {}) {
  using V = Vec<T>;
  constexpr int64_t LOTS = LOT<T>, W = lanes<V>, STEP = static_cast<int64_t>(CHAINS) * LOTS * W;
  Chains<V, R, K, CHAINS> c = to;  // in registers
  const auto add = [&](auto chain, auto r, int64_t j, int64_t count, const std::array<V, P>& v) FN_LAMBDA {
    const std::array<V, K> t = f(r, j, count, v);
    repeat<K>([&](auto k) FN_LAMBDA { c.s[chain][r][k] = c.s[chain][r][k] + t[k]; });
  };
  const auto add_lots = [&](auto chain, auto r, int64_t j) FN_LAMBDA {
    if constexpr (FUSED<F>) {
      f.add_lot(read, at[r], j, c.s[chain][r]);
    } else if constexpr (LOTS == 1) {
      add(chain, r, j, W, read.vectors(at[r], j, W));
    } else {
      const auto lots = read.lots(at[r], j);
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
    repeat<R>([&](auto r) FN_LAMBDA { add(chain, r, i, count, read.vectors(at[r], i, count)); });
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
