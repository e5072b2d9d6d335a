// Linears of float inputs and weights of up to 8 bits, which become real values in registers, summed in float32.
//
// The weight is stored in panels as for vnni_linear (linear.cpp). It is read once for up to kTile rows of inputs. A
// linear with one vector per sample, such as an embedding of timesteps, takes only the time of reading the weight.

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <utility>

#include "memory.h"
#include "simd.h"

namespace fxquant::weight_only_kernels {
namespace {

constexpr int64_t kPanel = 32;
constexpr int kTile = kWide ? 6 : 3;  // Rows per tile.

// Sums over quads [begin, end) of R rows times one panel, float32 [R][2].
template <int R, bool kHalves>
FXQUANT_INLINE void accumulate(const float* x, int64_t stride, const int8_t* panel,
                               int64_t begin, int64_t end, Floats (&acc)[R][2]) {
  const auto add = [&](int64_t quad, int v, Ints bytes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Floats w = simd::cvtepi32_ps(simd::srai_epi32(simd::slli_epi32(bytes, 24 - 8 * j), 24));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
        acc[r][v] = simd::fmadd_ps(simd::set1_ps(x[r * stride + quad * 4 + j]), w, acc[r][v]);
    }
  };
  if constexpr (kHalves) {
    const Ints low = simd::set1_epi8(15);
    for (int64_t quad = begin; quad < end; quad += 2) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Ints bytes = simd::loadu_si512(panel + quad * 64 + v * 64);
        add(quad, v, simd::and_si512(bytes, low));
        add(quad + 1, v, simd::and_si512(simd::srli_epi16(bytes, 4), low));
      }
    }
  } else {
    for (int64_t quad = begin; quad < end; ++quad) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) add(quad, v, simd::loadu_si512(panel + quad * 128 + v * 64));
    }
  }
}

struct WeightOnly {
  const float* x;       // [rows, stride], zeros after the inputs.
  const float* x_sums;  // [rows, groups]
  int64_t rows, stride, quads, group_quads, groups;
  const int8_t* weight;
  int64_t panel_bytes;
  const float *scale, *zero_point;  // [panels][groups][32]
  const float* bias;                // [panels * 32]
};

