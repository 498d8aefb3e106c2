#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "kernels/matmul_contract.h"
#include "kernels/number_formats.h"
#include "kernels/test_support.h"

namespace rankwise::kernels {
namespace {

SumTree OneChunk(int64_t n_in) { return {{0, n_in}}; }

struct Product {
  Random random{TestSeed()};
  int64_t n_out, n_in, rows;
  HostMatrix weights;
  std::vector<float> x, bias;

  Product(int64_t n_out, int64_t n_in, int64_t rows, DType dtype, bool is_exact = false)
      : n_out(n_out),
        n_in(n_in),
        rows(rows),
        weights(is_exact ? random.Ints(n_out * n_in, -9, 9) : random.Floats(n_out * n_in), n_out, dtype),
        x(is_exact ? random.Ints(rows * n_in, -9, 9) : random.Floats(rows * n_in)),
        bias(is_exact ? random.Ints(n_out, -9, 9) : random.Floats(n_out)) {}

  std::vector<float> On(Backend& backend, const SumTree& tree, bool has_bias = true) const {
    const MatrixView view = weights.view();
    return Multiply(backend, std::span(&view, 1), tree, x, has_bias);
  }

  std::vector<float> Multiply(Backend& backend, std::span<const MatrixView> blocks, const SumTree& tree,
                              const std::vector<float>& input, bool has_bias) const {
    auto packed = backend.Pack(blocks, tree);
    EXPECT_TRUE(packed.ok()) << packed.status();
    const int64_t row_count = static_cast<int64_t>(input.size()) / (*packed)->n_in();
    Guarded y(row_count * n_out);
    EXPECT_TRUE(backend.MatMul(y.data(), input.data(), row_count, **packed, has_bias ? bias.data() : nullptr).ok());
    EXPECT_TRUE(y.BandsAreIntact());
    return y.values();
  }
};

// The contract word for word: a scalar fma chain per chunk, added pairwise.
Output ChainedOutput(const MatrixView& view, const SumTree& tree, const float* x, float bias, int64_t out) {
  std::vector<float> sums;
  Output result{.value = 0, .exact = bias, .size = std::fabs(bias)};
  for (size_t c = 0; c + 1 < tree.boundaries.size(); ++c) {
    float sum = 0;
    for (int64_t k = tree.boundaries[c]; k < tree.boundaries[c + 1]; ++k) {
      const float w = ElementAt(view, out, k);
      sum = std::fma(x[k], w, sum);
      result.exact += double{x[k]} * w;
      result.size += std::fabs(double{x[k]} * w);
    }
    sums.push_back(sum);
  }
  result.value = TreeSum(std::move(sums)) + bias;
  return result;
}

class MatMulTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Backends, MatMulTest, testing::ValuesIn(BackendNames()),
                         [](const auto& i) { return i.param; });

TEST_P(MatMulTest, StaysWithinTheBoundOfItsFormula) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  const auto backend = MakeBackend(GetParam());
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const auto& [n_out, n_in, rows, chunks] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 1, 1}, {31, 7, 2, 1}, {32, 128, 3, 4}, {33, 172, 5, 8}, {65, 259, 13, 2}, {97, 300, 14, 64}}) {
      const Product p(n_out, n_in, rows, dtype);
      const SumTree tree = Chunks(n_in, static_cast<int>(chunks));
      const auto y = p.On(*backend, tree);
      const double roundings = std::ceil(static_cast<double>(n_in) / chunks) + std::log2(chunks) + 2;
      for (int64_t i = 0; i < rows * n_out; ++i) {
        const int64_t out = i % n_out;
        const Output output = ChainedOutput(p.weights.view(), tree, &p.x[i / n_out * n_in], p.bias[out], out);
        ASSERT_LE(std::fabs(y[i] - output.exact), 1.01 * roundings * kUnit * output.size)
            << DTypeName(dtype) << " n_out=" << n_out << " n_in=" << n_in << " row " << i / n_out << " column " << out;
      }
    }
  }
}

