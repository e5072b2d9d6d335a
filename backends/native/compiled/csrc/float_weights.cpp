// Linears of float inputs and weights in float formats of 4 to 8 bits, summed in float32.
//
// The weight is stored in panels as for vnni_linear (linear.cpp), its scales in panels too. Up to kFew rows of inputs
// are multiplied with elements in registers; scales multiply the sums of groups. For more rows, 16 KiB of a panel are
// decoded at a time, each weight as the reference decodes it, and then multiplied with all rows.

#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <utility>

#include "elements.h"
#include "factors.h"
#include "memory.h"
#include "parallel.h"

namespace fxquant::float_weights_kernels {
namespace {

constexpr int64_t kPanel = kFactorPanel;
constexpr int kFew = kWide ? 6 : 3;     // Rows that are multiplied with elements in registers.
constexpr int64_t kDwords = 128;        // Decoded dwords per output: 16 KiB per panel, half of a first-level cache.
constexpr int64_t kMostRows = 512;      // Rows whose sums one worker holds.

struct Task {
  const char* x;  // [rows, width], float32 or bfloat16, zeros after the inputs.
  int64_t rows, width;
  bool bf16;
  const int8_t* weight;
  int64_t panel_bytes;
  int64_t group;  // Inputs per scale.
  int64_t groups;
  ScaleKind kind;
  const void* scales;  // [panels][groups][32]
  Floats global;
  const float* bias;  // [panels * 32]

  Floats scales_of(int64_t panel, int64_t group, int v) const {
    return load_scales(kind, scales, (panel * groups + group) * kPanel + v * kLanes, global);
  }
};

// Calls `use(input, v, elements, next)` for every second input of [begin, end), with the elements of the input and of
// the next one. The bounds are multiples of 8 or, with a byte per code, of 4.
template <bool kHalves, class Element, class Use>
FXQUANT_INLINE void each_pair(const Element& element, const int8_t* panel, int64_t begin,
                              int64_t end, const Use& use) {
  constexpr int kCodes = kHalves ? 8 : 4;
  for (int64_t input = begin; input < end; input += kCodes) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Ints bytes = simd::loadu_si512(panel + input / kCodes * 128 + v * 64);
#pragma GCC unroll 4
      for (int code = 0; code < kCodes; code += 2) {
        const int bit = code % 4 * 8 + code / 4 * 4;
        use(input + code, v, element(simd::srli_epi32(bytes, bit)), element(simd::srli_epi32(bytes, bit + 8)));
      }
    }
  }
}

// The products of R rows with one panel, float32 [R][32].
template <int R, bool kHalves, class Element>
__attribute__((noinline)) void few_rows(const Task& task, const Element& element, int64_t panel, float* out) {
  const float* x = reinterpret_cast<const float*>(task.x);
  const int8_t* weight = task.weight + panel * task.panel_bytes;
  Floats total[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) total[r][v] = simd::loadu_ps(task.bias + panel * kPanel + v * kLanes);
  for (int64_t group = 0; group < task.groups; ++group) {
    Floats acc[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = simd::setzero_ps();
    const int64_t begin = group * task.group, end = std::min(task.width, begin + task.group);
    each_pair<kHalves>(element, weight, begin, end, [&](int64_t input, int v, Floats w, Floats next)
                           __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const float* at = x + r * task.width + input;
        acc[r][v] = simd::fmadd_ps(simd::set1_ps(at[0]), w, acc[r][v]);
        acc[r][v] = simd::fmadd_ps(simd::set1_ps(at[1]), next, acc[r][v]);
      }
    });
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Floats scale = task.scales_of(panel, group, v);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) total[r][v] = simd::fmadd_ps(scale, acc[r][v], total[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) simd::storeu_ps(out + r * kPanel + v * kLanes, total[r][v]);
}

