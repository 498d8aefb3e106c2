#include "kernels/cpu/cpu_matrix.h"

#include <algorithm>
#include <cstring>

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

// Elements [begin, end) of a row into one column of a panel. T is the packed element.
template <typename T>
void PackColumn(const SourceRow& from, int64_t begin, int64_t end, T* column) {
  if (from.block == nullptr) {
    for (int64_t k = begin; k < end; ++k) column[k * kPanelColumns] = T{};
  } else if (const MatrixView& block = *from.block;
             !block.grouped && DTypeBytes(block.dtype) == static_cast<int64_t>(sizeof(T))) {
    const std::byte* row = block.data + from.row * block.row_stride * static_cast<int64_t>(sizeof(T));
    for (int64_t k = begin; k < end; ++k) std::memcpy(column + k * kPanelColumns, row + k * sizeof(T), sizeof(T));
  } else {
    for (int64_t k = begin; k < end; ++k) {
      column[k * kPanelColumns] = static_cast<T>(ElementAt(block, from.row, k));
    }
  }
}

template <typename T>
void PackRows(std::span<const SourceRow> rows, int64_t n_in, T* panel) {
  constexpr int64_t kDepth = 64;  // 32 cache lines read, 64 written
  for (int64_t k = 0; k < n_in; k += kDepth) {
    for (size_t c = 0; c < rows.size(); ++c) PackColumn(rows[c], k, std::min(k + kDepth, n_in), panel + c);
  }
}

// Where q of input column k and column c of a panel lies: a byte and, of four bits, a shift in it.
struct Place {
  int64_t byte;
  int shift;
};
Place PlaceOf(DType dtype, bool is_in_pairs, int64_t k, int64_t c) {
  if (dtype == DType::kInt4) return {(k / 8 * kPanelColumns + c) * 4 + k % 8 / 2, static_cast<int>(k % 2 * 4)};
  if (!is_in_pairs) return {k * kPanelColumns + c, 0};
  return {((k / 8 * 2 + k % 2) * kPanelColumns + c) * 4 + k % 8 / 2, 0};
}

void PackGroups(std::span<const SourceRow> rows, const PackedShape& shape, bool is_in_pairs, int64_t q_bytes,
                std::byte* panel) {
  const int64_t groups = GroupCount(shape.n_in, shape.group_size, shape.group_offset);
  auto* scales = reinterpret_cast<uint16_t*>(panel + q_bytes);
  auto* zeros = reinterpret_cast<uint8_t*>(scales + groups * kPanelColumns);
  std::memset(panel, 0, static_cast<size_t>(q_bytes + groups * kPanelColumns * 3));
  for (int64_t k = 0; k < shape.n_in; ++k) {
    for (size_t c = 0; c < rows.size(); ++c) {
      if (rows[c].block == nullptr) continue;
      const MatrixView& block = *rows[c].block;
      const int q =
          GroupedValue(*block.grouped, block.grouped->qweight, block.col_begin + k, block.row_begin + rows[c].row);
      const Place place = PlaceOf(shape.dtype, is_in_pairs, k, static_cast<int64_t>(c));
      panel[place.byte] |= static_cast<std::byte>(q << place.shift);
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    for (size_t c = 0; c < rows.size(); ++c) {
      if (rows[c].block == nullptr) continue;
      const MatrixView& block = *rows[c].block;
      const int64_t source = block.col_begin / shape.group_size + group, out = block.row_begin + rows[c].row;
      scales[group * kPanelColumns + c] = GroupedScale(*block.grouped, source, out);
      zeros[group * kPanelColumns + c] =
          static_cast<uint8_t>(GroupedValue(*block.grouped, block.grouped->qzeros, source, out));
    }
  }
}

}  // namespace

int64_t CpuMatrix::panel_count() const { return (shape_.n_out + kPanelColumns - 1) / kPanelColumns; }
int64_t CpuMatrix::q_bytes() const {
  return takes_integers() && shape_.dtype == DType::kInt8
             ? (shape_.n_in + 7) / 8 * 8 * kPanelColumns
             : GroupedPanelBytes(shape_.n_in, shape_.dtype == DType::kInt4 ? 4 : 8);
}
int64_t CpuMatrix::panel_bytes() const {
  if (!IsGrouped(shape_.dtype)) return shape_.n_in * kPanelColumns * DTypeBytes(shape_.dtype);
  return q_bytes() + GroupCount(shape_.n_in, shape_.group_size, shape_.group_offset) * kPanelColumns * 3;
}

CpuMatrix::CpuMatrix(const PackedShape& shape, const SumTree& tree, Activations activations)
    : shape_(shape), boundaries_(tree.boundaries) {
  if (activations != Activations::kInt8 || !IsGrouped(shape.dtype)) return;
  int32_t pairs = 0;
  for (const ActivationGroup& group : CutActivations(shape, tree, chunk_groups_)) {
    const int32_t pair_begin = group.begin / 8, pair_end = (group.end - 1) / 8 + 1;
    dot_groups_.push_back({.begin = group.begin,
                           .end = group.end,
                           .weight_group = group.weight_group,
                           .pair_begin = pair_begin,
                           .pair_count = pair_end - pair_begin,
                           .x_pair = pairs});
    pairs += pair_end - pair_begin;
  }
}

absl::StatusOr<std::unique_ptr<CpuMatrix>> CpuMatrix::Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                             Activations activations, ThreadTeam& team) {
  RW_ASSIGN_OR_RETURN(const PackedShape shape, CheckPack(blocks, tree));
  std::unique_ptr<CpuMatrix> matrix(new CpuMatrix(shape, tree, activations));
  RW_ASSIGN_OR_RETURN(matrix->memory_, AllocateMemory(matrix->bytes()));
  team.For(matrix->panel_count(), [&](int64_t panel, int) { matrix->PackPanel(blocks, panel); });
  return matrix;
}

void CpuMatrix::PackPanel(std::span<const MatrixView> blocks, int64_t panel) {
  SourceRow rows[kPanelColumns];
  for (int c = 0; c < kPanelColumns; ++c) rows[c] = FindRow(blocks, panel * kPanelColumns + c);
  std::byte* to = memory_.get() + panel * panel_bytes();
  if (IsGrouped(shape_.dtype)) {
    PackGroups(rows, shape_, takes_integers(), q_bytes(), to);
  } else if (shape_.dtype == DType::kF32) {
    PackRows(rows, shape_.n_in, reinterpret_cast<float*>(to));
  } else {
    PackRows(rows, shape_.n_in, reinterpret_cast<uint16_t*>(to));
  }
}

}  // namespace rankwise::kernels
