#include "kernels/cpu/cpu_matrix.h"

#include <algorithm>
#include <cstring>

#include "base/status_macros.h"
#include "kernels/cpu/isa_kernels.h"
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

void PackGroups(std::span<const SourceRow> rows, const PackedShape& shape, std::byte* panel) {
  const int32_t bits = shape.dtype == DType::kInt4 ? 4 : 8;
  const int64_t groups = GroupCount(shape.n_in, shape.group_size, shape.group_offset);
  const int64_t q_bytes = GroupedPanelBytes(shape.n_in, bits);
  auto* scales = reinterpret_cast<uint16_t*>(panel + q_bytes);
  auto* zeros = reinterpret_cast<uint8_t*>(scales + groups * kPanelColumns);
  std::memset(panel, 0, static_cast<size_t>(q_bytes + groups * kPanelColumns * 3));
  for (int64_t k = 0; k < shape.n_in; ++k) {
    for (size_t c = 0; c < rows.size(); ++c) {
      if (rows[c].block == nullptr) continue;
      const MatrixView& block = *rows[c].block;
      const int q =
          GroupedValue(*block.grouped, block.grouped->qweight, block.col_begin + k, block.row_begin + rows[c].row);
      if (bits == 8) {
        reinterpret_cast<uint8_t*>(panel)[k * kPanelColumns + c] = static_cast<uint8_t>(q);
      } else {
        reinterpret_cast<uint32_t*>(panel)[k / 8 * kPanelColumns + c] |= static_cast<uint32_t>(q) << (k % 8 * 4);
      }
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
int64_t CpuMatrix::panel_bytes() const {
  const int64_t elements = shape_.n_in * kPanelColumns;
  if (!IsGrouped(shape_.dtype)) return elements * DTypeBytes(shape_.dtype);
  const int64_t parameters = GroupCount(shape_.n_in, shape_.group_size, shape_.group_offset) * kPanelColumns;
  return GroupedPanelBytes(shape_.n_in, shape_.dtype == DType::kInt4 ? 4 : 8) + parameters * 3;
}

absl::StatusOr<std::unique_ptr<CpuMatrix>> CpuMatrix::Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                             ThreadTeam& team) {
  RW_ASSIGN_OR_RETURN(const PackedShape shape, CheckPack(blocks, tree));
  std::unique_ptr<CpuMatrix> matrix(new CpuMatrix(shape, tree));
  RW_ASSIGN_OR_RETURN(matrix->memory_, AllocateMemory(matrix->bytes()));
  team.For(matrix->panel_count(), [&](int64_t panel, int) { matrix->PackPanel(blocks, panel); });
  return matrix;
}

void CpuMatrix::PackPanel(std::span<const MatrixView> blocks, int64_t panel) {
  SourceRow rows[kPanelColumns];
  for (int c = 0; c < kPanelColumns; ++c) rows[c] = FindRow(blocks, panel * kPanelColumns + c);
  std::byte* to = memory_.get() + panel * panel_bytes();
  if (IsGrouped(shape_.dtype)) {
    PackGroups(rows, shape_, to);
  } else if (shape_.dtype == DType::kF32) {
    PackRows(rows, shape_.n_in, reinterpret_cast<float*>(to));
  } else {
    PackRows(rows, shape_.n_in, reinterpret_cast<uint16_t*>(to));
  }
}

}  // namespace rankwise::kernels
