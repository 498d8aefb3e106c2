#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/step_plan.h"
#include "worker/model/decoder.h"

namespace rankwise::engine {

// Carries out step plans on one rank: keeps the block table of each slot and feeds the decoder. Every rank of a group
// executes the same plans in the same order.
class Executor {
 public:
  Executor(model::Decoder& decoder, const StepLimits& limits);

  // Logits of one row on rank 0: the segment's index in the plan and the row's position in its sequence.
  using LogitsSink = std::function<absl::Status(int32_t segment, int32_t position, std::span<float> logits)>;

  // How rank 0 draws, where it does not take logits: the rule of a row, null where its logits are wanted, and who takes
  // the token that comes after it.
  struct TokenSink {
    std::function<std::optional<kernels::DrawRule>(int32_t segment, int32_t position)> rule_of;
    std::function<absl::Status(int32_t segment, int32_t position, int32_t token)> take;
  };

  // Requires a plan of kind kRun that passed DecodeStepPlan. FailedPrecondition when a segment's rows do not follow
  // from its slot's history (a row without a block): rank 0 and this rank disagree, and the group must end.
  absl::Status Execute(const StepPlan& plan, const LogitsSink& sink, const TokenSink& draws = {});

  // Where Decoder::can_issue: issues a step of kind kRun or kRunOn and returns. Rank 0 gives a rule for every row whose
  // logits are wanted, the others none. FailedPrecondition also for a row of kRunOn whose token nobody drew.
  bool can_issue() const { return decoder_.can_issue(); }
  absl::Status Issue(const StepPlan& plan, const TokenSink& draws = {});
  // Rank 0 waits for the older step that was issued, and takes its tokens.
  absl::Status Collect(const TokenSink& draws);

  const StepLimits& limits() const { return limits_; }

 private:
  // Fills the scratch; all that Decoder::Forward asks for.
  absl::StatusOr<kernels::StepRows> Arrange(const StepPlan& plan, const TokenSink& draws);
  absl::Status ApplyTables(const StepPlan& plan);

  model::Decoder& decoder_;
  const StepLimits limits_;
  std::vector<std::vector<int32_t>> block_tables_;  // [slots], each reserved to its largest size

  // Scratch of one step.
  std::vector<int32_t> tokens_, row_begin_, first_position_, logit_rows_;
  using Origins = std::vector<std::pair<int32_t, int32_t>>;  // segment, position
  Origins logit_origin_;
  std::vector<std::span<const int32_t>> segment_tables_;
  std::vector<std::optional<kernels::DrawRule>> rules_;  // of logit_rows_; empty: none draws
  std::vector<kernels::DrawRule> issued_rules_;

  std::deque<Origins> uncollected_;  // of the steps issued, on rank 0
  int32_t drawn_count_ = 0;          // rows that the step before drew from
};

}  // namespace rankwise::engine
