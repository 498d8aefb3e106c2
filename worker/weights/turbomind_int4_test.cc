#include "worker/weights/turbomind_int4.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <random>
#include <utility>

#include "kernels/number_formats.h"

namespace rankwise::weights {
namespace {

using kernels::MatrixView;
using ::testing::HasSubstr;

std::vector<MatrixView> RowsOfAll(const GroupedWords& words) {
  std::vector<MatrixView> rows;
  for (int64_t out = 0; out < words.matrix.n_out; ++out) {
    rows.push_back({.dtype = kernels::DType::kInt4,
                    .rows = 1,
                    .cols = words.matrix.n_in,
                    .grouped = &words.matrix,
                    .row_begin = out});
  }
  return rows;
}

Int4Files FilesOf(const Int4Words& words, int64_t n_in, int64_t n_out, int32_t group_size) {
  return {.qweight = reinterpret_cast<const std::byte*>(words.qweight.data()),
          .scales_zeros = reinterpret_cast<const std::byte*>(words.scales_zeros.data()),
          .n_in = n_in,
          .n_out = n_out,
          .group_size = group_size};
}

GroupedWords Random(int64_t n_out, int64_t n_in, int32_t group_size) {
  std::mt19937_64 random(5);
  GroupedWords words(n_out, n_in, 4, group_size);
  for (int64_t out = 0; out < n_out; ++out) {
    for (int64_t in = 0; in < n_in; ++in) words.SetWeight(in, out, random() % 16);
    for (int64_t group = 0; group < n_in / group_size; ++group) {
      words.SetGroup(group, out, random() % 16, static_cast<uint16_t>(random() % 0x7C00));
    }
  }
  return words;
}

// Worked by hand from the fragment of mma.m16n8k16: a lane's a0 … a7 are at (row, 2c), (row, 2c + 1), the same of row +
// 8, and all four of column + 8, where row = lane / 4, c = lane % 4; a word holds a0 a2 a4 a6 a1 a3 a5 a7. Rows are
// outputs, columns inputs.
TEST(TurbomindInt4, GoldenWordsOfATile) {
  GroupedWords words(32, 32, 4, 32);
  for (int64_t out = 0; out < 32; ++out) {
    for (int64_t in = 0; in < 32; ++in) words.SetWeight(in, out, (in + in / 16 + out + out / 8) % 16);
  }
  const std::vector<uint32_t> qweight = ToTurbomindInt4(RowsOfAll(words)).qweight;
  ASSERT_EQ(qweight.size(), 128u);
  EXPECT_EQ(qweight[0], 0x29A11890u);   // 0 9 8 1 1 10 9 2 from outputs 0, 8 and inputs 0, 1, 8, 9
  EXPECT_EQ(qweight[1], 0x4BC33AB2u);   // outputs 16, 24: 2 11 10 3 3 12 11 4
  EXPECT_EQ(qweight[2], 0x3AB229A1u);   // inputs 16, 17, 24, 25: 1 10 9 2 2 11 10 3
  EXPECT_EQ(qweight[4], 0x4BC33AB2u);   // lane 1 has inputs 2, 3, 10, 11
  EXPECT_EQ(qweight[16], 0x3AB229A1u);  // lane 4 has outputs 1, 9
}

// The layout as its definition writes it: [n_in, n_out / 8] words of AWQ, seen as ten axes that are permuted.
TEST(TurbomindInt4, GoldenPermutationOfTenAxes) {
  constexpr int64_t kIn = 64, kOut = 96;
  const GroupedWords words = Random(kOut, kIn, 32);
  const std::array<int64_t, 10> shape = {kIn / 32, 2, 2, 4, 2, kOut / 32, 2, 2, 2, 4};
  const std::array<int, 10> order = {0, 5, 9, 8, 3, 1, 6, 4, 2, 7};
  std::vector<uint32_t> expected(kIn * kOut / 8);
  for (int64_t source = 0; source < kIn * kOut; ++source) {
    std::array<int64_t, 10> index{};
    for (int64_t axis = 9, rest = source; axis >= 0; rest /= shape[axis--]) index[axis] = rest % shape[axis];
    int64_t target = 0;
    for (const int axis : order) target = target * shape[axis] + index[axis];
    expected[target / 8] |= (words.qweight[source / 8] >> source % 8 * 4 & 0xF) << target % 8 * 4;
  }
  EXPECT_EQ(ToTurbomindInt4(RowsOfAll(words)).qweight, expected);
}

TEST(TurbomindInt4, GoldenScalesZerosAreHalvesThatBeginAt64) {
  GroupedWords words(32, 64, 4, 32);
  words.SetGroup(0, 0, 0, 0x3C00);   // 1
  words.SetGroup(0, 1, 15, 0x3800);  // 0.5
  words.SetGroup(1, 31, 8, 0xC000);  // -2
  const std::vector<uint16_t> pairs = ToTurbomindInt4(RowsOfAll(words)).scales_zeros;
  ASSERT_EQ(pairs.size(), 2u * 32 * 2);
  EXPECT_EQ(std::vector<uint16_t>(pairs.begin(), pairs.begin() + 4),
            (std::vector<uint16_t>{0x5400, 0x3C00, 0x54F0, 0x3800}));
  EXPECT_EQ(std::vector<uint16_t>(pairs.end() - 2, pairs.end()), (std::vector<uint16_t>{0x5480, 0xC000}));
  EXPECT_EQ(kernels::HalfToFloat(0x5400), 64);
  EXPECT_EQ(kernels::HalfToFloat(0x54F0), 79);
}

TEST(TurbomindInt4, SlicesComeBackInAnyOrder) {
  constexpr int64_t kIn = 128, kOut = 64;
  const GroupedWords words = Random(kOut, kIn, 32);
  const Int4Words written = ToTurbomindInt4(RowsOfAll(words));
  // Outputs 63, 60, …, 3 to 0, 1, …; inputs 40 … 99, which begin eight inputs into a group.
  std::vector<OutputMove> moves;
  for (int64_t out = kOut - 1; out > 0; out -= 3) moves.push_back({out, static_cast<int64_t>(moves.size())});
  GroupedWords slice(24, 96, 4, 32);
  CopyInt4(FilesOf(written, kIn, kOut, 32), {40, 100}, moves, slice, 8);
  const auto view = [](const GroupedWords& of, int64_t row, int64_t col) {
    return MatrixView{.dtype = kernels::DType::kInt4,
                      .rows = 1,
                      .cols = 60,
                      .grouped = &of.matrix,
                      .row_begin = row,
                      .col_begin = col};
  };
  for (const OutputMove& move : moves) {
    for (int64_t i = 0; i < 60; ++i) {
      ASSERT_EQ(kernels::ElementAt(view(slice, move.to, 8), 0, i), kernels::ElementAt(view(words, move.from, 40), 0, i))
          << move.from << " " << i;
    }
  }
}

TEST(TurbomindInt4, ParametersThatAreNoneAreRefused) {
  const GroupedWords words = Random(32, 64, 32);
  Int4Words written = ToTurbomindInt4(RowsOfAll(words));
  const Int4Files files = FilesOf(written, 64, 32, 32);
  EXPECT_EQ(CheckScalesZeros(files), absl::OkStatus());
  const auto refusal = [&](size_t at, uint16_t word) {
    const uint16_t kept = std::exchange(written.scales_zeros[at], word);
    const std::string message(CheckScalesZeros(files).message());
    written.scales_zeros[at] = kept;
    return message;
  };
  EXPECT_THAT(refusal(32 * 2 + 6, 0x4700), HasSubstr("group 1 of output 3 has zero point 7"));  // without the 64
  EXPECT_THAT(refusal(0, 0x5500), HasSubstr("zero point 80"));
  EXPECT_THAT(refusal(0, 0x5401), HasSubstr("zero point 64.06"));
  EXPECT_THAT(refusal(0, 0xD400), HasSubstr("zero point -64"));
  EXPECT_THAT(refusal(1, 0x7C00), HasSubstr("scale inf"));
  EXPECT_THAT(refusal(127, 0xFE00), HasSubstr("scale nan"));
  EXPECT_EQ(refusal(1, 0x8001), "");
}

}  // namespace
}  // namespace rankwise::weights
