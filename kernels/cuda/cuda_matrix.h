#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/kernels.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {

// Weights in the order of MatMulTask, on the device.
class CudaMatrix : public PackedMatrix {
 public:
  // Packs with the team, then copies; waits for the copy. To be multiplied with `activations`, where weights are of
  // them: f16 becomes bf16 for kBF16.
  static absl::StatusOr<std::unique_ptr<CudaMatrix>> Create(std::span<const MatrixView> blocks, const SumTree& tree,
                                                            Activations activations, ThreadTeam& team,
                                                            cudaStream_t stream);

  int64_t n_out() const override { return shape_.n_out; }
  int64_t n_in() const override { return shape_.n_in; }
  int64_t bytes() const override;
  Activations activations() const override { return activations_; }

  // What of a task depends on the weights alone.
  cuda::MatMulTask Task() const;
  cuda::WeightFormat format() const {
    return activations_ == Activations::kBF16 ? cuda::WeightFormat::kBF16OfBF16
                                              : static_cast<cuda::WeightFormat>(shape_.dtype);
  }

 private:
  CudaMatrix(const PackedShape& shape, Activations activations) : shape_(shape), activations_(activations) {}
  int64_t weight_bytes() const;
  int64_t padded_out() const { return (shape_.n_out + 15) / 16 * 16; }
  int64_t group_count() const;

  const PackedShape shape_;
  const Activations activations_;
  DeviceMemory weights_, scales_, zeros_;
};

}  // namespace rankwise::kernels
