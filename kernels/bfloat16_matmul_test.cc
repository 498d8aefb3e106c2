#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/matmul_contract.h"
#include "kernels/number_formats.h"
#include "kernels/test_support.h"

// Activations::kBF16.
namespace rankwise::kernels {
namespace {

constexpr double kLeast = 0x1p-126;

std::unique_ptr<Backend> MakeBf16Backend(const std::string& name, int threads = 1) {
  return MakeBackend(name, threads, Activations::kBF16);
}

float Rounded(float x) { return BFloat16ToFloat(FloatToBFloat16(x)); }

// An fma whose operands and result are zeros where they are denormals. A result is one that is too small for a normal
// number when rounded to 24 bits, whatever its exponent.
float FlushingFma(float a, float b, float c) {
  const auto flushed = [](float x) { return std::fabs(x) < kLeast ? std::copysign(0.0f, x) : x; };
  a = flushed(a), b = flushed(b), c = flushed(c);
  const float sum = std::fma(a, b, c);
  if (!(std::fabs(sum) <= kLeast)) return sum;
  if (std::fabs(a) > std::fabs(b)) std::swap(a, b);
  const float scaled = std::fma(a * 0x1p64f, b, c * 0x1p64f);
  return std::fabs(scaled) < kLeast * 0x1p64 ? std::copysign(0.0f, sum) : sum;
}

// By the words of Activations.
Output RoundedOutput(const MatrixView& view, const SumTree& tree, const float* x, float bias, int64_t out) {
  std::vector<float> sums;
  Output result{.value = 0, .exact = bias, .size = std::fabs(bias)};
  for (size_t c = 0; c + 1 < tree.boundaries.size(); ++c) {
    float sum = 0;
    for (int64_t k = tree.boundaries[c]; k < tree.boundaries[c + 1]; ++k) {
      const float a = Rounded(x[k]), w = Rounded(ElementAt(view, out, k));
      sum = FlushingFma(a, w, sum);
      result.exact += double{a} * w;
      result.size += std::fabs(double{a} * w);
    }
    sums.push_back(sum);
  }
  result.value = TreeSum(std::move(sums)) + bias;
  return result;
}

class BFloat16MatMulTest : public testing::TestWithParam<std::string> {
 protected:
  Random random_{TestSeed()};
};
INSTANTIATE_TEST_SUITE_P(Products, BFloat16MatMulTest, testing::ValuesIn(BFloat16Products()),
                         [](const auto& i) { return i.param; });

TEST_P(BFloat16MatMulTest, GivesTheBitsOfTheContractForAnyRowsAndThreads) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  for (const int threads : TeamSizes()) {
    const auto backend = MakeBf16Backend(GetParam(), threads);
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      for (const int64_t n_in : {1, 2, 31, 299}) {
        const HostMatrix weights(random_.Floats(77 * n_in), 77, dtype);
        for (const int chunks : {1, 2, 8, 64}) {  // most end in the middle of a pair
          SCOPED_TRACE(testing::Message() << threads << " threads");
          ExpectContract(*backend, weights.view(), Chunks(n_in, chunks), {1, 2, 6, 7, 12, 13, 241}, random_,
                         RoundedOutput);
        }
      }
    }
  }
}

// Any bits at all, and bits whose products and sums lie where normal numbers end: AVX512-BF16 and fma agree in what
// they flush.
TEST_P(BFloat16MatMulTest, GivesTheBitsOfTheContractAtTheEdgesOfTheFormat) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  const auto backend = MakeBf16Backend(GetParam());
  const auto bits_of_any = [&] { return static_cast<uint32_t>(random_.Int(INT32_MIN, INT32_MAX)); };
  int64_t flushed = 0, normal = 0, nans = 0;
  for (int round = 0; round < 400; ++round) {
    const int64_t n_in = 1 + round % 9, rows = 1 + round % 14;
    const bool is_tiny = round % 4 != 0;
    const auto any = [&] {
      const uint32_t bits = bits_of_any();
      if (!is_tiny) return std::bit_cast<float>(bits);
      const auto exponent = static_cast<uint32_t>(random_.Int(50, 76));  // products from 2^-154 to 2^-101
      return std::bit_cast<float>((bits & 0x807fffff) | exponent << 23);
    };
    std::vector<float> values(64 * n_in), x(rows * n_in);
    std::ranges::generate(values, any);
    std::ranges::generate(x, any);
    const HostMatrix weights(values, 64, DType::kBF16);
    const SumTree tree = Chunks(n_in, 1);
    const std::vector<float> y = Multiply(*backend, weights.view(), tree, x, nullptr);
    for (int64_t i = 0; i < rows * 64; ++i) {
      // Without a bias, whose addition would hide a sign of zero.
      float sum = 0;
      for (int64_t k = 0; k < n_in; ++k) {
        sum = FlushingFma(Rounded(x[i / 64 * n_in + k]), Rounded(weights.at(i % 64, k)), sum);
      }
      if (std::isnan(sum)) {
        ++nans;
        ASSERT_TRUE(std::isnan(y[i])) << round << " " << i;
      } else {
        (std::fabs(sum) < kLeast ? flushed : normal) += 1;
        ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), std::bit_cast<uint32_t>(sum)) << round << " " << i << ": " << sum;
      }
    }
  }
  EXPECT_GT(flushed, 1000);
  EXPECT_GT(normal, 1000);
  EXPECT_GT(nans, 100);
}

