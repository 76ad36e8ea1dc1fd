// What is written in an instruction set's own words: the 16-bit types widened to floats and rounded back (to nearest even),
// whole vectors and the first `count` lanes of them. Where the instruction set is none of those here, vectors.h does it by
// elements.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define FN_INLINE inline __attribute__((always_inline))
#define FN_LAMBDA __attribute__((always_inline))

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define FN_REGISTERS
#endif

namespace fastnorm {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;
using Floats = at::vec::Vectorized<float>;
using Doubles = at::vec::Vectorized<double>;

// Register: a vector of floats. Bits16: as many elements of 16 bits; TwoBits16: those of two vectors, or words.
#if defined(FN_REGISTERS)
FN_INLINE void store_bits(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
FN_INLINE void stream_bits(void* p, __m256i v) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }
#endif

#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
using Bits16 = __m256i;
using TwoBits16 = __m512i;

FN_INLINE Bits16 load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FN_INLINE void store_bits(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
FN_INLINE void stream_bits(void* p, __m512i v) { _mm512_stream_si512(static_cast<__m512i*>(p), v); }
FN_INLINE TwoBits16 unpacked(Bits16 bits) { return _mm512_cvtepu16_epi32(bits); }
FN_INLINE Bits16 packed(TwoBits16 words) { return _mm512_cvtepi32_epi16(words); }

FN_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
FN_INLINE Bits16 load_bits(const void* p, int64_t count) { return _mm256_maskz_loadu_epi16(first(count), p); }
FN_INLINE void store_bits(void* p, Bits16 v, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), v); }
FN_INLINE Floats load_first(const float* p, int64_t count) { return Floats::loadu(p, count); }
FN_INLINE Doubles load_first(const double* p, int64_t count) { return Doubles::loadu(p, count); }
FN_INLINE void store_first(float* p, Floats v, int64_t count) { v.store(p, static_cast<int>(count)); }
FN_INLINE void store_first(double* p, Doubles v, int64_t count) { v.store(p, static_cast<int>(count)); }
FN_INLINE Floats keep_first(Floats v, int64_t count) { return _mm512_maskz_mov_ps(first(count), v); }
FN_INLINE Doubles keep_first(Doubles v, int64_t count) { return Doubles::set(Doubles(0), v, count); }

// 2^n, where the lowest nine bits of each word are n, from -126 to 127; 0 for -127.
FN_INLINE Floats power_of_two(Floats n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(n), 23), _mm512_set1_epi32(127 << 23)));
}

// v * 2^n for a whole n, as far as floats reach: 0 and infinity beyond.
#define FN_SCALES
FN_INLINE Floats scaled(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }

// Within each 128 bits: words of a and b in turn, from the lower or the upper half, and pairs of words likewise.
FN_INLINE __m512 low_words(__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b); }
FN_INLINE __m512 high_words(__m512 a, __m512 b) { return _mm512_unpackhi_ps(a, b); }
FN_INLINE __m512 low_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FN_INLINE __m512 high_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// 16 bits of the type that the first argument points to, as floats, and back.
FN_INLINE Floats widen(const BFloat16*, Bits16 bits) {  // each word to the upper half of its lane, in one shuffle
  const __m512i from =
      _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(bits)));
}
#if defined(__AVX512BF16__)
FN_INLINE Bits16 narrow(const BFloat16*, Floats v) { return reinterpret_cast<Bits16>(_mm512_cvtneps_pbh(Register(v))); }
#else
FN_INLINE Bits16 narrow(const BFloat16*, Floats v) { return at::vec::cvtfp32_bf16(Register(v)); }
#endif

#elif defined(CPU_CAPABILITY_AVX2)
using Register = __m256;
using Bits16 = __m128i;
using TwoBits16 = __m256i;

