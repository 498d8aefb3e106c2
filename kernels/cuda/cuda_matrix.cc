#include "kernels/cuda/cuda_matrix.h"

#include <bit>
#include <cstring>
#include <vector>

#include "base/status_macros.h"
#include "kernels/number_formats.h"

namespace rankwise::kernels {
namespace {

constexpr int kTileOutputs = 16, kSlab = 64, kLanes = 32, kLaneValues = 32;

int BitsOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 32;
    case DType::kF16:
    case DType::kBF16:
      return 16;
    case DType::kInt8:
      return 8;
    case DType::kInt4:
      return 4;
  }
  return 0;
}

// One row of the stacked blocks; `block` is null past the last.
struct SourceRow {
  const MatrixView* block = nullptr;
  int64_t row = 0;
};

SourceRow FindRow(std::span<const MatrixView> blocks, int64_t row) {
  for (const MatrixView& block : blocks) {
    if (row < block.rows) return {&block, row};
    row -= block.rows;
  }
  return {};
}

// The bits of a weight as they are packed: of `dtype`, but for f16 that is to be multiplied as bf16.
uint32_t PackedBits(const SourceRow& from, int64_t column, DType dtype, Activations activations) {
  const MatrixView& block = *from.block;
  if (IsGrouped(dtype)) {
    return GroupedValue(*block.grouped, block.grouped->qweight, block.col_begin + column, block.row_begin + from.row);
  }
  if (dtype == DType::kF32) return std::bit_cast<uint32_t>(ElementAt(block, from.row, column));
  uint16_t bits;
  std::memcpy(&bits, block.data + (from.row * block.row_stride + column) * 2, sizeof(bits));
  return dtype == DType::kF16 && activations == Activations::kBF16 ? HalfToBFloat16(bits) : bits;
}

// Sixteen outputs: [slabs][loads][lanes][16 bytes], as matmul.cu's Stored says.
void PackTile(std::span<const SourceRow> rows, const PackedShape& shape, Activations activations, std::byte* tile) {
  const int bits = BitsOf(shape.dtype), per_word = 128 / bits;
  for (int64_t slab = 0; slab * kSlab < shape.n_in; ++slab) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < kLaneValues; ++i) {
        const int step = i / 8, e = i % 8;
        const SourceRow& from = rows[lane / 4 + e / 2 % 2 * 8];
        const int64_t column = slab * kSlab + lane % 4 * 16 + step * 4 + e / 4 * 2 + e % 2;
        if (from.block == nullptr || column >= shape.n_in) continue;
        const uint32_t value = PackedBits(from, column, shape.dtype, activations);
        const int64_t bit =
            (((slab * (kLaneValues / per_word) + i / per_word) * kLanes + lane) * 128) + int64_t{i % per_word} * bits;
        std::byte* to = tile + bit / 8;
        if (bits == 32) {
          std::memcpy(to, &value, 4);
        } else if (bits == 16) {
          std::memcpy(to, &value, 2);
        } else {
          *to |= static_cast<std::byte>(value << bit % 8);
        }
      }
    }
  }
}

}  // namespace

int64_t CudaMatrix::weight_bytes() const {
  return padded_out() * ((shape_.n_in + kSlab - 1) / kSlab * kSlab) * BitsOf(shape_.dtype) / 8;
}

int64_t CudaMatrix::group_count() const {
  return IsGrouped(shape_.dtype) ? (shape_.n_in + shape_.group_offset - 1) / shape_.group_size + 1 : 0;
}

int64_t CudaMatrix::bytes() const { return weight_bytes() + group_count() * padded_out() * 3; }

absl::StatusOr<std::unique_ptr<CudaMatrix>> CudaMatrix::Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                               Activations activations, ThreadTeam& team,
                                                               cudaStream_t stream) {
  RW_ASSIGN_OR_RETURN(const PackedShape shape, CheckPack(blocks, tree));
  RW_ASSIGN_OR_RETURN(const Activations own, ActivationsOf(shape, activations));
  std::unique_ptr<CudaMatrix> matrix(new CudaMatrix(shape, own));
  const int64_t tiles = matrix->padded_out() / kTileOutputs, tile_bytes = matrix->weight_bytes() / tiles;
  const int64_t groups = matrix->group_count(), padded_out = matrix->padded_out();
  std::vector<std::byte> weights(matrix->weight_bytes());
  std::vector<uint16_t> scales(groups * padded_out);
  std::vector<uint8_t> zeros(groups * padded_out);
  team.For(tiles, [&](int64_t tile, int) {
    SourceRow rows[kTileOutputs];
    for (int i = 0; i < kTileOutputs; ++i) rows[i] = FindRow(blocks, tile * kTileOutputs + i);
    PackTile(rows, shape, own, weights.data() + tile * tile_bytes);
    for (int64_t group = 0; group < groups; ++group) {
      for (int i = 0; i < kTileOutputs; ++i) {
        if (rows[i].block == nullptr) continue;
        const MatrixView& block = *rows[i].block;
        const int64_t source = block.col_begin / shape.group_size + group, out = block.row_begin + rows[i].row;
        const int64_t at = group * padded_out + tile * kTileOutputs + i;
        scales[at] = GroupedScale(*block.grouped, source, out);
        zeros[at] = static_cast<uint8_t>(GroupedValue(*block.grouped, block.grouped->qzeros, source, out));
      }
    }
  });
  RW_ASSIGN_OR_RETURN(matrix->weights_, UploadToDevice(weights.data(), static_cast<int64_t>(weights.size()), stream));
  RW_ASSIGN_OR_RETURN(matrix->scales_, UploadToDevice(scales.data(), groups * padded_out * 2, stream));
  RW_ASSIGN_OR_RETURN(matrix->zeros_, UploadToDevice(zeros.data(), groups * padded_out, stream));
  return matrix;
}

cuda::MatMulTask CudaMatrix::Task() const {
  return {.weights = reinterpret_cast<const unsigned char*>(weights_.get()),
          .scales = reinterpret_cast<const uint16_t*>(scales_.get()),
          .zeros = reinterpret_cast<const uint8_t*>(zeros_.get()),
          .n_out = shape_.n_out,
          .n_in = shape_.n_in,
          .padded_out = padded_out(),
          .group_size = shape_.group_size,
          .group_offset = shape_.group_offset,
          .has_group_per_slab =
              IsGrouped(shape_.dtype) && shape_.group_size % kSlab == 0 && shape_.group_offset % kSlab == 0};
}

}  // namespace rankwise::kernels