// The twin in double, within the roundings that the contract leaves.
TEST_P(BFloat16MatMulTest, StaysWithinTheBoundOfItsFormula) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  const auto backend = MakeBf16Backend(GetParam()), reference = CreateReferenceBackend(Activations::kBF16);
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const auto& [n_out, n_in, rows, chunks] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 1, 1}, {31, 7, 2, 1}, {32, 128, 3, 4}, {33, 172, 5, 8}, {65, 259, 13, 2}, {97, 300, 14, 64}}) {
      const HostMatrix weights(random_.Floats(n_out * n_in), n_out, dtype);
      const SumTree tree = Chunks(n_in, static_cast<int>(chunks));
      const std::vector<float> x = random_.Floats(rows * n_in), bias = random_.Floats(n_out);
      const std::vector<float> y = Multiply(*backend, weights.view(), tree, x, bias.data());
      const std::vector<float> twin = Multiply(*reference, weights.view(), tree, x, bias.data());
      const double roundings = std::ceil(static_cast<double>(n_in) / static_cast<double>(chunks)) +
                               std::log2(static_cast<double>(chunks)) + 2;
      for (int64_t i = 0; i < rows * n_out; ++i) {
        const Output output = RoundedOutput(weights.view(), tree, &x[i / n_out * n_in], bias[i % n_out], i % n_out);
        const double bound = 1.01 * roundings * kUnit * output.size + static_cast<double>(n_in) * kLeast;
        ASSERT_LE(std::fabs(y[i] - output.exact), bound) << i;
        // The twin rounds once, from sums of doubles.
        ASSERT_LE(std::fabs(twin[i] - output.exact), 1.01 * kUnit * std::fabs(output.exact) + kLeast) << i;
      }
    }
  }
}

TEST_P(BFloat16MatMulTest, ARowOfALargeBatchEqualsTheRowAlone) {
  const auto backend = MakeBf16Backend(GetParam(), 2);
  const HostMatrix weights(random_.Floats(70 * 1037), 70, DType::kF16);
  ExpectRowsAreAsAlone(*backend, weights.view(), random_);
}

// Also where a half begins in the middle of a pair of the whole, and among sums so small that a flush in the tree would
// show.
TEST_P(BFloat16MatMulTest, HalvesOfTheTreeAddUpToTheWhole) {
  const auto backend = MakeBf16Backend(GetParam(), 2);
  for (const float size : {1.0f, 0x1p-62f}) {
    SCOPED_TRACE(size);
    const HostMatrix weights(random_.Floats(45 * 344, -size, size), 45, DType::kBF16);
    ExpectHalvesAddUp(*backend, weights.view(), {{0, 43, 86, 129, 173, 215, 258, 301, 344}},
                      random_.Floats(3 * 344, -size, size));
  }
}

