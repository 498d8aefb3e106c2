#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_kv_pool.h"
#include "kernels/cpu/cpu_matrix.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/preconditions.h"
#include "kernels/token_draw.h"

namespace rankwise::kernels {

struct CpuKernels {
  const IsaKernels& floats;
  const IntegerKernels& integers;
  const IntegerAttention& integer_attention;
  const BFloat16Kernels& bfloat16s;
};
// Those of `instruction_set` ("" the best) and what this CPU has beyond it. InvalidArgument for an unknown name,
// FailedPrecondition when this CPU lacks it.
absl::StatusOr<CpuKernels> FindCpuKernels(const std::string& instruction_set);

// Scratch grows to the largest step seen and is kept; after that no op allocates.
class CpuBackend : public Backend {
 public:
  CpuBackend(const CpuKernels& kernels, const CpuOptions& options, int threads);

  std::string Description() const override;
  int32_t step_rows() const override { return kCpuStepRows; }
  absl::StatusOr<Floats> Allocate(int64_t count) override;
  absl::Status CopyToHost(const float* device, std::span<float> host) override;
  absl::Status CopyToDevice(std::span<const float> host, float* device) override;
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> blocks, const SumTree& tree) override;
  int64_t KvBlockBytes(const KvShape& shape) const override { return CpuKvBlockBytes(shape); }
  absl::StatusOr<std::unique_ptr<KvPool>> CreateKvPool(const KvShape& shape, int32_t block_count) override;
  absl::Status SetKvScales(KvPool& pool, std::span<const KvChannelScales> scales) override;

  absl::Status BeginStep(const StepRows& rows) override;
  absl::Status Embed(const EmbeddingTable& table, float* x) override;
  absl::Status RmsNorm(float* out, const float* x, const float* weight, int64_t width, float eps) override;
  absl::Status AddRmsNorm(float* out, float* x, const float* delta, const float* bias, const float* weight,
                          int64_t width, float eps) override;
  absl::Status Add(float* x, const float* delta, const float* bias, int64_t width) override;
  absl::Status MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                      const float* bias) override;
  absl::Status RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope, const float* q_norm,
                          const float* k_norm, float norm_eps, KvPool& pool, int layer,
                          KvObservation* observation) override;
  absl::Status Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                         int layer) override;
  absl::Status SiluMul(float* out, const float* gate_up, int64_t width) override;
  absl::Status PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) override;
  absl::Status Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                    int32_t vocab_size) override;

 private:
  // Some rows of one segment, and the splits of the context that any of them attends.
  struct RowTile {
    int64_t row_begin;
    int32_t row_count;
    int32_t segment;
    int32_t split_begin, split_end;
    int64_t partial_begin;  // of the states of its first split, in partials_, in floats
  };
  // One (tile, split) of a step too small to keep the team busy by tiles.
  struct TileSplit {
    int32_t tile, split;
  };

  void MultiplyPanels(const MatMulTask& task, const CpuMatrix& w, bool is_small);
  void TileColumns(MatMulTask& task, const CpuMatrix& w, bool is_small);
  void TileIntegers(MatMulTask& task, const CpuMatrix& w, bool is_small);

  template <typename Body>
  void ForRows(int64_t width, Body&& body);
  void BuildTiles(const AttentionTask& task, int32_t n_kv_heads);
  AttentionTile TileOf(const RowTile& rows, const CpuKvPool& pool, int layer, int head) const;
  AttendSplitFunction* AttendSplitOf(KvFormat format) const;
  void AttendByTile(const AttentionTask& task, const CpuKvPool& pool, int layer);
  void AttendBySplit(const AttentionTask& task, const CpuKvPool& pool, int layer);

  const IsaKernels& isa_;
  const IntegerKernels& integers_;
  const IntegerAttention& integer_attention_;
  const BFloat16Kernels& bfloat16s_;
  const Activations activations_;
  bool has_own_activations_ = false;  // a matrix that was packed is not multiplied with floats
  ThreadTeam team_;
  StepIndex step_;
  std::vector<RowTile> tiles_;
  std::vector<TileSplit> tile_splits_;
  Scratch matmul_scratch_;        // [threads, kMatMulScratch]
  Scratch tiled_rows_;            // rows of one block of a matmul, by tiles: floats, words or QuantizedRows
  Scratch attention_scratch_;     // [threads]: two states, then AttentionScratchFloats
  Scratch partials_;              // states [tile splits, KV heads]
  std::vector<TokenDraw> draws_;  // [threads], of the latest vocabulary
};

}  // namespace rankwise::kernels
