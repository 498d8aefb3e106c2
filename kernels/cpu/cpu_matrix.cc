#include "kernels/cpu/cpu_matrix.h"

#include <algorithm>
#include <cstring>

#include "base/status_macros.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/number_formats.h"

namespace rankwise::kernels {
namespace {

struct SourceRow {
  const std::byte* data;
  DType dtype;
};

SourceRow FindRow(std::span<const MatrixView> blocks, int64_t row) {
  for (const MatrixView& block : blocks) {
    if (row < block.rows) return {block.data + row * block.row_stride * DTypeBytes(block.dtype), block.dtype};
    row -= block.rows;
  }
  return {nullptr, DType::kF32};
}

// Elements [begin, end) of a row into one column of a panel. T is the packed element.
template <typename T>
void PackColumn(const SourceRow& row, int64_t begin, int64_t end, T* column) {
  if (row.data == nullptr) {
    for (int64_t k = begin; k < end; ++k) column[k * kPanelColumns] = T{};
  } else if (DTypeBytes(row.dtype) == sizeof(T)) {
    for (int64_t k = begin; k < end; ++k) std::memcpy(column + k * kPanelColumns, row.data + k * sizeof(T), sizeof(T));
  } else {
    for (int64_t k = begin; k < end; ++k) {
      column[k * kPanelColumns] = static_cast<T>(LoadAsFloat(row.data + k * DTypeBytes(row.dtype), row.dtype));
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

}  // namespace

int64_t CpuMatrix::panel_count() const { return (shape_.n_out + kPanelColumns - 1) / kPanelColumns; }
int64_t CpuMatrix::panel_bytes() const { return shape_.n_in * kPanelColumns * DTypeBytes(shape_.dtype); }

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
  if (shape_.dtype == DType::kF32) {
    PackRows(rows, shape_.n_in, reinterpret_cast<float*>(to));
  } else {
    PackRows(rows, shape_.n_in, reinterpret_cast<uint16_t*>(to));
  }
}

}  // namespace rankwise::kernels
