#include "worker/weights/turbomind_int4.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/number_formats.h"

namespace rankwise::weights {
namespace {

using kernels::MatrixView;

// 64 + zero as an f16: the last bit of its significand is 1/16.
constexpr uint16_t kZeroBits = 0x5400;
constexpr uint16_t ZeroWord(int zero) { return static_cast<uint16_t>(kZeroBits | zero << 4); }
constexpr uint32_t ZeroOf(uint16_t word) { return word >> 4 & 0xF; }

struct Group {
  uint16_t zero, scale;  // f16
};
Group GroupAt(const Int4Files& files, int64_t group, int64_t out) {
  Group pair;
  std::memcpy(&pair, files.scales_zeros + (group * files.n_out + out) * static_cast<int64_t>(sizeof pair), sizeof pair);
  return pair;
}

}  // namespace

Int4Words ToTurbomindInt4(std::span<const MatrixView> rows) {
  const auto n_out = static_cast<int64_t>(rows.size());
  const int64_t n_in = rows.front().cols, group_size = rows.front().grouped->group_size, groups = n_in / group_size;
  RW_CHECK(n_out % kInt4Tile == 0 && n_in % kInt4Tile == 0 && n_in % group_size == 0,
           absl::StrCat("[", n_in, ", ", n_out, "]"));
  Int4Words words{.qweight = std::vector<uint32_t>(n_in * n_out / 8),
                  .scales_zeros = std::vector<uint16_t>(groups * n_out * 2)};
  for (int64_t out = 0; out < n_out; ++out) {
    const MatrixView& row = rows[out];
    const kernels::GroupedMatrix& m = *row.grouped;
    RW_CHECK(row.cols == n_in && m.bits == 4 && m.group_size == group_size && row.col_begin % group_size == 0, "rows");
    for (int64_t in = 0; in < n_in; ++in) {
      const int64_t nibble = InputNibble(in, n_out) + OutputNibble(out);
      const int q = kernels::GroupedValue(m, m.qweight, row.col_begin + in, row.row_begin);
      words.qweight[nibble / 8] |= static_cast<uint32_t>(q) << nibble % 8 * 4;
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t source = row.col_begin / group_size + group;
      uint16_t* pair = &words.scales_zeros[(group * n_out + out) * 2];
      pair[0] = ZeroWord(kernels::GroupedValue(m, m.qzeros, source, row.row_begin));
      pair[1] = kernels::GroupedScale(m, source, row.row_begin);
    }
  }
  return words;
}

absl::Status CheckScalesZeros(const Int4Files& files) {
  for (int64_t group = 0; group < files.n_in / files.group_size; ++group) {
    for (int64_t out = 0; out < files.n_out; ++out) {
      const Group pair = GroupAt(files, group, out);
      if (pair.zero == ZeroWord(static_cast<int>(ZeroOf(pair.zero))) && (pair.scale & 0x7C00) != 0x7C00) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("group ", group, " of output ", out, " has zero point ", kernels::HalfToFloat(pair.zero),
                       " and scale ", kernels::HalfToFloat(pair.scale), ": they are 64 + 0 … 15, and finite"));
    }
  }
  return absl::OkStatus();
}

void CopyInt4(const Int4Files& files, shard::Range inputs, std::span<const OutputMove> outputs, GroupedWords& matrix,
              int64_t to_input) {
  RW_CHECK((to_input - inputs.begin) % files.group_size == 0, absl::StrCat("input ", inputs.begin, " to ", to_input));
  std::vector<int64_t> nibbles;
  nibbles.reserve(outputs.size());
  for (const OutputMove& output : outputs) nibbles.push_back(OutputNibble(output.from));
  for (int64_t in = inputs.begin; in < inputs.end; ++in) {
    const int64_t to = to_input + in - inputs.begin, first = InputNibble(in, files.n_out);
    for (size_t i = 0; i < outputs.size(); ++i) {
      const int64_t nibble = first + nibbles[i];
      matrix.SetWeight(to, outputs[i].to, kernels::LoadWord(files.qweight, nibble / 8) >> nibble % 8 * 4 & 0xF);
    }
    if (in != inputs.begin && in % files.group_size != 0) continue;
    for (const OutputMove& output : outputs) {
      const Group pair = GroupAt(files, in / files.group_size, output.from);
      matrix.SetGroup(to / files.group_size, output.to, ZeroOf(pair.zero), pair.scale);
    }
  }
}

}  // namespace rankwise::weights
