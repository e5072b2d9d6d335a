// Sixteen lanes in two registers of AVX2, with the functions of avx512.h.

#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "this compiler makes no AVX2, FMA and F16C instructions for this processor"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fxquant {

struct Floats {
  __m256 low, high;
};

struct Ints {
  __m256i low, high;
};

using Lanes = uint16_t;  // A bit per lane.

constexpr bool kWide = false;  // Half as many registers, of half the width.

namespace simd {

constexpr Lanes kAll = 0xffff;

// All bits of the lanes whose bits are set.
FXQUANT_INLINE Ints spread(Lanes lanes) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const auto half = [&](int of) __attribute__((always_inline)) {
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(of), bits), bits);
  };
  return {half(lanes & 255), half(lanes >> 8)};
}

FXQUANT_INLINE Floats castsi512_ps(Ints a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
FXQUANT_INLINE Ints castps_si512(Floats a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

FXQUANT_INLINE Floats setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FXQUANT_INLINE Floats set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

#define FXQUANT_FLOATS(name)                                                            \
  FXQUANT_INLINE Floats name(Floats a, Floats b) {                                      \
    return {_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)};                \
  }
FXQUANT_FLOATS(add_ps)
FXQUANT_FLOATS(sub_ps)
FXQUANT_FLOATS(mul_ps)
FXQUANT_FLOATS(div_ps)
FXQUANT_FLOATS(min_ps)
FXQUANT_FLOATS(max_ps)
#undef FXQUANT_FLOATS

FXQUANT_INLINE Floats fmadd_ps(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

FXQUANT_INLINE Floats fnmadd_ps(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

FXQUANT_INLINE Floats round_ps(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}

// a * 2**b for whole b of -126 or more. In two factors, so that powers of 2**128 and more overflow to infinity.
FXQUANT_INLINE Floats scalef_ps(Floats a, Floats b) {
  const auto scaled = [](__m256 x, __m256 power) __attribute__((always_inline)) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(254.0f), power));
    const __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    const __m256i bias = _mm256_set1_epi32(127);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
  };
  return {scaled(a.low, b.low), scaled(a.high, b.high)};
}

FXQUANT_INLINE Floats permutexvar_ps(Ints at, Floats a) {
  const auto found = [&](__m256i lanes) __attribute__((always_inline)) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(a.low, lanes), _mm256_permutevar8x32_ps(a.high, lanes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
  };
  return {found(at.low), found(at.high)};
}

FXQUANT_INLINE Floats cvtepi32_ps(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

FXQUANT_INLINE Floats cvtph_ps(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}

FXQUANT_INLINE __m256i cvtps_ph(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(a.high, kNearest), _mm256_cvtps_ph(a.low, kNearest));
}

