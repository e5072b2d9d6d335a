// Branches of low rank beside integer linears: `y + strength * b (a x)`.
//
// The inner values `a x` are computed by the kernel that quantizes x (down.h), and `b` times the inner values by the
// epilogue of the linear. Products are those of bfloat16 pairs, or of float32; sums are float32.

#pragma once

#include <torch/library.h>

#include <cstring>
#include <optional>

#include "simd.h"

namespace fxquant {

constexpr int64_t kSection = 4;  // The inner values of a branch start at a multiple of this many columns.

#ifdef __AVX512BF16__
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

inline uint32_t bf16_bits(float value) { return c10::BFloat16(value).x; }

// The branch of one linear. Rows of `inner` have `stride` values, of which `rank` belong to this branch.
struct Branch {
  at::Tensor held, up;
  const char* inner = nullptr;  // Null if there is no branch.
  int64_t stride = 0, rank = 0, bytes = 0;
  bool bf16 = false;
  float strength = 1.0f;

  explicit operator bool() const { return inner != nullptr; }
};

inline Branch make_branch(const std::optional<at::Tensor>& inner, const std::optional<at::Tensor>& up, int64_t from,
                          const std::optional<at::Tensor>& strength, int64_t rows, int64_t out) {
  Branch branch;
  if (!inner) return branch;
  TORCH_CHECK(up && up->dim() == 2 && up->size(0) == out, "a branch beside ", out, " outputs needs [", out, ", rank]");
  branch.rank = up->size(1);
  branch.held = inner->contiguous();
  branch.stride = branch.held.size(-1);
  branch.bf16 = branch.held.scalar_type() == at::kBFloat16;
  TORCH_CHECK(branch.bf16 ? kHasBf16 : branch.held.scalar_type() == at::kFloat, "inner values are float32 or, where the ",
              "processor multiplies it, bfloat16, not ", branch.held.scalar_type());
  TORCH_CHECK(from % kSection == 0 && from + divide_up(branch.rank, 2) * 2 <= branch.stride &&
                  branch.held.numel() == rows * branch.stride,
              "inner values of shape ", branch.held.sizes(), " have no ", branch.rank, " columns from ", from, " in ",
              rows, " rows");
  branch.up = up->to(at::kFloat).contiguous();
  branch.bytes = branch.bf16 ? 2 : 4;
  branch.inner = static_cast<const char*>(branch.held.const_data_ptr()) + from * branch.bytes;
  if (strength) branch.strength = static_cast<float>(strength->item<double>());
  return branch;
}

// The factor b of one panel of 32 outputs, and its products with the inner values of rows.
class UpPanel {
 public:
  UpPanel(const Branch& branch, int64_t column, int64_t out) : branch_(branch) {
    if (!branch) return;
    steps_ = branch.bf16 ? divide_up(branch.rank, 2) : branch.rank;
    held_.assign(steps_ * 32, 0);
    const float* from = branch.up.const_data_ptr<float>() + column * branch.rank;
    const int64_t count = std::min<int64_t>(32, out - column);
    for (int64_t c = 0; c < count; ++c, from += branch.rank)
      for (int64_t step = 0; step < steps_; ++step) held_[step * 32 + c] = word(from, step);
  }

  // Strength times the products of rows, float32 [count][32].
  void multiply(int64_t row, int64_t count, float* sums) const {
    const char* inner = branch_.inner + row * branch_.stride * branch_.bytes;
    const int64_t row_bytes = branch_.stride * branch_.bytes;
    const auto call = branch_.bf16 ? &UpPanel::split<true> : &UpPanel::split<false>;
    for (; count > 0; count -= 12, sums += 12 * 32, inner += 12 * row_bytes)
      (this->*call)(inner, std::min<int64_t>(count, 12), sums);
  }

 private:
  uint32_t word(const float* from, int64_t step) const {
    uint32_t bits;
    if (!branch_.bf16) return std::memcpy(&bits, from + step, 4), bits;
    bits = bf16_bits(from[2 * step]);
    return 2 * step + 1 < branch_.rank ? bits | bf16_bits(from[2 * step + 1]) << 16 : bits;
  }

  template <bool kBf16>
  void split(const char* inner, int64_t count, float* sums) const {
    const int64_t row_bytes = branch_.stride * branch_.bytes;
    switch (count) {
      case 12: return rows<12, kBf16>(inner, sums);
      case 11: return rows<11, kBf16>(inner, sums);
      case 10: return rows<10, kBf16>(inner, sums);
    }
    for (; count >= 3; count -= 3, sums += 3 * 32, inner += 3 * row_bytes) rows<3, kBf16>(inner, sums);
    if (count == 2) rows<2, kBf16>(inner, sums);
    if (count == 1) rows<1, kBf16>(inner, sums);
  }

  template <int R, bool kBf16>
  void rows(const char* inner, float* sums) const {
    __m512 acc[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    const int64_t row_bytes = branch_.stride * branch_.bytes;
    const uint32_t* weight = held_.data();
    for (int64_t step = 0; step < steps_; ++step, weight += 32) {
      const __m512i left = _mm512_loadu_si512(weight), right = _mm512_loadu_si512(weight + 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(inner + r * row_bytes + step * 4));
        add<kBf16>(acc[r][0], x, left);
        add<kBf16>(acc[r][1], x, right);
      }
    }
    const __m512 strength = _mm512_set1_ps(branch_.strength);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + r * 32 + v * kLanes, _mm512_mul_ps(acc[r][v], strength));
  }

  template <bool kBf16>
  static inline __attribute__((always_inline)) void add(__m512& acc, __m512i x, __m512i weight) {
#ifdef __AVX512BF16__
    if constexpr (kBf16) return add_products_bf16(acc, x, weight);
#endif
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weight), acc);
  }

  const Branch& branch_;
  int64_t steps_ = 0;
  std::vector<uint32_t> held_;
};

}  // namespace fxquant