template <int R, bool kHalves>
void tile(const WeightOnly& task, int64_t first, int64_t panel, float* out) {
  Floats total[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) total[r][v] = simd::loadu_ps(task.bias + panel * kPanel + v * kLanes);
  for (int64_t group = 0; group < task.groups; ++group) {
    Floats acc[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = simd::setzero_ps();
    const int64_t begin = group * task.group_quads, end = std::min(task.quads, begin + task.group_quads);
    accumulate<R, kHalves>(task.x + first * task.stride, task.stride, task.weight + panel * task.panel_bytes, begin, end,
                           acc);
    const int64_t at = (panel * task.groups + group) * kPanel;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Floats scale = simd::loadu_ps(task.scale + at + v * kLanes);
      const Floats zero_point = simd::loadu_ps(task.zero_point + at + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Floats sum = simd::set1_ps(task.x_sums[(first + r) * task.groups + group]);
        total[r][v] = simd::fmadd_ps(scale, simd::fnmadd_ps(zero_point, sum, acc[r][v]), total[r][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) simd::storeu_ps(out + r * kPanel + v * kLanes, total[r][v]);
}

using Tile = void (*)(const WeightOnly&, int64_t, int64_t, float*);

template <bool kHalves, size_t... R>
constexpr std::array<Tile, kTile> make_tiles(std::index_sequence<R...>) {
  return {tile<R + 1, kHalves>...};
}

constexpr auto kWhole = make_tiles<false>(std::make_index_sequence<kTile>());
constexpr auto kHalf = make_tiles<true>(std::make_index_sequence<kTile>());

// `[out, groups]` in the order of panels, minus `less`, with zeros after the outputs.
std::vector<float> in_panels(const at::Tensor& values, int64_t panels, float less) {
  const at::Tensor real = values.to(at::kFloat).contiguous();
  const int64_t groups = real.size(1);
  const float* from = real.const_data_ptr<float>();
  std::vector<float> result(panels * groups * kPanel, 0.0f);
  for (int64_t n = 0; n < real.size(0); ++n)
    for (int64_t group = 0; group < groups; ++group)
      result[(n / kPanel * groups + group) * kPanel + n % kPanel] = from[n * groups + group] - less;
  return result;
}

at::Tensor weight_only_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& w_scale,
                              const at::Tensor& w_zero_point, const std::optional<at::Tensor>& bias, int64_t bits,
                              int64_t group_size, int64_t out_features) {
  TORCH_CHECK(x.dim() >= 1 && x.is_floating_point(), "weight_only_linear reads float inputs, not ", x.scalar_type());
  const bool halves = weight.scalar_type() == at::kByte;
  const int64_t in = x.size(-1), each = halves ? 8 : 4, panels = divide_up(out_features, kPanel);
  const int64_t width = divide_up(in, each) * each, groups = w_scale.size(1);
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == width / each && weight.size(2) == 128 &&
                  weight.is_contiguous(),
              "a weight of ", in, " inputs and ", out_features, " outputs in panels is [", panels, ", ", width / each,
              ", 128], not ", weight.sizes());
  TORCH_CHECK(w_scale.size(0) == out_features && w_zero_point.sizes() == w_scale.sizes() &&
                  groups == (group_size ? divide_up(in, group_size) : 1) && (group_size % each == 0 || groups == 1),
              "a grid ", w_scale.sizes(), " in groups of ", group_size, " does not fit a weight of ", in, " inputs");
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  at::Tensor result = pooled(sizes, x.options());
  if (!result.numel()) return result;
  const int64_t rows = result.numel() / out_features;
  at::Tensor real = x.reshape({rows, in}).to(at::kFloat);
  if (width != in) real = at::constant_pad_nd(real, {0, width - in});
  real = real.contiguous();
  const int64_t group = groups == 1 ? width : group_size;
  const at::Tensor sums = at::constant_pad_nd(real, {0, groups * group - width}).view({rows, groups, group}).sum(2);
  const float shift = bits == 8 ? 128.0f : 0.0f;
  const auto scales = in_panels(w_scale, panels, 0.0f), zero_points = in_panels(w_zero_point, panels, shift);
  std::vector<float> added(panels * kPanel, 0.0f);
  if (bias) {
    const at::Tensor row = bias->to(at::kFloat).contiguous();
    TORCH_CHECK(row.numel() == out_features, "a bias of shape ", row.sizes(), " for ", out_features, " outputs");
    std::copy_n(row.const_data_ptr<float>(), out_features, added.begin());
  }
  const WeightOnly task{real.const_data_ptr<float>(), sums.const_data_ptr<float>(), rows, width, width / 4, group / 4,
                        groups, static_cast<const int8_t*>(weight.const_data_ptr()), width / each * 128, scales.data(),
                        zero_points.data(), added.data()};
  const int64_t tiles = divide_up(rows, kTile);
  const auto& kernels = halves ? kHalf : kWhole;
  const auto write = [&](auto zero) {
    using T = decltype(zero);
    T* to = result.mutable_data_ptr<T>();
    at::parallel_for(0, panels, std::max<int64_t>(1, (1 << 17) / (width * kPanel)), [&](int64_t begin, int64_t end) {
      alignas(64) float out[kTile * kPanel];
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t top = rows * tile / tiles, bottom = rows * (tile + 1) / tiles;
          kernels[bottom - top - 1](task, top, panel, out);
          for (int64_t r = top; r < bottom; ++r)
            for (int64_t column = 0; column < kPanel; column += kLanes)
              store(to + r * out_features + panel * kPanel + column,
                    first_lanes(out_features - panel * kPanel - column),
                    simd::load_ps(out + (r - top) * kPanel + column));
        }
      }
    });
  };
  if (x.scalar_type() == at::kFloat) write(0.0f);
  else if (x.scalar_type() == at::kBFloat16) write(c10::BFloat16());
  else if (x.scalar_type() == at::kHalf) write(c10::Half());
  else TORCH_CHECK(false, "weight_only_linear reads float32, bfloat16 and float16, not ", x.scalar_type());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) { library.impl("weight_only_linear", &weight_only_linear); }

}  // namespace fxquant::weight_only_kernels