// Folds 16 lanes to one, in the order of AVX-512's reductions.
template <class Fold, class Fold4>
FXQUANT_INLINE float reduce(Floats a, const Fold& fold, const Fold4& fold4) {
  const __m256 eight = fold(a.low, a.high);
  const __m128 four = fold4(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = fold4(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(fold4(two, _mm_shuffle_ps(two, two, 1)));
}

FXQUANT_INLINE float reduce_add_ps(Floats a) {
  return reduce(a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); },
                [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}

FXQUANT_INLINE float reduce_max_ps(Floats a) {
  return reduce(a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); },
                [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}

template <int kOrder>
FXQUANT_INLINE Floats permute_ps(Floats a) {
  return {_mm256_permute_ps(a.low, kOrder), _mm256_permute_ps(a.high, kOrder)};
}

FXQUANT_INLINE Floats loadu_ps(const void* from) {
  const auto* at = static_cast<const float*>(from);
  return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
}

FXQUANT_INLINE Floats load_ps(const void* from) {
  const auto* at = static_cast<const float*>(from);
  return {_mm256_load_ps(at), _mm256_load_ps(at + 8)};
}

FXQUANT_INLINE void storeu_ps(void* to, Floats a) {
  _mm256_storeu_ps(static_cast<float*>(to), a.low);
  _mm256_storeu_ps(static_cast<float*>(to) + 8, a.high);
}

FXQUANT_INLINE void store_ps(void* to, Floats a) {
  _mm256_store_ps(static_cast<float*>(to), a.low);
  _mm256_store_ps(static_cast<float*>(to) + 8, a.high);
}

FXQUANT_INLINE Floats maskz_loadu_ps(Lanes lanes, const void* from) {
  if (lanes == kAll) return loadu_ps(from);
  const Ints mask = spread(lanes);
  const auto* at = static_cast<const float*>(from);
  return {_mm256_maskload_ps(at, mask.low), _mm256_maskload_ps(at + 8, mask.high)};
}

FXQUANT_INLINE void mask_storeu_ps(void* to, Lanes lanes, Floats a) {
  if (lanes == kAll) return storeu_ps(to, a);
  const Ints mask = spread(lanes);
  _mm256_maskstore_ps(static_cast<float*>(to), mask.low, a.low);
  _mm256_maskstore_ps(static_cast<float*>(to) + 8, mask.high, a.high);
}

// `value` in the lanes whose bits are set.
FXQUANT_INLINE Floats mask_mov_ps(Floats otherwise, Lanes lanes, Floats value) {
  if (lanes == kAll) return value;
  const Floats mask = castsi512_ps(spread(lanes));
  return {_mm256_blendv_ps(otherwise.low, value.low, mask.low), _mm256_blendv_ps(otherwise.high, value.high, mask.high)};
}

FXQUANT_INLINE Floats maskz_mov_ps(Lanes lanes, Floats a) { return mask_mov_ps(setzero_ps(), lanes, a); }
FXQUANT_INLINE Floats maskz_sub_ps(Lanes lanes, Floats a, Floats b) { return maskz_mov_ps(lanes, sub_ps(a, b)); }

FXQUANT_INLINE Floats mask_loadu_ps(Floats otherwise, Lanes lanes, const void* from) {
  return mask_mov_ps(otherwise, lanes, maskz_loadu_ps(lanes, from));
}

FXQUANT_INLINE Floats mask_sub_ps(Floats otherwise, Lanes lanes, Floats a, Floats b) {
  return mask_mov_ps(otherwise, lanes, sub_ps(a, b));
}

FXQUANT_INLINE Floats mask_max_ps(Floats otherwise, Lanes lanes, Floats a, Floats b) {
  return mask_mov_ps(otherwise, lanes, max_ps(a, b));
}

FXQUANT_INLINE Ints setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FXQUANT_INLINE Ints set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
FXQUANT_INLINE Ints set1_epi32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

FXQUANT_INLINE Ints set4_epi32(int d, int c, int b, int a) {
  const __m256i half = _mm256_set_epi32(d, c, b, a, d, c, b, a);
  return {half, half};
}

#define FXQUANT_INTS(name, half)                                         \
  FXQUANT_INLINE Ints name(Ints a, Ints b) {                             \
    return {_mm256_##half(a.low, b.low), _mm256_##half(a.high, b.high)}; \
  }
FXQUANT_INTS(add_epi32, add_epi32)
FXQUANT_INTS(sub_epi32, sub_epi32)
FXQUANT_INTS(sub_epi8, sub_epi8)
FXQUANT_INTS(mullo_epi32, mullo_epi32)
FXQUANT_INTS(min_epi32, min_epi32)
FXQUANT_INTS(max_epi32, max_epi32)
FXQUANT_INTS(and_si512, and_si256)
FXQUANT_INTS(or_si512, or_si256)
FXQUANT_INTS(xor_si512, xor_si256)
FXQUANT_INTS(shuffle_epi8, shuffle_epi8)
FXQUANT_INTS(unpacklo_epi32, unpacklo_epi32)
FXQUANT_INTS(unpackhi_epi32, unpackhi_epi32)
FXQUANT_INTS(unpacklo_epi64, unpacklo_epi64)
FXQUANT_INTS(unpackhi_epi64, unpackhi_epi64)
#undef FXQUANT_INTS

#define FXQUANT_SHIFT(name)                                              \
  FXQUANT_INLINE Ints name(Ints a, unsigned bits) {                      \
    const int by = static_cast<int>(bits);                               \
    return {_mm256_##name(a.low, by), _mm256_##name(a.high, by)};        \
  }
FXQUANT_SHIFT(slli_epi32)
FXQUANT_SHIFT(srli_epi32)
FXQUANT_SHIFT(srai_epi32)
FXQUANT_SHIFT(srli_epi16)
#undef FXQUANT_SHIFT

FXQUANT_INLINE Ints sll_epi32(Ints a, __m128i bits) {
  return {_mm256_sll_epi32(a.low, bits), _mm256_sll_epi32(a.high, bits)};
}

FXQUANT_INLINE Ints cvtps_epi32(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }

FXQUANT_INLINE Ints cvtepu8_epi32(__m128i a) {
  return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))};
}

FXQUANT_INLINE Ints cvtepu16_epi32(__m256i a) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}

