#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

// What every backend asks of its arguments. Statuses name the offending value; broken invariants of the step end the
// process.
namespace rankwise::kernels {

inline constexpr int kMaxSumChunks = 64;

struct PackedShape {
  int64_t n_out = 0;
  int64_t n_in = 0;
  DType dtype = DType::kF32;
  int32_t group_size = 0;  // of a grouped dtype: input column k is in group (k + group_offset) / group_size
  int32_t group_offset = 0;
};

absl::StatusOr<PackedShape> CheckPack(std::span<const MatrixView> blocks, const SumTree& tree);
// What inputs of such a matrix are multiplied as when `wanted` is asked for. InvalidArgument where it cannot be.
absl::StatusOr<Activations> ActivationsOf(const PackedShape& shape, Activations wanted);
absl::Status CheckKvShape(const KvShape& shape, int32_t block_count);
absl::Status CheckKvScales(const KvShape& shape, std::span<const KvChannelScales> scales);
// Every token of the step must be a row of the table.
absl::Status CheckTokens(std::span<const int32_t> tokens, const EmbeddingTable& table);
void CheckAttention(const AttentionShape& shape, const KvPool& pool, int layer);
void CheckRope(const AttentionShape& shape, const RopeTable& rope, const KvObservation* observation);

// The step row by row. Grows to the largest step seen and never shrinks.
class StepIndex {
 public:
  void Build(const StepRows& rows);

  const StepRows& rows() const { return rows_; }
  int32_t row_count() const { return static_cast<int32_t>(position_.size()); }
  int32_t position(int64_t row) const { return position_[row]; }
  int32_t segment(int64_t row) const { return segment_[row]; }
  int32_t position_end() const { return position_end_; }
  // The block of the row's own position, and the slot in it.
  int32_t block(int64_t row) const { return rows_.block_table[segment_[row]][position_[row] / kKvBlockTokens]; }
  int32_t slot(int64_t row) const { return position_[row] % kKvBlockTokens; }
  void CheckFits(const KvPool& pool) const;

 private:
  StepRows rows_;
  std::vector<int32_t> position_, segment_;
  int32_t position_end_ = 0;
  int32_t block_end_ = 0;
};

}  // namespace rankwise::kernels