TEST_P(MatMulTest, IsExactOnSmallIntegers) {
  const auto backend = MakeBackend(GetParam());
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (int64_t rows : {1, 6, 7, 12, 13, 241}) {
      const Product p(37, 301, rows, dtype, /*is_exact=*/true);
      const auto y = p.On(*backend, Chunks(301, 8));
      for (int64_t i = 0; i < rows * 37; ++i) {
        const float* x = &p.x[i / 37 * 301];
        ASSERT_EQ(y[i], ChainedOutput(p.weights.view(), OneChunk(301), x, p.bias[i % 37], i % 37).value) << i;
      }
    }
  }
}

// Any slice, at any number of rows: the bits of the f32 matrix that the quantised one means.
TEST_P(MatMulTest, GroupedWeightsEqualTheirFloatsToTheBit) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam(), 2);
  for (const int bits : {4, 8}) {
    for (const auto& [n_out, n_in, group, row_begin, col_begin] :
         std::vector<std::array<int64_t, 5>>{{32, 128, 128, 0, 0},
                                             {72, 256, 128, 0, 0},
                                             {40, 384, 64, 8, 64},
                                             {64, 320, 32, 5, 19},
                                             {8, 96, 96, 0, 95}}) {
      const Quantised whole(n_out, n_in, bits, static_cast<int32_t>(group), random);
      const MatrixView slice = ColumnsOf(RowsOf(whole.view(), row_begin, n_out), col_begin, n_in);
      const int64_t rows = n_out - row_begin, cols = n_in - col_begin;
      std::vector<float> dense;
      for (int64_t r = 0; r < rows; ++r) {
        const auto* from = whole.dense.data() + (row_begin + r) * n_in + col_begin;
        dense.insert(dense.end(), from, from + cols);
      }
      const HostMatrix floats(dense, rows, DType::kF32);
      for (const int64_t count : {1, 2, 5, 7, 12, 13, 300}) {
        const Product p(rows, cols, count, DType::kF32);
        for (const int chunks : {1, 4}) {
          const SumTree tree = Chunks(cols, chunks);
          const MatrixView equal = floats.view();
          ASSERT_TRUE(SameBits(p.Multiply(*backend, std::span(&slice, 1), tree, p.x, true),
                               p.Multiply(*backend, std::span(&equal, 1), tree, p.x, true)))
              << bits << " bits, [" << rows << ", " << cols << "], " << count << " rows, " << chunks << " chunks";
        }
      }
    }
  }
}

TEST_P(MatMulTest, GroupedWeightsStackAndStaySmall) {
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam());
  const Quantised a(32, 256, 4, 128, random), b(64, 256, 4, 128, random), eight(32, 256, 8, 128, random);
  const std::vector<MatrixView> same = {a.view(), RowsOf(b.view(), 32, 64)}, mixed = {a.view(), eight.view()};
  const HostMatrix a_floats(a.dense, 32, DType::kF32), eight_floats(eight.dense, 32, DType::kF32),
      b_floats({b.dense.begin() + 32 * 256, b.dense.end()}, 32, DType::kF32);
  const std::vector<MatrixView> same_floats = {a_floats.view(), b_floats.view()},
                                mixed_floats = {a_floats.view(), eight_floats.view()};
  const Product p(64, 256, 3, DType::kF32);
  EXPECT_TRUE(SameBits(p.Multiply(*backend, same, OneChunk(256), p.x, true),
                       p.Multiply(*backend, same_floats, OneChunk(256), p.x, true)));
  EXPECT_TRUE(SameBits(p.Multiply(*backend, mixed, OneChunk(256), p.x, true),
                       p.Multiply(*backend, mixed_floats, OneChunk(256), p.x, true)));
  if (GetParam() == "reference") return;
  // Half a byte per weight, and three bytes per group of 128; on the CPU a fourth, for alignment.
  const int64_t parameters = GetParam() == "cuda" ? 3 : 4;
  EXPECT_EQ((*backend->Pack(same, OneChunk(256)))->bytes(), 64 * 256 / 2 + 64 * 2 * parameters);
}

