// Attention of codes: both products are of uint8 and int8 with exact 32-bit sums; the softmax between them is float32.

#include <torch/library.h>

#include <numeric>

#include "attention.h"

namespace fxquant::int8_attention_kernels {
namespace {

constexpr int32_t kMiddle = 128;  // Subtracted from the codes of the right factor, so that they fit int8.

// Codes and their grids, one per sample.
struct Codes {
  Heads<uint8_t> heads;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;

  Codes(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points, int64_t query_heads,
        const char* what)
      : heads(codes, query_heads, what),
        scale(per_row<float>(scales, codes, codes.size(0), what)),
        zero_point(per_row<uint8_t, int32_t>(zero_points, codes, codes.size(0), what)) {}
};

template <class T>
class Int8Worker {
 public:
  Int8Worker(const Codes& q, const Codes& k, const Codes& v, const Mask& mask, float softmax_scale, float softmax_qmax,
             const Output& output)
      : q_(q), k_(k), v_(v), mask_(mask), softmax_scale_(softmax_scale), softmax_qmax_(softmax_qmax), output_(output),
        keys_(k.heads.tokens), depth_(q.heads.channels), channels_(v.heads.channels),
        key_vectors_(divide_up(keys_, kLanes)), channel_vectors_(divide_up(channels_, kLanes)),
        depth_steps_(divide_up(depth_, 4)), key_steps_(divide_up(keys_, 4)), width_(key_vectors_ * kLanes),
        wide_(channel_vectors_ * kLanes), packed_k_(depth_steps_ * width_ * 4), packed_v_(key_steps_ * wide_ * 4),
        key_offsets_(width_), rows_(kLanes * depth_steps_ * 4), scores_(kQueries * width_),
        probabilities_(kQueries * width_), sums_(kQueries * wide_) {}

  void pack(int64_t batch, int64_t head) {
    batch_ = batch;
    head_ = head;
    const uint8_t* keys = k_.heads.at(batch, head);
    const Ints sign = simd::set1_epi8(static_cast<char>(kMiddle)), ones = simd::set1_epi8(1);
    // After the channels of a head, rows hold the middle, which becomes 0 when the middle is subtracted.
    std::fill(rows_.begin(), rows_.end(), static_cast<uint8_t>(kMiddle));
    for (int64_t key = 0; key < keys_; key += kLanes) {
      const int64_t count = std::min(kLanes, keys_ - key);
      for (int64_t r = 0; r < count; ++r) {
        k_.heads.prefetch(keys + std::min(key + r + kLanes, keys_ - 1) * k_.heads.token_stride);
        std::copy_n(keys + (key + r) * k_.heads.token_stride, depth_, rows_.data() + r * depth_steps_ * 4);
      }
      Ints sums = simd::setzero_si512();
      for (int64_t step = 0; step < depth_steps_; ++step) {
        const Ints held = simd::xor_si512(simd::gather_rows(rows_.data() + step * 4, depth_steps_), sign);
        add_products_u8s8(sums, ones, held);
        simd::storeu_si512(packed_k_.data() + (step * width_ + key) * 4, held);
      }
      simd::storeu_si512(key_offsets_.data() + key,
                          simd::mullo_epi32(sums, simd::set1_epi32(q_.zero_point[batch])));
    }
    const uint8_t* values = v_.heads.at(batch, head);
    for (int64_t key = 0; key < keys_; key += 4) {
      for (int64_t ahead = kLanes; ahead < kLanes + 4; ++ahead)
        v_.heads.prefetch(values + std::min(key + ahead, keys_ - 1) * v_.heads.token_stride);
      for (int64_t d = 0; d < channels_; d += kLanes) {
        __m128i part[4];
        for (int64_t i = 0; i < 4; ++i)
          part[i] = key + i < keys_ ? simd::maskz_loadu_epi8(first_lanes(channels_ - d),
                                                           values + (key + i) * v_.heads.token_stride + d)
                                    : _mm_setzero_si128();
        const __m128i left[] = {_mm_unpacklo_epi8(part[0], part[1]), _mm_unpackhi_epi8(part[0], part[1])};
        const __m128i right[] = {_mm_unpacklo_epi8(part[2], part[3]), _mm_unpackhi_epi8(part[2], part[3])};
        int8_t* to = packed_v_.data() + (key / 4 * wide_ + d) * 4;
        for (int64_t i = 0; i < 2; ++i) {
          store_held(to + i * 32, _mm_unpacklo_epi16(left[i], right[i]));
          store_held(to + i * 32 + 16, _mm_unpackhi_epi16(left[i], right[i]));
        }
      }
    }
  }