// Decodes inputs [begin, end) of a panel: one dword of float32 per input and output, or of two bfloat16 of neighbours.
template <bool kBf16, bool kHalves, class Element>
__attribute__((noinline)) void decode(const Task& task, const Element& element, int64_t panel, int64_t begin,
                                      int64_t end, uint32_t* to) {
  const int8_t* weight = task.weight + panel * task.panel_bytes;
  for (int64_t from = begin; from < end;) {
    const int64_t group = from / task.group, until = std::min(end, (group + 1) * task.group);
    const Floats scales[2] = {task.scales_of(panel, group, 0), task.scales_of(panel, group, 1)};
    each_pair<kHalves>(element, weight, from, until, [&](int64_t input, int v, Floats w, Floats next)
                           __attribute__((always_inline)) {
      w = simd::mul_ps(w, scales[v]);
      next = simd::mul_ps(next, scales[v]);
      if constexpr (kBf16) {
        const Ints low = simd::cvtepu16_epi32(to_bf16(w)), high = simd::cvtepu16_epi32(to_bf16(next));
        simd::storeu_si512(to + (input - begin) / 2 * kPanel + v * kLanes,
                            simd::or_si512(low, simd::slli_epi32(high, 16)));
      } else {
        uint32_t* at = to + (input - begin) * kPanel + v * kLanes;
        simd::storeu_ps(at, w);
        simd::storeu_ps(at + kPanel, next);
      }
    });
    from = until;
  }
}

// The products of rows [first, last) with one panel, float32 [rows][32]; `decoded` is memory for the decoded part.
template <bool kHalves, class Element>
void many_rows(const Task& task, const Element& element, int64_t panel, int64_t first, int64_t last, uint32_t* decoded,
               float* out) {
  for (int64_t row = first; row < last; ++row) std::copy_n(task.bias + panel * kPanel, kPanel, out + (row - first) * kPanel);
  const int64_t bytes = task.bf16 ? 2 : 4, step = kDwords * 4 / bytes, rows = last - first;
  const auto& kernels = factor_kernels(task.bf16, false);
  const int64_t tiles = divide_up(rows, kFactorRows);
  alignas(64) float sums[kFactorRows * kPanel];
  for (int64_t begin = 0; begin < task.width; begin += step) {
    const int64_t end = std::min(task.width, begin + step);
    if (task.bf16) decode<true, kHalves>(task, element, panel, begin, end, decoded);
    else decode<false, kHalves>(task, element, panel, begin, end, decoded);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t top = rows * tile / tiles, bottom = rows * (tile + 1) / tiles;
      kernels[bottom - top - 1](task.x + ((first + top) * task.width + begin) * bytes, task.width * bytes, decoded,
                                factor_steps(end - begin, task.bf16), 1.0f, sums);
      for (int64_t at = 0; at < (bottom - top) * kPanel; at += kLanes) {
        float* to = out + top * kPanel + at;
        simd::storeu_ps(to, simd::add_ps(simd::loadu_ps(to), simd::load_ps(sums + at)));
      }
    }
  }
}

template <bool kHalves, class Element, size_t... R>
void run_few(const Task& task, const Element& element, int64_t panel, float* out, std::index_sequence<R...>) {
  using Few = void (*)(const Task&, const Element&, int64_t, float*);
  static constexpr std::array<Few, kFew> kernels = {few_rows<R + 1, kHalves, Element>...};
  kernels[task.rows - 1](task, element, panel, out);
}

// Calls `write(panel, first, last, values)` with the values of rows [first, last), float32 [rows][32].
template <bool kHalves, class Element, class Write>
void run(const Task& task, const Element& element, int64_t panels, const Write& write) {
  const bool few = task.rows <= kFew;
  const int64_t parts = divide_up(task.rows, kMostRows), rows = divide_up(task.rows, parts);
  const int64_t least = std::max<int64_t>(1, (1 << 17) / (task.width * kPanel * rows));
  share_out(panels * parts, least, [&](const auto& take) {
    std::vector<float> out(rows * kPanel);
    std::vector<uint32_t> decoded(few ? 0 : kDwords * kPanel);
    take([&](int64_t unit) {
      const int64_t part = unit / panels, panel = unit % panels;
      const int64_t first = task.rows * part / parts, last = task.rows * (part + 1) / parts;
      if (few) run_few<kHalves>(task, element, panel, out.data(), std::make_index_sequence<kFew>());
      else many_rows<kHalves>(task, element, panel, first, last, decoded.data(), out.data());
      write(panel, first, last, out.data());
    });
  });
}

