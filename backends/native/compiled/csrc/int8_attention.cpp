// Attention of codes: both products of uint8 and int8 with exact 32-bit sums, the softmax in float32 between them.

#include <torch/library.h>

#include "attention.h"

namespace fxquant {
namespace {

constexpr int32_t kMiddle = 128;  // Taken off the codes of the right factor, so that they fit int8.

// Codes and their grid, one a sample.
struct Codes {
  Heads heads;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;

  Codes(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points, int64_t query_heads,
        const char* what)
      : heads(codes, query_heads, what) {
    TORCH_CHECK(codes.scalar_type() == at::kByte, what, " are uint8 codes, not ", codes.scalar_type());
    const int64_t samples = codes.size(0);
    scale = per_row<float>(scales, codes, samples, what);
    zero_point = per_row<uint8_t, int32_t>(zero_points, codes, samples, what);
  }
};

template <class T>
class Int8Worker {
 public:
  Int8Worker(const Codes& q, const Codes& k, const Codes& v, const Mask& mask, float softmax_scale, float softmax_qmax,
             const Output& output)
      : q_(q), k_(k), v_(v), mask_(mask), softmax_scale_(softmax_scale), softmax_qmax_(softmax_qmax), output_(output),
        keys_(k.heads.tensor.size(2)), depth_(q.heads.tensor.size(3)), channels_(v.heads.tensor.size(3)),
        key_vectors_(divide_up(keys_, kLanes)), channel_vectors_(divide_up(channels_, kLanes)),
        depth_steps_(divide_up(depth_, 4)), key_steps_(divide_up(keys_, 4)), width_(key_vectors_ * kLanes),
        wide_(channel_vectors_ * kLanes), packed_k_(depth_steps_ * width_ * 4), packed_v_(key_steps_ * wide_ * 4),
        key_sums_(width_), query_(kQueries * depth_steps_ * 4), scores_(kQueries * width_),
        probabilities_(kQueries * width_), sums_(kQueries * wide_) {}

  void pack(int64_t batch, int64_t head) {
    batch_ = batch;
    head_ = head;
    for (int64_t key = 0; key < keys_; ++key) {
      const uint8_t* from = k_.heads.at<uint8_t>(batch, head, key);
      int32_t sum = 0;
      for (int64_t d = 0; d < depth_; ++d) {
        const int32_t code = static_cast<int32_t>(from[d]) - kMiddle;
        packed_k_[(d / 4 * width_ + key) * 4 + d % 4] = static_cast<int8_t>(code);
        sum += code;
      }
      key_sums_[key] = sum;
    }
    for (int64_t key = 0; key < keys_; ++key) {
      const uint8_t* from = v_.heads.at<uint8_t>(batch, head, key);
      int8_t* to = packed_v_.data() + key / 4 * wide_ * 4 + key % 4;
      for (int64_t d = 0; d < channels_; ++d) to[d * 4] = static_cast<int8_t>(static_cast<int32_t>(from[d]) - kMiddle);
    }
  }

  void rows(int64_t first, int64_t count) {
    const int64_t query_width = depth_steps_ * 4;
    int32_t query_sums[kQueries];
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t* from = q_.heads.at<uint8_t>(batch_, head_, first + r);
      std::copy(from, from + depth_, query_.data() + r * query_width);
      query_sums[r] = 0;
      for (int64_t d = 0; d < depth_; ++d) query_sums[r] += from[d];
    }
    product<Bytes>(count, query_.data(), query_width, packed_k_.data(), key_vectors_, depth_steps_, scores_.data(),
                   width_);
    for (int64_t r = 0; r < count; ++r) {
      scale_scores(r, query_sums[r]);
      float* scores = scores_.data() + r * width_;
      mask_.add(scores, batch_, head_, first + r, keys_);
      probability_sums_[r] = quantize_powers(r, soften(scores, keys_, width_));
    }
    product<Bytes>(count, probabilities_.data(), width_, packed_v_.data(), channel_vectors_, key_steps_, sums_.data(),
                   wide_);
    const __m512 scale = _mm512_set1_ps(softmax_scale_ * v_.scale[batch_]);
    for (int64_t r = 0; r < count; ++r) {
      const __m512i offset = _mm512_set1_epi32((v_.zero_point[batch_] - kMiddle) * probability_sums_[r]);
      for (int64_t d = 0; d < channels_; d += kLanes) {
        const __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(sums_.data() + r * wide_ + d), offset);
        output_.write<T>(batch_, head_, first + r, d, first_lanes(channels_ - d),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
      }
    }
  }

