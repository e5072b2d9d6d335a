// Normalization, modulation and quantization of rows in one pass. The results are the codes that a linear reads.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "down.h"
#include "memory.h"
#include "simd.h"

namespace fxquant::norm_kernels {
namespace {

struct Statistics {
  float mean, inverse;
};

template <class T>
Statistics statistics(const T* row, int64_t channels, float eps, bool centered) {
  const float count = static_cast<float>(channels);
  float mean = 0.0f;
  if (centered) {
    Floats sum = simd::setzero_ps();
    for (int64_t c = 0; c < channels; c += kLanes) sum = simd::add_ps(sum, load(row + c, first_lanes(channels - c)));
    mean = simd::reduce_add_ps(sum) / count;
  }
  // The second pass reads the first-level cache. Differences to the mean lose no precision if the mean is large.
  Floats squares = simd::setzero_ps();
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Lanes lanes = first_lanes(channels - c);
    const Floats x = simd::maskz_sub_ps(lanes, load(row + c, lanes), simd::set1_ps(mean));
    squares = simd::fmadd_ps(x, x, squares);
  }
  return {mean, 1.0f / std::sqrt(simd::reduce_add_ps(squares) / count + eps)};
}

// What happens to a row before it is quantized; null where it has no such part.
template <class T>
struct Row {
  const T *weight, *bias, *factor, *shift;
};

// Codes of rows, and the inner values of branches that read the rows; see down.h.
template <class T, class Value>
void write_codes(const T* from, int64_t rows, int64_t channels, const std::vector<float>& scales,
                 const std::vector<int32_t>& zero_points, int64_t qmax, uint8_t* to, const Down* down, void* inner,
                 const Value& value) {
  const Ints highest = simd::set1_epi32(static_cast<int32_t>(qmax));
  const int64_t least = std::max<int64_t>(1, 16384 / (channels + (down ? down->work() / 32 : 0)));
  at::parallel_for(0, rows, least, [&](int64_t begin, int64_t end) {
    std::vector<char> kept = down ? down->scratch() : std::vector<char>();
    const int64_t tiles = divide_up(end - begin, kDownRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t top = begin + (end - begin) * tile / tiles, bottom = begin + (end - begin) * (tile + 1) / tiles;
      for (int64_t r = top; r < bottom; ++r) {
        const auto at = value(from + r * channels, r);
        const Floats scale = simd::set1_ps(scales[r]);
        const Ints zero_point = simd::set1_epi32(zero_points[r]);
        for (int64_t c = 0; c < channels; c += kLanes) {
          const Lanes lanes = first_lanes(channels - c);
          const Floats y = at(c, lanes);
          if (down) down->keep(kept.data() + (r - top) * down->row_bytes(), c, simd::maskz_mov_ps(lanes, y));
          simd::mask_storeu_epi8(to + r * channels + c, lanes, quantize(y, scale, zero_point, highest));
        }
      }
      if (down) down->multiply(kept.data(), down->row_bytes(), bottom - top, inner, top);
    }
  });
}

struct Results {
  at::Tensor codes, inner;
};

// Memory for the inner values of all rows.
at::Tensor inner_of(const at::Tensor& input, const Down* down) {
  if (!down) return at::Tensor();
  auto sizes = input.sizes().vec();
  sizes.back() = down->width();
  return pooled(sizes, input.options().dtype(down->dtype()));
}

template <class T>
Results run(const at::Tensor& x, bool centered, double eps, const std::optional<at::Tensor>& weight,
            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor, double plus,
            const std::optional<at::Tensor>& shift, const at::Tensor& out_scale, const at::Tensor& out_zero_point,
            int64_t qmax, const Down* down) {
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
  at::Tensor result = pooled(input.sizes(), input.options().dtype(at::kByte)), inner = inner_of(input, down);
  const Floats more = simd::set1_ps(static_cast<float>(plus));
  write_codes(input.const_data_ptr<T>(), rows, channels, scales, zero_points, qmax, result.mutable_data_ptr<uint8_t>(),
              down, down ? inner.mutable_data_ptr() : nullptr, [&](const T* row, int64_t r) {
    const Statistics found = statistics(row, channels, static_cast<float>(eps), centered);
    const Row<T> own{weights.empty() ? nullptr : weights[r], biases.empty() ? nullptr : biases[r],
                     factors.empty() ? nullptr : factors[r], shifts.empty() ? nullptr : shifts[r]};
    const Floats mean = simd::set1_ps(found.mean), inverse = simd::set1_ps(found.inverse);
    return [=](int64_t c, Lanes lanes) __attribute__((always_inline)) {
      Floats y = simd::mul_ps(simd::sub_ps(load(row + c, lanes), mean), inverse);
      if (own.weight) y = simd::mul_ps(y, load(own.weight + c, lanes));
      if (own.bias) y = simd::add_ps(y, load(own.bias + c, lanes));
      if (own.factor) y = simd::mul_ps(y, simd::add_ps(load(own.factor + c, lanes), more));
      if (own.shift) y = simd::add_ps(y, load(own.shift + c, lanes));
      return y;
    };
  });
  return {result, inner};
}

Results norm(const at::Tensor& x, bool centered, double eps, const std::optional<at::Tensor>& weight,
             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor, double plus,
             const std::optional<at::Tensor>& shift, const at::Tensor& out_scale, const at::Tensor& out_zero_point,
             int64_t qmax, const Down* down) {
  const auto call = [&](auto zero) {
    return run<decltype(zero)>(x, centered, eps, weight, bias, factor, plus, shift, out_scale, out_zero_point, qmax, down);
  };
  if (x.scalar_type() == at::kFloat) return call(0.0f);
  if (x.scalar_type() == at::kBFloat16) return call(c10::BFloat16());
  TORCH_CHECK(x.scalar_type() == at::kHalf, "norm_quantize reads float32, bfloat16 and float16, not ", x.scalar_type());
  return call(c10::Half());
}

at::Tensor norm_quantize(const at::Tensor& x, bool centered, double eps, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor, double plus,
                         const std::optional<at::Tensor>& shift, const at::Tensor& out_scale,
                         const at::Tensor& out_zero_point, int64_t qmax) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "norm_quantize reads rows of one channel or more, not ", x.sizes());
  return norm(x, centered, eps, weight, bias, factor, plus, shift, out_scale, out_zero_point, qmax, nullptr).codes;
}

