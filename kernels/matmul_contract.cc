#include "kernels/matmul_contract.h"

#include <gtest/gtest.h>

namespace rankwise::kernels {

SumTree Chunks(int64_t n_in, int chunks) {
  SumTree tree;
  for (int c = 0; c <= chunks; ++c) tree.boundaries.push_back(n_in * c / chunks);
  return tree;
}

std::vector<float> Multiply(Backend& backend, const MatrixView& view, const SumTree& tree, const std::vector<float>& x,
                            const float* bias) {
  auto packed = backend.Pack(std::span(&view, 1), tree);
  EXPECT_TRUE(packed.ok()) << packed.status();
  const int64_t rows = static_cast<int64_t>(x.size()) / view.cols;
  Guarded y(rows * view.rows);
  EXPECT_TRUE(backend.MatMul(y.data(), x.data(), rows, **packed, bias).ok());
  EXPECT_TRUE(y.BandsAreIntact());
  return y.values();
}

float TreeSum(std::vector<float> sums) {
  for (; sums.size() > 1; sums.resize(sums.size() / 2)) {
    for (size_t i = 0; i < sums.size() / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  return sums[0];
}

void ExpectContract(Backend& backend, const MatrixView& view, const SumTree& tree,
                    const std::vector<int64_t>& row_counts, Random& random, const OutputOf& output_of) {
  const std::vector<float> bias = random.Floats(view.rows);
  for (const int64_t rows : row_counts) {
    const std::vector<float> x = random.Floats(rows * view.cols);
    const std::vector<float> y = Multiply(backend, view, tree, x, bias.data());
    const int64_t step = rows > 26 ? 13 : 1;
    for (int64_t i = 0; i < rows * view.rows; i += step) {
      const int64_t row = i / view.rows, out = i % view.rows;
      ASSERT_EQ(y[i], output_of(view, tree, &x[row * view.cols], bias[out], out).value)
          << DTypeName(view.dtype) << " [" << view.rows << ", " << view.cols << "] from column " << view.col_begin
          << ", " << tree.boundaries.size() - 1 << " chunks, " << rows << " rows: row " << row << ", output " << out;
    }
  }
}

void ExpectRowsAreAsAlone(Backend& backend, const MatrixView& view, Random& random) {
  constexpr int64_t kRows = 499;
  const SumTree tree = Chunks(view.cols, 4);
  const std::vector<float> x = random.Floats(kRows * view.cols);
  const std::vector<float> y = Multiply(backend, view, tree, x, nullptr);
  for (const int64_t row : {0, 1, 239, 240, 241, 479, 480, 498}) {
    const std::vector<float> own(x.begin() + row * view.cols, x.begin() + (row + 1) * view.cols);
    const std::vector<float> batched(y.begin() + row * view.rows, y.begin() + (row + 1) * view.rows);
    EXPECT_TRUE(SameBits(Multiply(backend, view, tree, own, nullptr), batched)) << "row " << row;
  }
}

void ExpectHalvesAddUp(Backend& backend, const MatrixView& view, const SumTree& tree, const std::vector<float>& x) {
  const std::vector<float> whole = Multiply(backend, view, tree, x, nullptr);
  const auto chunks = std::ssize(tree.boundaries) - 1;
  std::vector<float> sum(whole.size());
  for (const int half : {0, 1}) {
    const auto first = tree.boundaries.begin() + half * chunks / 2;
    SumTree part{{first, first + chunks / 2 + 1}};
    const int64_t begin = part.boundaries.front(), end = part.boundaries.back();
    for (int64_t& boundary : part.boundaries) boundary -= begin;
    std::vector<float> own;
    for (auto row = x.begin(); row != x.end(); row += view.cols) own.insert(own.end(), row + begin, row + end);
    const std::vector<float> of_half = Multiply(backend, ColumnsOf(view, begin, end), part, own, nullptr);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] = half ? sum[i] + of_half[i] : of_half[i];
  }
  EXPECT_TRUE(SameBits(sum, whole));
}

}  // namespace rankwise::kernels
