// The inner values `a x` of branches of low rank, for rows that a kernel quantizes.
//
// A worker writes up to kFactorRows rows of x into its own memory while it quantizes them. Then they are multiplied with the
// panels of `a`: a tile needs one load of `a` for two products of each row.

#pragma once

#include <ATen/core/List.h>

#include "branch.h"
#include "memory.h"

namespace fxquant {

constexpr int64_t kDownRows = kFactorRows;

// The factors `a` of all branches that read x, one below the other, each padded to a multiple of kSection rows.
class Down {
 public:
  Down(at::TensorList factors, int64_t channels, bool bf16)
      : bf16_(bf16), bytes_(bf16 ? 2 : 4), steps_(factor_steps(channels, bf16)) {
    TORCH_CHECK(!bf16 || kHasBf16, "this processor does not multiply bfloat16");
    std::vector<at::Tensor> held;
    std::vector<const float*> rows;
    for (const at::Tensor& factor : factors) {
      TORCH_CHECK(factor.dim() == 2 && factor.size(1) == channels, "a factor for ", channels, " inputs is [rank, ",
                  channels, "], not ", factor.sizes());
      held.push_back(factor.to(at::kFloat).contiguous());
      for (int64_t r = 0; r < factor.size(0); ++r) rows.push_back(held.back().const_data_ptr<float>() + r * channels);
      rows.resize(divide_up(rows.size(), kSection) * kSection, nullptr);
    }
    width_ = rows.size();
    const int64_t panels = divide_up(width_, kFactorPanel);
    packed_ = pooled({panels, steps_, kFactorPanel}, factors[0].options().dtype(at::kInt));
    for (int64_t panel = 0; panel < panels; ++panel)
      pack_factor(channels, bf16, panel_at(panel), [&](int64_t c) {
        const int64_t row = panel * kFactorPanel + c;
        return row < width_ ? rows[row] : nullptr;
      });
    // Rows that begin at multiples of 4096 bytes would compete for the same lines of the first-level cache.
    row_bytes_ = divide_up(channels, 32) * 32 * bytes_ + 64;
  }

  at::ScalarType dtype() const { return bf16_ ? at::kBFloat16 : at::kFloat; }
  int64_t width() const { return width_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t work() const { return steps_ * width_; }

  // Memory for the rows that one worker holds.
  std::vector<char> scratch() const { return std::vector<char>(kDownRows * row_bytes_); }

  // Keeps 16 values of a row of the scratch memory.
  void keep(char* row, int64_t channel, Floats value) const {
    if (bf16_) _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + channel * 2), to_bf16(value));
    else simd::storeu_ps(row + channel * 4, value);
  }

  // Inner values of `count` rows, 1 to kFactorRows, that are `row_bytes` apart, written to rows `row` and following of `inner`.
  void multiply(const char* rows, int64_t row_bytes, int64_t count, void* inner, int64_t row) const {
    alignas(64) float sums[kDownRows * kFactorPanel];
    for (int64_t column = 0; column < width_; column += kFactorPanel) {
      const int64_t columns = std::min(width_ - column, kFactorPanel);
      factor_kernels(bf16_, columns <= kLanes)[count - 1](rows, row_bytes, panel_at(column / kFactorPanel), steps_,
                                                          1.0f, sums);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < columns; c += kLanes) {
          const int64_t at = (row + r) * width_ + column + c;
          const Floats value = simd::loadu_ps(sums + r * kFactorPanel + c);
          if (bf16_) store(static_cast<c10::BFloat16*>(inner) + at, first_lanes(columns - c), value);
          else store(static_cast<float*>(inner) + at, first_lanes(columns - c), value);
        }
    }
  }

 private:
  uint32_t* panel_at(int64_t panel) const {
    return reinterpret_cast<uint32_t*>(packed_.data_ptr<int32_t>()) + panel * steps_ * kFactorPanel;
  }

  bool bf16_;
  int64_t bytes_, steps_, width_ = 0, row_bytes_ = 0;
  at::Tensor packed_;
};

}  // namespace fxquant
