#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/activation_groups.h"
#include "kernels/matmul_contract.h"
#include "kernels/number_formats.h"
#include "kernels/test_support.h"

// Activations::kInt8 of the CPU backend.
namespace rankwise::kernels {
namespace {

std::unique_ptr<Backend> MakeInt8Backend(const std::string& name, int threads = 1) {
  return MakeBackend(name, threads, Activations::kInt8);
}

// By the words of kernels/activation_groups.h.
Output QuantisedOutput(const MatrixView& view, const SumTree& tree, const float* x, float bias, int64_t out) {
  const GroupedMatrix& m = *view.grouped;
  const auto group_of = [&](int64_t k) { return (view.col_begin + k) / m.group_size; };
  std::vector<float> sums;
  Output result{.value = 0, .exact = bias, .size = std::fabs(bias)};
  for (size_t c = 0; c + 1 < tree.boundaries.size(); ++c) {
    float sum = 0;
    for (int64_t begin = tree.boundaries[c], end = begin; begin < tree.boundaries[c + 1]; begin = end) {
      const int64_t first = group_of(begin) * m.group_size;  // in columns of the whole matrix
      while (end < tree.boundaries[c + 1] && group_of(end) == group_of(begin) &&
             (view.col_begin + end - first) / kActivationGroup == (view.col_begin + begin - first) / kActivationGroup) {
        ++end;
      }
      std::vector<int8_t> q(end - begin);
      const float scale = QuantizeActivations({x + begin, q.size()}, q);
      const int zero = GroupedValue(m, m.qzeros, group_of(begin), view.row_begin + out);
      int32_t dot = 0;
      for (int64_t k = begin; k < end; ++k) {
        dot += (GroupedValue(m, m.qweight, view.col_begin + k, view.row_begin + out) - zero) * q[k - begin];
      }
      const float weight_scale = HalfToFloat(GroupedScale(m, group_of(begin), view.row_begin + out));
      sum = std::fma(static_cast<float>(dot), weight_scale * scale, sum);
      const double term = static_cast<double>(dot) * weight_scale * scale;
      result.exact += term;
      result.size += std::fabs(term);
    }
    sums.push_back(sum);
  }
  result.value = TreeSum(std::move(sums)) + bias;
  return result;
}

class IntegerMatMulTest : public testing::TestWithParam<std::string> {
 protected:
  Random random_{TestSeed()};
};
INSTANTIATE_TEST_SUITE_P(Products, IntegerMatMulTest, testing::ValuesIn(IntegerProducts()),
                         [](const auto& i) { return i.param; });

struct Case {
  int64_t n_out, n_in;
  int32_t group_size;
  int64_t row_begin, col_begin;
  int chunks;
};
// Groups that begin and end within a pair of words, that a slice cuts, larger and smaller than an activation group.
const std::vector<Case> kCases = {{32, 128, 128, 0, 0, 1},   {72, 256, 128, 0, 0, 2}, {40, 384, 64, 8, 64, 4},
                                  {64, 320, 32, 5, 19, 8},   {8, 96, 96, 0, 95, 1},   {40, 1056, 1056, 0, 3, 1},
                                  {96, 768, 128, 0, 416, 2}, {32, 39, 3, 0, 2, 8},    {32, 352, 176, 0, 0, 64}};

TEST_P(IntegerMatMulTest, GivesTheBitsOfTheContractForAnyRowsAndThreads) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  for (const int threads : TeamSizes()) {
    const auto backend = MakeInt8Backend(GetParam(), threads);
    for (const int bits : {4, 8}) {
      for (const Case& c : kCases) {
        const Quantised whole(c.n_out, c.n_in, bits, c.group_size, random_);
        const MatrixView view = ColumnsOf(RowsOf(whole.view(), c.row_begin, c.n_out), c.col_begin, c.n_in);
        SCOPED_TRACE(testing::Message() << threads << " threads, groups of " << c.group_size);
        ExpectContract(*backend, view, Chunks(view.cols, c.chunks), {1, 2, 3, 4, 5, 8, 11, 12, 13, 25, 241}, random_,
                       QuantisedOutput);
      }
    }
  }
}

// 255 and 0 times ±127, all of one sign: the largest sums there are.
TEST_P(IntegerMatMulTest, DoesNotSaturate) {
  const auto backend = MakeInt8Backend(GetParam());
  for (const int bits : {4, 8}) {
    for (const uint32_t weights : {0u, 0xffffffffu}) {
      for (const uint32_t zeros : {0u, 0xffffffffu}) {
        Quantised whole(32, 256, bits, 128, random_);
        std::ranges::fill(whole.qweight, weights);
        std::ranges::fill(whole.qzeros, zeros);
        for (const float value : {1.0f, -1.0f}) {
          for (const int64_t rows : {1, 30}) {
            const std::vector<float> x(rows * 256, value), bias(32);
            const std::vector<float> y = Multiply(*backend, whole.view(), Chunks(256, 1), x, bias.data());
            for (int64_t i = 0; i < rows * 32; ++i) {
              ASSERT_EQ(y[i], QuantisedOutput(whole.view(), Chunks(256, 1), x.data(), 0, i % 32).value)
                  << bits << " " << i;
            }
          }
        }
      }
    }
  }
}

// The twin in double, within the roundings that the contract leaves.
TEST_P(IntegerMatMulTest, StaysWithinTheBoundOfItsFormula) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  const auto backend = MakeInt8Backend(GetParam()), reference = CreateReferenceBackend(Activations::kInt8);
  for (const int bits : {4, 8}) {
    for (const Case& c : kCases) {
      const Quantised whole(c.n_out, c.n_in, bits, c.group_size, random_);
      const MatrixView view = ColumnsOf(RowsOf(whole.view(), c.row_begin, c.n_out), c.col_begin, c.n_in);
      const SumTree tree = Chunks(view.cols, c.chunks);
      std::vector<int32_t> chunk_begin;
      auto shape = CheckPack(std::span(&view, 1), tree);
      ASSERT_TRUE(shape.ok());
      CutActivations(*shape, tree, chunk_begin);
      int32_t most = 0;
      for (size_t i = 0; i + 1 < chunk_begin.size(); ++i) most = std::max(most, chunk_begin[i + 1] - chunk_begin[i]);
      const std::vector<float> x = random_.Floats(3 * view.cols), bias = random_.Floats(view.rows);
      const std::vector<float> y = Multiply(*backend, view, tree, x, bias.data());
      const std::vector<float> twin = Multiply(*reference, view, tree, x, bias.data());
      for (int64_t i = 0; i < 3 * view.rows; ++i) {
        const Output output =
            QuantisedOutput(view, tree, &x[i / view.rows * view.cols], bias[i % view.rows], i % view.rows);
        const double bound = 1.01 * (most + std::log2(c.chunks) + 2) * kUnit * output.size;
        ASSERT_LE(std::fabs(y[i] - output.exact), bound) << i;
        // The twin rounds once, from sums of doubles.
        ASSERT_LE(std::fabs(y[i] - twin[i]), bound + 1.01 * kUnit * std::fabs(twin[i])) << i;
      }
    }
  }
}