FXQUANT_INLINE __m256i cvtepi32_epi16(Ints a) {
  const __m256i word = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(a.low, word), _mm256_and_si256(a.high, word));
  return _mm256_permute4x64_epi64(packed, 0b11011000);  // Packs of 128 bits alternate between the two halves.
}

FXQUANT_INLINE __m128i cvtepi32_epi8(Ints a) {
  const __m256i words = cvtepi32_epi16({_mm256_and_si256(a.low, _mm256_set1_epi32(255)),
                                        _mm256_and_si256(a.high, _mm256_set1_epi32(255))});
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

FXQUANT_INLINE int32_t reduce_add_epi32(Ints a) {
  const __m256i eight = _mm256_add_epi32(a.low, a.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0b10110001)));
}

// Of the four parts of 128 bits of each, two of a and then two of b.
template <int kOrder>
FXQUANT_INLINE Ints shuffle_i32x4(Ints a, Ints b) {
  constexpr int kFirst = (kOrder & 3) | (kOrder >> 2 & 3) << 4, kSecond = (kOrder >> 4 & 3) | (kOrder >> 6 & 3) << 4;
  return {_mm256_permute2x128_si256(a.low, a.high, kFirst), _mm256_permute2x128_si256(b.low, b.high, kSecond)};
}

template <int kOrder>
FXQUANT_INLINE Floats shuffle_f32x4(Floats a, Floats b) {
  return castsi512_ps(shuffle_i32x4<kOrder>(castps_si512(a), castps_si512(b)));
}

FXQUANT_INLINE Ints join(__m256i low, __m256i high) { return {low, high}; }

// `value` in the lanes where a and b are equal.
FXQUANT_INLINE Ints where_equal(Ints a, Ints b, Ints value, Ints otherwise) {
  return {_mm256_blendv_epi8(otherwise.low, value.low, _mm256_cmpeq_epi32(a.low, b.low)),
          _mm256_blendv_epi8(otherwise.high, value.high, _mm256_cmpeq_epi32(a.high, b.high))};
}

FXQUANT_INLINE Ints loadu_si512(const void* from) {
  const auto* at = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}

FXQUANT_INLINE Ints load_si512(const void* from) {
  const auto* at = static_cast<const __m256i*>(from);
  return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
}

FXQUANT_INLINE void storeu_si512(void* to, Ints a) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), a.low);
  _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, a.high);
}

FXQUANT_INLINE void store_si512(void* to, Ints a) {
  _mm256_store_si256(static_cast<__m256i*>(to), a.low);
  _mm256_store_si256(static_cast<__m256i*>(to) + 1, a.high);
}

// One dword from each of 16 rows, which are `row_dwords` apart. Loads are faster than the gathers of AVX2.
FXQUANT_INLINE Ints gather_rows(const void* first, int64_t row_dwords) {
  const auto* from = static_cast<const int32_t*>(first);
  const auto eight = [&](const int32_t* at) __attribute__((always_inline)) {
    return _mm256_setr_epi32(at[0], at[row_dwords], at[2 * row_dwords], at[3 * row_dwords], at[4 * row_dwords],
                             at[5 * row_dwords], at[6 * row_dwords], at[7 * row_dwords]);
  };
  return {eight(from), eight(from + 8 * row_dwords)};
}

