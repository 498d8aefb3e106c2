#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "kernels/token_draw.h"
#include "worker/comm/communicator.h"
#include "worker/shard/shard_plan.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::model {

struct DecoderOptions {
  int32_t max_rows = 512;        // rows of one step
  int64_t max_positions = 2048;  // of one sequence
  kernels::KvFormat kv_format = kernels::KvFormat::kF16;
  int32_t block_count = 0;                          // of the paged cache
  std::vector<kernels::KvChannelScales> kv_scales;  // [n_layers, n_kv_heads_local, head_dim], int8 only
  bool observes = false;                            // keep statistics of all K and V, and of all inputs
  absl::Duration collective_timeout = absl::Seconds(60);
};

// Sums of squares, since the start, of what the linear layers of one decoder layer read on this rank, per channel:
// [hidden], [heads_local * head_dim], [hidden], [intermediate_local].
struct InputObservation {
  std::vector<double> qkv, o, gate_up, down;
};

// One rank's slice of a decoder: token rows in, logits out. One class for every family: weights::ModelConfig says what
// differs. Forward is collective over the group's ranks: all call it with the same rows. One thread calls it.
class Decoder {
 public:
  // Packs this rank's slices into the backend's layout and takes all memory a step needs. `backend` and `communicator`
  // must outlive the decoder; `checkpoint` too, because embedding rows are read from its mapping.
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const weights::Checkpoint& checkpoint,
                                                         const shard::ShardPlan& plan, kernels::Backend& backend,
                                                         comm::Communicator& communicator,
                                                         const DecoderOptions& options);

  // What rank 0 does with logit_rows[i]: either takes its logits [vocab_size] f32, which it may overwrite, or takes the
  // token drawn by rules[i], for which they need not come to the host. No rules: all logits are taken.
  struct RowSink {
    std::function<absl::Status(int32_t i, std::span<float> logits)> take_logits;
    std::span<const std::optional<kernels::DrawRule>> rules;
    std::function<absl::Status(int32_t i, int32_t token)> take_token;
  };

  // Appends the rows' K and V to the cache, then hands what `logit_rows` (row indices, rising) gave to `sink` in order.
  absl::Status Forward(const kernels::StepRows& rows, std::span<const int32_t> logit_rows, const RowSink& sink);

  // Forward in two halves, so that the host prepares a step while the device is at the one before: false where the host
  // has to look tokens up or to draw, or observes.
  bool can_issue() const { return issued_tokens_[0] != nullptr; }
  // Issues a step and returns. Rank 0 draws from each logit row by its rule; the others pass none. Of kDrawn, row r has
  // the token drawn from logit_rows[rows.tokens[r]] of the step issued before. At most two steps are not collected.
  enum class TokenSource : uint8_t { kKnown, kDrawn };
  absl::Status Issue(const kernels::StepRows& rows, std::span<const int32_t> logit_rows,
                     std::span<const kernels::DrawRule> rules, TokenSource source);
  // On rank 0, waits for the older step that was issued: its tokens, valid until the Issue after the next.
  absl::StatusOr<std::span<const int32_t>> Collect();

  const weights::ModelConfig& config() const { return config_; }
  const shard::ShardPlan& plan() const { return plan_; }
  const kernels::KvPool& kv_pool() const { return *kv_pool_; }
  // Per layer; empty unless observes.
  const std::vector<kernels::KvObservation>& observations() const { return observations_; }
  const std::vector<InputObservation>& input_observations() const { return input_observations_; }
  int64_t observed_rows() const { return observed_rows_; }
  int64_t weight_bytes() const;   // packed matrices of this rank: what a decode step reads besides KV
  int64_t multiply_adds() const;  // per row, this rank, without attention and without the output matrix
  int64_t output_multiply_adds() const;
  kernels::Activations activations() const;  // of the layers' matrices: kFloat unless others are of such weights
  kernels::Activations output_activations() const { return output_->activations(); }

 private:
  struct Layer {
    kernels::Backend::Floats attention_norm, mlp_norm, qkv_bias, q_norm, k_norm, wo_bias, gate_up_bias, w2_bias;
    std::unique_ptr<kernels::PackedMatrix> qkv, wo, gate_up, w2;
  };

  Decoder(const weights::ModelConfig& config, const shard::ShardPlan& plan, kernels::Backend& backend,
          comm::Communicator& communicator, const DecoderOptions& options);
  absl::Status Load(const weights::Checkpoint& checkpoint);
  absl::Status LoadLayer(const weights::Checkpoint& checkpoint, int index);
  absl::Status TakeBuffers();
  absl::StatusOr<kernels::Backend::Floats> Upload(const std::vector<float>& host);
  // From the step's plan to what the last layer leaves in `normed`.
  absl::Status Compute(const kernels::StepRows& rows, std::span<const int32_t> logit_rows);
  absl::Status RunLayers();  // of the step of row_count_ rows
  absl::Status RunLayer(int index, int32_t row_count);
  absl::Status ReduceDelta(int32_t row_count);
  // Adds the squares of x [row_count, sums.size()]; nothing unless observes.
  absl::Status Observe(const float* x, int32_t row_count, int layer, std::vector<double> InputObservation::*sums);
  absl::Status EmitLogits(std::span<const int32_t> logit_rows, const RowSink& sink);
  // Whether logits of the whole vocabulary meet in memory of rank 0's device, which may draw from them there.
  bool has_whole_logits() const { return plan_.world_size == 1 || stream_ != nullptr; }
  // Of `count` rows whose parts are in logits_local_; null on the other ranks.
  absl::StatusOr<const float*> WholeLogits(int32_t count);
  // logits_local_ of these rows.
  absl::Status MultiplyOutput(std::span<const int32_t> logit_rows);
  // Rows [begin, begin + count) of the sink, whose logits are whole, or lie in parts of all ranks in logits_local_.
  absl::Status EmitWholeRows(const float* logits, int32_t begin, int32_t count, const RowSink& sink);
  absl::Status EmitGatheredRows(int32_t begin, int32_t count, const RowSink& sink);

  const weights::ModelConfig config_;
  const shard::ShardPlan plan_;
  const DecoderOptions options_;
  kernels::Backend& backend_;
  comm::Communicator& communicator_;
  comm::StreamCollectives* const stream_;  // null: ranks meet on their hosts
  kernels::AttentionShape attention_;      // sliding_window is set per layer
  kernels::RopeTable rope_;

  kernels::EmbeddingTable embedding_;
  kernels::Backend::Floats final_norm_;
  std::unique_ptr<kernels::PackedMatrix> output_;
  std::vector<Layer> layers_;
  std::unique_ptr<kernels::KvPool> kv_pool_;
  std::vector<kernels::KvObservation> observations_;
  std::vector<InputObservation> input_observations_;
  int64_t observed_rows_ = 0;
  std::unique_ptr<kernels::Repeated> repeated_layers_;  // null: not repeatable
  int32_t row_count_ = 0;

  // Activations, [max_rows, …]: x the residual stream, normed the input of the next matmul, delta its contribution to
  // x.
  kernels::Backend::Floats x_, normed_, qkv_, attended_, delta_, gate_up_, activated_;
  kernels::Backend::Floats picked_, logits_local_;  // [kLogitRows, hidden], [kLogitRows, vocab_local]
  kernels::Backend::Floats logits_gathered_;        // [kLogitRows, vocab] on rank 0 of several with a stream
  std::vector<float> part_, gathered_, logits_;     // host: this rank's part, all parts, one row in vocabulary order
  std::vector<int64_t> vocab_counts_;               // per rank
  std::vector<kernels::DrawRule> rules_;            // of the step's logit rows
  std::vector<int32_t> drawn_;
  // Of the step issued last and of the one before; null where steps are not issued.
  std::array<std::unique_ptr<kernels::DrawnTokens>, 2> issued_tokens_;
  int32_t issued_count_ = 0;                // tokens of the step issued last
  int32_t uncollected_ = 0;                 // steps
  std::optional<kernels::TokenDraw> draw_;  // of gathered rows
};

}  // namespace rankwise::model