  void rows(int64_t first, int64_t count) {
    const uint8_t* queries = q_.heads.at(batch_, head_) + first * q_.heads.token_stride;
    int32_t query_sums[kQueries];
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t* from = queries + r * q_.heads.token_stride;
      std::copy_n(from, depth_, rows_.data() + r * depth_steps_ * 4);
      query_sums[r] = std::accumulate(from, from + depth_, 0);
      q_.heads.prefetch(from + std::min<int64_t>(kQueries, q_.heads.tokens - 1 - first - r) * q_.heads.token_stride);
    }
    product<Bytes>(count, rows_.data(), depth_steps_ * 4, packed_k_.data(), key_vectors_, depth_steps_, scores_.data(),
                   width_);
    for (int64_t r = 0; r < count; ++r) {
      float highest = scale_scores(r, query_sums[r]);
      float* scores = scores_.data() + r * width_;
      if (!mask_.is_none()) {
        mask_.add(scores, batch_, head_, first + r, keys_);
        highest = largest(scores, keys_);
      }
      const float inverse = soften(scores, keys_, highest, [&](int64_t k, Floats power) __attribute__((always_inline)) {
        simd::storeu_ps(scores + k, power);
      });
      probability_sums_[r] = quantize_powers(r, inverse);
    }
    product<Bytes>(count, probabilities_.data(), width_, packed_v_.data(), channel_vectors_, key_steps_, sums_.data(),
                   wide_);
    const Floats scale = simd::set1_ps(softmax_scale_ * v_.scale[batch_]);
    for (int64_t r = 0; r < count; ++r) {
      const Ints offset = simd::set1_epi32((v_.zero_point[batch_] - kMiddle) * probability_sums_[r]);
      const int64_t at = output_.row(batch_, head_, first + r);
      for (int64_t d = 0; d < channels_; d += kLanes) {
        const Ints total = simd::sub_epi32(simd::loadu_si512(sums_.data() + r * wide_ + d), offset);
        output_.template write<T>(batch_, at + d, first_lanes(channels_ - d),
                                  simd::mul_ps(simd::cvtepi32_ps(total), scale));
      }
    }
  }

 private:
  static void store_held(int8_t* to, __m128i codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(kMiddle))));
  }

  // Converts the sums of products of one row to real scores in units of log2, in place. Returns the largest score.
  float scale_scores(int64_t r, int32_t query_sum) {
    const int32_t q_zero = q_.zero_point[batch_], k_zero = k_.zero_point[batch_] - kMiddle;
    const Ints fixed = simd::set1_epi32(k_zero * (query_sum - static_cast<int32_t>(depth_) * q_zero));
    const Floats scale = simd::set1_ps(q_.scale[batch_] * k_.scale[batch_] * kLog2E);
    float* scores = scores_.data() + r * width_;
    const auto real = [&](int64_t k) __attribute__((always_inline)) {
      const Ints offset = simd::add_epi32(fixed, simd::loadu_si512(key_offsets_.data() + k));
      const Ints total = simd::sub_epi32(simd::loadu_si512(scores + k), offset);
      const Floats score = simd::mul_ps(simd::cvtepi32_ps(total), scale);
      simd::storeu_ps(scores + k, score);
      return score;
    };
    Floats top = simd::set1_ps(-std::numeric_limits<float>::infinity());
    int64_t k = 0;
    for (; k + kLanes <= keys_; k += kLanes) top = simd::max_ps(top, real(k));
    if (k < keys_) top = simd::mask_max_ps(top, first_lanes(keys_ - k), top, real(k));
    return simd::reduce_max_ps(top);
  }

  // Makes the codes of the probabilities of one row. Returns the sum of the codes.
  int32_t quantize_powers(int64_t r, float inverse_sum) {
    const Floats inverse = simd::set1_ps(inverse_sum / softmax_scale_), highest = simd::set1_ps(softmax_qmax_);
    const float* powers = scores_.data() + r * width_;
    Ints sum = simd::setzero_si512();
    for (int64_t k = 0; k < width_; k += kLanes) {
      const Floats code = simd::min_ps(simd::mul_ps(simd::loadu_ps(powers + k), inverse), highest);
      const Ints whole = simd::cvtps_epi32(code);
      sum = simd::add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(probabilities_.data() + r * width_ + k), simd::cvtepi32_epi8(whole));
    }
    return simd::reduce_add_epi32(sum);
  }

  const Codes &q_, &k_, &v_;
  const Mask& mask_;
  float softmax_scale_, softmax_qmax_;
  const Output& output_;
  int64_t keys_, depth_, channels_, key_vectors_, channel_vectors_, depth_steps_, key_steps_, width_, wide_;
  std::vector<int8_t> packed_k_, packed_v_;
  std::vector<int32_t> key_offsets_;
  std::vector<uint8_t> rows_;
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
  TORCH_CHECK(q.scalar_type() == at::kByte && k.scalar_type() == at::kByte && v.scalar_type() == at::kByte,
              "int8_attention reads uint8 codes");
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

}  // namespace fxquant::int8_attention_kernels