// Sixteen lanes of bytes, and of words. Lanes whose bits are not set are neither read nor written.
template <class T, class Vector>
FXQUANT_INLINE Vector masked_load(Lanes lanes, const void* from, Vector (*load)(const Vector*)) {
  if (lanes == kAll) return load(static_cast<const Vector*>(from));
  alignas(32) T values[16] = {};
  for (int lane = 0; lane < 16; ++lane)
    if (lanes >> lane & 1) std::memcpy(values + lane, static_cast<const T*>(from) + lane, sizeof(T));
  return load(reinterpret_cast<const Vector*>(values));
}

template <class T, class Vector>
FXQUANT_INLINE void masked_store(void* to, Lanes lanes, Vector a, void (*store)(Vector*, Vector)) {
  if (lanes == kAll) return store(static_cast<Vector*>(to), a);
  alignas(32) T values[16];
  store(reinterpret_cast<Vector*>(values), a);
  for (int lane = 0; lane < 16; ++lane)
    if (lanes >> lane & 1) std::memcpy(static_cast<T*>(to) + lane, values + lane, sizeof(T));
}

FXQUANT_INLINE __m128i maskz_loadu_epi8(Lanes lanes, const void* from) {
  return masked_load<uint8_t, __m128i>(lanes, from, [](const __m128i* at) { return _mm_loadu_si128(at); });
}

FXQUANT_INLINE __m256i maskz_loadu_epi16(Lanes lanes, const void* from) {
  return masked_load<uint16_t, __m256i>(lanes, from, [](const __m256i* at) { return _mm256_loadu_si256(at); });
}

FXQUANT_INLINE void mask_storeu_epi8(void* to, Lanes lanes, __m128i a) {
  masked_store<uint8_t, __m128i>(to, lanes, a, [](__m128i* at, __m128i value) { _mm_storeu_si128(at, value); });
}

FXQUANT_INLINE void mask_storeu_epi16(void* to, Lanes lanes, __m256i a) {
  masked_store<uint16_t, __m256i>(to, lanes, a, [](__m256i* at, __m256i value) { _mm256_storeu_si256(at, value); });
}

}  // namespace simd

// Even bytes as words, and odd ones: as unsigned, and as signed numbers.
FXQUANT_INLINE __m256i even_u8(__m256i a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
FXQUANT_INLINE __m256i odd_u8(__m256i a) { return _mm256_srli_epi16(a, 8); }
FXQUANT_INLINE __m256i even_s8(__m256i a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
FXQUANT_INLINE __m256i odd_s8(__m256i a) { return _mm256_srai_epi16(a, 8); }

// acc += sum of four products of unsigned bytes and signed bytes, exactly. Sums of products of bytes overflow 16 bits,
// so the bytes are widened first.
FXQUANT_INLINE void add_products_u8s8(Ints& acc, Ints u8, Ints s8) {
  const auto add = [](__m256i& sum, __m256i u, __m256i s) __attribute__((always_inline)) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even_u8(u), even_s8(s)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd_u8(u), odd_s8(s)));
  };
  add(acc.low, u8.low, s8.low);
  add(acc.high, u8.high, s8.high);
}

// The sum of `count` bytes.
inline int32_t sum_of(const uint8_t* bytes, int64_t count) {
  __m256i total = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + k));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(part, _mm256_setzero_si256()));
  }
  int32_t sum = simd::reduce_add_epi32({total, _mm256_setzero_si256()});
  for (; k < count; ++k) sum += bytes[k];
  return sum;
}

// The nearest bfloat16 values, ties to even.
inline __m256i to_bf16(Floats value) {
  const auto rounded = [](__m256 x) __attribute__((always_inline)) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7FC00000), _mm256_castps_si256(nan)), 16);
  };
  return simd::cvtepi32_epi16({rounded(value.low), rounded(value.high)});
}

}  // namespace fxquant
