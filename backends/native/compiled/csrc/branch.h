// Branches of low rank beside integer linears: `y + strength * b (a x)`.
//
// The inner values `a x` are computed by the kernel that quantizes x (down.h), and `b` times the inner values by the
// epilogue of the linear. Products are those of bfloat16 pairs, or of float32; sums are float32.

#pragma once

#include <torch/library.h>

#include <optional>
#include <vector>

#include "factors.h"
#include "simd.h"

namespace fxquant {

constexpr int64_t kSection = 4;  // The inner values of a branch start at a multiple of this many columns.

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
    steps_ = factor_steps(branch.rank, branch.bf16);
    panel_.resize(steps_ * kFactorPanel);
    const float* from = branch.up.const_data_ptr<float>();
    pack_factor(branch.rank, branch.bf16, panel_.data(), [&](int64_t c) {
      return column + c < out ? from + (column + c) * branch.rank : nullptr;
    });
  }

  // Fetches the inner values of a row into the caches: a block of codes and the panel of the weight leave little room.
  void prefetch(int64_t row) const {
    const char* from = branch_.inner + row * branch_.stride * branch_.bytes;
    for (int64_t byte = 0; byte < branch_.rank * branch_.bytes; byte += 64) __builtin_prefetch(from + byte);
  }

  // Strength times the products of `count` rows, 1 to kFactorRows, float32 [count][32].
  void multiply(int64_t row, int64_t count, float* sums) const {
    const int64_t row_bytes = branch_.stride * branch_.bytes;
    factor_kernels(branch_.bf16, false)[count - 1](branch_.inner + row * row_bytes, row_bytes, panel_.data(), steps_,
                                                   branch_.strength, sums);
  }

 private:
  const Branch& branch_;
  int64_t steps_ = 0;
  std::vector<uint32_t> panel_;
};

}  // namespace fxquant
