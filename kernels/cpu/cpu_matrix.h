#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {

// Panels [n_out / 32, n_in, 32] in the packed dtype, those of grouped weights with their parameters (MatMulTask);
// columns past n_out are zeros.
class CpuMatrix : public PackedMatrix {
 public:
  static absl::StatusOr<std::unique_ptr<CpuMatrix>> Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                           ThreadTeam& team);

  int64_t n_out() const override { return shape_.n_out; }
  int64_t n_in() const override { return shape_.n_in; }
  int64_t bytes() const override { return panel_count() * panel_bytes(); }

  DType dtype() const { return shape_.dtype; }
  const PackedShape& shape() const { return shape_; }
  int64_t panel_bytes() const;
  int64_t panel_count() const;
  const std::byte* data() const { return memory_.get(); }
  std::span<const int64_t> boundaries() const { return boundaries_; }

 private:
  CpuMatrix(const PackedShape& shape, const SumTree& tree) : shape_(shape), boundaries_(tree.boundaries) {}
  void PackPanel(std::span<const MatrixView> blocks, int64_t panel);

  const PackedShape shape_;
  const std::vector<int64_t> boundaries_;
  Memory memory_;
};

}  // namespace rankwise::kernels
