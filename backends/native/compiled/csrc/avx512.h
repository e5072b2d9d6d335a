// Sixteen lanes of AVX-512. Functions of `simd` are the instructions of that name; avx2.h has the same functions.
//
// Products are written in assembler, because GCC copies the accumulators of the builtins to and from memory.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fxquant {

using Floats = __m512;
using Ints = __m512i;
using Lanes = __mmask16;  // A bit per lane.

constexpr bool kWide = true;  // 32 registers of 16 lanes.

namespace simd {

FXQUANT_INLINE Floats setzero_ps() { return _mm512_setzero_ps(); }
FXQUANT_INLINE Floats set1_ps(float x) { return _mm512_set1_ps(x); }
FXQUANT_INLINE Floats add_ps(Floats a, Floats b) { return _mm512_add_ps(a, b); }
FXQUANT_INLINE Floats sub_ps(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
FXQUANT_INLINE Floats mul_ps(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
FXQUANT_INLINE Floats div_ps(Floats a, Floats b) { return _mm512_div_ps(a, b); }
FXQUANT_INLINE Floats min_ps(Floats a, Floats b) { return _mm512_min_ps(a, b); }
FXQUANT_INLINE Floats max_ps(Floats a, Floats b) { return _mm512_max_ps(a, b); }
FXQUANT_INLINE Floats fmadd_ps(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FXQUANT_INLINE Floats fnmadd_ps(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
FXQUANT_INLINE Floats scalef_ps(Floats a, Floats b) { return _mm512_scalef_ps(a, b); }
FXQUANT_INLINE Floats permutexvar_ps(Ints at, Floats a) { return _mm512_permutexvar_ps(at, a); }
FXQUANT_INLINE Floats castsi512_ps(Ints a) { return _mm512_castsi512_ps(a); }
FXQUANT_INLINE Floats cvtepi32_ps(Ints a) { return _mm512_cvtepi32_ps(a); }
FXQUANT_INLINE Floats cvtph_ps(__m256i a) { return _mm512_cvtph_ps(a); }
FXQUANT_INLINE float reduce_add_ps(Floats a) { return _mm512_reduce_add_ps(a); }
FXQUANT_INLINE float reduce_max_ps(Floats a) { return _mm512_reduce_max_ps(a); }

FXQUANT_INLINE Floats round_ps(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FXQUANT_INLINE __m256i cvtps_ph(Floats a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <int kOrder>
FXQUANT_INLINE Floats permute_ps(Floats a) {
  return _mm512_permute_ps(a, kOrder);
}

template <int kOrder>
FXQUANT_INLINE Floats shuffle_f32x4(Floats a, Floats b) {
  return _mm512_shuffle_f32x4(a, b, kOrder);
}

FXQUANT_INLINE Floats loadu_ps(const void* from) { return _mm512_loadu_ps(from); }
FXQUANT_INLINE Floats load_ps(const void* from) { return _mm512_load_ps(from); }
FXQUANT_INLINE void storeu_ps(void* to, Floats a) { _mm512_storeu_ps(to, a); }
FXQUANT_INLINE void store_ps(void* to, Floats a) { _mm512_store_ps(to, a); }
FXQUANT_INLINE Floats maskz_loadu_ps(Lanes lanes, const void* from) { return _mm512_maskz_loadu_ps(lanes, from); }
FXQUANT_INLINE void mask_storeu_ps(void* to, Lanes lanes, Floats a) { _mm512_mask_storeu_ps(to, lanes, a); }
FXQUANT_INLINE Floats maskz_mov_ps(Lanes lanes, Floats a) { return _mm512_maskz_mov_ps(lanes, a); }
FXQUANT_INLINE Floats maskz_sub_ps(Lanes lanes, Floats a, Floats b) { return _mm512_maskz_sub_ps(lanes, a, b); }

FXQUANT_INLINE Floats mask_loadu_ps(Floats otherwise, Lanes lanes, const void* from) {
  return _mm512_mask_loadu_ps(otherwise, lanes, from);
}

FXQUANT_INLINE Floats mask_sub_ps(Floats otherwise, Lanes lanes, Floats a, Floats b) {
  return _mm512_mask_sub_ps(otherwise, lanes, a, b);
}

FXQUANT_INLINE Floats mask_max_ps(Floats otherwise, Lanes lanes, Floats a, Floats b) {
  return _mm512_mask_max_ps(otherwise, lanes, a, b);
}

FXQUANT_INLINE Ints setzero_si512() { return _mm512_setzero_si512(); }
FXQUANT_INLINE Ints set1_epi8(char x) { return _mm512_set1_epi8(x); }
FXQUANT_INLINE Ints set1_epi32(int32_t x) { return _mm512_set1_epi32(x); }
FXQUANT_INLINE Ints set4_epi32(int d, int c, int b, int a) { return _mm512_set4_epi32(d, c, b, a); }
FXQUANT_INLINE Ints add_epi32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
FXQUANT_INLINE Ints sub_epi32(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
FXQUANT_INLINE Ints sub_epi8(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
FXQUANT_INLINE Ints mullo_epi32(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
FXQUANT_INLINE Ints min_epi32(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
FXQUANT_INLINE Ints max_epi32(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
FXQUANT_INLINE Ints and_si512(Ints a, Ints b) { return _mm512_and_si512(a, b); }
FXQUANT_INLINE Ints or_si512(Ints a, Ints b) { return _mm512_or_si512(a, b); }
FXQUANT_INLINE Ints xor_si512(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
FXQUANT_INLINE Ints slli_epi32(Ints a, unsigned bits) { return _mm512_slli_epi32(a, bits); }
FXQUANT_INLINE Ints srli_epi32(Ints a, unsigned bits) { return _mm512_srli_epi32(a, bits); }
FXQUANT_INLINE Ints srai_epi32(Ints a, unsigned bits) { return _mm512_srai_epi32(a, bits); }
FXQUANT_INLINE Ints srli_epi16(Ints a, unsigned bits) { return _mm512_srli_epi16(a, bits); }
FXQUANT_INLINE Ints sll_epi32(Ints a, __m128i bits) { return _mm512_sll_epi32(a, bits); }
FXQUANT_INLINE Ints shuffle_epi8(Ints a, Ints at) { return _mm512_shuffle_epi8(a, at); }
FXQUANT_INLINE Ints unpacklo_epi32(Ints a, Ints b) { return _mm512_unpacklo_epi32(a, b); }
FXQUANT_INLINE Ints unpackhi_epi32(Ints a, Ints b) { return _mm512_unpackhi_epi32(a, b); }
FXQUANT_INLINE Ints unpacklo_epi64(Ints a, Ints b) { return _mm512_unpacklo_epi64(a, b); }
FXQUANT_INLINE Ints unpackhi_epi64(Ints a, Ints b) { return _mm512_unpackhi_epi64(a, b); }
FXQUANT_INLINE Ints castps_si512(Floats a) { return _mm512_castps_si512(a); }
FXQUANT_INLINE Ints cvtps_epi32(Floats a) { return _mm512_cvtps_epi32(a); }
FXQUANT_INLINE Ints cvtepu8_epi32(__m128i a) { return _mm512_cvtepu8_epi32(a); }
FXQUANT_INLINE Ints cvtepu16_epi32(__m256i a) { return _mm512_cvtepu16_epi32(a); }
FXQUANT_INLINE __m128i cvtepi32_epi8(Ints a) { return _mm512_cvtepi32_epi8(a); }
FXQUANT_INLINE __m256i cvtepi32_epi16(Ints a) { return _mm512_cvtepi32_epi16(a); }
FXQUANT_INLINE int32_t reduce_add_epi32(Ints a) { return _mm512_reduce_add_epi32(a); }

template <int kOrder>
FXQUANT_INLINE Ints shuffle_i32x4(Ints a, Ints b) {
  return _mm512_shuffle_i32x4(a, b, kOrder);
}

FXQUANT_INLINE Ints join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// `value` in the lanes where a and b are equal.
FXQUANT_INLINE Ints where_equal(Ints a, Ints b, Ints value, Ints otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmpeq_epi32_mask(a, b), value);
}

FXQUANT_INLINE Ints loadu_si512(const void* from) { return _mm512_loadu_si512(from); }
FXQUANT_INLINE Ints load_si512(const void* from) { return _mm512_load_si512(from); }
FXQUANT_INLINE void storeu_si512(void* to, Ints a) { _mm512_storeu_si512(to, a); }
FXQUANT_INLINE void store_si512(void* to, Ints a) { _mm512_store_si512(to, a); }

// One dword from each of 16 rows, which are `row_dwords` apart.
FXQUANT_INLINE Ints gather_rows(const void* first, int64_t row_dwords) {
  const Ints steps = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32(static_cast<int32_t>(row_dwords)));
  return _mm512_i32gather_epi32(steps, first, 4);
}

// Sixteen lanes of bytes, and of words.
FXQUANT_INLINE __m128i maskz_loadu_epi8(Lanes lanes, const void* from) { return _mm_maskz_loadu_epi8(lanes, from); }
FXQUANT_INLINE void mask_storeu_epi8(void* to, Lanes lanes, __m128i a) { _mm_mask_storeu_epi8(to, lanes, a); }
FXQUANT_INLINE __m256i maskz_loadu_epi16(Lanes lanes, const void* from) { return _mm256_maskz_loadu_epi16(lanes, from); }
FXQUANT_INLINE void mask_storeu_epi16(void* to, Lanes lanes, __m256i a) { _mm256_mask_storeu_epi16(to, lanes, a); }

}  // namespace simd

// acc += sum of four products of unsigned bytes and signed bytes, exactly.
FXQUANT_INLINE void add_products_u8s8(Ints& acc, Ints u8, Ints s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}

// The sum of `count` bytes.
inline int32_t sum_of(const uint8_t* bytes, int64_t count) {
  const Ints ones = _mm512_set1_epi8(1);
  Ints total = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 64) {
    const __mmask64 lanes = count - k >= 64 ? ~0ull : (1ull << (count - k)) - 1;
    total = _mm512_dpbusd_epi32(total, _mm512_maskz_loadu_epi8(lanes, bytes + k), ones);
  }
  return _mm512_reduce_add_epi32(total);
}

// The nearest bfloat16 values, ties to even.
inline __m256i to_bf16(Floats value) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  const Ints bits = _mm512_castps_si512(value);
  const Ints odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Ints rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000)), 16));
#endif
}

#ifdef __AVX512BF16__
// acc += sum of two products of bfloat16.
FXQUANT_INLINE void add_products_bf16(Floats& acc, Ints a, Ints b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
#endif

}  // namespace fxquant
