// Linears of uint8 codes and integer weights of up to 8 bits, summed exactly in 32 bits, and the ops that follow them.
//
// The weight is stored in panels of 32 output channels. A panel holds, for every four input channels, 32 groups of four
// bytes; 16 groups are one operand of vpdpbusd. Weights of up to 4 bits hold eight input channels in the same space,
// the first four in the low halves of the bytes and the others in the high halves. They are unpacked in registers.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "branch.h"
#include "groups.h"
#include "memory.h"
#include "parallel.h"
#include "products.h"
#include "results.h"
#include "simd.h"

namespace fxquant::linear_kernels {
namespace {

enum class Activation { kNone, kGeluTanh, kSilu };

template <bool kHalves, size_t... R>
constexpr std::array<Accumulate, kRows> make_accumulates(std::index_sequence<R...>) {
  return {accumulate<R + 1, kHalves, false>...};
}

constexpr auto kWhole = make_accumulates<false>(std::make_index_sequence<kRows>());
constexpr auto kHalf = make_accumulates<true>(std::make_index_sequence<kRows>());

struct Linear {
  // The codes: rows of `row_bytes` bytes, of which the first `in` are used.
  const uint8_t* codes;
  int64_t rows, in, row_bytes;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  // The weight.
  const int8_t* weight;
  int64_t out, quads, panel_bytes;
  bool halves;
  const float* w_scale;
  const int32_t* w_zero_point;  // Null if all are 0. w_scale and w_zero_point are padded to whole panels.
  const int32_t* w_sums;
  const Groups* groups;  // Null if a weight has one grid per output; else w_scale, w_zero_point and w_sums are null.
  // The ops that follow.
  std::vector<const float*> bias;  // Empty if there is no bias.
  Branch branch;
  Activation activation;
};

// Real values of one row of a tile: activation of `scale * w_scale * sum (x - zero_point) (w - w_zero_point) + bias`
// plus the branch, 32 values or null.
class Epilogue {
 public:
  Epilogue(const Linear& linear, int64_t column) : linear_(linear), column_(column) {
    for (int v = 0; v < 2; ++v) {
      lanes_[v] = first_lanes(linear.out - column - v * kLanes);
      if (linear.groups) {
        real_sums_[v] = simd::maskz_loadu_ps(lanes_[v], linear.groups->w_sums + column + v * kLanes);
        continue;
      }
      w_scale_[v] = simd::loadu_ps(linear.w_scale + column + v * kLanes);
      w_sums_[v] = simd::loadu_si512(linear.w_sums + column + v * kLanes);
      if (linear.w_zero_point) w_zero_point_[v] = simd::loadu_si512(linear.w_zero_point + column + v * kLanes);
    }
  }

  Lanes lanes(int v) const { return lanes_[v]; }

  void values(const int32_t* sums, int64_t row, int32_t code_sum, const float* branch, Floats (&y)[2]) {
    const int32_t zero_point = linear_.zero_point[row];
    if (zero_point != last_) {
      last_ = zero_point;
      for (int v = 0; v < 2; ++v) offset_[v] = simd::mullo_epi32(w_sums_[v], simd::set1_epi32(zero_point));
    }
    const Floats scale = simd::set1_ps(linear_.scale[row]);
    const int32_t real_sum = code_sum - static_cast<int32_t>(linear_.in) * zero_point;
    for (int v = 0; v < 2; ++v) {
      Ints total = simd::sub_epi32(simd::loadu_si512(sums + v * kLanes), offset_[v]);
      if (linear_.w_zero_point)
        total = simd::sub_epi32(total, simd::mullo_epi32(w_zero_point_[v], simd::set1_epi32(real_sum)));
      y[v] = simd::mul_ps(simd::mul_ps(simd::cvtepi32_ps(total), w_scale_[v]), scale);
    }
    finish(row, branch, y);
  }

  // The same for a weight in groups, whose sums include its scales and zero points.
  void values(const float* sums, int64_t row, const float* branch, Floats (&y)[2]) const {
    const Floats scale = simd::set1_ps(linear_.scale[row]);
    const Floats zero_point = simd::set1_ps(static_cast<float>(linear_.zero_point[row]));
    for (int v = 0; v < 2; ++v)
      y[v] = simd::mul_ps(simd::fnmadd_ps(zero_point, real_sums_[v], simd::loadu_ps(sums + v * kLanes)), scale);
    finish(row, branch, y);
  }

 private:
  void finish(int64_t row, const float* branch, Floats (&y)[2]) const {
    for (int v = 0; v < 2; ++v) {
      if (!linear_.bias.empty()) y[v] = simd::add_ps(y[v], load(linear_.bias[row] + column_ + v * kLanes, lanes_[v]));
      if (branch) y[v] = simd::add_ps(y[v], simd::loadu_ps(branch + v * kLanes));
      if (linear_.activation == Activation::kGeluTanh) y[v] = gelu_tanh(y[v]);
      if (linear_.activation == Activation::kSilu) y[v] = silu(y[v]);
    }
  }

