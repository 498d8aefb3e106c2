#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "worker/shard/shard_plan.h"
#include "worker/weights/grouped_words.h"

// Matrices of four bits as a TurboMind workspace of layout 0.2 holds them, in two files each:
//   qweight       q [n_in, n_out] in the order in which a warp loads the operands of m16n8k16: see the nibbles below
//   scales_zeros  [n_in / group_size, n_out] pairs of f16 {64 + zero, scale}
// q and zero are AWQ's; 64 is what the bit trick adds that makes an f16 of a nibble, so that it cancels in q - zero.
namespace rankwise::weights {

inline constexpr int64_t kInt4Tile = 32;  // inputs and outputs of a file are multiples

// q[in][out] is nibble InputNibble + OutputNibble of the file, nibble n being bits [4 (n % 8), 4 (n % 8) + 4) of word
// n / 8. Tiles of 32 × 32 follow one another along the outputs. A tile has 32 lanes, out % 8 * 4 + in % 8 / 2; a lane
// has a word for each of the 2 × 2 blocks of 16 × 16; the eight values of a word are {in % 16 / 8, out % 16 / 8, in %
// 2} counted in binary, in the order 0 2 4 6 1 3 5 7.
constexpr int64_t InputNibble(int64_t in, int64_t n_out) {
  return in / 32 * 32 * n_out + in % 8 / 2 * 32 + in % 32 / 16 * 16 + in % 2 * 4 + in % 16 / 8 * 2;
}
constexpr int64_t OutputNibble(int64_t out) {
  return out / 32 * 1024 + out % 8 * 128 + out % 32 / 16 * 8 + out % 16 / 8;
}

struct Int4Words {
  std::vector<uint32_t> qweight;
  std::vector<uint16_t> scales_zeros;
};
// Output i is rows[i], a view of one row of a kInt4 matrix that begins with a group. Inputs and outputs must be
// multiples of kInt4Tile, inputs of the group size too.
Int4Words ToTurbomindInt4(std::span<const kernels::MatrixView> rows);

// Two files, mapped, of the sizes that n_in, n_out and group_size give.
struct Int4Files {
  const std::byte *qweight = nullptr, *scales_zeros = nullptr;
  int64_t n_in = 0, n_out = 0;
  int32_t group_size = 0;
};
// InvalidArgument when a scale is not finite or a zero point is not 64 + 0 … 15.
absl::Status CheckScalesZeros(const Int4Files& files);

// Output files[from] becomes output `to` of a matrix.
struct OutputMove {
  int64_t from = 0, to = 0;
};
// Copies the outputs, inputs [begin, end) of them, with the parameters of every group these touch. The first input
// becomes input `to_input`, which is as far into its group.
void CopyInt4(const Int4Files& files, shard::Range inputs, std::span<const OutputMove> outputs, GroupedWords& matrix,
              int64_t to_input);

}  // namespace rankwise::weights
