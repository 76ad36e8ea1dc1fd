// What relu's backward needs of z, in a bit for each element: bit i % 8 of byte i / 8 is 1 where z is not <= 0 (a NaN is not).
// Elements are counted in the order of y's memory. WORD more bytes than that are there to be written and read.
#pragma once

#include "loops.h"

namespace fastnorm::cpu {

constexpr int64_t WORD = 8;

// ---------------------------------------------------------------- writing them

// Whether a vector's are whole bytes.
template <class T>
constexpr bool WHOLE_BYTES = lanes<Vec<T>> % 8 == 0;

template <class V>
FN_INLINE uint64_t zeros(V v) {
  return static_cast<uint64_t>(v.zero_mask()) & ((uint64_t{1} << lanes<V>) - 1);
}

// The bits of y = relu(z), which is zero for all z <= 0: those of J vectors, in lots as load_group has them. Of one vector
// alone half may not exist.
template <class T, size_t J>
FN_INLINE void put_bits(uint8_t* to, const std::array<Vec<T>, J>& y, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<V>;
  static_assert(WHOLE_BYTES<T> && J * W <= 8 * WORD);
  uint64_t zero = 0;
  if constexpr (IN_LOTS<T, J>) {
#if defined(CPU_CAPABILITY_AVX2)
    // As words are cut to bytes 0 stays 0 and -0 becomes -128, all others are neither.
    const auto words = [&](auto j) FN_LAMBDA { return narrow_lot(y[2 * j], y[2 * j + 1]); };
    if constexpr (J % 4 == 0)
      repeat<J / 4>([&](auto j) FN_LAMBDA {
        const __m256i halves = _mm256_packs_epi16(words(2 * j), words(2 * j + 1));
        const __m256i bytes = _mm256_permute4x64_epi64(halves, 0xd8);
        const __m256i none = _mm256_cmpeq_epi8(_mm256_add_epi8(bytes, bytes), _mm256_setzero_si256());
        zero |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(none))) << (j * 32);
      });
    else
      repeat<J / 2>([&](auto j) FN_LAMBDA {
        const __m256i w = words(j);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
        const __m128i none = _mm_cmpeq_epi8(_mm_add_epi8(bytes, bytes), _mm_setzero_si128());
        zero |= static_cast<uint64_t>(_mm_movemask_epi8(none)) << (j * 16);
      });
#endif
  } else {
    repeat<J>([&](auto j) FN_LAMBDA { zero |= zeros(y[j]) << (j * W); });
  }
  const uint64_t bits = ~zero;
  if (W > 8 && J == 1 && count < W)
    *to = static_cast<uint8_t>(bits);
  else
    std::memcpy(to, &bits, J * W / 8);
}

// The same for all n elements from y on.
template <class T>
void put_bits(const T* y, int64_t n, uint8_t* to) {
  using V = Vec<T>;
  constexpr int64_t BITS = 8 * WORD;
  parallel_for(ceil_div(n, BITS), BITS, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* at = y + k * BITS;
      uint64_t zero = 0;
      for_vectors<V>(std::min(n - k * BITS, BITS),
                     [&](int64_t i, int64_t count) FN_LAMBDA { zero |= zeros(load(at + i, count)) << i; });
      const uint64_t bits = ~zero;
      std::memcpy(to + k * WORD, &bits, WORD);
    }
  });
}

// ---------------------------------------------------------------- reading them

// dz = dy where z's bit is set, else 0, for n elements from element i on.
template <class T>
void keep_marked(const T* dy, const uint8_t* bits, int64_t i, int64_t n, T* dz) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  constexpr int64_t TOGETHER = 32;  // at most 8 * WORD - 7
  const auto some = [&](int64_t k, int64_t count) FN_LAMBDA {
    uint64_t word;
    std::memcpy(&word, bits + k / 8, WORD);
    word >>= k % 8;
    for (int64_t j = 0; j < count; ++j) {
      Word element;
      std::memcpy(&element, dy + k + j, sizeof element);
      element &= static_cast<Word>(-static_cast<Word>(static_cast<uint32_t>(word) >> j & 1));
      std::memcpy(static_cast<void*>(dz + k + j), &element, sizeof element);
    }
  };
  const int64_t end = i + n;
  for (; i + TOGETHER <= end; i += TOGETHER) some(i, TOGETHER);
  if (i < end) some(i, end - i);
}

