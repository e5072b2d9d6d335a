// Products of rows with the factors of branches of low rank.
//
// A factor `[columns, depth]` is packed into panels of 32 columns. A panel holds, for each step, one dword per column:
// a float32 value, or two bfloat16 values. Rows hold the same dwords, one after the other.

#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "simd.h"

namespace fxquant {

constexpr int kFactorRows = kWide ? 12 : 6;  // Rows per tile: of 32 registers, 24 hold sums; of 16, 12.
constexpr int64_t kFactorPanel = 32;  // Columns per panel.

#ifdef __AVX512BF16__
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// Dwords of a row of `depth` values.
inline int64_t factor_steps(int64_t depth, bool bf16) { return bf16 ? divide_up(depth, 2) : depth; }

// Transposes 16 rows of 16 dwords.
FXQUANT_INLINE void transpose(Ints (&v)[16]) {
  Ints t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = simd::unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = simd::unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      v[i + 2 * half] = simd::unpacklo_epi64(t[i + half], t[i + half + 2]);
      v[i + 2 * half + 1] = simd::unpackhi_epi64(t[i + half], t[i + half + 2]);
    }
  // Now 128 bits number `n` of v[i + j] hold column 4 n + j of rows i to i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Ints even = simd::shuffle_i32x4<0x88>(v[j], v[4 + j]), odd = simd::shuffle_i32x4<0xdd>(v[j], v[4 + j]);
    const Ints more_even = simd::shuffle_i32x4<0x88>(v[8 + j], v[12 + j]);
    const Ints more_odd = simd::shuffle_i32x4<0xdd>(v[8 + j], v[12 + j]);
    t[j] = simd::shuffle_i32x4<0x88>(even, more_even);
    t[4 + j] = simd::shuffle_i32x4<0x88>(odd, more_odd);
    t[8 + j] = simd::shuffle_i32x4<0xdd>(even, more_even);
    t[12 + j] = simd::shuffle_i32x4<0xdd>(odd, more_odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// 16 dwords of a row of float32 values, from dword `step`; zeros after its end.
inline Ints factor_dwords(const float* row, int64_t depth, int64_t step, bool bf16) {
  if (!bf16) return simd::castps_si512(load(row + step, first_lanes(depth - step)));
  const int64_t at = 2 * step;
  const __m256i low = to_bf16(load(row + at, first_lanes(depth - at)));
  const __m256i high = to_bf16(load(row + at + kLanes, first_lanes(depth - at - kLanes)));
  return simd::join(low, high);
}

// Packs up to 32 columns of a factor; `row(column)` is the float32 row of a column, or null for zeros.
template <class Row>
void pack_factor(int64_t depth, bool bf16, uint32_t* panel, const Row& row) {
  const int64_t steps = factor_steps(depth, bf16);
  for (int64_t first = 0; first < kFactorPanel; first += kLanes) {
    const float* rows[kLanes];
    for (int64_t c = 0; c < kLanes; ++c) rows[c] = row(first + c);
    for (int64_t step = 0; step < steps; step += kLanes) {
      Ints block[kLanes];
      for (int64_t c = 0; c < kLanes; ++c)
        block[c] = rows[c] ? factor_dwords(rows[c], depth, step, bf16) : simd::setzero_si512();
      transpose(block);
      for (int64_t n = 0; n < std::min(kLanes, steps - step); ++n)
        simd::storeu_si512(panel + (step + n) * kFactorPanel + first, block[n]);
    }
  }
}

// `strength` times the products of R rows of dwords with the first 16 V columns of a panel, float32 [R][32].
template <int R, int V, bool kBf16>
__attribute__((noinline)) void factor_products(const char* x, int64_t row_bytes, const uint32_t* panel, int64_t steps,
                                               float strength, float* sums) {
  if constexpr (!kWide && V == 2) {  // One vector at a time, so that the registers hold all sums.
    factor_products<R, 1, kBf16>(x, row_bytes, panel, steps, strength, sums);
    factor_products<R, 1, kBf16>(x, row_bytes, panel + kLanes, steps, strength, sums + kLanes);
    return;
  }
  Floats acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = simd::setzero_ps();
  for (int64_t step = 0; step < steps; ++step, panel += kFactorPanel) {
    Ints w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      _mm_prefetch(reinterpret_cast<const char*>(panel + v * kLanes) + 1024, _MM_HINT_T0);
      w[v] = simd::loadu_si512(panel + v * kLanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Ints value = simd::set1_epi32(*reinterpret_cast<const int32_t*>(x + r * row_bytes + step * 4));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
#ifdef __AVX512BF16__
        if constexpr (kBf16) add_products_bf16(acc[r][v], value, w[v]);
        else
#endif
          acc[r][v] = simd::fmadd_ps(simd::castsi512_ps(value), simd::castsi512_ps(w[v]), acc[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      simd::storeu_ps(sums + r * kFactorPanel + v * kLanes, simd::mul_ps(acc[r][v], simd::set1_ps(strength)));
}

using FactorProducts = void (*)(const char*, int64_t, const uint32_t*, int64_t, float, float*);

template <int V, bool kBf16, size_t... R>
constexpr std::array<FactorProducts, kFactorRows> make_factor_products(std::index_sequence<R...>) {
  return {factor_products<R + 1, V, kBf16>...};
}

// The products for 1 to kFactorRows rows, of the first 16 or of all 32 columns of a panel.
inline const std::array<FactorProducts, kFactorRows>& factor_kernels(bool bf16, bool half) {
  using Rows = std::make_index_sequence<kFactorRows>;
  static constexpr std::array<FactorProducts, kFactorRows> kernels[2][2] = {
      {make_factor_products<2, false>(Rows()), make_factor_products<1, false>(Rows())},
      {make_factor_products<2, kHasBf16>(Rows()), make_factor_products<1, kHasBf16>(Rows())}};
  return kernels[bf16][half];
}

}  // namespace fxquant
