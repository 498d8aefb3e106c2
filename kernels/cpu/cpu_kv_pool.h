#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/thread_team.h"

namespace rankwise::kernels {

// One block of one KV head: {K [head_dim, 16], V [16, padded_dim], OnlineBlock in online formats}, each tile padded to
// 64 bytes; integers lie as PairedOffset has it. A token's K is a column, so that one load holds a dim of sixteen
// tokens.
struct CpuKvBlock {
  explicit CpuKvBlock(const KvShape& shape);

  int32_t padded_dim;  // dim rounded up to whole vectors, the row length of V
  int64_t v_offset, online_offset, bytes;
};
int64_t CpuKvBlockBytes(const KvShape& shape);  // of all layers and heads

// Memory [layer][head][block]: blocks that follow each other are read as one stream.
class CpuKvPool : public KvPool {
 public:
  // Zeroes every block with the team, so that no step pays for a first touch.
  static absl::StatusOr<std::unique_ptr<CpuKvPool>> Create(const KvShape& shape, int32_t block_count, ThreadTeam& team);

  const KvShape& shape() const override { return shape_; }
  int32_t block_count() const override { return block_count_; }
  int64_t bytes() const override { return shape_.n_layers * head_bytes() * shape_.n_kv_heads_local; }
  std::vector<int64_t> SaturatedCounts() const override;
  std::vector<std::byte> BlockBytes(int layer, int32_t block) const override;

  const CpuKvBlock& block() const { return block_; }
  // Block 0 of one layer and head.
  std::byte* Head(int layer, int head) const {
    return memory_.get() + (int64_t{layer} * shape_.n_kv_heads_local + head) * head_bytes();
  }
  OnlineBlock& Online(int layer, int head, int32_t block) const {
    return *reinterpret_cast<OnlineBlock*>(Head(layer, head) + block * block_.bytes + block_.online_offset);
  }
  HeadScales scales(int layer, int head) const;
  void set_scales(std::span<const KvChannelScales> scales);  // [n_layers, n_kv_heads_local, head_dim]
  // Any thread.
  void AddSaturated(int layer, int64_t count) { saturated_[layer].fetch_add(count, std::memory_order_relaxed); }

 private:
  CpuKvPool(const KvShape& shape, int32_t block_count);
  int64_t head_bytes() const { return block_count_ * block_.bytes; }

  const KvShape shape_;
  const int32_t block_count_;
  const CpuKvBlock block_;
  std::vector<float> scales_;                          // [n_layers, n_kv_heads_local]{HeadScales, one after the other}
  std::unique_ptr<std::atomic<int64_t>[]> saturated_;  // [n_layers]
  Memory memory_;
};

}  // namespace rankwise::kernels
