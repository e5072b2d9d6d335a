// Sixteen lanes: loads and stores of every float dtype, exponentials, quantization. The instructions are those of
// AVX-512 with VNNI where the compiler makes them, or else those of AVX2.

#pragma once

#define FXQUANT_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define FXQUANT_AVX512
#include "avx512.h"
#else
#include "avx2.h"
#endif

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fxquant {

constexpr int64_t kLanes = 16;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Lanes below `count`, which may be negative.
inline Lanes first_lanes(int64_t count) {
  return static_cast<Lanes>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1u);
}

inline Floats load(const float* from, Lanes lanes) { return simd::maskz_loadu_ps(lanes, from); }

inline Floats load(const c10::BFloat16* from, Lanes lanes) {
  const Ints wide = simd::cvtepu16_epi32(simd::maskz_loadu_epi16(lanes, from));
  return simd::castsi512_ps(simd::slli_epi32(wide, 16));
}

inline Floats load(const c10::Half* from, Lanes lanes) {
  return simd::cvtph_ps(simd::maskz_loadu_epi16(lanes, from));
}

inline void store(float* to, Lanes lanes, Floats value) { simd::mask_storeu_ps(to, lanes, value); }

inline void store(c10::BFloat16* to, Lanes lanes, Floats value) {
  simd::mask_storeu_epi16(to, lanes, to_bf16(value));
}

inline void store(c10::Half* to, Lanes lanes, Floats value) {
  simd::mask_storeu_epi16(to, lanes, simd::cvtps_ph(value));
}

// 2**x, by a minimax polynomial of 2**rest on [-1/2, 1/2]. Degree 5 is as accurate as float32. Degree 4 has an error
// of 3e-6, far below the resolution of bfloat16 and codes. About 0 below -126. The order of operands keeps NaN as NaN.
template <int kDegree = 5>
FXQUANT_INLINE Floats exp2(Floats x) {
  static_assert(kDegree == 4 || kDegree == 5);
  x = simd::max_ps(simd::set1_ps(-126.0f), x);
  const Floats whole = simd::round_ps(x);
  const Floats rest = simd::sub_ps(x, whole);
  constexpr float five[] = {1.0f, 6.93146967e-1f, 2.40221197e-1f, 5.55071328e-2f, 9.67554154e-3f, 1.32764717e-3f};
  constexpr float four[] = {9.99999261e-1f, 6.93121815e-1f, 2.40247448e-1f, 5.59178621e-2f, 9.57010165e-3f};
  const float* terms = kDegree == 5 ? five : four;
  Floats y = simd::set1_ps(terms[kDegree]);
#pragma GCC unroll 5
  for (int term = kDegree - 1; term >= 0; --term) y = simd::fmadd_ps(y, rest, simd::set1_ps(terms[term]));
  return simd::scalef_ps(y, whole);
}

constexpr float kLog2E = 1.44269504088896341f;

// x / (1 + 2**power). If 2**power overflows to infinity, the quotient is 0, as it should be.
FXQUANT_INLINE Floats gated(Floats x, Floats power) {
  return simd::div_ps(x, simd::add_ps(simd::set1_ps(1.0f), exp2<4>(power)));
}

FXQUANT_INLINE Floats silu(Floats x) {
  return gated(x, simd::mul_ps(x, simd::set1_ps(-kLog2E)));
}

// GELU by the tanh formula: x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x**3).
FXQUANT_INLINE Floats gelu_tanh(Floats x) {
  constexpr float linear = -kLog2E * 1.5957691216057308f, cubic = linear * 0.044715f;
  const Floats inner = simd::fmadd_ps(simd::mul_ps(x, x), simd::set1_ps(cubic), simd::set1_ps(linear));
  // The square of a value beyond 1e19 is infinite. The power is limited, so that the quotient is not NaN.
  return gated(x, simd::min_ps(simd::set1_ps(1e4f), simd::mul_ps(x, inner)));
}

// Codes 0..qmax of `value`, ties rounded to even, as 16 bytes. `inverse` is one over the scale. The product with it
// rounds once more than the quotient, so a code may differ only within 1e-7 of the middle between two codes.
FXQUANT_INLINE __m128i quantize(Floats value, Floats inverse, Ints zero_point, Ints qmax) {
  // Limits the value so that it fits an integer when rounded. A limit far below 2**24 would be enough.
  const Floats steps = simd::min_ps(simd::set1_ps(16777216.0f), simd::mul_ps(value, inverse));
  const Ints code = simd::add_epi32(simd::cvtps_epi32(steps), zero_point);
  return simd::cvtepi32_epi8(simd::min_epi32(simd::max_epi32(code, simd::setzero_si512()), qmax));
}

// One entry per row of `of`, from one number, or from numbers along the leading axes of `of`. The result is a table,
// because a division per row would cost more than the arithmetic.
template <class T, class Row = T>
std::vector<Row> per_row(const at::Tensor& values, const at::Tensor& of, int64_t rows, const char* what) {
  const int64_t count = values.numel();
  int64_t leading = 1;
  for (int64_t axis = 0; axis < of.dim() - 1 && leading < count; ++axis) {
    TORCH_CHECK(axis < values.dim() && values.size(axis) == of.size(axis), what, " of shape ", values.sizes(),
                " is neither one number nor one along the leading axes of ", of.sizes());
    leading *= of.size(axis);
  }
  TORCH_CHECK(leading == count && count, what, " of shape ", values.sizes(), " does not fit ", of.sizes());
  // Zero points are uint8, or whole float32 numbers if they are found at run time.
  const at::Tensor dense = values.to(c10::CppTypeToScalarType<T>::value).contiguous();
  std::vector<Row> result(rows);
  const T* from = dense.const_data_ptr<T>();
  for (int64_t entry = 0; entry < count; ++entry)
    std::fill(result.begin() + rows * entry / count, result.begin() + rows * (entry + 1) / count,
              static_cast<Row>(from[entry]));
  return result;
}

// One over each of the scales.
inline std::vector<float> inverses(std::vector<float> scales) {
  for (float& scale : scales) scale = 1.0f / scale;
  return scales;
}

// One pointer per row, to the vector that the row reads. `values` is `[channels]`, or one vector per sample
// `[batch, 1, ..., channels]`, of the dtype T.
template <class T>
std::vector<const T*> vectors(const at::Tensor& values, int64_t samples, int64_t rows, int64_t channels,
                              const char* what) {
  TORCH_CHECK(values.scalar_type() == c10::CppTypeToScalarType<T>::value && values.dim() >= 1 &&
                  values.size(-1) == channels && (channels == 1 || values.stride(-1) == 1),
              what, " of shape ", values.sizes(), " and dtype ", values.scalar_type(), " is no vector of ", channels);
  const int64_t count = values.numel() / std::max<int64_t>(channels, 1);
  TORCH_CHECK(count == 1 || (count == samples && values.size(0) == samples), what, " of shape ", values.sizes(),
              " is neither one vector nor one for each of ", samples, " samples");
  std::vector<const T*> result(rows);
  const T* from = values.const_data_ptr<T>();
  for (int64_t entry = 0; entry < count; ++entry)
    std::fill(result.begin() + rows * entry / count, result.begin() + rows * (entry + 1) / count,
              from + (count == 1 ? 0 : entry * values.stride(0)));
  return result;
}

}  // namespace fxquant