  const Linear& linear_;
  int64_t column_;
  Lanes lanes_[2];
  Floats w_scale_[2], real_sums_[2];
  Ints w_sums_[2], w_zero_point_[2], offset_[2];
  int32_t last_ = -1;
};

// The sums of `count` rows of codes, one per row, or one per group of each row.
void sum_codes(const Linear& linear, int64_t first, int64_t count, std::vector<int32_t>& sums) {
  const int64_t groups = linear.groups ? linear.groups->count : 1;
  const int64_t size = linear.groups ? linear.groups->quads * 4 : linear.in;
  sums.resize(count * groups);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t group = 0; group < groups; ++group)
      sums[r * groups + group] = sum_of(linear.codes + (first + r) * linear.row_bytes + group * size,
                                        std::min(size, linear.in - group * size));
}

// Loops over blocks of rows that fit the cache; in a block, over panels; in a panel, over tiles of rows. The memory
// that a tile reads and writes at its end is prefetched at its start, because the sums take as long as memory access.
template <class Finish>
void multiply(const Linear& linear, const Finish& finish) {
  const int64_t panels = divide_up(linear.out, kPanel);
  const int64_t most = std::max<int64_t>(kRows, kBlockBytes / std::max<int64_t>(linear.row_bytes, 1));
  const int64_t blocks = divide_up(linear.rows, most), block = divide_up(linear.rows, blocks);
  const int64_t work = block * linear.in * kPanel;  // Multiplications per panel and block.
  const auto& kernels = linear.halves ? kHalf : kWhole;
  const Groups* groups = linear.groups;
  const auto& group_kernels = kernels_of_groups<kRows>(linear.halves, groups && groups->subtracts);
  const int64_t least = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(work, 1));
  share_out(blocks * panels, least, [&](const auto& take) {
    std::vector<int32_t> code_sums;
    alignas(64) int32_t sums[kRows * kPanel];
    alignas(64) float branch_sums[kRows * kPanel];
    alignas(64) float totals[kRows * kPanel];
    // The rows of a block as the kernels read them.
    const int64_t row_bytes = linear.row_bytes * (linear.halves ? kQuadBytes<true> : kQuadBytes<false>) / 4;
    std::vector<uint8_t> wide(row_bytes == linear.row_bytes ? 0 : block * row_bytes);
    int64_t summed = -1, widened = -1;
    take([&](int64_t unit) {
      const int64_t first = unit / panels * block, count = std::min(block, linear.rows - first);
      if (!wide.empty() && widened != first) {
        for (int64_t r = 0; r < count; ++r)
          widen(linear.codes + (first + r) * linear.row_bytes, linear.row_bytes, wide.data() + r * row_bytes);
        widened = first;
      }
      const int64_t panel = unit % panels;
      if ((linear.w_zero_point || (groups && groups->corrects)) && summed != first) {
        sum_codes(linear, first, count, code_sums);
        summed = first;
      }
      const int64_t tiles = divide_up(count, kRows);
      Epilogue epilogue(linear, panel * kPanel);
      const UpPanel up(linear.branch, panel * kPanel, linear.out);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t top = count * tile / tiles, bottom = count * (tile + 1) / tiles;
        for (int64_t r = top; r < bottom; ++r) {
          finish.prefetch(first + r, panel * kPanel);
          if (linear.branch) up.prefetch(first + r);
        }
        const uint8_t* codes = wide.empty() ? linear.codes + (first + top) * row_bytes : wide.data() + top * row_bytes;
        const int8_t* weight = linear.weight + panel * linear.panel_bytes;
        if (groups)
          group_kernels[bottom - top - 1](*groups, codes, row_bytes, weight, linear.quads, panel * kPanel,
                                          groups->corrects ? code_sums.data() + top * groups->count : nullptr, totals);
        else
          kernels[bottom - top - 1](codes, row_bytes, weight, linear.quads, nullptr, sums);
        if (linear.branch) up.multiply(first + top, bottom - top, branch_sums);
        for (int64_t r = top; r < bottom; ++r) {
          const float* branch = linear.branch ? branch_sums + (r - top) * kPanel : nullptr;
          Floats y[2];
          if (groups) epilogue.values(totals + (r - top) * kPanel, first + r, branch, y);
          else
            epilogue.values(sums + (r - top) * kPanel, first + r, linear.w_zero_point ? code_sums[r] : 0, branch, y);
          for (int v = 0; v < 2; ++v)
            if (epilogue.lanes(v)) finish.write(first + r, panel * kPanel + v * kLanes, epilogue.lanes(v), y[v]);
        }
      }
    });
  });
}

