#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/number_formats.h"
#include "worker/shard/shard_plan.h"

// Parts of borrowed matrices. The ranges are the caller's to check.
namespace rankwise::weights {

inline kernels::MatrixView RowsOf(const kernels::MatrixView& view, shard::Range rows) {
  return kernels::RowsOf(view, rows.begin, rows.end);
}

inline kernels::MatrixView ColumnsOf(const kernels::MatrixView& view, shard::Range columns) {
  return kernels::ColumnsOf(view, columns.begin, columns.end);
}

// The first row as f32.
inline std::vector<float> Floats(const kernels::MatrixView& row) {
  std::vector<float> values(row.cols);
  for (int64_t i = 0; i < row.cols; ++i) {
    values[i] = kernels::LoadAsFloat(row.data + i * kernels::DTypeBytes(row.dtype), row.dtype);
  }
  return values;
}

// `value` rounded half to even to a 16-bit dtype.
inline uint16_t RoundTo16(float value, kernels::DType dtype) {
  if (dtype == kernels::DType::kF16) return kernels::FloatToHalf(value);
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// One element as a word of a 16-bit dtype; unchanged when it is of that dtype already.
inline uint16_t WordAt(const kernels::MatrixView& view, int64_t row, int64_t col, kernels::DType dtype) {
  const std::byte* source = view.data + (row * view.row_stride + col) * kernels::DTypeBytes(view.dtype);
  if (view.dtype != dtype) return RoundTo16(kernels::LoadAsFloat(source, view.dtype), dtype);
  uint16_t word = 0;
  std::memcpy(&word, source, sizeof word);
  return word;
}

}  // namespace rankwise::weights