FN_INLINE Bits16 load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FN_INLINE void store_bits(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
FN_INLINE void stream_bits(void* p, __m128i v) { _mm_stream_si128(static_cast<__m128i*>(p), v); }
FN_INLINE TwoBits16 unpacked(Bits16 bits) { return _mm256_cvtepu16_epi32(bits); }
FN_INLINE Bits16 packed(TwoBits16 words) {  // their upper halves are zero
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <class U>
FN_INLINE U read(const char* p) {
  U u;
  std::memcpy(&u, p, sizeof u);
  return u;
}
// By halves: a masked store is microcode in some processors, and there is none of 16 bits.
FN_INLINE Bits16 load_bits(const void* from, int64_t count) {
  const char *p = static_cast<const char*>(from), *end = p + 2 * count;
  uint64_t rest = 0;
  if (count & 1) rest = read<uint16_t>(end -= 2);
  if (count & 2) rest = rest << 32 | read<uint32_t>(end -= 4);
  const __m128i behind = _mm_cvtsi64_si128(static_cast<int64_t>(rest));
  return (count & 4) ? _mm_unpacklo_epi64(_mm_cvtsi64_si128(read<int64_t>(p)), behind) : behind;
}
FN_INLINE void store_bits(void* to, Bits16 v, int64_t count) {
  char* p = static_cast<char*>(to);
  if (count & 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v);
    v = _mm_unpackhi_epi64(v, v);
    p += 8;
  }
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  if (count & 2) {
    std::memcpy(p, &rest, 4);
    rest >>= 32;
    p += 4;
  }
  if (count & 1) std::memcpy(p, &rest, 2);
}

// Ones in the first `count` of eight words.
FN_INLINE __m256i first_words(int64_t count) {
  alignas(64) static constexpr int32_t ONES[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ONES + 8 - count));
}
FN_INLINE Floats load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_words(count)); }
FN_INLINE Doubles load_first(const double* p, int64_t count) { return _mm256_maskload_pd(p, first_words(2 * count)); }
FN_INLINE void store_first(float* p, Floats v, int64_t count) {
  __m128 part = _mm256_castps256_ps128(v);
  if (count & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, part);
}
FN_INLINE void store_first(double* p, Doubles v, int64_t count) {
  store_first(reinterpret_cast<float*>(p), _mm256_castpd_ps(v), 2 * count);
}
FN_INLINE Floats keep_first(Floats v, int64_t count) { return _mm256_and_ps(v, _mm256_castsi256_ps(first_words(count))); }
FN_INLINE Doubles keep_first(Doubles v, int64_t count) { return _mm256_and_pd(v, _mm256_castsi256_pd(first_words(2 * count))); }

FN_INLINE Floats power_of_two(Floats n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(n), 23), _mm256_set1_epi32(127 << 23)));
}

FN_INLINE __m256 low_words(__m256 a, __m256 b) { return _mm256_unpacklo_ps(a, b); }
FN_INLINE __m256 high_words(__m256 a, __m256 b) { return _mm256_unpackhi_ps(a, b); }
FN_INLINE __m256 low_pairs(__m256 a, __m256 b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
FN_INLINE __m256 high_pairs(__m256 a, __m256 b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}

FN_INLINE Floats widen(const BFloat16*, Bits16 bits) {
  Register v;
  at::vec::cvtbf16_fp32(bits, v);
  return v;
}
// Rounded, in the upper half of each lane. What is not a number stays so if its lower half is zero, as it is in a bfloat16 and
// in what an operation makes of numbers.
FN_INLINE __m256i rounded_own(Floats v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
// The same for whatever is not a number: it becomes all ones.
FN_INLINE __m256i rounded(Floats v) {
  return _mm256_or_si256(rounded_own(v), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
FN_INLINE Bits16 narrow(const BFloat16*, Floats v) { return packed(_mm256_srli_epi32(rounded(v), 16)); }
#endif

#if defined(FN_REGISTERS)
FN_INLINE Floats widen(const Half*, Bits16 bits) {
  Register v;
  at::vec::cvtfp16_fp32(bits, v);
  return v;
}
FN_INLINE Bits16 narrow(const Half*, Floats v) { return at::vec::cvtfp32_fp16(Register(v)); }

// Two neighbouring vectors.
template <class T>
FN_INLINE TwoBits16 narrow_two(const T* p, Floats low, Floats high) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#endif
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(p, low)), narrow(p, high), 1);
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(rounded(low), 16), _mm256_srli_epi32(rounded(high), 16));
    return _mm256_permute4x64_epi64(words, 0xd8);  // the pack goes by halves of a register
  } else {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(p, low)), narrow(p, high), 1);
  }
#endif
}
// Whether two are rounded faster than one and one.
template <class T>
constexpr bool BY_TWO = false;
#if defined(__AVX512BF16__) || defined(CPU_CAPABILITY_AVX2)
template <>
constexpr bool BY_TWO<BFloat16> = true;
#endif
#endif

}  // namespace fastnorm
