// The sums of products.h by vpdpbusd.

#pragma once

#include "simd.h"

namespace fxquant {

constexpr int kRows = 12;                  // Rows per tile: 24 accumulators leave 8 registers for operands.
constexpr int64_t kBlockBytes = 640 << 10; // Bytes of codes that stay in the second-level cache for all panels.

// Bytes of four codes in the rows that `accumulate` reads.
template <bool kHalves>
constexpr int64_t kQuadBytes = 4;

// Codes are read as they are.
inline void widen(const uint8_t*, int64_t, uint8_t*) {}

// Sums of products of R rows of codes and one panel, int32 [R][32]. With kSubtracts, `zero` holds the zero points of the
// 32 outputs, four bytes each, which are subtracted from the weights.
template <int R, bool kHalves, bool kSubtracts>
__attribute__((noinline)) void accumulate(const uint8_t* codes, int64_t row_bytes, const int8_t* panel, int64_t quads,
                                          const int8_t* zero, int32_t* sums) {
  Ints acc[R][2], less[2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = simd::setzero_si512();
  if constexpr (kSubtracts)
    for (int v = 0; v < 2; ++v) less[v] = simd::loadu_si512(zero + v * 64);
  const auto add = [&](int64_t quad, Ints left, Ints right) __attribute__((always_inline)) {
    if constexpr (kSubtracts) {
      left = simd::sub_epi8(left, less[0]);
      right = simd::sub_epi8(right, less[1]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Ints x = simd::set1_epi32(*reinterpret_cast<const int32_t*>(codes + r * row_bytes + quad * 4));
      add_products_u8s8(acc[r][0], x, left);
      add_products_u8s8(acc[r][1], x, right);
    }
  };
  if constexpr (kHalves) {
    const Ints low = simd::set1_epi8(15);
    for (int64_t quad = 0; quad < quads; quad += 2, panel += 128) {
      const Ints left = simd::loadu_si512(panel), right = simd::loadu_si512(panel + 64);
      add(quad, simd::and_si512(left, low), simd::and_si512(right, low));
      add(quad + 1, simd::and_si512(simd::srli_epi16(left, 4), low),
          simd::and_si512(simd::srli_epi16(right, 4), low));
    }
  } else {
    for (int64_t quad = 0; quad < quads; ++quad, panel += 128) {
      _mm_prefetch(reinterpret_cast<const char*>(panel + 1024), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(panel + 1088), _MM_HINT_T0);
      add(quad, simd::loadu_si512(panel), simd::loadu_si512(panel + 64));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    simd::storeu_si512(sums + r * kPanel, acc[r][0]);
    simd::storeu_si512(sums + r * kPanel + kLanes, acc[r][1]);
  }
}

}  // namespace fxquant
