// Normalization, modulation and quantization of rows in one pass. The results are the codes that a linear reads.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "memory.h"
#include "simd.h"

namespace fxquant {
namespace {

struct Statistics {
  float mean, inverse;
};

template <class T>
Statistics statistics(const T* row, int64_t channels, float eps, bool centered) {
  const float count = static_cast<float>(channels);
  float mean = 0.0f;
  if (centered) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < channels; c += kLanes) sum = _mm512_add_ps(sum, load(row + c, first_lanes(channels - c)));
    mean = _mm512_reduce_add_ps(sum) / count;
  }
  // The second pass reads the first-level cache. Differences to the mean lose no precision if the mean is large.
  __m512 squares = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __mmask16 lanes = first_lanes(channels - c);
    const __m512 x = _mm512_maskz_sub_ps(lanes, load(row + c, lanes), _mm512_set1_ps(mean));
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  return {mean, 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / count + eps)};
}

template <class T>
at::Tensor run(const at::Tensor& x, bool centered, double eps, const std::optional<at::Tensor>& weight,
               const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor, double plus,
               const std::optional<at::Tensor>& shift, const at::Tensor& out_scale, const at::Tensor& out_zero_point,
               int64_t qmax) {
  const at::Tensor input = x.contiguous();
  const int64_t channels = input.size(-1), rows = input.numel() / channels;
  const int64_t samples = input.dim() > 1 ? input.size(0) : 1;
  const auto vector = [&](const std::optional<at::Tensor>& values, const char* what) {
    return values ? vectors<T>(*values, samples, rows, channels, what) : std::vector<const T*>();
  };
  const auto weights = vector(weight, "the weight"), biases = vector(bias, "the bias");
  const auto factors = vector(factor, "the factor"), shifts = vector(shift, "the shift");
  const auto scales = inverses(per_row<float>(out_scale, input, rows, "the scale of the result"));
  const auto zero_points = per_row<uint8_t, int32_t>(out_zero_point, input, rows, "the zero point of the result");
  at::Tensor result = pooled(input.sizes(), input.options().dtype(at::kByte));
  const T* from = input.const_data_ptr<T>();
  uint8_t* to = result.mutable_data_ptr<uint8_t>();
  const __m512 more = _mm512_set1_ps(static_cast<float>(plus));
  const __m512i highest = _mm512_set1_epi32(static_cast<int32_t>(qmax));
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = from + r * channels;
      const Statistics found = statistics(row, channels, static_cast<float>(eps), centered);
      const __m512 mean = _mm512_set1_ps(found.mean), inverse = _mm512_set1_ps(found.inverse);
      const __m512 scale = _mm512_set1_ps(scales[r]);
      const __m512i zero_point = _mm512_set1_epi32(zero_points[r]);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const __mmask16 lanes = first_lanes(channels - c);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(load(row + c, lanes), mean), inverse);
        if (!weights.empty()) y = _mm512_mul_ps(y, load(weights[r] + c, lanes));
        if (!biases.empty()) y = _mm512_add_ps(y, load(biases[r] + c, lanes));
        if (!factors.empty()) y = _mm512_mul_ps(y, _mm512_add_ps(load(factors[r] + c, lanes), more));
        if (!shifts.empty()) y = _mm512_add_ps(y, load(shifts[r] + c, lanes));
        _mm_mask_storeu_epi8(to + r * channels + c, lanes, quantize(y, scale, zero_point, highest));
      }
    }
  });
  return result;
}

at::Tensor norm_quantize(const at::Tensor& x, bool centered, double eps, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor, double plus,
                         const std::optional<at::Tensor>& shift, const at::Tensor& out_scale,
                         const at::Tensor& out_zero_point, int64_t qmax) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "norm_quantize reads rows of one channel or more, not ", x.sizes());
  const auto call = [&](auto zero) {
    return run<decltype(zero)>(x, centered, eps, weight, bias, factor, plus, shift, out_scale, out_zero_point, qmax);
  };
  if (x.scalar_type() == at::kFloat) return call(0.0f);
  if (x.scalar_type() == at::kBFloat16) return call(c10::BFloat16());
  TORCH_CHECK(x.scalar_type() == at::kHalf, "norm_quantize reads float32, bfloat16 and float16, not ", x.scalar_type());
  return call(c10::Half());
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) { library.impl("norm_quantize", &norm_quantize); }

}  // namespace fxquant
