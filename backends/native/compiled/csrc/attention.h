// Attention, one head at a time. Keys and values are packed once. Then a few rows of queries at a time are multiplied
// with all keys.
//
// Scores of a few rows fit the first-level cache, so a plain softmax over whole rows is used. Products are of bfloat16
// with float32 sums, or of uint8 and int8 codes with exact 32-bit sums. Head dimensions at which torch's kernels are
// slow, such as 72, only cost the time of their multiplications.

#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace fxquant {

constexpr int kQueries = kWide ? 6 : 4;  // Rows of queries per tile: times four vectors, or one, 24 accumulators or 8.

// acc[r][v] of R rows of factors, four bytes per step, and V vectors. `Bf16` or `Bytes` says what four bytes are.
template <class Kind, int R, int V>
void tile(const char* rows, int64_t row_bytes, const char* vectors, int64_t step_bytes, int64_t steps, void* out,
          int64_t out_stride) {
  typename Kind::Sum acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Kind::zero();
  for (int64_t step = 0; step < steps; ++step) {
    Ints right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = simd::loadu_si512(vectors + step * step_bytes + v * 64);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Ints left = simd::set1_epi32(*reinterpret_cast<const int32_t*>(rows + r * row_bytes + step * 4));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) Kind::add(acc[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      simd::storeu_si512(static_cast<int32_t*>(out) + r * out_stride + v * kLanes, Kind::bits(acc[r][v]));
}

#ifdef __AVX512BF16__
struct Bf16 {
  static constexpr int64_t kEach = 2;  // Values per step.
  using Value = uint16_t;
  using Sum = Floats;
  static Sum zero() { return simd::setzero_ps(); }
  static void add(Sum& sum, Ints left, Ints right) { add_products_bf16(sum, left, right); }
  static Ints bits(Sum sum) { return simd::castps_si512(sum); }
};
#endif

struct Bytes {
  static constexpr int64_t kEach = 4;
  using Value = uint8_t;
  using Sum = Ints;
  static Sum zero() { return simd::setzero_si512(); }
  static void add(Sum& sum, Ints left, Ints right) { add_products_u8s8(sum, left, right); }
  static Ints bits(Sum sum) { return sum; }
};

template <class Kind, int R>
void some_rows(const char* rows, int64_t row_bytes, const char* vectors, int64_t count, int64_t steps, int32_t* out,
               int64_t out_stride) {
  const int64_t step_bytes = count * 64;
  int64_t v = 0;
  const auto run = [&](auto kernel, int64_t width) {
    kernel(rows, row_bytes, vectors + v * 64, step_bytes, steps, out + v * kLanes, out_stride);
    v += width;
  };
  if constexpr (!kWide) {
    while (v < count) run(tile<Kind, R, 1>, 1);
  } else {
    while (count - v >= 6 || count - v == 4) run(tile<Kind, R, 4>, 4);
    if (count - v == 5) run(tile<Kind, R, 3>, 3);  // Splitting 5 into 3 and 2 keeps more sums in flight than 4 and 1.
    if (count - v == 3) run(tile<Kind, R, 3>, 3);
    if (count - v == 2) run(tile<Kind, R, 2>, 2);
    if (count - v == 1) run(tile<Kind, R, 1>, 1);
  }
}

// Products of up to kQueries rows of factors with `count` vectors, which are stored step by step.
template <class Kind>
void product(int64_t row_count, const void* rows, int64_t row_bytes, const void* vectors, int64_t count, int64_t steps,
             void* out, int64_t out_stride) {
  const auto* left = static_cast<const char*>(rows);
  const auto* right = static_cast<const char*>(vectors);
  auto* to = static_cast<int32_t*>(out);
  switch (row_count) {
    case 1: return some_rows<Kind, 1>(left, row_bytes, right, count, steps, to, out_stride);
    case 2: return some_rows<Kind, 2>(left, row_bytes, right, count, steps, to, out_stride);
    case 3: return some_rows<Kind, 3>(left, row_bytes, right, count, steps, to, out_stride);
    case 4: return some_rows<Kind, 4>(left, row_bytes, right, count, steps, to, out_stride);
    case 5: return some_rows<Kind, 5>(left, row_bytes, right, count, steps, to, out_stride);
    default: return some_rows<Kind, 6>(left, row_bytes, right, count, steps, to, out_stride);
  }
}

// A tensor [batch, heads, tokens, channels] with contiguous channels. Sizes and strides are read once, because reading
// them from a tensor takes longer than the arithmetic of a row.
template <class T>
struct Heads {
  at::Tensor tensor;
  const T* data;
  int64_t tokens, channels, batch_stride, head_stride, token_stride;
  int64_t group;  // Query heads that share a head of this tensor.

  Heads(const at::Tensor& values, int64_t heads, const char* what)
      : tensor(values.dim() == 4 && values.stride(3) == 1 ? values : values.contiguous()) {
    TORCH_CHECK(tensor.size(1) && heads % tensor.size(1) == 0, heads, " heads of queries do not share ",
                tensor.size(1), " heads of ", what);
    data = tensor.const_data_ptr<T>();
    tokens = tensor.size(2);
    channels = tensor.size(3);
    batch_stride = tensor.stride(0);
    head_stride = tensor.stride(1);
    token_stride = tensor.stride(2);
    group = heads / tensor.size(1);
  }

  const T* at(int64_t batch, int64_t head) const { return data + batch * batch_stride + head / group * head_stride; }

  // Tokens of a head lie pages apart; the processor's prefetchers do not look that far.
  void prefetch(const T* token) const {
    for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(token + c);
  }
};

// The mask that is added to scores, in units of log2; may be none.
class Mask {
 public:
  Mask(const std::optional<at::Tensor>& mask, at::IntArrayRef sizes, bool causal) : causal_(causal) {
    if (!mask) return;
    TORCH_CHECK(mask->scalar_type() == at::kFloat || mask->scalar_type() == at::kBool,
                "a mask is float32 or bool, not ", mask->scalar_type());
    tensor_ = mask->expand(sizes);
    boolean_ = mask->scalar_type() == at::kBool;
  }

  bool is_none() const { return !tensor_.defined() && !causal_; }

  // Adds the mask to one row of scores.
  void add(float* scores, int64_t batch, int64_t head, int64_t row, int64_t keys) const {
    if (tensor_.defined()) {
      const int64_t start = batch * tensor_.stride(0) + head * tensor_.stride(1) + row * tensor_.stride(2);
      const int64_t step = tensor_.stride(3);
      if (boolean_) {
        const bool* from = tensor_.const_data_ptr<bool>() + start;
        for (int64_t k = 0; k < keys; ++k)
          if (!from[k * step]) scores[k] = -std::numeric_limits<float>::infinity();
      } else {
        const float* from = tensor_.const_data_ptr<float>() + start;
        for (int64_t k = 0; k < keys; ++k) scores[k] += kLog2E * from[k * step];
      }
    }
    if (causal_)
      for (int64_t k = row + 1; k < keys; ++k) scores[k] = -std::numeric_limits<float>::infinity();
  }

 private:
  at::Tensor tensor_;
  bool boolean_ = false, causal_ = false;
};

// The largest score of a row.
inline float largest(const float* scores, int64_t keys) {
  const Floats lowest = simd::set1_ps(-std::numeric_limits<float>::infinity());
  Floats top = lowest;
  int64_t k = 0;
  for (; k + kLanes <= keys; k += kLanes) top = simd::max_ps(top, simd::loadu_ps(scores + k));
  top = simd::max_ps(top, simd::mask_loadu_ps(lowest, first_lanes(keys - k), scores + k));
  return simd::reduce_max_ps(top);
}

// Calls `use` with 2**(score - largest), 16 powers at a time. Powers beyond `keys` are 0; if all keys are masked, all
// powers are 0. Returns one over the sum of the powers, or 0 if all keys are masked.
template <class Use>
FXQUANT_INLINE float soften(const float* scores, int64_t keys, float largest, const Use& use) {
  if (largest == -std::numeric_limits<float>::infinity()) {
    for (int64_t k = 0; k < keys; k += kLanes) use(k, simd::setzero_ps());
    return 0.0f;
  }
  const Floats highest = simd::set1_ps(largest);
  Floats total = simd::setzero_ps();
  int64_t k = 0;
  for (; k + kLanes <= keys; k += kLanes) {
    const Floats power = exp2<4>(simd::sub_ps(simd::loadu_ps(scores + k), highest));
    use(k, power);
    total = simd::add_ps(total, power);
  }
  if (k < keys) {
    const Floats power = simd::maskz_mov_ps(first_lanes(keys - k),
                                             exp2<4>(simd::sub_ps(simd::loadu_ps(scores + k), highest)));
    use(k, power);
    total = simd::add_ps(total, power);
  }
  return 1.0f / simd::reduce_add_ps(total);
}

// Writes rows of the result, real values or codes.
struct Output {
  at::Tensor result;  // [batch, tokens, heads, channels]
  int64_t heads, channels, tokens;
  void* data;
  bool codes;
  std::vector<float> inverse_scale;  // One per sample.
  std::vector<int32_t> zero_point;
  int32_t qmax;
  at::Tensor kept;                  // Values in bfloat16 beside codes, or undefined.
  c10::BFloat16* values = nullptr;  // Those of `kept`.

  // The offset of a row, in elements.
  int64_t row(int64_t batch, int64_t head, int64_t token) const {
    return ((batch * tokens + token) * heads + head) * channels;
  }

  template <class T>
  void write(int64_t batch, int64_t at, Lanes lanes, Floats value) const {
    if (codes)
      simd::mask_storeu_epi8(static_cast<uint8_t*>(data) + at, lanes,
                           quantize(value, simd::set1_ps(inverse_scale[batch]),
                                    simd::set1_epi32(zero_point[batch]), simd::set1_epi32(qmax)));
    else
      store(static_cast<T*>(data) + at, lanes, value);
    if (values) store(values + at, lanes, value);
  }
};

inline Output make_output(at::IntArrayRef q, int64_t channels, const at::Tensor& like,
                          const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero_point,
                          int64_t qmax, at::ScalarType dtype, bool keeps_values = false) {
  const int64_t sizes[] = {q[0], q[2], q[1], channels};
  const at::Tensor result = pooled(sizes, like.options().dtype(scale ? at::kByte : dtype));
  Output output{result, q[1], channels, q[2], result.mutable_data_ptr(), scale.has_value(), {}, {},
                static_cast<int32_t>(qmax)};
  TORCH_CHECK(!keeps_values || scale, "values are written beside codes, which need a scale");
  if (keeps_values) {
    output.kept = pooled(sizes, like.options().dtype(at::kBFloat16));
    output.values = output.kept.mutable_data_ptr<c10::BFloat16>();
  }
  if (scale) {
    const at::Tensor rows = result.flatten(1);
    output.inverse_scale = inverses(per_row<float>(*scale, rows, q[0], "the scale of the result"));
    output.zero_point = per_row<uint8_t, int32_t>(*zero_point, rows, q[0], "the zero point of the result");
  }
  return output;
}

// For every batch and head, in parallel, calls `pack()` and then `rows(first, count)` for all tiles of rows.
template <class Worker>
void for_each_head(int64_t batch, int64_t heads, int64_t tokens, const Worker& make) {
  const int64_t tiles = divide_up(tokens, kQueries);
  // Each thread that works on a head has to pack it, so threads take half a head or more at a time.
  share_out(batch * heads * tiles, divide_up(tiles, 2), [&](const auto& take) {
    auto worker = make();
    int64_t packed = -1;
    take([&](int64_t unit) {
      const int64_t head = unit / tiles, tile = unit % tiles;
      if (packed != head) worker.pack(head / heads, head % heads);
      packed = head;
      const int64_t top = tokens * tile / tiles, bottom = tokens * (tile + 1) / tiles;
      worker.rows(top, bottom - top);
    });
  });
}

inline void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) && q.size(0) == v.size(0) &&
                  q.size(3) == k.size(3) && k.size(2) == v.size(2) && k.size(1) == v.size(1),
              "attention of queries ", q.sizes(), ", keys ", k.sizes(), " and values ", v.sizes());
}

}  // namespace fxquant
