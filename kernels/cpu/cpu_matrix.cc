#include "kernels/cpu/cpu_matrix.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/status_macros.h"
#include "kernels/activation_groups.h"
#include "kernels/number_formats.h"

namespace rankwise::kernels {
namespace {

// One row of the stacked blocks; `block` is null past the last.
struct SourceRow {
  const MatrixView* block;
  int64_t row;
};

SourceRow FindRow(std::span<const MatrixView> blocks, int64_t row) {
  for (const MatrixView& block : blocks) {
    if (row < block.rows) return {&block, row};
    row -= block.rows;
  }
  return {nullptr, 0};
}

// An element of f16 or bf16.
uint16_t BFloat16At(const MatrixView& block, int64_t row, int64_t k) {
  uint16_t bits;
  std::memcpy(&bits, block.data + (row * block.row_stride + k) * static_cast<int64_t>(sizeof(bits)), sizeof(bits));
  return block.dtype == DType::kF16 ? HalfToBFloat16(bits) : bits;
}

// Elements [begin, end) of a row into one column of a panel of `dtype`, whose elements are T.
template <typename T>
void PackColumn(const SourceRow& from, DType dtype, int64_t begin, int64_t end, T* column) {
  if (from.block == nullptr) {
    for (int64_t k = begin; k < end; ++k) column[k * kPanelColumns] = T{};
  } else if (const MatrixView& block = *from.block; block.dtype == dtype) {
    const std::byte* row = block.data + from.row * block.row_stride * static_cast<int64_t>(sizeof(T));
    for (int64_t k = begin; k < end; ++k) std::memcpy(column + k * kPanelColumns, row + k * sizeof(T), sizeof(T));
  } else {
    for (int64_t k = begin; k < end; ++k) {
      if constexpr (std::is_same_v<T, float>) {
        column[k * kPanelColumns] = ElementAt(block, from.row, k);
      } else {
        column[k * kPanelColumns] = BFloat16At(block, from.row, k);
      }
    }
  }
}

constexpr int64_t kPackDepth = 64;  // 32 cache lines read, 64 written

template <typename T>
void PackRows(std::span<const SourceRow> rows, const PackedShape& shape, T* panel) {
  for (int64_t k = 0; k < shape.n_in; k += kPackDepth) {
    const int64_t end = std::min(k + kPackDepth, shape.n_in);
    for (size_t c = 0; c < rows.size(); ++c) PackColumn(rows[c], shape.dtype, k, end, panel + c);
  }
}

// Columns [begin, end) of one chunk in words of two, the earlier in the upper half.
void PackPairs(std::span<const SourceRow> rows, int64_t begin, int64_t end, uint32_t* words) {
  constexpr uint32_t kMinusZero = 0x8000;
  for (int64_t k = begin; k < end; k += kPackDepth, words += kPackDepth / 2 * kPanelColumns) {
    for (size_t c = 0; c < rows.size(); ++c) {
      const auto [block, row] = rows[c];
      for (int64_t i = k; i < std::min(k + kPackDepth, end); i += 2) {
        const uint32_t upper = block ? BFloat16At(*block, row, i) : 0;
        const uint32_t lower = i + 1 == end ? kMinusZero : block ? BFloat16At(*block, row, i + 1) : 0;
        words[(i - k) / 2 * kPanelColumns + c] = upper << 16 | lower;
      }
    }
  }
}

// Where q of column k of a group and column c of a panel lies: a byte and, of four bits, a shift in it.
struct Place {
  int64_t byte;
  int shift;
};
Place PlaceOf(DType dtype, bool is_in_pairs, int64_t k, int64_t c) {
  if (dtype == DType::kInt4) return {(k / 8 * kPanelColumns + c) * 4 + k % 8 / 2, static_cast<int>(k % 2 * 4)};
  if (!is_in_pairs) return {k * kPanelColumns + c, 0};
  return {((k / 8 * 2 + k % 2) * kPanelColumns + c) * 4 + k % 8 / 2, 0};
}

// One group's columns [begin, end) of the slice.
void PackGroup(std::span<const SourceRow> rows, const PackedShape& shape, bool is_in_pairs, int64_t group,
               int64_t begin, int64_t end, std::byte* out) {
  auto* scales = reinterpret_cast<uint16_t*>(out);
  auto* zeros = reinterpret_cast<uint8_t*>(scales + kPanelColumns);
  std::byte* q = out + kGroupHeaderBytes;
  for (size_t c = 0; c < rows.size(); ++c) {
    if (rows[c].block == nullptr) continue;
    const MatrixView& block = *rows[c].block;
    const int64_t source = block.col_begin / shape.group_size + group, row = block.row_begin + rows[c].row;
    scales[c] = GroupedScale(*block.grouped, source, row);
    zeros[c] = static_cast<uint8_t>(GroupedValue(*block.grouped, block.grouped->qzeros, source, row));
  }
  for (int64_t k = begin; k < end; ++k) {
    for (size_t c = 0; c < rows.size(); ++c) {
      if (rows[c].block == nullptr) continue;
      const MatrixView& block = *rows[c].block;
      const int value =
          GroupedValue(*block.grouped, block.grouped->qweight, block.col_begin + k, block.row_begin + rows[c].row);
      const Place place = PlaceOf(shape.dtype, is_in_pairs, k - begin, static_cast<int64_t>(c));
      q[place.byte] |= static_cast<std::byte>(value << place.shift);
    }
  }
}

}  // namespace

int64_t CpuMatrix::panel_count() const { return (shape_.n_out + kPanelColumns - 1) / kPanelColumns; }
int CpuMatrix::bits() const { return shape_.dtype == DType::kInt4 ? 4 : 8; }
int64_t CpuMatrix::group_bytes() const { return GroupBytes(shape_.n_in, shape_.group_size, bits()); }
int64_t CpuMatrix::panel_bytes() const {
  if (is_in_pairs_) return steps_.back() * kPanelColumns * static_cast<int64_t>(sizeof(uint32_t));
  if (!IsGrouped(shape_.dtype)) return shape_.n_in * kPanelColumns * DTypeBytes(shape_.dtype);
  return GroupedPanelBytes(shape_.n_in, shape_.group_size, shape_.group_offset, bits());
}

CpuMatrix::CpuMatrix(const PackedShape& shape, const SumTree& tree, Activations activations, bool is_in_pairs)
    : shape_(shape),
      activations_(activations),
      is_in_pairs_(is_in_pairs),
      boundaries_(tree.boundaries),
      steps_(tree.boundaries) {
  if (is_in_pairs) {
    for (size_t c = 1; c < steps_.size(); ++c) {
      steps_[c] = steps_[c - 1] + (boundaries_[c] - boundaries_[c - 1] + 1) / 2;
    }
  }
  if (activations != Activations::kInt8) return;
  int32_t pairs = 0;
  for (const ActivationGroup& group : CutActivations(shape, tree, chunk_groups_)) {
    const auto first = static_cast<int32_t>(GroupBegin(group.weight_group, shape.group_size, shape.group_offset));
    const int32_t pair_begin = (group.begin - first) / 8, pair_end = (group.end - first + 7) / 8;
    dot_groups_.push_back({.begin = group.begin,
                           .end = group.end,
                           .weight_group = group.weight_group,
                           .pair_begin = pair_begin,
                           .pair_count = pair_end - pair_begin,
                           .pair_column = first + pair_begin * 8,
                           .x_pair = pairs});
    pairs += pair_end - pair_begin;
  }
}

absl::StatusOr<std::unique_ptr<CpuMatrix>> CpuMatrix::Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                             Activations activations, const BFloat16Kernels& bfloat16s,
                                                             ThreadTeam& team) {
  RW_ASSIGN_OR_RETURN(PackedShape shape, CheckPack(blocks, tree));
  RW_ASSIGN_OR_RETURN(const Activations own, ActivationsOf(shape, activations));
  if (own == Activations::kBF16) shape.dtype = DType::kBF16;
  const bool is_in_pairs = own == Activations::kBF16 && bfloat16s.is_in_pairs;
  std::unique_ptr<CpuMatrix> matrix(new CpuMatrix(shape, tree, own, is_in_pairs));
  RW_ASSIGN_OR_RETURN(matrix->memory_, AllocateMemory(matrix->bytes()));
  team.For(matrix->panel_count(), [&](int64_t panel, int) { matrix->PackPanel(blocks, panel); });
  return matrix;
}