// Bits beside an input of a sweep, dy, and where what they leave of it goes, or null; all lie as y does.
template <class T>
struct Marks {
  const T* dy;
  const uint8_t* bits;
  T* dz;
};

#if defined(CPU_CAPABILITY_AVX512)
// Whether dy is read through its bits about as fast as without; and whether those of a vector may begin within a byte, and some
// of them not exist.
template <class T>
constexpr bool MARKS_READ = true;
constexpr bool MARKS_ANYWHERE = true;

// Those of 32 elements from `dy` on.
template <class T>
FN_INLINE uint32_t bits_from(const Marks<T>& marks, const T* dy) {
  const size_t i = static_cast<size_t>(dy - marks.dy);
  uint64_t word;
  std::memcpy(&word, marks.bits + (i >> 3), WORD);
  return static_cast<uint32_t>(word >> (i & 7));
}
// What bits leave of a vector's elements, and their like stored.
FN_INLINE Floats left_of(const float* p, uint32_t bits) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p); }
FN_INLINE Doubles left_of(const double* p, uint32_t bits) { return _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p); }
FN_INLINE Bits16 left_of(const BFloat16* p, uint32_t bits) { return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), p); }
FN_INLINE Bits16 left_of(const Half* p, uint32_t bits) { return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), p); }
template <class T>
FN_INLINE void put_left(T* p, Vec<T> v, int64_t count, bool past) {
  past ? stream(p, v) : store(p, v, count);
}
template <class T>
FN_INLINE void put_left(T* p, Bits16 bits, int64_t count, bool past) {
  if (past) return stream_bits(p, bits);
  count == lanes<Floats> ? store_bits(p, bits) : store_bits(p, bits, count);
}
FN_INLINE Floats widened(const float*, Floats v) { return v; }
FN_INLINE Doubles widened(const double*, Doubles v) { return v; }
template <class T>
FN_INLINE Floats widened(const T* p, Bits16 bits) {
  return widen(p, bits);
}

// J vectors of dz from `dy` on, the only one of `count` lanes, as load_group would have them of it; where `dz` is not null they
// go there as well.
template <class T, size_t J>
FN_INLINE std::array<Vec<T>, J> load_marked(const Marks<T>& marks, const T* dy, int64_t count, T* dz = nullptr,
                                            bool stream = false) {
  constexpr int64_t W = lanes<Vec<T>>;
  const bool some = J == 1 && count < W, past = stream && !some && J * W * sizeof(T) % 64 == 0;  // whole lines, as in put_all
  std::array<Vec<T>, J> v;
  repeat<J>([&](auto j) FN_LAMBDA {
    const uint32_t bits = bits_from(marks, dy + j * W);
    const auto left = left_of(dy + j * W, some ? bits & ((1u << count) - 1) : bits);
    if (dz) put_left(dz + j * W, left, count, past);
    v[j] = widened(dy, left);
  });
  return v;
}
template <class T>
FN_INLINE std::array<Vec<T>, LOT<T>> load_marked_lot(const Marks<T>& marks, const T* dy) {
  if constexpr (LOT<T> == 1)
    return load_marked<T, 1>(marks, dy, lanes<Vec<T>>);
  else
    return lot_of(dy, _mm512_maskz_loadu_epi16(bits_from(marks, dy), dy));
}

#elif defined(CPU_CAPABILITY_AVX2)
template <class T>
constexpr bool MARKS_READ = sizeof(T) < 8;
constexpr bool MARKS_ANYWHERE = false;

// What bits leave of eight words, of eight elements of 16 bits, and of sixteen.
FN_INLINE __m256i marked_words(const void* p, uint8_t bits) {
  const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), own), own);
  return _mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), set);
}
FN_INLINE __m128i marked_eight(const void* p, uint8_t bits) {
  const __m128i own = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm_and_si128(load_bits(p), _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(bits), own), own));
}
FN_INLINE __m256i marked_sixteen(const void* p, const uint8_t* bits) {
  const __m256i own = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  int16_t word;
  std::memcpy(&word, bits, sizeof word);
  const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(word), own), own);
  return _mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), set);
}

