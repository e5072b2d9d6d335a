// Products of uint8 codes and weights that have a scale and a zero point for each group of input channels.
//
// Sums are exact 32-bit integers within a group. The sums of the groups, times their scales, are added in float32. Zero
// points of up to 7 bits are subtracted from the weights in registers, where all rows of a tile share them. Codes of 8
// bits, held minus 128, leave no room for this: their zero points multiply the sums of the codes of each group.

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "memory.h"
#include "products.h"

namespace fxquant {

// Weights in groups, with grids `[count, out]`: the outputs of a group are adjacent.
struct Groups {
  int64_t quads, count;   // Quads per group; the last group may have fewer.
  int64_t out;
  const float* scale;
  const uint8_t* zero_point;
  bool subtracts;         // Zero points are subtracted from weights. Otherwise weights are held minus 128.
  bool corrects;          // Zero points that are not 128 multiply the sums of codes.
  const float* w_sums;    // Sums of the real weights of each output.

  Groups(const at::Tensor& w_scale, const at::Tensor& w_zero_point, const at::Tensor& sums, int64_t bits,
         int64_t group_size, int64_t in, int64_t out_features)
      : quads(group_size / 4), count(divide_up(in, group_size)), out(out_features), subtracts(bits < 8) {
    for (const at::Tensor& grid : {w_scale, w_zero_point})
      TORCH_CHECK(grid.dim() == 2 && grid.size(0) == count && grid.size(1) == out && grid.is_contiguous(), "a grid ",
                  grid.sizes(), " does not fit ", in, " inputs in groups of ", group_size, " and ", out, " outputs");
    TORCH_CHECK(w_scale.scalar_type() == at::kFloat && w_zero_point.scalar_type() == at::kByte &&
                    sums.scalar_type() == at::kFloat && sums.numel() == out && sums.is_contiguous(),
                "a weight in groups has scales and sums of float32 and zero points of uint8");
    scale = w_scale.const_data_ptr<float>();
    zero_point = w_zero_point.const_data_ptr<uint8_t>();
    w_sums = sums.const_data_ptr<float>();
    corrects = !subtracts && std::any_of(zero_point, zero_point + count * out, [](uint8_t z) { return z != 128; });
  }
};

// Sums of R rows of codes and one panel, over groups, float32 [R][32]. `code_sums` are those of the groups of each row,
// or null if no zero point multiplies them.
template <int R, bool kHalves, bool kSubtracts>
void accumulate_groups(const Groups& groups, const uint8_t* codes, int64_t row_bytes, const int8_t* panel,
                       int64_t all_quads, int64_t column, const int32_t* code_sums, float* totals) {
  // A function of its own per group keeps the sums in registers; inlined here, the compiler spills them.
  constexpr auto product = accumulate<R, kHalves, kSubtracts>;
  const Ints spread = simd::set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const Lanes lanes[2] = {first_lanes(groups.out - column), first_lanes(groups.out - column - kLanes)};
  alignas(64) int32_t sums[R * kPanel];
  alignas(64) int8_t zero[2 * 64];
  std::fill_n(totals, R * kPanel, 0.0f);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = group * groups.quads, grid = group * groups.out + column;
    const auto zero_points = [&](int v) __attribute__((always_inline)) {
      return simd::cvtepu8_epi32(simd::maskz_loadu_epi8(lanes[v], groups.zero_point + grid + v * kLanes));
    };
    if constexpr (kSubtracts)
      for (int v = 0; v < 2; ++v) simd::store_si512(zero + v * 64, simd::shuffle_epi8(zero_points(v), spread));
    product(codes + begin * kQuadBytes<kHalves>, row_bytes, panel + begin * (kHalves ? 64 : 128),
            std::min(groups.quads, all_quads - begin), zero, sums);
    for (int v = 0; v < 2; ++v) {
      const Floats scale = simd::maskz_loadu_ps(lanes[v], groups.scale + grid + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const int64_t at = r * kPanel + v * kLanes;
        const Floats sum = simd::cvtepi32_ps(simd::load_si512(sums + at));
        simd::store_ps(totals + at, simd::fmadd_ps(sum, scale, simd::load_ps(totals + at)));
      }
      if (kSubtracts || !code_sums) continue;
      const Ints shift = simd::sub_epi32(zero_points(v), simd::set1_epi32(128));
      const Floats step = simd::mul_ps(simd::cvtepi32_ps(shift), scale);
      for (int r = 0; r < R; ++r) {
        const int64_t at = r * kPanel + v * kLanes;
        const Floats sum = simd::set1_ps(static_cast<float>(code_sums[r * groups.count + group]));
        simd::store_ps(totals + at, simd::fnmadd_ps(step, sum, simd::load_ps(totals + at)));
      }
    }
  }
}

using AccumulateGroups = void (*)(const Groups&, const uint8_t*, int64_t, const int8_t*, int64_t, int64_t,
                                  const int32_t*, float*);

template <bool kHalves, bool kSubtracts, size_t... R>
constexpr std::array<AccumulateGroups, sizeof...(R)> make_groups(std::index_sequence<R...>) {
  return {accumulate_groups<R + 1, kHalves, kSubtracts>...};
}

// The kernels for 1 to kMost rows.
template <size_t kMost>
const std::array<AccumulateGroups, kMost>& kernels_of_groups(bool halves, bool subtracts) {
  static constexpr auto half = make_groups<true, true>(std::make_index_sequence<kMost>());
  static constexpr auto whole = make_groups<false, true>(std::make_index_sequence<kMost>());
  static constexpr auto bytes = make_groups<false, false>(std::make_index_sequence<kMost>());
  return halves ? half : subtracts ? whole : bytes;
}

}  // namespace fxquant
