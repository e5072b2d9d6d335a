// The sums of products.h with AVX2, which has no exact instruction for them: a sum of two products of bytes may exceed
// 16 bits. Weights of up to 4 bits are small enough. All others are multiplied as words, and so are the codes, which
// are widened once per block of rows.

#pragma once

#include "simd.h"

namespace fxquant {

constexpr int kRows = 6;                   // Rows per tile: 12 accumulators leave 4 registers for operands.
constexpr int64_t kBlockBytes = 128 << 10; // Bytes of codes that stay in the second-level cache for all panels.

// Bytes of four codes in the rows that `accumulate` reads.
template <bool kHalves>
constexpr int64_t kQuadBytes = kHalves ? 4 : 8;

// Widens a row of bytes, a multiple of four: of every four, the first and third as words, then the second and fourth.
inline void widen(const uint8_t* from, int64_t count, uint8_t* to) {
  int64_t k = 0;
  for (; k + 32 <= count; k += 32, to += 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    const __m256i even = even_u8(bytes), odd = odd_u8(bytes);
    const __m256i left = _mm256_unpacklo_epi32(even, odd), right = _mm256_unpackhi_epi32(even, odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(left, right, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, _mm256_permute2x128_si256(left, right, 0x31));
  }
  for (; k < count; k += 4, to += 8) {
    const uint16_t words[4] = {from[k], from[k + 2], from[k + 1], from[k + 3]};
    std::memcpy(to, words, 8);
  }
}

FXQUANT_INLINE __m256i four_bytes(const uint8_t* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return _mm256_set1_epi32(value);
}

FXQUANT_INLINE __m256i eight_outputs(const int8_t* panel) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
}

// acc += sums of two products of words. In assembler, because GCC adds the products first, which takes more registers.
FXQUANT_INLINE void add_products_s16(__m256i& acc, __m256i left, __m256i right) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(left), "x"(right));
}

// Sums of 8 outputs of a weight with two codes per byte. 16 bits hold the sums of four quads: 8 * 255 * 15 = 30600.
template <int R, bool kSubtracts>
FXQUANT_INLINE void accumulate_halves(const uint8_t* codes, int64_t row_bytes, const int8_t* panel, int64_t quads,
                                      __m256i zero, int32_t* sums) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i acc[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_si256();
  const auto weights = [&](__m256i bytes) __attribute__((always_inline)) {
    const __m256i found = _mm256_and_si256(bytes, low);
    return kSubtracts ? _mm256_sub_epi8(found, zero) : found;
  };
  int64_t quad = 0;
  for (; quad + 4 <= quads; quad += 4, panel += 256) {
    _mm_prefetch(reinterpret_cast<const char*>(panel + 1024), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(panel + 1152), _MM_HINT_T0);
    const __m256i first = eight_outputs(panel), second = eight_outputs(panel + 128);
    const __m256i w[4] = {weights(first), weights(_mm256_srli_epi16(first, 4)), weights(second),
                          weights(_mm256_srli_epi16(second, 4))};
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const uint8_t* x = codes + r * row_bytes + quad * 4;
      const __m256i left = _mm256_add_epi16(_mm256_maddubs_epi16(four_bytes(x), w[0]),
                                            _mm256_maddubs_epi16(four_bytes(x + 4), w[1]));
      const __m256i right = _mm256_add_epi16(_mm256_maddubs_epi16(four_bytes(x + 8), w[2]),
                                             _mm256_maddubs_epi16(four_bytes(x + 12), w[3]));
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(_mm256_add_epi16(left, right), ones));
    }
  }
  for (; quad < quads; quad += 2, panel += 128) {
    const __m256i bytes = eight_outputs(panel);
    const __m256i w[2] = {weights(bytes), weights(_mm256_srli_epi16(bytes, 4))};
    for (int r = 0; r < R; ++r) {
      const uint8_t* x = codes + r * row_bytes + quad * 4;
      const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(four_bytes(x), w[0]),
                                           _mm256_maddubs_epi16(four_bytes(x + 4), w[1]));
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(sum, ones));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanel), acc[r]);
}

// Sums of 16 outputs of a weight with one code per byte.
template <int R, bool kSubtracts>
FXQUANT_INLINE void accumulate_bytes(const uint8_t* codes, int64_t row_bytes, const int8_t* panel, int64_t quads,
                                     const int8_t* zero, int32_t* sums) {
  __m256i acc[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  const auto weights = [&](int v) __attribute__((always_inline)) {
    const __m256i bytes = eight_outputs(panel + v * 32);
    return kSubtracts ? _mm256_sub_epi8(bytes, eight_outputs(zero + v * 32)) : bytes;
  };
  const auto add = [&](const uint8_t* x, __m256i left, __m256i right) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i value = four_bytes(x + r * row_bytes);
      add_products_s16(acc[r][0], value, left);
      add_products_s16(acc[r][1], value, right);
    }
  };
  for (int64_t quad = 0; quad < quads; ++quad, panel += 128) {
    _mm_prefetch(reinterpret_cast<const char*>(panel + 1024), _MM_HINT_T0);
    const uint8_t* x = codes + quad * kQuadBytes<false>;
    add(x, even_s8(weights(0)), even_s8(weights(1)));
    add(x + 4, odd_s8(weights(0)), odd_s8(weights(1)));
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + v * 8), acc[r][v]);
}

// Sums of products of R rows of codes and one panel, int32 [R][32]. With kSubtracts, `zero` holds the zero points of the
// 32 outputs, four bytes each, which are subtracted from the weights.
template <int R, bool kHalves, bool kSubtracts>
__attribute__((noinline)) void accumulate(const uint8_t* codes, int64_t row_bytes, const int8_t* panel, int64_t quads,
                                          const int8_t* zero, int32_t* sums) {
  if constexpr (kHalves)
    for (int64_t part = 0; part < 4; ++part)
      accumulate_halves<R, kSubtracts>(codes, row_bytes, panel + part * 32, quads,
                                       kSubtracts ? eight_outputs(zero + part * 32) : _mm256_setzero_si256(),
                                       sums + part * 8);
  else
    for (int64_t part = 0; part < 2; ++part)
      accumulate_bytes<R, kSubtracts>(codes, row_bytes, panel + part * 64, quads, kSubtracts ? zero + part * 64 : nullptr,
                                      sums + part * 16);
}

}  // namespace fxquant
