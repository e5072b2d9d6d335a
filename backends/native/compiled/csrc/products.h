// Sums of products of a few rows of uint8 codes and one panel of a weight.

#pragma once

#include "simd.h"

namespace fxquant {

constexpr int64_t kPanel = 32;

using Accumulate = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, const int8_t*, int32_t*);

}  // namespace fxquant

#ifdef FXQUANT_AVX512
#include "products_avx512.h"
#else
#include "products_avx2.h"
#endif