template <class T>
struct Values {
  T* out;
  int64_t width;
  std::vector<const T*> gates;
  const T* added;

  void prefetch(int64_t row, int64_t column) const {
    const int64_t at = row * width + column;
    for (int64_t byte = 0; byte < kPanel * static_cast<int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(out + at) + byte, 1);
      if (added) __builtin_prefetch(reinterpret_cast<const char*>(added + at) + byte, 0);
    }
  }

  void write(int64_t row, int64_t column, Lanes lanes, Floats y) const {
    const int64_t at = row * width + column;
    if (!gates.empty()) y = simd::mul_ps(y, load(gates[row] + column, lanes));
    if (added) y = simd::add_ps(y, load(added + at, lanes));
    store(out + at, lanes, y);
  }
};

struct Codes {
  uint8_t* out;
  int64_t width;
  std::vector<float> inverse_scale;
  std::vector<int32_t> zero_point;
  Ints highest;

  void prefetch(int64_t row, int64_t column) const { __builtin_prefetch(out + row * width + column, 1); }

  void write(int64_t row, int64_t column, Lanes lanes, Floats y) const {
    simd::mask_storeu_epi8(out + row * width + column, lanes,
                         quantize(y, simd::set1_ps(inverse_scale[row]), simd::set1_epi32(zero_point[row]), highest));
  }
};

// Codes, and the values themselves in bfloat16 for a branch of low rank.
struct CodesAndValues {
  Codes codes;
  c10::BFloat16* values;

  void prefetch(int64_t row, int64_t column) const {
    codes.prefetch(row, column);
    __builtin_prefetch(values + row * codes.width + column, 1);
  }

  void write(int64_t row, int64_t column, Lanes lanes, Floats y) const {
    codes.write(row, column, lanes, y);
    store(values + row * codes.width + column, lanes, y);
  }
};

template <class T>
void write_floats(const Linear& linear, const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& residual,
                  int64_t samples, at::Tensor& result) {
  std::vector<const T*> gates;
  if (gate) gates = vectors<T>(*gate, samples, linear.rows, linear.out, "the gate");
  const T* added = residual ? residual->const_data_ptr<T>() : nullptr;
  multiply(linear, Values<T>{result.mutable_data_ptr<T>(), linear.out, std::move(gates), added});
}

template <class T>
std::vector<T> padded(const at::Tensor& values, int64_t size, int32_t minus = 0) {
  std::vector<T> result(size, T(0));
  if (values.scalar_type() == at::kByte) {
    const uint8_t* from = values.const_data_ptr<uint8_t>();
    for (int64_t n = 0; n < values.numel(); ++n) result[n] = static_cast<T>(static_cast<int32_t>(from[n]) - minus);
  } else {
    const T* from = values.const_data_ptr<T>();
    std::copy(from, from + values.numel(), result.begin());
  }
  return result;
}

// Scales, zero points and sums of a weight, one for each output, with zeros up to whole panels.
struct Grids {
  std::vector<float> scales;
  std::vector<int32_t> zero_points, sums;

  void read(const at::Tensor& w_scale, const at::Tensor& w_zero_point, const at::Tensor& w_sums, int64_t bits,
            Linear& task) {
    const int64_t size = divide_up(task.out, kPanel) * kPanel;
    TORCH_CHECK(w_scale.numel() == task.out && w_zero_point.numel() == task.out && w_sums.numel() == task.out,
                "scales, zero points and sums of a weight are one for each of ", task.out, " outputs");
    scales = padded<float>(w_scale, size);
    zero_points = padded<int32_t>(w_zero_point, size, bits == 8 ? 128 : 0);
    sums = padded<int32_t>(w_sums, size);
    task.w_scale = scales.data();
    task.w_sums = sums.data();
    const bool zero = std::all_of(zero_points.begin(), zero_points.begin() + task.out, [](int32_t z) { return z == 0; });
    task.w_zero_point = zero ? nullptr : zero_points.data();
  }
};