 private:
  // Sums of products of one row to real scores in units of log2, in place.
  void scale_scores(int64_t r, int32_t query_sum) {
    const int32_t q_zero = q_.zero_point[batch_], k_zero = k_.zero_point[batch_] - kMiddle;
    const __m512i fixed = _mm512_set1_epi32(k_zero * (query_sum - static_cast<int32_t>(depth_) * q_zero));
    const __m512i zero = _mm512_set1_epi32(q_zero);
    const __m512 scale = _mm512_set1_ps(q_.scale[batch_] * k_.scale[batch_] * kLog2E);
    float* scores = scores_.data() + r * width_;
    for (int64_t k = 0; k < width_; k += kLanes) {
      __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(scores + k), fixed);
      total = _mm512_sub_epi32(total, _mm512_mullo_epi32(zero, _mm512_loadu_si512(key_sums_.data() + k)));
      _mm512_storeu_ps(scores + k, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
    }
  }

  // Codes of the probabilities of one row; returns their sum.
  int32_t quantize_powers(int64_t r, float inverse_sum) {
    const __m512 inverse = _mm512_set1_ps(inverse_sum / softmax_scale_), highest = _mm512_set1_ps(softmax_qmax_);
    const float* powers = scores_.data() + r * width_;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < width_; k += kLanes) {
      const __m512 code = _mm512_min_ps(_mm512_mul_ps(_mm512_loadu_ps(powers + k), inverse), highest);
      const __m512i whole = _mm512_cvtps_epi32(code);
      sum = _mm512_add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(probabilities_.data() + r * width_ + k), _mm512_cvtepi32_epi8(whole));
    }
    return _mm512_reduce_add_epi32(sum);
  }

  const Codes &q_, &k_, &v_;
  const Mask& mask_;
  float softmax_scale_, softmax_qmax_;
  const Output& output_;
  int64_t keys_, depth_, channels_, key_vectors_, channel_vectors_, depth_steps_, key_steps_, width_, wide_;
  std::vector<int8_t> packed_k_, packed_v_;
  std::vector<int32_t> key_sums_;
  std::vector<uint8_t> query_;
  std::vector<float> scores_;
  std::vector<uint8_t> probabilities_;
  std::vector<int32_t> sums_;
  int32_t probability_sums_[kQueries];
  int64_t batch_ = 0, head_ = 0;
};

at::Tensor int8_attention(const at::Tensor& q, const at::Tensor& q_scale, const at::Tensor& q_zero_point,
                          const at::Tensor& k, const at::Tensor& k_scale, const at::Tensor& k_zero_point,
                          const at::Tensor& v, const at::Tensor& v_scale, const at::Tensor& v_zero_point,
                          const std::optional<at::Tensor>& mask, const at::Tensor& softmax_scale,
                          const at::Tensor& softmax_zero_point, int64_t softmax_qmax,
                          const std::optional<at::Tensor>& out_scale, const std::optional<at::Tensor>& out_zero_point,
                          int64_t qmax, at::ScalarType out_dtype) {
  check_shapes(q, k, v);
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2);
  const Output output = make_output(q.sizes(), v.size(3), q, out_scale, out_zero_point, qmax, out_dtype);
  if (!output.result.numel()) return output.result;
  TORCH_CHECK(k.size(2), "attention over no keys");
  TORCH_CHECK(softmax_scale.numel() == 1 && softmax_zero_point.numel() == 1 && softmax_zero_point.item<int64_t>() == 0,
              "the grid of probabilities is one for all and begins at 0");
  const Codes queries(q, q_scale, q_zero_point, heads, "queries"), keys(k, k_scale, k_zero_point, heads, "keys");
  const Codes values(v, v_scale, v_zero_point, heads, "values");
  const int64_t scores[] = {batch, heads, tokens, k.size(2)};
  const Mask added(mask, scores, false);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    for_each_head(batch, heads, tokens, [&] {
      return Int8Worker<T>(queries, keys, values, added, softmax_scale.item<float>(), static_cast<float>(softmax_qmax),
                           output);
    });
  };
  if (out_dtype == at::kFloat) run(0.0f);
  else if (out_dtype == at::kBFloat16) run(c10::BFloat16());
  else if (out_dtype == at::kHalf) run(c10::Half());
  else TORCH_CHECK(false, "int8_attention writes float32, bfloat16 and float16, not ", out_dtype);
  return output.result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxquant_native, CPU, library) { library.impl("int8_attention", &int8_attention); }

}  // namespace fxquant
