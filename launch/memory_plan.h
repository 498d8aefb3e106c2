#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/isa_kernels.h"
#include "worker/weights/model_config.h"

// How much memory a rank takes, before it takes it. Pure arithmetic; what it adds up is what Decoder, CpuBackend and
// MpiCommunicator allocate.
namespace rankwise::launch {

// In the words of `serve`.
struct MemoryOptions {
  int tp = 1;
  kernels::KvFormat kv_format = kernels::KvFormat::kF16;
  kernels::DType weight_dtype = kernels::DType::kF16;
  int64_t batch = 8;                          // --max-running, all of them at their full length
  int64_t sequence_tokens = 2048;             // --max-tokens
  int64_t step_rows = kernels::kCpuStepRows;  // --max-step-rows; a batch above it raises it
  int threads = 1;                            // of one rank
};

// What is added to weights and KV instead of our own activations, buffers and process.
struct Overhead {
  int64_t fixed_bytes = 0;
  int64_t sequence_bytes = 0;  // for each sequence of the batch
};

// What LMDeploy's page on KV int8 shows beside weights and KV. Seven of the eight cells of its table of GPU memory are
// 14113 MiB + batch x (KV of 2056 tokens + 2 MiB) to the last digit, the eighth is 16 MiB off; LLaMA-7B's f16 weights
// are 12853 MiB of that.
inline constexpr Overhead kPageOverhead = {.fixed_bytes = int64_t{1260} << 20, .sequence_bytes = int64_t{2} << 20};

// Bytes of one rank.
struct RankMemory {
  int64_t weights = 0;        // packed matrices, norms and biases
  int64_t embedding = 0;      // read where the checkpoint is mapped; ranks of a host share its pages
  int64_t kv = 0;             // whole blocks: a sequence's last one may be part empty
  int64_t activations = 0;    // buffers of the largest step, scratch of the threads, RoPE angles
  int64_t communication = 0;  // all-reduce scratch; on rank 0 all ranks' logits
  int64_t process = 0;        // gRPC, MPI and stacks, as measured; on rank 0 the scheduler's ledger of blocks
  int64_t overhead = 0;       // instead of the three before it, when an Overhead is given

  int64_t total() const { return weights + embedding + kv + activations + communication + process + overhead; }
  bool operator==(const RankMemory&) const = default;
};

int64_t BlocksPerSequence(int64_t sequence_tokens);
// What rank 0's scheduler keeps of so many blocks (scheduler::BlockLedger).
int64_t LedgerBytes(int64_t blocks);

// InvalidArgument for a tp that the model cannot be cut into, and for a cache of more blocks or bytes than can be.
absl::StatusOr<RankMemory> PlanMemory(const weights::ModelConfig& config, const MemoryOptions& options, int rank,
                                      const std::optional<Overhead>& overhead = std::nullopt);

// The largest batch with which every rank stays within `memory_bytes`; 0 when not even one sequence fits.
absl::StatusOr<int64_t> LargestBatch(const weights::ModelConfig& config, MemoryOptions options, int64_t memory_bytes,
                                     const std::optional<Overhead>& overhead = std::nullopt);

}  // namespace rankwise::launch
