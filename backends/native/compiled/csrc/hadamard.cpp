// Rotations of channels: signs, then a fast Walsh-Hadamard transform of each block of channels.
//
// A row is transformed in a buffer in the first-level cache: block * log2(block) additions instead of block * block
// multiplications. Steps between channels less than a vector apart exchange lanes of one register.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace fxquant::hadamard_kernels {
namespace {

// The sums and differences of lanes that are `kStep` apart: a, b become a + b, a - b.
template <int kStep>
FXQUANT_INLINE Floats within(Floats x) {
  Floats other;
  Lanes negative;
  if constexpr (kStep == 1) {
    other = simd::permute_ps<0b10110001>(x);
    negative = 0xaaaa;
  } else if constexpr (kStep == 2) {
    other = simd::permute_ps<0b01001110>(x);
    negative = 0xcccc;
  } else if constexpr (kStep == 4) {
    other = simd::shuffle_f32x4<0b10110001>(x, x);
    negative = 0xf0f0;
  } else {
    other = simd::shuffle_f32x4<0b01001110>(x, x);
    negative = 0xff00;
  }
  return simd::mask_sub_ps(simd::add_ps(x, other), negative, other, x);
}

// Steps of up to `block` within one vector.
FXQUANT_INLINE Floats transform_vector(Floats x, int64_t block) {
  if (block > 1) x = within<1>(x);
  if (block > 2) x = within<2>(x);
  if (block > 4) x = within<4>(x);
  if (block > 8) x = within<8>(x);
  return x;
}

// Transforms a row of whole vectors in place. Blocks of less than a vector divide the vectors.
void transform(float* row, int64_t width, int64_t block) {
  for (int64_t c = 0; c < width; c += kLanes)
    simd::store_ps(row + c, transform_vector(simd::load_ps(row + c), block));
  int64_t step = kLanes;
  for (; step * 4 <= block; step *= 4)  // Two steps at a time halve the loads and stores.
    for (int64_t base = 0; base < width; base += step * 4)
      for (int64_t c = base; c < base + step; c += kLanes) {
        const Floats a = simd::load_ps(row + c), b = simd::load_ps(row + c + step);
        const Floats d = simd::load_ps(row + c + 2 * step), e = simd::load_ps(row + c + 3 * step);
        const Floats ab = simd::add_ps(a, b), a_b = simd::sub_ps(a, b);
        const Floats de = simd::add_ps(d, e), d_e = simd::sub_ps(d, e);
        simd::store_ps(row + c, simd::add_ps(ab, de));
        simd::store_ps(row + c + step, simd::add_ps(a_b, d_e));
        simd::store_ps(row + c + 2 * step, simd::sub_ps(ab, de));
        simd::store_ps(row + c + 3 * step, simd::sub_ps(a_b, d_e));
      }
  for (; step * 2 <= block; step *= 2)
    for (int64_t base = 0; base < width; base += step * 2)
      for (int64_t c = base; c < base + step; c += kLanes) {
        const Floats a = simd::load_ps(row + c), b = simd::load_ps(row + c + step);
        simd::store_ps(row + c, simd::add_ps(a, b));
        simd::store_ps(row + c + step, simd::sub_ps(a, b));
      }
}

template <class T, class Write>
void rotate(const at::Tensor& x, const at::Tensor& signs, int64_t block, const Write& write) {
  const int64_t width = x.size(-1), rows = x.numel() / width, whole = divide_up(width, kLanes) * kLanes;
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  const int8_t* sign = signs.const_data_ptr<int8_t>();
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / whole), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(whole * 2 + kLanes);
    void* start = memory.data();
    size_t space = memory.size() * sizeof(float);
    auto* row = static_cast<float*>(std::align(64, whole * 2 * sizeof(float), start, space));
    float* factors = row + whole;
    for (int64_t c = 0; c < whole; ++c) factors[c] = c < width ? sign[c] * factor : 0.0f;
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < width; c += kLanes)
        simd::store_ps(row + c, simd::mul_ps(load(from + r * width + c, first_lanes(width - c)),
                                               simd::load_ps(factors + c)));
      transform(row, whole, block);
      for (int64_t c = 0; c < width; c += kLanes)
        write(r, r * width + c, first_lanes(width - c), simd::load_ps(row + c));
    }
  });
}

void check(const at::Tensor& x, const at::Tensor& signs, int64_t block) {
  TORCH_CHECK(x.dim() >= 1 && x.is_floating_point() && signs.scalar_type() == at::kChar && signs.is_contiguous() &&
                  signs.dim() == 1 && signs.size(0) == x.size(-1),
              "signs are int8, one per channel of float values ", x.sizes(), ", not ", signs.sizes());
  TORCH_CHECK(block > 0 && (block & (block - 1)) == 0 && x.size(-1) % block == 0, "blocks of ", block,
              " channels are not powers of two that divide ", x.size(-1));
}

template <class Run>
void for_dtype(const at::Tensor& x, const Run& run) {
  if (x.scalar_type() == at::kFloat) run(0.0f);
  else if (x.scalar_type() == at::kBFloat16) run(c10::BFloat16());
  else if (x.scalar_type() == at::kHalf) run(c10::Half());
  else TORCH_CHECK(false, "rotations read float32, bfloat16 and float16, not ", x.scalar_type());
}

at::Tensor hadamard(const at::Tensor& values, const at::Tensor& signs, int64_t block) {
  check(values, signs, block);
  const at::Tensor x = values.contiguous(), result = pooled(x.sizes(), x.options());
  if (!x.numel()) return result;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    T* to = result.mutable_data_ptr<T>();
    rotate<T>(x, signs, block, [&](int64_t, int64_t at, Lanes lanes, Floats y) { store(to + at, lanes, y); });
  });
  return result;
}

at::Tensor hadamard_quantize(const at::Tensor& values, const at::Tensor& signs, int64_t block,
                             const at::Tensor& out_scale, const at::Tensor& out_zero_point, int64_t qmax) {
  check(values, signs, block);
  const at::Tensor x = values.contiguous(), result = pooled(x.sizes(), x.options().dtype(at::kByte));
  if (!x.numel()) return result;
  const int64_t rows = x.numel() / x.size(-1);
  const auto inverse = inverses(per_row<float>(out_scale, x, rows, "the scale of the result"));
  const auto zero_point = per_row<uint8_t, int32_t>(out_zero_point, x, rows, "the zero point of the result");
  const Ints highest = simd::set1_epi32(static_cast<int32_t>(qmax));
  uint8_t* to = result.mutable_data_ptr<uint8_t>();
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    rotate<T>(x, signs, block, [&](int64_t r, int64_t at, Lanes lanes, Floats y) {
      if constexpr (!std::is_same_v<T, float>) {  // As if the rotated values were stored before.
        alignas(64) T rounded[kLanes];
        store(rounded, 0xffff, y);
        y = load(rounded, 0xffff);
      }
      simd::mask_storeu_epi8(to + at, lanes,
                           quantize(y, simd::set1_ps(inverse[r]), simd::set1_epi32(zero_point[r]), highest));
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) {
  library.impl("hadamard", &hadamard);
  library.impl("hadamard_quantize", &hadamard_quantize);
}

}  // namespace fxquant::hadamard_kernels
