#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/kernels.h"

namespace rankwise::kernels {

// Device memory [layer][head][block] of the tiles of kv_layout.h.
class CudaKvPool : public KvPool {
 public:
  // InvalidArgument also for a head_dim beyond kHeadDimLimit. All blocks are zero.
  static absl::StatusOr<std::unique_ptr<CudaKvPool>> Create(const KvShape& shape, int32_t block_count,
                                                            cudaStream_t stream);

  const KvShape& shape() const override { return shape_; }
  int32_t block_count() const override { return block_count_; }
  int64_t bytes() const override { return shape_.n_layers * shape_.n_kv_heads_local * head_bytes(); }
  // Both wait for the stream.
  std::vector<int64_t> SaturatedCounts() const override;
  std::vector<std::byte> BlockBytes(int layer, int32_t block) const override;

  absl::Status SetScales(std::span<const KvChannelScales> scales);
  cuda::KvElement format() const { return static_cast<cuda::KvElement>(shape_.format); }
  cuda::KvLayer Layer(int layer) const;

 private:
  CudaKvPool(const KvShape& shape, int32_t block_count, cudaStream_t stream);
  int64_t head_bytes() const { return block_count_ * block_bytes_; }
  void CopyToHost(const std::byte* device, void* host, int64_t bytes) const;

  const KvShape shape_;
  const int32_t block_count_;
  const int64_t block_bytes_;
  const cudaStream_t stream_;
  DeviceMemory memory_;
  DeviceMemory scales_;     // KvScales [n_layers, n_kv_heads_local, head_dim]
  DeviceMemory saturated_;  // unsigned long long [n_layers]
};

}  // namespace rankwise::kernels
