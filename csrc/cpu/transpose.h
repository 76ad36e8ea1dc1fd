// Blocks of elements turned round.
#pragma once

#include "vectors.h"

namespace fastnorm {

#if defined(FN_REGISTERS)
constexpr int64_t BLOCK = lanes<Floats>;

// A vector of elements of two or four bytes as words, and back.
template <class T>
FN_INLINE Register load_words(const T* p) {
  if constexpr (sizeof(T) == 4)
    return load(p);
  else
    return reinterpret_cast<Register>(unpacked(load_bits(p)));
}
template <class T>
FN_INLINE void store_words(T* p, Register v) {
  if constexpr (sizeof(T) == 4)
    store(p, Floats(v));
  else
    store_bits(p, packed(reinterpret_cast<TwoBits16>(v)));
}

// A block of as many rows as a vector has lanes. at::vec's does the same, and clears four kilobytes on each call
// with AVX-512.
template <class T>
void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Register a[BLOCK], b[BLOCK];
  repeat<BLOCK>([&](auto k) FN_LAMBDA { a[k] = load_words(from + k * from_stride); });
  repeat<BLOCK / 2>([&](auto k) FN_LAMBDA {  // pairs of rows
    b[2 * k] = low_words(a[2 * k], a[2 * k + 1]);
    b[2 * k + 1] = high_words(a[2 * k], a[2 * k + 1]);
  });
  repeat<BLOCK / 2>([&](auto k) FN_LAMBDA {  // fours of rows: a[4q + c] has columns c, c + 4, ... of rows 4q to 4q + 3
    constexpr size_t q = k / 2 * 4, h = k % 2;
    a[q + 2 * h] = low_pairs(b[q + h], b[q + h + 2]);
    a[q + 2 * h + 1] = high_pairs(b[q + h], b[q + h + 2]);
  });
  repeat<4>([&](auto c) FN_LAMBDA {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88), high = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88),
                 high2 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    store_words(to + c * to_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    store_words(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    store_words(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    store_words(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
#else
    store_words(to + c * to_stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
    store_words(to + (c + 4) * to_stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
#endif
  });
}
#else
constexpr int64_t BLOCK = 16;
#endif

// to[j][i] = from[i][j]; row after row of `to`, whose cache lines are fetched one after the other then.
template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += BLOCK)
    for (int64_t i = 0; i < rows; i += BLOCK) {
      const int64_t m = std::min(BLOCK, rows - i), n = std::min(BLOCK, columns - j);
      const T* block = from + i * from_stride + j;
      T* turned = to + j * to_stride + i;
#if defined(FN_REGISTERS)
      if constexpr (sizeof(T) <= 4)
        if (m == BLOCK && n == BLOCK) {
          transpose_block(block, from_stride, turned, to_stride);
          continue;
        }
#endif
      for (int64_t r = 0; r < m; ++r)
        for (int64_t c = 0; c < n; ++c) turned[c * to_stride + r] = block[r * from_stride + c];
    }
}

}  // namespace fastnorm