TEST_P(MatMulTest, StacksBlocksAndWidensMixedOnes) {
  const auto backend = MakeBackend(GetParam());
  Product p(40, 19, 3, DType::kF32, /*is_exact=*/true);
  const auto whole = p.On(*backend, OneChunk(19));
  std::vector<float> top, bottom;
  for (int64_t o = 0; o < 40; ++o) {
    for (int64_t k = 0; k < 19; ++k) (o < 5 ? top : bottom).push_back(p.weights.at(o, k));
  }
  for (DType other : {DType::kF32, DType::kF16, DType::kBF16}) {
    const HostMatrix a(top, 5, DType::kF16), b(bottom, 35, other);
    const std::vector<MatrixView> blocks = {a.view(), b.view()};
    EXPECT_EQ(p.Multiply(*backend, blocks, OneChunk(19), p.x, true), whole) << DTypeName(other);
  }
}

TEST_P(MatMulTest, TakesNoRows) {
  const auto backend = MakeBackend(GetParam());
  EXPECT_TRUE(Product(5, 3, 0, DType::kF16).On(*backend, OneChunk(3)).empty());
}

TEST_P(MatMulTest, RefusesWhatCannotBePacked) {
  const auto backend = MakeBackend(GetParam());
  const HostMatrix matrix(std::vector<float>(6), 2, DType::kF32);
  const std::vector<MatrixView> blocks = {matrix.view()};
  for (const auto& [boundaries, word] :
       std::vector<std::pair<std::vector<int64_t>, std::string>>{{{}, "chunks"},
                                                                 {{0}, "chunks"},
                                                                 {{0, 1, 2, 3}, "chunks"},
                                                                 {{0, 4}, "n_in=3"},
                                                                 {{0, 2, 1}, "n_in=3"},
                                                                 {{1, 3}, "n_in=3"}}) {
    const auto packed = backend->Pack(blocks, {boundaries});
    ASSERT_FALSE(packed.ok());
    EXPECT_THAT(std::string(packed.status().message()), testing::HasSubstr(word));
  }
  EXPECT_FALSE(backend->Pack({}, OneChunk(3)).ok());
  const HostMatrix other(std::vector<float>(8), 2, DType::kF32);
  const std::vector<MatrixView> mixed = {matrix.view(), other.view()};
  EXPECT_FALSE(backend->Pack(mixed, OneChunk(3)).ok());
}

class CpuMatMulTest : public testing::TestWithParam<std::string> {
 protected:
  Random random_{TestSeed()};
};
INSTANTIATE_TEST_SUITE_P(InstructionSets, CpuMatMulTest, testing::ValuesIn(InstructionSets()),
                         [](const auto& i) { return i.param; });

TEST_P(CpuMatMulTest, GivesTheBitsOfTheContractForAnyRowsAndThreads) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  for (const int threads : TeamSizes()) {
    const auto backend = MakeBackend(GetParam(), threads);
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const HostMatrix weights(random_.Floats(77 * 299), 77, dtype);
      for (const int chunks : {1, 2, 8, 64}) {
        SCOPED_TRACE(testing::Message() << threads << " threads");
        ExpectContract(*backend, weights.view(), Chunks(299, chunks), {1, 2, 5, 6, 7, 11, 12, 13, 24, 26}, random_,
                       ChainedOutput);
      }
    }
  }
}

TEST_P(CpuMatMulTest, ARowOfALargeBatchEqualsTheRowAlone) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  const auto backend = MakeBackend(GetParam(), 2);
  const HostMatrix weights(random_.Floats(70 * 517), 70, DType::kF16);
  ExpectRowsAreAsAlone(*backend, weights.view(), random_);
}

TEST_P(CpuMatMulTest, HalvesOfTheTreeAddUpToTheWhole) {
  const auto backend = MakeBackend(GetParam(), 2);
  const HostMatrix weights(random_.Floats(45 * 344), 45, DType::kBF16);
  ExpectHalvesAddUp(*backend, weights.view(), Chunks(344, 8), random_.Floats(3 * 344));
}

TEST(RandomTest, CoversBothSignsAndDiffers) {
  Random random(TestSeed());
  const auto v = random.Floats(1000);
  EXPECT_THAT(v, testing::Contains(testing::Gt(0.9f)));
  EXPECT_THAT(v, testing::Contains(testing::Lt(-0.9f)));
  EXPECT_NE(v[0], v[1]);
}

}  // namespace
}  // namespace rankwise::kernels
