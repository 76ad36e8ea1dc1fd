// Random words of neighbouring counters, several at once.
#pragma once

#include "../philox.h"
#include "vectors.h"

namespace fastnorm {

#if defined(CPU_CAPABILITY_AVX512)
struct WideWords {
  static constexpr int64_t LANES = 8;
  __m512i v;
  static WideWords from(uint64_t first) {
    return {_mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
};
FN_INLINE WideWords operator^(WideWords a, WideWords b) { return {_mm512_xor_si512(a.v, b.v)}; }
FN_INLINE WideWords all(WideWords, uint32_t word) { return {_mm512_set1_epi64(word)}; }
FN_INLINE WideWords product(WideWords a, uint32_t factor) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(factor))}; }
FN_INLINE WideWords upper(WideWords a) { return {_mm512_srli_epi64(a.v, 32)}; }
// The four words of each lane, one lane's after the other's.
FN_INLINE void store_words(uint32_t* to, const WideWords (&c)[4]) {
  const __m512i a = _mm512_mask_blend_epi32(0xAAAA, c[0].v, _mm512_slli_epi64(c[1].v, 32)),
                b = _mm512_mask_blend_epi32(0xAAAA, c[2].v, _mm512_slli_epi64(c[3].v, 32));
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), last = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a, first, b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(a, last, b));
}
#elif defined(CPU_CAPABILITY_AVX2)
struct WideWords {
  static constexpr int64_t LANES = 4;
  __m256i v;
  static WideWords from(uint64_t first) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
};
FN_INLINE WideWords operator^(WideWords a, WideWords b) { return {_mm256_xor_si256(a.v, b.v)}; }
FN_INLINE WideWords all(WideWords, uint32_t word) { return {_mm256_set1_epi64x(word)}; }
FN_INLINE WideWords product(WideWords a, uint32_t factor) { return {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(factor))}; }
FN_INLINE WideWords upper(WideWords a) { return {_mm256_srli_epi64(a.v, 32)}; }
FN_INLINE void store_words(uint32_t* to, const WideWords (&c)[4]) {
  const __m256i a = _mm256_blend_epi32(c[0].v, _mm256_slli_epi64(c[1].v, 32), 0xAA),
                b = _mm256_blend_epi32(c[2].v, _mm256_slli_epi64(c[3].v, 32), 0xAA);
  const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
#else
struct WideWords {
  static constexpr int64_t LANES = 1;
  uint64_t v;
  static WideWords from(uint64_t first) { return {first}; }
};
FN_INLINE WideWords operator^(WideWords a, WideWords b) { return {a.v ^ b.v}; }
FN_INLINE WideWords all(WideWords, uint32_t word) { return {word}; }
FN_INLINE WideWords product(WideWords a, uint32_t factor) { return {product(a.v, factor)}; }
FN_INLINE WideWords upper(WideWords a) { return {upper(a.v)}; }
FN_INLINE void store_words(uint32_t* to, const WideWords (&c)[4]) {
  for (int k = 0; k < 4; ++k) to[k] = static_cast<uint32_t>(c[k].v);
}
#endif

// The words of N counters from `first` on, 4 N of them in their order.
template <int64_t N>
FN_INLINE void random_words(uint64_t seed, uint64_t first, uint32_t* out) {
  constexpr int64_t LANES = WideWords::LANES;
  constexpr int64_t TOGETHER = std::min<int64_t>(4, N / LANES);  // round by round, for each waits for its products
  static_assert(N % (TOGETHER * LANES) == 0);
  for (int64_t k = 0; k < N; k += TOGETHER * LANES) {
    WideWords c[TOGETHER][4];
    repeat<TOGETHER>([&](auto i) FN_LAMBDA {
      c[i][0] = WideWords::from(first + static_cast<uint64_t>(k + static_cast<int64_t>(i) * LANES));
      c[i][1] = upper(c[i][0]);
      c[i][2] = c[i][3] = all(c[i][0], 0);
    });
    PhiloxKey key(seed);
    repeat<PHILOX_ROUNDS>([&](auto) FN_LAMBDA {
      repeat<TOGETHER>([&](auto i) FN_LAMBDA { philox_round(c[i], key); });
      key.next();
    });
    repeat<TOGETHER>([&](auto i) FN_LAMBDA { store_words(out + 4 * (k + static_cast<int64_t>(i) * LANES), c[i]); });
  }
}

}  // namespace fastnorm