Results linear(bool keeps_values, const at::Tensor& xq, const at::Tensor& x_scale, const at::Tensor& x_zero_point,
               const at::Tensor& weight, const at::Tensor& w_scale, const at::Tensor& w_zero_point,
               const at::Tensor& w_sums, const std::optional<at::Tensor>& bias, int64_t bits, int64_t out_features,
               c10::string_view activation, const std::optional<at::Tensor>& gate,
               const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& out_scale,
               const std::optional<at::Tensor>& out_zero_point, int64_t qmax, at::ScalarType out_dtype,
               const std::optional<at::Tensor>& inner, const std::optional<at::Tensor>& up, int64_t inner_from,
               const std::optional<at::Tensor>& strength, int64_t group_size) {
  TORCH_CHECK(xq.scalar_type() == at::kByte && xq.dim() >= 1, "vnni_linear reads uint8 codes, not ", xq.scalar_type());
  const at::Tensor codes = xq.contiguous();
  Linear task{};
  task.in = codes.size(-1);
  task.rows = task.in ? codes.numel() / task.in : 0;
  task.out = out_features;
  task.halves = weight.scalar_type() == at::kByte;  // Two codes per byte, unsigned.
  const int64_t panels = divide_up(out_features, kPanel), each = task.halves ? 8 : 4;
  const int64_t groups = divide_up(task.in, each);
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == groups && weight.size(2) == 128 &&
                  weight.is_contiguous(),
              "a weight of ", task.in, " inputs and ", out_features, " outputs in panels is [", panels, ", ", groups,
              ", 128], not ", weight.sizes());
  task.quads = groups * each / 4;
  task.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  task.panel_bytes = groups * 128;
  // Rows are as long as the panels: bytes after the codes are multiplied with weights of 0, but have to be readable.
  at::Tensor ends;
  task.row_bytes = task.in;
  task.codes = codes.const_data_ptr<uint8_t>();
  if (task.in % each) {
    ends = at::zeros({task.rows, task.quads * 4}, codes.options());
    ends.narrow(1, 0, task.in).copy_(codes.reshape({task.rows, task.in}));
    task.row_bytes = task.quads * 4;
    task.codes = ends.const_data_ptr<uint8_t>();
  }
  task.scale = per_row<float>(x_scale, codes, task.rows, "the scale of the codes");
  task.zero_point = per_row<uint8_t, int32_t>(x_zero_point, codes, task.rows, "the zero point of the codes");
  std::optional<Groups> grouped;
  Grids grids;
  if (group_size) {
    TORCH_CHECK(group_size > 0 && group_size % each == 0, "groups of ", group_size, " inputs are not multiples of ", each);
    grouped.emplace(w_scale, w_zero_point, w_sums, bits, group_size, task.in, out_features);
    task.groups = &*grouped;
  } else {
    grids.read(w_scale, w_zero_point, w_sums, bits, task);
  }
  const int64_t samples = codes.dim() > 1 ? codes.size(0) : 1;
  at::Tensor row;
  if (bias) {
    row = bias->scalar_type() == at::kFloat && bias->stride(-1) == 1 ? *bias : bias->to(at::kFloat).contiguous();
    task.bias = vectors<float>(row, samples, task.rows, out_features, "the bias");
  }
  TORCH_CHECK(activation == "none" || activation == "gelu_tanh" || activation == "silu", "no activation ", activation);
  task.activation = activation == "none" ? Activation::kNone
                    : activation == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  task.branch = make_branch(inner, up, inner_from, strength, task.rows, out_features);
  auto sizes = codes.sizes().vec();
  sizes.back() = out_features;
  at::Tensor result = pooled(sizes, codes.options().dtype(out_scale ? at::kByte : out_dtype)), values;
  TORCH_CHECK(!keeps_values || out_scale, "values are written beside codes, which need a scale");
  if (keeps_values) values = pooled(sizes, codes.options().dtype(at::kBFloat16));
  if (!task.rows || !out_features) return {result, values};
  if (out_scale) {
    TORCH_CHECK(!gate && !residual && out_zero_point, "codes are written without gate and residual");
    Codes written{result.mutable_data_ptr<uint8_t>(), out_features,
                  inverses(per_row<float>(*out_scale, result, task.rows, "the scale of the result")),
                  per_row<uint8_t, int32_t>(*out_zero_point, result, task.rows, "the zero point of the result"),
                  simd::set1_epi32(static_cast<int32_t>(qmax))};
    if (keeps_values) multiply(task, CodesAndValues{std::move(written), values.mutable_data_ptr<c10::BFloat16>()});
    else multiply(task, written);
    return {result, values};
  }
  std::optional<at::Tensor> added;
  if (residual) {
    TORCH_CHECK(residual->sizes() == result.sizes() && residual->scalar_type() == out_dtype, "a residual of shape ",
                residual->sizes(), " and dtype ", residual->scalar_type(), " is added to ", result.sizes());
    added = residual->contiguous();
  }
  if (out_dtype == at::kFloat) write_floats<float>(task, gate, added, samples, result);
  else if (out_dtype == at::kBFloat16) write_floats<c10::BFloat16>(task, gate, added, samples, result);
  else if (out_dtype == at::kHalf) write_floats<c10::Half>(task, gate, added, samples, result);
  else TORCH_CHECK(false, "vnni_linear writes float32, bfloat16 and float16, not ", out_dtype);
  return {result, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) {
  library.impl("vnni_linear", &Op<&linear>::one);
  library.impl("vnni_linear_values", &Op<&linear>::both);
}

}  // namespace fxquant::linear_kernels
