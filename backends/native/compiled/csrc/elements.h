// Codes of float formats as float32 values, sixteen at a time: elements of up to 8 bits, and scales of 8 bits.
//
// Every value is exactly that of the reference (fxquant.numerics.formats).

#pragma once

#include <c10/util/Exception.h>

#include <string>

#include "simd.h"

namespace fxquant {

// Positive numbers of e2m1 (OCP MX specification), then the negative ones.
alignas(64) constexpr float kE2M1[kLanes] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Quantiles of the normal distribution (arXiv 2305.14314, appendix E).
alignas(64) constexpr float kNF4[kLanes] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The lowest bits of each lane are a code; the bits above are ignored.

// Elements of 4 bits, looked up in a table of sixteen numbers.
class Table {
 public:
  explicit Table(const float* numbers) : numbers_(simd::load_ps(numbers)) {}

  Floats operator()(Ints codes) const { return simd::permutexvar_ps(codes, numbers_); }

 private:
  Floats numbers_;
};

// Floats of 6 or 8 bits with a sign. Moved into the place of a half, they are too small by a constant power of two.
class SmallFloat {
 public:
  // `flips` says that the sign bit is stored inverted; `nan` is the magnitude that stands for NaN, or -1.
  SmallFloat(int exponent_bits, int mantissa_bits, int nan, bool flips)
      : magnitude_(simd::set1_epi32((1 << (exponent_bits + mantissa_bits)) - 1)),
        sign_(simd::set1_epi32(0x8000)),
        flip_(simd::set1_epi32(flips ? 0x8000 : 0)),
        nan_(simd::set1_epi32(nan)),
        shift_(_mm_cvtsi32_si128(kHalfMantissa - mantissa_bits)),
        sign_shift_(_mm_cvtsi32_si128(15 - exponent_bits - mantissa_bits)),
        power_(simd::set1_ps(static_cast<float>(1 << (kHalfBias - ((1 << (exponent_bits - 1)) - 1))))) {}

  Floats operator()(Ints codes) const {
    const Ints magnitude = simd::and_si512(codes, magnitude_);
    const Ints sign = simd::xor_si512(simd::and_si512(simd::sll_epi32(codes, sign_shift_), sign_), flip_);
    const Ints half = simd::or_si512(simd::sll_epi32(magnitude, shift_), sign);
    const Floats value = simd::mul_ps(simd::cvtph_ps(simd::cvtepi32_epi16(half)), power_);
    return simd::castsi512_ps(
        simd::where_equal(magnitude, nan_, simd::set1_epi32(0x7FC00000), simd::castps_si512(value)));
  }

 private:
  static constexpr int kHalfMantissa = 10, kHalfBias = 15;

  Ints magnitude_, sign_, flip_, nan_;
  __m128i shift_, sign_shift_;
  Floats power_;
};

constexpr int kNanE4M3 = 0x7F;

// Scales as they are stored.
enum class ScaleKind { kFloat32, kE8M0, kE4M3 };

inline Ints widened(const uint8_t* bytes) {
  return simd::cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Sixteen scales, from number `at` on. Scales in e4m3 are multiplied by the scale of the tensor.
inline Floats load_scales(ScaleKind kind, const void* scales, int64_t at, Floats global) {
  switch (kind) {
    case ScaleKind::kFloat32:
      return simd::loadu_ps(static_cast<const float*>(scales) + at);
    case ScaleKind::kE8M0: {  // 2**(code - 127), of which 2**-127 has no exponent; 255 is NaN.
      const Ints codes = widened(static_cast<const uint8_t*>(scales) + at);
      Ints bits = simd::slli_epi32(codes, 23);
      bits = simd::where_equal(codes, simd::setzero_si512(), simd::set1_epi32(1 << 22), bits);
      return simd::castsi512_ps(simd::where_equal(codes, simd::set1_epi32(255), simd::set1_epi32(0x7FC00000), bits));
    }
    case ScaleKind::kE4M3:
      return simd::mul_ps(SmallFloat(4, 3, kNanE4M3, false)(widened(static_cast<const uint8_t*>(scales) + at)),
                           global);
  }
  return global;
}

// How a float format stores its weights.
struct FloatFormat {
  int exponent_bits, mantissa_bits;  // Of the element, if it has no table.
  int nan;
  const float* table;
  ScaleKind scales;

  int bits() const { return 1 + exponent_bits + mantissa_bits; }
  SmallFloat element() const { return SmallFloat(exponent_bits, mantissa_bits, nan, bits() == 8); }
};

inline FloatFormat float_format(const std::string& name) {
  if (name == "nf4") return {2, 1, -1, kNF4, ScaleKind::kFloat32};
  if (name == "mxfp4") return {2, 1, -1, kE2M1, ScaleKind::kE8M0};
  if (name == "nvfp4") return {2, 1, -1, kE2M1, ScaleKind::kE4M3};
  if (name == "fp8") return {4, 3, kNanE4M3, nullptr, ScaleKind::kFloat32};
  if (name == "fp8e5m2") return {5, 2, -1, nullptr, ScaleKind::kFloat32};  // Halves have its NaN and infinity.
  if (name == "mxfp8") return {4, 3, kNanE4M3, nullptr, ScaleKind::kE8M0};
  if (name == "mxfp6") return {2, 3, -1, nullptr, ScaleKind::kE8M0};
  if (name == "mxfp6e3m2") return {3, 2, -1, nullptr, ScaleKind::kE8M0};
  TORCH_CHECK(false, "the kernels do not decode weights of the format ", name);
}

}  // namespace fxquant
