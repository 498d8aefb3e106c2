#include "worker/engine/executor.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::engine {

Executor::Executor(model::Decoder& decoder, const StepLimits& limits)
    : decoder_(decoder), limits_(limits), block_tables_(limits.slot_count) {
  for (auto& table : block_tables_) {
    table.reserve((limits.max_positions + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens);
  }
}

absl::Status Executor::ApplyTables(const StepPlan& plan) {
  for (const int32_t slot : plan.cleared_slots) block_tables_[slot].clear();
  for (const StepSegment& segment : plan.segments) {
    auto& table = block_tables_[segment.slot];
    table.insert(table.end(), segment.new_blocks.begin(), segment.new_blocks.end());
    const auto end = segment.first_position + static_cast<int64_t>(segment.tokens.size());
    const auto room = static_cast<int64_t>(table.size()) * kernels::kKvBlockTokens;
    if (end > room) {
      return absl::FailedPreconditionError(absl::StrCat("step ", plan.step, ": slot ", segment.slot, " has blocks for ",
                                                        room, " positions, its rows end at ", end));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<kernels::StepRows> Executor::Arrange(const StepPlan& plan, const TokenSink& draws) {
  RW_RETURN_IF_ERROR(ApplyTables(plan));
  tokens_.clear();
  row_begin_.assign(1, 0);
  first_position_.clear();
  logit_rows_.clear();
  logit_origin_.clear();
  segment_tables_.clear();
  rules_.clear();
  for (size_t s = 0; s < plan.segments.size(); ++s) {
    const StepSegment& segment = plan.segments[s];
    const auto count = static_cast<int32_t>(segment.tokens.size());
    for (int32_t i = FirstLogitRow(segment); i < count; ++i) {
      logit_rows_.push_back(row_begin_.back() + i);
      logit_origin_.emplace_back(static_cast<int32_t>(s), segment.first_position + i);
      if (draws.rule_of) rules_.push_back(draws.rule_of(static_cast<int32_t>(s), segment.first_position + i));
    }
    tokens_.insert(tokens_.end(), segment.tokens.begin(), segment.tokens.end());
    row_begin_.push_back(static_cast<int32_t>(tokens_.size()));
    first_position_.push_back(segment.first_position);
    segment_tables_.push_back(block_tables_[segment.slot]);
  }
  return kernels::StepRows{
      .tokens = tokens_, .row_begin = row_begin_, .first_position = first_position_, .block_table = segment_tables_};
}

absl::Status Executor::Issue(const StepPlan& plan, const TokenSink& draws) {
  const bool is_drawn = plan.kind == StepKind::kRunOn;
  for (const StepSegment& segment : plan.segments) {
    if (is_drawn && segment.tokens[0] >= drawn_count_) {
      return absl::FailedPreconditionError(absl::StrCat("step ", plan.step, ": slot ", segment.slot,
                                                        " goes on with row ", segment.tokens[0], " of the ",
                                                        drawn_count_, " drawn before"));
    }
  }
  RW_ASSIGN_OR_RETURN(const kernels::StepRows rows, Arrange(plan, draws));
  issued_rules_.clear();
  for (const auto& rule : rules_) {
    RW_CHECK(rule.has_value());
    issued_rules_.push_back(*rule);
  }
  if (draws.rule_of) uncollected_.push_back(logit_origin_);
  drawn_count_ = static_cast<int32_t>(logit_rows_.size());
  return decoder_.Issue(rows, logit_rows_, issued_rules_,
                        is_drawn ? model::Decoder::TokenSource::kDrawn : model::Decoder::TokenSource::kKnown);
}

absl::Status Executor::Collect(const TokenSink& draws) {
  RW_ASSIGN_OR_RETURN(const std::span<const int32_t> tokens, decoder_.Collect());
  const Origins origins = std::move(uncollected_.front());
  uncollected_.pop_front();
  for (size_t i = 0; i < origins.size(); ++i) {
    RW_RETURN_IF_ERROR(draws.take(origins[i].first, origins[i].second, tokens[i]));
  }
  return absl::OkStatus();
}

absl::Status Executor::Execute(const StepPlan& plan, const LogitsSink& sink, const TokenSink& draws) {
  RW_ASSIGN_OR_RETURN(const kernels::StepRows rows, Arrange(plan, draws));
  drawn_count_ = static_cast<int32_t>(logit_rows_.size());
  return decoder_.Forward(rows, logit_rows_,
                          {.take_logits =
                               [&](int32_t i, std::span<float> logits) {
                                 return sink(logit_origin_[i].first, logit_origin_[i].second, logits);
                               },
                           .rules = rules_,
                           .take_token =
                               [&](int32_t i, int32_t token) {
                                 return draws.take(logit_origin_[i].first, logit_origin_[i].second, token);
                               }});
}

}  // namespace rankwise::engine
