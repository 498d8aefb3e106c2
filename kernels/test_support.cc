#include "kernels/test_support.h"

#include <cmath>
#include <cstdlib>
#include <limits>

#include "kernels/number_formats.h"

namespace rankwise::kernels {

std::vector<float> Random::Floats(int64_t count, float low, float high) {
  std::vector<float> v(count);
  for (float& x : v) x = Uniform(low, high);
  return v;
}

std::vector<float> Random::Ints(int64_t count, int low, int high) {
  std::vector<float> v(count);
  for (float& x : v) x = static_cast<float>(Int(low, high));
  return v;
}

uint64_t TestSeed() {
  const char* seed = std::getenv("RANKWISE_TEST_SEED");
  return seed ? std::strtoull(seed, nullptr, 10) : 20240917;
}

Guarded::Guarded(int64_t count) : all_(count + 2 * kBand, std::numeric_limits<float>::quiet_NaN()) {
  for (int64_t i = 0; i < kBand; ++i) all_[i] = all_[all_.size() - 1 - i] = static_cast<float>(i) - 12345.5f;
}

Guarded::Guarded(const std::vector<float>& values) : Guarded(static_cast<int64_t>(values.size())) {
  std::copy(values.begin(), values.end(), data());
}

bool Guarded::BandsAreIntact() const {
  for (int64_t i = 0; i < kBand; ++i) {
    const float expected = static_cast<float>(i) - 12345.5f;
    if (all_[i] != expected || all_[all_.size() - 1 - i] != expected) return false;
  }
  return true;
}

HostMatrix::HostMatrix(const std::vector<float>& values, int64_t rows, DType dtype)
    : rows_(rows), cols_(static_cast<int64_t>(values.size()) / rows), stride_(cols_ + 3), dtype_(dtype) {
  bytes_.resize(1 + rows_ * stride_ * DTypeBytes(dtype), std::byte{0xff});
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    std::byte* to = bytes_.data() + 1 + (i / cols_ * stride_ + i % cols_) * DTypeBytes(dtype);
    if (dtype == DType::kF32) {
      std::memcpy(to, &values[i], 4);
    } else {
      const uint16_t half = dtype == DType::kF16 ? FloatToHalf(values[i])
                                                 : static_cast<uint16_t>(std::bit_cast<uint32_t>(values[i]) >> 16);
      std::memcpy(to, &half, 2);
    }
  }
}

MatrixView HostMatrix::view() const {
  return {.data = bytes_.data() + 1, .dtype = dtype_, .rows = rows_, .cols = cols_, .row_stride = stride_};
}

float HostMatrix::at(int64_t row, int64_t col) const {
  return LoadAsFloat(bytes_.data() + 1 + (row * stride_ + col) * DTypeBytes(dtype_), dtype_);
}

Quantised::Quantised(int64_t n_out, int64_t n_in, int32_t bits, int32_t group_size, Random& random)
    : qweight(n_in * n_out * bits / 32),
      qzeros(n_in / group_size * n_out * bits / 32),
      scales(n_in / group_size * n_out),
      dense(n_out * n_in),
      matrix{reinterpret_cast<const std::byte*>(qweight.data()),
             reinterpret_cast<const std::byte*>(qzeros.data()),
             reinterpret_cast<const std::byte*>(scales.data()),
             n_out,
             n_in,
             bits,
             group_size} {
  const std::vector<int> order = bits == 4 ? std::vector{0, 2, 4, 6, 1, 3, 5, 7} : std::vector{0, 1, 2, 3};
  const auto per_word = static_cast<int64_t>(order.size());
  const auto fill = [&](std::vector<uint32_t>& words, std::vector<int>& values) {
    for (size_t w = 0; w < words.size(); ++w) {
      for (size_t i = 0; i < order.size(); ++i) {
        const int value = random.Int(0, (1 << bits) - 1);
        words[w] |= static_cast<uint32_t>(value) << (i * bits);
        values[w * per_word + order[i]] = value;
      }
    }
  };
  std::vector<int> q(n_in * n_out), zeros(n_in / group_size * n_out);
  fill(qweight, q);
  fill(qzeros, zeros);
  for (uint16_t& scale : scales) scale = FloatToHalf(random.Uniform(0.001f, 0.02f));
  for (int64_t o = 0; o < n_out; ++o) {
    for (int64_t i = 0; i < n_in; ++i) {
      const int64_t group = i / group_size * n_out + o;
      dense[o * n_in + i] = static_cast<float>(q[i * n_out + o] - zeros[group]) * HalfToFloat(scales[group]);
    }
  }
}

MatrixView Quantised::view() const {
  return {.dtype = matrix.bits == 4 ? DType::kInt4 : DType::kInt8,
          .rows = matrix.n_out,
          .cols = matrix.n_in,
          .grouped = &matrix};
}

Step& Step::Add(int32_t first_position, int32_t row_count, std::vector<int32_t> block_table) {
  tokens_.resize(tokens_.size() + row_count);
  row_begin_.push_back(static_cast<int32_t>(tokens_.size()));
  first_position_.push_back(first_position);
  tables_.push_back(std::move(block_table));
  return *this;
}

StepRows Step::rows() {
  table_views_.assign(tables_.begin(), tables_.end());
  return {.tokens = tokens_, .row_begin = row_begin_, .first_position = first_position_, .block_table = table_views_};
}

Step PlainStep(int32_t count) {
  Step step;
  if (count > 0) step.Add(0, count, std::vector<int32_t>((count + kKvBlockTokens - 1) / kKvBlockTokens));
  return step;
}

RopeTable MakeRope(int rotary_dim, int64_t position_count) {
  RopeTable rope{.rotary_dim = rotary_dim, .position_count = position_count};
  for (int64_t p = 0; p < position_count; ++p) {
    for (int i = 0; i < rotary_dim / 2; ++i) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * i / rotary_dim);
      rope.cos.push_back(static_cast<float>(std::cos(angle)));
      rope.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return rope;
}

}  // namespace rankwise::kernels
