// Attention of float values: products in bfloat16, everything else in float32.

#include <torch/library.h>

#include "attention.h"
#include "results.h"

#ifdef __AVX512BF16__

namespace fxquant::bf16_attention_kernels {
namespace {

template <class T, class Out>
class Bf16Worker {
 public:
  Bf16Worker(const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const Mask& mask, float scale,
             const Output& output)
      : q_(q), k_(k), v_(v), mask_(mask), scale_(simd::set1_ps(scale * kLog2E)), output_(output), keys_(k.tokens),
        depth_(q.channels), channels_(v.channels), key_vectors_(divide_up(keys_, kLanes)),
        channel_vectors_(divide_up(channels_, kLanes)), depth_steps_(divide_up(depth_, 2)),
        key_steps_(divide_up(keys_, 2)), width_(key_vectors_ * kLanes), wide_(channel_vectors_ * kLanes),
        packed_k_(depth_steps_ * width_ * 2), packed_v_(key_steps_ * wide_ * 2), rows_(kLanes * depth_steps_ * 2),
        scores_(kQueries * width_), powers_(kQueries * width_), sums_(kQueries * wide_) {}

  void pack(int64_t batch, int64_t head) {
    batch_ = batch;
    head_ = head;
    const T* keys = k_.at(batch, head);
    for (int64_t key = 0; key < keys_; key += kLanes) {
      const int64_t count = std::min(kLanes, keys_ - key);
      for (int64_t r = 0; r < count; ++r) {
        k_.prefetch(keys + std::min(key + r + kLanes, keys_ - 1) * k_.token_stride);
        convert(keys + (key + r) * k_.token_stride, r, simd::set1_ps(1.0f));
      }
      for (int64_t step = 0; step < depth_steps_; ++step)
        simd::storeu_si512(packed_k_.data() + (step * width_ + key) * 2,
                            simd::gather_rows(rows_.data() + step * 2, depth_steps_));
    }
    const T* values = v_.at(batch, head);
    for (int64_t key = 0; key < keys_; key += 2) {
      const T* even = values + key * v_.token_stride;
      const T* odd = key + 1 < keys_ ? even + v_.token_stride : nullptr;
      for (int64_t ahead = kLanes; ahead < kLanes + 2; ++ahead)
        v_.prefetch(values + std::min(key + ahead, keys_ - 1) * v_.token_stride);
      for (int64_t d = 0; d < channels_; d += kLanes) {
        const Lanes lanes = first_lanes(channels_ - d);
        const Ints low = simd::cvtepu16_epi32(to_bf16(load(even + d, lanes)));
        const Ints high = odd ? simd::cvtepu16_epi32(to_bf16(load(odd + d, lanes))) : simd::setzero_si512();
        simd::storeu_si512(packed_v_.data() + (key / 2 * wide_ + d) * 2,
                            simd::or_si512(low, simd::slli_epi32(high, 16)));
      }
    }
  }

  void rows(int64_t first, int64_t count) {
    const T* queries = q_.at(batch_, head_) + first * q_.token_stride;
    for (int64_t r = 0; r < count; ++r) {
      convert(queries + r * q_.token_stride, r, scale_);
      q_.prefetch(queries + std::min(r + kQueries, q_.tokens - 1 - first) * q_.token_stride);
    }
    product<Bf16>(count, rows_.data(), depth_steps_ * 4, packed_k_.data(), key_vectors_, depth_steps_, scores_.data(),
                  width_);
    float inverses[kQueries];
    for (int64_t r = 0; r < count; ++r) {
      float* scores = scores_.data() + r * width_;
      mask_.add(scores, batch_, head_, first + r, keys_);
      inverses[r] = soften(scores, keys_, largest(scores, keys_), [&](int64_t k, Floats power) __attribute__((always_inline)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(powers_.data() + r * width_ + k), to_bf16(power));
      });
    }
    product<Bf16>(count, powers_.data(), width_ * 2, packed_v_.data(), channel_vectors_, key_steps_, sums_.data(),
                  wide_);
    for (int64_t r = 0; r < count; ++r) {
      const Floats inverse = simd::set1_ps(inverses[r]);
      const int64_t at = output_.row(batch_, head_, first + r);
      for (int64_t d = 0; d < channels_; d += kLanes)
        output_.template write<Out>(batch_, at + d, first_lanes(channels_ - d),
                                  simd::mul_ps(simd::loadu_ps(sums_.data() + r * wide_ + d), inverse));
    }
  }

 private:
  // Converts one row to bfloat16, `depth_steps_` dwords.
  void convert(const T* from, int64_t row, Floats factor) {
    for (int64_t d = 0; d < depth_; d += kLanes) {
      const Lanes lanes = first_lanes(depth_ - d);
      simd::mask_storeu_epi16(rows_.data() + row * depth_steps_ * 2 + d, lanes,
                               to_bf16(simd::mul_ps(load(from + d, lanes), factor)));
    }
  }

  const Heads<T>&q_, &k_, &v_;
  const Mask& mask_;
  Floats scale_;
  const Output& output_;
  int64_t keys_, depth_, channels_, key_vectors_, channel_vectors_, depth_steps_, key_steps_, width_, wide_;
  std::vector<uint16_t> packed_k_, packed_v_, rows_;
  std::vector<float> scores_;
  std::vector<uint16_t> powers_;
  std::vector<float> sums_;
  int64_t batch_ = 0, head_ = 0;
};

Results attention(bool keeps_values, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const std::optional<at::Tensor>& mask, bool causal, double scale,
                  const std::optional<at::Tensor>& out_scale, const std::optional<at::Tensor>& out_zero_point,
                  int64_t qmax, std::optional<at::ScalarType> out_dtype) {
  check_shapes(q, k, v);
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "queries, keys and values are of one dtype");
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2);
  const int64_t scores[] = {batch, heads, tokens, k.size(2)};
  const Mask added(mask, scores, causal);
  const at::ScalarType reads = q.scalar_type(), writes = out_dtype.value_or(reads);
  const Output output = make_output(q.sizes(), v.size(3), q, out_scale, out_zero_point, qmax, writes, keeps_values);
  if (!output.result.numel()) return {output.result, output.kept};
  TORCH_CHECK(k.size(2), "attention over no keys");
  const auto run = [&](auto zero, auto result) {
    using T = decltype(zero);
    const Heads<T> queries(q, heads, "queries"), keys(k, heads, "keys"), values(v, heads, "values");
    for_each_head(batch, heads, tokens, [&] {
      return Bf16Worker<T, decltype(result)>(queries, keys, values, added, static_cast<float>(scale), output);
    });
  };
  TORCH_CHECK(writes == reads || (writes == at::kFloat && reads == at::kBFloat16),
              "bf16_attention of bfloat16 writes bfloat16 or float32, and any other its own dtype, not ", writes);
  if (reads == at::kFloat) run(0.0f, 0.0f);
  else if (reads == at::kBFloat16 && writes == at::kFloat) run(c10::BFloat16(), 0.0f);
  else if (reads == at::kBFloat16) run(c10::BFloat16(), c10::BFloat16());
  else if (reads == at::kHalf) run(c10::Half(), c10::Half());
  else TORCH_CHECK(false, "bf16_attention reads float32, bfloat16 and float16, not ", reads);
  return {output.result, output.kept};
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) {
  library.impl("bf16_attention", &Op<&attention>::one);
  library.impl("bf16_attention_values", &Op<&attention>::both);
}

}  // namespace fxquant::bf16_attention_kernels

#endif
