// Sums of products of a few rows of uint8 codes and one panel of a weight.

#pragma once

#include "simd.h"

namespace fxquant {

constexpr int64_t kPanel = 32;

// Sums of products of R rows of codes and one panel, int32 [R][32]. With kSubtracts, `zero` holds the zero points of the
// 32 outputs, four bytes each, which are subtracted from the weights.
template <int R, bool kHalves, bool kSubtracts>
__attribute__((noinline)) void accumulate(const uint8_t* codes, int64_t row_bytes, const int8_t* panel, int64_t quads, const int8_t* zero,
                int32_t* sums) {
  __m512i acc[R][2], less[2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  if constexpr (kSubtracts)
    for (int v = 0; v < 2; ++v) less[v] = _mm512_loadu_si512(zero + v * 64);
  const auto add = [&](int64_t quad, __m512i left, __m512i right) __attribute__((always_inline)) {
    if constexpr (kSubtracts) {
      left = _mm512_sub_epi8(left, less[0]);
      right = _mm512_sub_epi8(right, less[1]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(codes + r * row_bytes + quad * 4));
      add_products_u8s8(acc[r][0], x, left);
      add_products_u8s8(acc[r][1], x, right);
    }
  };
  if constexpr (kHalves) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t quad = 0; quad < quads; quad += 2, panel += 128) {
      const __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + 64);
      add(quad, _mm512_and_si512(left, low), _mm512_and_si512(right, low));
      add(quad + 1, _mm512_and_si512(_mm512_srli_epi16(left, 4), low),
          _mm512_and_si512(_mm512_srli_epi16(right, 4), low));
    }
  } else {
    for (int64_t quad = 0; quad < quads; ++quad, panel += 128) {
      _mm_prefetch(reinterpret_cast<const char*>(panel + 1024), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(panel + 1088), _MM_HINT_T0);
      add(quad, _mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_si512(sums + r * kPanel, acc[r][0]);
    _mm512_storeu_si512(sums + r * kPanel + kLanes, acc[r][1]);
  }
}

using Accumulate = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, const int8_t*, int32_t*);

}  // namespace fxquant