TEST_P(BFloat16MatMulTest, ARowThatIsNotFiniteSpoilsItselfAlone) {
  const auto backend = MakeBf16Backend(GetParam());
  const HostMatrix weights(random_.Floats(32 * 255), 32, DType::kF16);
  std::vector<float> x = random_.Floats(5 * 255);
  const std::vector<float> good = Multiply(*backend, weights.view(), Chunks(255, 1), x, nullptr);
  x[255 + 254] = std::numeric_limits<float>::quiet_NaN();
  x[2 * 255 + 9] = -std::numeric_limits<float>::infinity();
  std::fill_n(&x[3 * 255], 255, std::numeric_limits<float>::denorm_min());
  const std::vector<float> y = Multiply(*backend, weights.view(), Chunks(255, 1), x, nullptr);
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(y[i], good[i]);
    EXPECT_TRUE(std::isnan(y[32 + i]));
    EXPECT_FALSE(std::isfinite(y[2 * 32 + i]));
    EXPECT_EQ(y[3 * 32 + i], 0);
    EXPECT_EQ(y[4 * 32 + i], good[4 * 32 + i]);
  }
}

TEST_P(BFloat16MatMulTest, OfSixteenBitsAloneAndNoLarger) {
  const auto backend = MakeBf16Backend(GetParam()), floats = MakeBackend(GetParam());
  const std::vector<float> values = random_.Floats(64 * 100), x = random_.Floats(7 * 100);
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    const HostMatrix matrix(values, 64, dtype);
    const MatrixView view = matrix.view();
    const auto packed = backend->Pack(std::span(&view, 1), Chunks(100, 2)).value();
    const auto in_floats = floats->Pack(std::span(&view, 1), Chunks(100, 2)).value();
    EXPECT_EQ(packed->activations(), Activations::kBF16);
    EXPECT_EQ(in_floats->activations(), Activations::kFloat);
    EXPECT_EQ(packed->bytes(), in_floats->bytes());
  }
  const HostMatrix wide(values, 64, DType::kF32);
  const MatrixView view = wide.view();
  EXPECT_EQ(backend->Pack(std::span(&view, 1), Chunks(100, 2)).value()->activations(), Activations::kFloat);
  EXPECT_TRUE(SameBits(Multiply(*backend, view, Chunks(100, 4), x, nullptr),
                       Multiply(*floats, view, Chunks(100, 4), x, nullptr)));
  EXPECT_THAT(backend->Description(), testing::HasSubstr(", bf16 by "));
}

TEST_P(BFloat16MatMulTest, RefusesQuantisedWeights) {
  for (const int bits : {4, 8}) {
    const Quantised whole(64, 256, bits, 128, random_);
    const MatrixView view = whole.view();
    for (const auto& backend : {MakeBf16Backend(GetParam()), CreateReferenceBackend(Activations::kBF16)}) {
      const auto packed = backend->Pack(std::span(&view, 1), Chunks(256, 1));
      EXPECT_EQ(packed.status(), absl::InvalidArgumentError(
                                     absl::StrCat("activations bf16 are of f16 and bf16 weights, but these are int",
                                                  bits, ": choose float or int8")));
    }
  }
}

TEST(FloatToBFloat16Test, TakesTheNearestAndOfTwoTheEven) {
  Random random(TestSeed());
  for (int i = 0; i < 100'000; ++i) {
    const auto bits = static_cast<uint32_t>(random.Int(0x00800000, 0x7f7f8000 - 1));  // below what rounds to infinity
    const float x = std::bit_cast<float>(bits);
    const uint16_t down = static_cast<uint16_t>(bits >> 16), up = static_cast<uint16_t>(down + 1);
    const double above = double{BFloat16ToFloat(up)} - x, below = double{x} - BFloat16ToFloat(down);
    const uint16_t expected = above < below || (above == below && down % 2 == 1) ? up : down;
    ASSERT_EQ(FloatToBFloat16(x), expected) << bits;
    ASSERT_EQ(FloatToBFloat16(-x), expected | 0x8000) << bits;
  }
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x3f808000u)), 0x3f80);
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
  EXPECT_EQ(FloatToBFloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(FloatToBFloat16(-std::numeric_limits<float>::infinity()), 0xff80);
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x007fffffu)), 0);
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x807fffffu)), 0x8000);
  EXPECT_TRUE(std::isnan(Rounded(std::bit_cast<float>(0x7f800001u))));
}

TEST(HalfToBFloat16Test, IsTheRoundedFloatOfEveryHalf) {
  for (int half = 0; half <= 0xffff; ++half) {
    const auto bits = static_cast<uint16_t>(half);
    ASSERT_EQ(HalfToBFloat16(bits), FloatToBFloat16(HalfToFloat(bits))) << half;
  }
}

}  // namespace
}  // namespace rankwise::kernels