// The halves begin in the middle of a weight group and of a pair of words.
TEST_P(IntegerMatMulTest, HalvesOfTheTreeAddUpToTheWhole) {
  const auto backend = MakeInt8Backend(GetParam(), 2);
  for (const int bits : {4, 8}) {
    SCOPED_TRACE(bits);
    const Quantised whole(64, 1032, bits, 344, random_);
    ExpectHalvesAddUp(*backend, whole.view(), Chunks(1032, 8), random_.Floats(5 * 1032));
  }
}

TEST_P(IntegerMatMulTest, ARowThatIsNotFiniteSpoilsItselfAlone) {
  const auto backend = MakeInt8Backend(GetParam());
  const Quantised whole(32, 256, 4, 128, random_);
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  std::vector<float> x = random_.Floats(6 * 256);
  const std::vector<float> good = Multiply(*backend, whole.view(), Chunks(256, 1), x, nullptr);
  x[256] = nan;
  x[2 * 256 + 9] = -infinity;
  std::fill_n(&x[3 * 256], 256, 0.0f);
  std::fill_n(&x[4 * 256], 256, std::numeric_limits<float>::denorm_min());
  const std::vector<float> y = Multiply(*backend, whole.view(), Chunks(256, 1), x, nullptr);
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(y[i], good[i]);
    EXPECT_TRUE(std::isnan(y[32 + i]));
    EXPECT_FALSE(std::isfinite(y[2 * 32 + i]));
    EXPECT_EQ(y[3 * 32 + i], 0);
    EXPECT_EQ(y[4 * 32 + i], 0);
    EXPECT_EQ(y[5 * 32 + i], good[5 * 32 + i]);
  }
}

TEST_P(IntegerMatMulTest, MatricesStaySmallAndThoseOfFloatsAsTheyWere) {
  const auto floats = MakeBackend(GetParam()), integers = MakeInt8Backend(GetParam());
  for (const int bits : {4, 8}) {
    const Quantised whole(64, 256, bits, 128, random_);
    const MatrixView view = whole.view();
    const auto packed = integers->Pack(std::span(&view, 1), Chunks(256, 1)).value();
    const auto in_floats = floats->Pack(std::span(&view, 1), Chunks(256, 1)).value();
    EXPECT_EQ(packed->bytes(), in_floats->bytes());
    EXPECT_EQ(packed->activations(), Activations::kInt8);
    EXPECT_EQ(in_floats->activations(), Activations::kFloat);
  }
  const HostMatrix matrix(random_.Floats(40 * 100), 40, DType::kF16);
  const MatrixView of_floats = matrix.view();
  EXPECT_EQ((*integers->Pack(std::span(&of_floats, 1), Chunks(100, 1)))->activations(), Activations::kFloat);
  const std::vector<float> x = random_.Floats(7 * 100);
  EXPECT_TRUE(SameBits(Multiply(*integers, matrix.view(), Chunks(100, 4), x, nullptr),
                       Multiply(*floats, matrix.view(), Chunks(100, 4), x, nullptr)));
  EXPECT_THAT(integers->Description(), testing::HasSubstr("integers by "));
  EXPECT_THAT(floats->Description(), testing::Not(testing::HasSubstr("integers")));
}

TEST(QuantizeActivationsTest, IsWithinHalfAStepAndTakesTheLargestExactly) {
  Random random(TestSeed());
  for (const float size : {1e-30f, 1.0f, 1e30f}) {
    const std::vector<float> x = random.Floats(128, -size, size);
    std::vector<int8_t> q(128);
    const float scale = QuantizeActivations(x, q);
    int largest = 0;
    for (int i = 0; i < 128; ++i) {
      EXPECT_LE(std::fabs(x[i] - static_cast<double>(q[i]) * scale), 0.5 * scale * (1 + 0x1p-16));
      largest = std::max(largest, std::abs(int{q[i]}));
    }
    EXPECT_EQ(largest, 127);
  }
}

}  // namespace
}  // namespace rankwise::kernels