// J whole vectors of dz from `dy` on, as load_group would have them of it; where `dz` is not null they go there as well.
template <class T, size_t J>
FN_INLINE std::array<Vec<T>, J> load_marked(const Marks<T>& marks, const T* dy, int64_t, T* dz = nullptr, bool stream = false) {
  std::array<Vec<T>, J> v;
  constexpr int64_t W = lanes<Floats>;
  const uint8_t* bits = marks.bits + (static_cast<size_t>(dy - marks.dy) >> 3);
  const bool past = stream && J * W * sizeof(T) % 64 == 0;  // whole lines, as in put_all
  const auto put = [&](int64_t i, auto left) FN_LAMBDA {
    if (!dz) return;
    if constexpr (sizeof(left) == sizeof(__m256i))
      if (past) return stream_bits(dz + i, left);
    store_bits(dz + i, left);
  };
  if constexpr (IN_LOTS<T, J>) {
    repeat<J / 2>([&](auto j) FN_LAMBDA {
      const __m256i left = marked_sixteen(dy + j * 2 * W, bits + j * 2);
      put(j * 2 * W, left);
      const auto lot = lot_of(dy, left);
      v[2 * j] = lot[0], v[2 * j + 1] = lot[1];
    });
  } else if constexpr (sizeof(T) == 4) {
    repeat<J>([&](auto j) FN_LAMBDA {
      const __m256i left = marked_words(dy + j * W, bits[j]);
      put(j * W, left);
      v[j] = _mm256_castsi256_ps(left);
    });
  } else {
    repeat<J>([&](auto j) FN_LAMBDA {
      const __m128i left = marked_eight(dy + j * W, bits[j]);
      put(j * W, left);
      v[j] = widen(dy, left);
    });
  }
  return v;
}
template <class T>
FN_INLINE std::array<Vec<T>, LOT<T>> load_marked_lot(const Marks<T>& marks, const T* dy) {
  return load_marked<T, LOT<T>>(marks, dy, lanes<Vec<T>>);
}

#else
template <class T>
constexpr bool MARKS_READ = false;
constexpr bool MARKS_ANYWHERE = false;

template <class T, size_t J>
std::array<Vec<T>, J> load_marked(const Marks<T>&, const T*, int64_t, T* = nullptr, bool = false) {
  static_assert(MARKS_READ<T>);
  return {};
}
template <class T>
std::array<Vec<T>, LOT<T>> load_marked_lot(const Marks<T>&, const T*) {
  static_assert(MARKS_READ<T>);
  return {};
}
#endif

// The same, to where the marks say.
template <class T, size_t J>
FN_INLINE std::array<Vec<T>, J> pass_marked(const Marks<T>& marks, const T* dy, int64_t count, bool stream) {
  return load_marked<T, J>(marks, dy, count, marks.dz ? marks.dz + (dy - marks.dy) : nullptr, stream);
}

// How the inputs of a row are read where the first is dy beside bits.
template <class T>
struct Marked : AsTheyAre {
  Marks<T> marks;
  explicit Marked(const Marks<T>& m) : marks(m) {}
  template <size_t P>
  FN_INLINE std::array<Vec<T>, P> vectors(const std::array<const T*, P>& at, int64_t i, int64_t count) const {
    auto v = AsTheyAre::vectors(at, i, count);
    v[0] = load_marked<T, 1>(marks, at[0] + i, count)[0];
    return v;
  }
  template <size_t P>
  FN_INLINE std::array<std::array<Vec<T>, LOT<T>>, P> lots(const std::array<const T*, P>& at, int64_t i) const {
    auto lots = AsTheyAre::lots(at, i);
    lots[0] = load_marked_lot<T>(marks, at[0] + i);
    return lots;
  }
#if defined(__AVX512BF16__)
  template <size_t P>
  FN_INLINE __m512i pairs(const std::array<const T*, P>& at, size_t p, int64_t i) const {
    return p == 0 ? _mm512_maskz_loadu_epi16(bits_from(marks, at[0] + i), at[0] + i) : AsTheyAre::pairs(at, p, i);
  }
#endif
};

}  // namespace fastnorm::cpu
