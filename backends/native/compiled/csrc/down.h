// The inner values `a x` of branches of low rank, for rows that a kernel quantizes.
//
// A worker writes up to 12 rows of x into its own memory while it quantizes them. Then each four rows of `a` are
// multiplied with six of them. Both are padded with zeros, so loops have no ends to treat.

#pragma once

#include <ATen/core/List.h>
#include <ATen/ops/zeros.h>

#include "branch.h"
#include "memory.h"

namespace fxquant {

constexpr int64_t kDownRows = 12;

// The factors `a` of all branches that read x, one below the other, each padded to a multiple of kSection rows.
class Down {
 public:
  Down(at::TensorList factors, int64_t channels, bool bf16) : bf16_(bf16), bytes_(bf16 ? 2 : 4) {
    TORCH_CHECK(!bf16 || kHasBf16, "this processor does not multiply bfloat16");
    for (const at::Tensor& factor : factors) {
      TORCH_CHECK(factor.dim() == 2 && factor.size(1) == channels, "a factor for ", channels, " inputs is [rank, ",
                  channels, "], not ", factor.sizes());
      width_ += divide_up(factor.size(0), kSection) * kSection;
    }
    padded_ = divide_up(channels, 32) * 32;
    held_ = at::zeros({width_, padded_}, factors[0].options().dtype(dtype()));
    int64_t from = 0;
    for (const at::Tensor& factor : factors) {
      held_.narrow(0, from, factor.size(0)).narrow(1, 0, channels).copy_(factor);
      from += divide_up(factor.size(0), kSection) * kSection;
    }
    weight_ = static_cast<const char*>(held_.const_data_ptr());
  }

  at::ScalarType dtype() const { return bf16_ ? at::kBFloat16 : at::kFloat; }
  int64_t width() const { return width_; }
  int64_t row_bytes() const { return padded_ * bytes_; }
  int64_t work() const { return padded_ * width_; }

  // Memory for the rows that one worker holds.
  std::vector<char> scratch() const { return std::vector<char>(kDownRows * row_bytes()); }

  // Keeps 16 values of a row of the scratch memory.
  void keep(char* row, int64_t channel, __m512 value) const {
    if (bf16_) _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + channel * 2), to_bf16(value));
    else _mm512_storeu_ps(row + channel * 4, value);
  }

  // Inner values of `count` kept rows, written to rows `row` and following of `inner`.
  void multiply(const char* kept, int64_t count, void* inner, int64_t row) const {
    for (int64_t column = 0; column < width_; column += kSection) {
      const char* x = kept;
      int64_t left = count, at = row;
      for (; left >= 6; left -= 6, x += 6 * row_bytes(), at += 6) dots<6>(x, column, inner, at);
      switch (left) {
        case 5: dots<5>(x, column, inner, at); break;
        case 4: dots<4>(x, column, inner, at); break;
        case 3: dots<3>(x, column, inner, at); break;
        case 2: dots<2>(x, column, inner, at); break;
        case 1: dots<1>(x, column, inner, at); break;
      }
    }
  }

 private:
  template <int R>
  void dots(const char* x, int64_t column, void* inner, int64_t row) const {
    if (bf16_) run<R, true>(x, column, inner, row);
    else run<R, false>(x, column, inner, row);
  }

  template <int R, bool kBf16>
  void run(const char* x, int64_t column, void* inner, int64_t row) const {
    const int64_t stride = row_bytes();
    const char* weight = weight_ + column * stride;
    __m512 acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < stride; byte += 64) {
      __m512i w[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) w[c] = _mm512_loadu_si512(weight + c * stride + byte);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512i value = _mm512_loadu_si512(x + r * stride + byte);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
#ifdef __AVX512BF16__
          if constexpr (kBf16) add_products_bf16(acc[r][c], value, w[c]);
          else
#endif
            acc[r][c] = _mm512_fmadd_ps(_mm512_castsi512_ps(value), _mm512_castsi512_ps(w[c]), acc[r][c]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * width_ + column;
      const __m128 sums = totals(acc[r]);
      if (kBf16) {
        const __m256i narrow = to_bf16(_mm512_castps128_ps512(sums));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<char*>(inner) + at * 2), _mm256_castsi256_si128(narrow));
      } else {
        _mm_storeu_ps(static_cast<float*>(inner) + at, sums);
      }
    }
  }

  // The totals of four vectors.
  static __m128 totals(const __m512 (&v)[4]) {
    const __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 right = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(left), _mm512_castps_pd(right));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(left), _mm512_castps_pd(right));
    const __m512 both = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(both),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(both), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }

  bool bf16_;
  int64_t bytes_, width_ = 0, padded_ = 0;
  at::Tensor held_;
  const char* weight_;
};

}  // namespace fxquant