std::tuple<at::Tensor, at::Tensor> norm_quantize_down(
    const at::Tensor& x, bool centered, double eps, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor, double plus,
    const std::optional<at::Tensor>& shift, const at::Tensor& out_scale, const at::Tensor& out_zero_point, int64_t qmax,
    at::TensorList downs, bool bf16) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && !downs.empty(), "norm_quantize_down reads rows of one channel or more, ",
              "and one factor or more, not ", x.sizes(), " and ", downs.size(), " factors");
  const Down down(downs, x.size(-1), bf16);
  Results found = norm(x, centered, eps, weight, bias, factor, plus, shift, out_scale, out_zero_point, qmax, &down);
  return {found.codes, found.inner};
}

template <class T>
Results plain(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t qmax, const Down& down) {
  const at::Tensor input = x.contiguous();
  const int64_t channels = input.size(-1), rows = input.numel() / channels;
  at::Tensor codes = pooled(input.sizes(), input.options().dtype(at::kByte)), inner = inner_of(input, &down);
  write_codes(input.const_data_ptr<T>(), rows, channels, inverses(per_row<float>(scale, input, rows, "the scale")),
              per_row<uint8_t, int32_t>(zero_point, input, rows, "the zero point"), qmax,
              codes.mutable_data_ptr<uint8_t>(), &down, inner.mutable_data_ptr(), [](const T* row, int64_t) {
    return [=](int64_t c, Lanes lanes) __attribute__((always_inline)) { return load(row + c, lanes); };
  });
  return {codes, inner};
}

std::tuple<at::Tensor, at::Tensor> quantize_down(const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, int64_t qmax, at::TensorList downs,
                                                 bool bf16) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && !downs.empty(), "quantize_down reads rows of one channel or more, and ",
              "one factor or more, not ", x.sizes(), " and ", downs.size(), " factors");
  const Down down(downs, x.size(-1), bf16);
  const auto call = [&](auto zero) { return plain<decltype(zero)>(x, scale, zero_point, qmax, down); };
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
              "quantize_down reads float32, bfloat16 and float16, not ", x.scalar_type());
  Results found = x.scalar_type() == at::kFloat ? call(0.0f)
                  : x.scalar_type() == at::kHalf ? call(c10::Half()) : call(c10::BFloat16());
  return {found.codes, found.inner};
}

// The inner values of rows of bfloat16 that are read as they are.
at::Tensor down(const at::Tensor& x, at::TensorList downs) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && !downs.empty() && x.scalar_type() == at::kBFloat16,
              "down reads rows of bfloat16 of one channel or more, and one factor or more, not ", x.sizes(), " of ",
              x.scalar_type(), " and ", downs.size(), " factors");
  const at::Tensor input = x.contiguous();
  const int64_t channels = input.size(-1), rows = input.numel() / channels, row_bytes = channels * 2;
  const Down down(downs, channels, true);
  at::Tensor inner = inner_of(input, &down);
  const char* from = static_cast<const char*>(input.const_data_ptr());
  void* to = inner.mutable_data_ptr();
  // Rows that end within a dword, or that compete for lines of the first-level cache, are copied first.
  const bool copies = row_bytes % 4 || row_bytes % 4096 == 0;
  at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 19) / down.work()), [&](int64_t begin, int64_t end) {
    std::vector<char> kept = copies ? down.scratch() : std::vector<char>();
    const int64_t tiles = divide_up(end - begin, kDownRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t top = begin + (end - begin) * tile / tiles, bottom = begin + (end - begin) * (tile + 1) / tiles;
      for (int64_t r = top; copies && r < bottom; ++r)
        std::memcpy(kept.data() + (r - top) * down.row_bytes(), from + r * row_bytes, row_bytes);
      down.multiply(copies ? kept.data() : from + top * row_bytes, copies ? down.row_bytes() : row_bytes, bottom - top,
                    to, top);
    }
  });
  return inner;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) {
  library.impl("norm_quantize", &norm_quantize);
  library.impl("norm_quantize_down", &norm_quantize_down);
  library.impl("quantize_down", &quantize_down);
  library.impl("down", &down);
}

}  // namespace fxquant::norm_kernels
