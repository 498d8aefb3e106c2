#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {

// Panels [n_out / 32, n_in, 32] in the packed dtype, those of grouped weights with their parameters (MatMulTask), those
// in pairs as BFloat16Kernels has them; columns past n_out are zeros.
class CpuMatrix : public PackedMatrix {
 public:
  static absl::StatusOr<std::unique_ptr<CpuMatrix>> Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                           Activations activations, const BFloat16Kernels& bfloat16s,
                                                           ThreadTeam& team);

  int64_t n_out() const override { return shape_.n_out; }
  int64_t n_in() const override { return shape_.n_in; }
  int64_t bytes() const override { return panel_count() * panel_bytes(); }
  Activations activations() const override { return activations_; }

  DType dtype() const { return shape_.dtype; }
  const PackedShape& shape() const { return shape_; }
  int64_t panel_bytes() const;
  int64_t group_bytes() const;  // of grouped weights
  int64_t panel_count() const;
  const std::byte* data() const { return memory_.get(); }
  std::span<const int64_t> boundaries() const { return boundaries_; }
  std::span<const int64_t> steps() const { return steps_; }  // of a panel, behind each of the boundaries
  // Of a matrix for quantised activations, else empty.
  std::span<const DotGroup> dot_groups() const { return dot_groups_; }
  std::span<const int32_t> chunk_groups() const { return chunk_groups_; }
  int64_t pairs_per_row() const { return dot_groups_.back().x_pair + dot_groups_.back().pair_count; }

 private:
  CpuMatrix(const PackedShape& shape, const SumTree& tree, Activations activations, bool is_in_pairs);
  int bits() const;  // of grouped weights
  void PackPanel(std::span<const MatrixView> blocks, int64_t panel);

  const PackedShape shape_;
  const Activations activations_;
  const bool is_in_pairs_;
  const std::vector<int64_t> boundaries_;
  std::vector<int64_t> steps_;
  std::vector<DotGroup> dot_groups_;
  std::vector<int32_t> chunk_groups_;
  Memory memory_;
};

}  // namespace rankwise::kernels