// Inputs as the kernels read them, with zeros up to `width`.
at::Tensor real_rows(const at::Tensor& x, int64_t rows, int64_t width, bool bf16) {
  at::Tensor real = x.reshape({rows, x.size(-1)}).to(bf16 ? at::kBFloat16 : at::kFloat);
  if (width != x.size(-1)) real = at::constant_pad_nd(real, {0, width - x.size(-1)});
  return real.contiguous();
}

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
           const std::optional<at::Tensor>& global, const std::optional<at::Tensor>& bias, const FloatFormat& format,
           int64_t group_size, int64_t out_features) {
  TORCH_CHECK(x.dim() >= 1 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 ||
                               x.scalar_type() == at::kHalf),
              "float_weight_linear reads float32, bfloat16 and float16, not ", x.scalar_type());
  const bool halves = weight.scalar_type() == at::kByte;
  const int64_t in = x.size(-1), each = halves ? 8 : 4, panels = divide_up(out_features, kPanel);
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == divide_up(in, each) &&
                  weight.size(2) == 128 && weight.is_contiguous() && (!halves || format.table != nullptr),
              "a weight of ", in, " inputs and ", out_features, " outputs in panels is [", panels, ", ",
              divide_up(in, each), ", 128], not ", weight.sizes());
  const at::ScalarType stored = format.scales == ScaleKind::kFloat32 ? at::kFloat : at::kByte;
  const int64_t groups = group_size ? divide_up(in, group_size) : 1;
  TORCH_CHECK(scales.dim() == 3 && scales.size(0) == panels && scales.size(1) == groups && scales.size(2) == kPanel &&
                  scales.is_contiguous() && scales.scalar_type() == stored && group_size >= 0 && group_size % each == 0,
              "scales in panels, for ", in, " inputs in groups of ", group_size, ", are ", stored, " [", panels, ", ",
              groups, ", 32], not ", scales.scalar_type(), " ", scales.sizes());
  TORCH_CHECK(global.has_value() == (format.scales == ScaleKind::kE4M3) && (!global || global->numel() == 1),
              "formats with scales in e4m3, and no others, have one scale of the tensor");
  TORCH_CHECK(!bias || bias->numel() == out_features, "a bias of shape ", bias->sizes(), " for ", out_features,
              " outputs");
}

at::Tensor float_weight_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& w_scale,
                               const std::optional<at::Tensor>& global_scale, const std::optional<at::Tensor>& bias,
                               const std::string& format, int64_t group_size, int64_t out_features) {
  const FloatFormat held = float_format(format);
  check(x, weight, w_scale, global_scale, bias, held, group_size, out_features);
  const bool halves = weight.scalar_type() == at::kByte;
  const int64_t panels = weight.size(0), width = weight.size(1) * (halves ? 8 : 4);
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  at::Tensor result = pooled(sizes, x.options());
  if (!result.numel()) return result;
  const int64_t rows = result.numel() / out_features;
  const bool bf16 = kHasBf16 && x.scalar_type() == at::kBFloat16 && rows > kFew;
  const at::Tensor real = real_rows(x, rows, width, bf16);
  std::vector<float> added(panels * kPanel, 0.0f);
  if (bias) {
    const at::Tensor row = bias->to(at::kFloat).contiguous();
    std::copy_n(row.const_data_ptr<float>(), out_features, added.begin());
  }
  const float global = global_scale ? global_scale->item<float>() : 1.0f;
  const Task task{static_cast<const char*>(real.const_data_ptr()), rows, width, bf16,
                  static_cast<const int8_t*>(weight.const_data_ptr()), weight.size(1) * 128,
                  group_size ? group_size : width, w_scale.size(1), held.scales, w_scale.const_data_ptr(),
                  simd::set1_ps(global), added.data()};
  const auto start = [&](auto* to) {
    const auto write = [&](int64_t panel, int64_t first, int64_t last, const float* values) {
      for (int64_t row = first; row < last; ++row)
        for (int64_t column = 0; column < kPanel; column += kLanes)
          store(to + row * out_features + panel * kPanel + column, first_lanes(out_features - panel * kPanel - column),
                simd::loadu_ps(values + (row - first) * kPanel + column));
    };
    if (!held.table) run<false>(task, held.element(), panels, write);
    else if (halves) run<true>(task, Table(held.table), panels, write);
    else run<false>(task, Table(held.table), panels, write);
  };
  if (x.scalar_type() == at::kFloat) start(result.mutable_data_ptr<float>());
  else if (x.scalar_type() == at::kBFloat16) start(result.mutable_data_ptr<c10::BFloat16>());
  else start(result.mutable_data_ptr<c10::Half>());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) { library.impl("float_weight_linear", &float_weight_linear); }

}  // namespace fxquant::float_weights_kernels