void CpuMatrix::PackPanel(std::span<const MatrixView> blocks, int64_t panel) {
  SourceRow rows[kPanelColumns];
  for (int c = 0; c < kPanelColumns; ++c) rows[c] = FindRow(blocks, panel * kPanelColumns + c);
  std::byte* to = memory_.get() + panel * panel_bytes();
  if (IsGrouped(shape_.dtype)) {
    std::memset(to, 0, static_cast<size_t>(panel_bytes()));
    const int64_t groups = panel_bytes() / group_bytes();
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = GroupBegin(group, shape_.group_size, shape_.group_offset);
      const int64_t end = std::min(GroupBegin(group + 1, shape_.group_size, shape_.group_offset), shape_.n_in);
      PackGroup(rows, shape_, activations_ == Activations::kInt8, group, begin, end, to + group * group_bytes());
    }
  } else if (is_in_pairs_) {
    for (size_t c = 0; c + 1 < steps_.size(); ++c) {
      PackPairs(rows, boundaries_[c], boundaries_[c + 1], reinterpret_cast<uint32_t*>(to) + steps_[c] * kPanelColumns);
    }
  } else if (shape_.dtype == DType::kF32) {
    PackRows(rows, shape_, reinterpret_cast<float*>(to));
  } else {
    PackRows(rows, shape_, reinterpret_cast<uint16_t*>(to));
  }
}

}  // namespace rankwise::kernels
