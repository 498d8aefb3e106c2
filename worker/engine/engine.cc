#include "worker/engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::engine {

Engine::Engine(const scheduler::SchedulerOptions& options, Executor& executor, comm::Communicator& communicator,
               std::vector<int32_t> eos_ids, absl::Duration collective_timeout)
    : scheduler_(options),
      executor_(executor),
      communicator_(communicator),
      eos_ids_(std::move(eos_ids)),
      collective_timeout_(collective_timeout),
      max_positions_(options.max_positions),
      sampler_(executor.limits().vocab_size) {
  RW_CHECK(communicator.rank() == 0);
}

absl::Status Engine::Submit(Request request) {
  const int32_t vocab_size = executor_.limits().vocab_size;
  RW_RETURN_IF_ERROR(ValidateSamplingParams(request.sampling, vocab_size));
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt has no tokens");
  for (const auto* tokens : {&request.prompt, &request.generated}) {
    for (const int32_t token : *tokens) {
      if (token < 0 || token >= vocab_size) {
        return absl::InvalidArgumentError(absl::StrCat("token id ", token, " is outside [0, ", vocab_size, ")"));
      }
    }
  }
  const int64_t room = max_positions_ - static_cast<int64_t>(request.prompt.size());
  if (room < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a prompt of ", request.prompt.size(), " tokens leaves no room in a context of ", max_positions_));
  }
  request.sampling.max_tokens = static_cast<int32_t>(std::min<int64_t>(request.sampling.max_tokens, room));
  if (static_cast<int64_t>(request.generated.size()) >= request.sampling.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("a replay with ", request.generated.size(),
                                                   " generated tokens of max_tokens=", request.sampling.max_tokens));
  }
  auto live = std::make_unique<Live>();
  live->tokens = request.prompt;
  live->tokens.insert(live->tokens.end(), request.generated.begin(), request.generated.end());
  live->arrived = absl::Now();
  const SequenceId id = request.id;
  RW_RETURN_IF_ERROR(
      scheduler_.Admit({.id = id,
                        .tokens = live->tokens,
                        .max_tokens = static_cast<int32_t>(request.prompt.size()) + request.sampling.max_tokens,
                        .priority = request.priority,
                        .max_drafts = request.max_drafts,
                        .needs_all_logits = request.sampling.prompt_logprobs >= 0 && request.generated.empty()}));
  live->request = std::move(request);
  sequences_.emplace(id, std::move(live));
  return absl::OkStatus();
}

void Engine::Cancel(SequenceId id) {
  scheduler_.Remove(id);
  sequences_.erase(id);
  for (scheduler::Planned& planned : planned_) planned.produces_token &= planned.id != id;
}

absl::Status Engine::Broadcast(StepPlan& plan) {
  plan.step = ++next_step_;
  communicator_.EnterStep(plan.step);
  if (communicator_.size() == 1) return absl::OkStatus();
  std::string bytes = EncodeStepPlan(plan);
  return communicator_.Broadcast(bytes, collective_timeout_);
}

absl::Status Engine::Heartbeat() {
  StepPlan plan;
  return Broadcast(plan);
}

absl::Status Engine::Stop() {
  StepPlan plan{.kind = StepKind::kStop};
  return Broadcast(plan);
}

absl::StatusOr<std::vector<std::string>> Engine::CollectReports(const std::string& own) {
  StepPlan plan{.kind = StepKind::kReport};
  RW_RETURN_IF_ERROR(Broadcast(plan));
  std::vector<std::string> reports;
  RW_RETURN_IF_ERROR(communicator_.GatherMessages(own, reports, collective_timeout_));
  return reports;
}

absl::StatusOr<std::vector<Output>> Engine::Step() {
  outputs_.clear();
  continued_.clear();
  const absl::Time begin = absl::Now();
  const Executor::TokenSink draws = {
      .rule_of = [&](int32_t segment, int32_t position) { return RuleOf(planned_[segment], position); },
      .take = [&](int32_t segment, int32_t position,
                  int32_t token) { return TakeToken(planned_[segment], position, token); }};
  if (!is_issued_) {
    if (!scheduler_.PlanStep(plan_, planned_)) return std::vector<Output>();
    CountIn(begin);
    RW_RETURN_IF_ERROR(Broadcast(plan_));
    is_issued_ = executor_.can_issue() && IsDrawnWhole();
    if (is_issued_) {
      RW_RETURN_IF_ERROR(executor_.Issue(plan_, draws));
    } else {
      const auto take_logits = [&](int32_t segment, int32_t position, std::span<float> logits) {
        return TakeLogits(planned_[segment], position, logits);
      };
      RW_RETURN_IF_ERROR(executor_.Execute(plan_, take_logits, draws));
    }
  }
  bool is_ahead = false;
  if (is_issued_) {
    RW_ASSIGN_OR_RETURN(is_ahead, IssueAhead());
    RW_RETURN_IF_ERROR(executor_.Collect(draws));
  }
  scheduler_.CompleteStep(continued_);
  is_issued_ = is_ahead;
  if (is_ahead) {
    std::swap(plan_, next_plan_);
    std::swap(planned_, next_planned_);
  }
  for (const Output& output : outputs_) {
    if (output.reason != FinishReason::kNone || !output.error.ok()) Cancel(output.id);
  }
  ++counters_.steps;
  counters_.latest_step_time = absl::Now() - begin;
  return std::move(outputs_);
}

void Engine::CountIn(absl::Time now) {
  for (const scheduler::Planned& planned : planned_) {
    Live& live = *sequences_.at(planned.id);
    if (live.started == absl::Time()) {
      live.started = now;
      live.cached_prompt_tokens = planned.cached_tokens;
    }
    const StepSegment& segment = plan_.segments[planned.segment];
    const int64_t prompt_left = static_cast<int64_t>(live.request.prompt.size()) - segment.first_position;
    counters_.prompt_tokens += std::clamp<int64_t>(prompt_left, 0, static_cast<int64_t>(segment.tokens.size()));
  }
}

// Without such a row there is nothing to wait for, nor to run ahead of.
bool Engine::IsDrawnWhole() const {
  bool draws = false;
  for (const scheduler::Planned& planned : planned_) {
    const StepSegment& segment = plan_.segments[planned.segment];
    for (int32_t i = FirstLogitRow(segment); i < std::ssize(segment.tokens); ++i) {
      if (!RuleOf(planned, segment.first_position + i).has_value()) return false;
      draws = true;
    }
  }
  return draws;
}

// Whoever is drawn now is drawn in the next step, too.
absl::StatusOr<bool> Engine::IssueAhead() {
  if (!scheduler_.PlanAhead(next_plan_, next_planned_)) return false;
  RW_RETURN_IF_ERROR(Broadcast(next_plan_));
  RW_RETURN_IF_ERROR(executor_.Issue(next_plan_, {.rule_of = [&](int32_t segment, int32_t position) {
                                       return RuleOf(next_planned_[segment], position);
                                     }}));
  ++counters_.steps_ahead;
  return true;
}

bool Engine::IsKnown(const scheduler::Planned& planned, int32_t position) const {
  const std::vector<int32_t>& tokens = sequences_.at(planned.id)->tokens;
  const StepSegment& segment = plan_.segments[planned.segment];
  if (position >= std::ssize(tokens)) return false;
  return plan_.kind == StepKind::kRunOn || segment.tokens[position - segment.first_position] == tokens[position];
}

// The token after the last known one is drawn, and those after drafts in case these are what is sampled.
std::optional<kernels::DrawRule> Engine::RuleOf(const scheduler::Planned& planned, int32_t position) const {
  const Live& live = *sequences_.at(planned.id);
  if (position + 1 < std::ssize(live.tokens)) return std::nullopt;
  return RawRule(live.request.sampling, position + 1, static_cast<int32_t>(live.request.prompt.size()));
}

absl::Status Engine::TakeToken(const scheduler::Planned& planned, int32_t position, int32_t token) {
  if (!planned.produces_token || !IsKnown(planned, position)) return absl::OkStatus();
  RW_CHECK(position + 1 == std::ssize(sequences_.at(planned.id)->tokens));
  Deliver(planned, {.id = token});
  return absl::OkStatus();
}

absl::Status Engine::TakeLogits(const scheduler::Planned& planned, int32_t position, std::span<float> logits) {
  Live& live = *sequences_.at(planned.id);
  const SamplingParams& sampling = live.request.sampling;
  const auto known = static_cast<int32_t>(live.tokens.size());
  if (!IsKnown(planned, position)) return absl::OkStatus();
  if (position + 1 < known) {
    const auto scored = static_cast<int32_t>(live.prompt_logprobs.size());
    if (live.first_token == absl::Time() && position == scored &&
        position + 1 < static_cast<int32_t>(live.request.prompt.size())) {
      live.prompt_logprobs.push_back(sampler_.Score(logits, live.tokens[position + 1], sampling.prompt_logprobs));
    }
    return absl::OkStatus();
  }
  RW_CHECK(planned.produces_token, "logits past the last known token of a sequence that samples nothing");
  Deliver(planned,
          sampler_.Sample(logits, sampling, live.tokens, static_cast<int32_t>(live.request.prompt.size()), eos_ids_));
  return absl::OkStatus();
}

void Engine::Deliver(const scheduler::Planned& planned, SampledToken sampled) {
  Live& live = *sequences_.at(planned.id);
  const SamplingParams& sampling = live.request.sampling;
  // All tokens of a sequence in one output, but an error behind them in its own.
  if (outputs_.empty() || outputs_.back().id != planned.id || sampled.id < 0) {
    Output& added = outputs_.emplace_back();
    added.id = planned.id;
    added.token_offset = live.generated_count();
  }
  Output& output = outputs_.back();
  if (sampled.id < 0) {
    output.error = absl::InternalError("the model's logits are not numbers");
    return;
  }
  if (live.first_token == absl::Time()) {
    live.first_token = absl::Now();
    output.prompt_logprobs = std::move(live.prompt_logprobs);
    live.prompt_logprobs.clear();
  }
  const auto ends_with = [&](const std::vector<int32_t>& ids) {
    return std::ranges::find(ids, sampled.id) != ids.end();
  };
  if (ends_with(sampling.stop_token_ids) || (!sampling.ignore_eos && ends_with(eos_ids_))) {
    output.reason = FinishReason::kStop;
    output.stop_token = sampled.id;
    return Finish(live, output);
  }
  live.tokens.push_back(sampled.id);
  ++counters_.generated_tokens;
  continued_.push_back({.id = planned.id, .token = sampled.id});
  output.tokens.push_back(std::move(sampled));
  if (live.generated_count() >= sampling.max_tokens) {
    output.reason = FinishReason::kLength;
    Finish(live, output);
  }
}

void Engine::Finish(Live& live, Output& output) {
  output.cached_prompt_tokens = live.cached_prompt_tokens;
  output.queue_time = live.started - live.arrived;
  output.prefill_time = live.first_token - live.started;
  output.decode_time = absl::Now() - live.first_token;
}

absl::Status Follow(Executor& executor, comm::Communicator& communicator, absl::Duration collective_timeout,
                    const std::function<std::string()>& report) {
  uint64_t expected_step = 0;
  for (std::string bytes;;) {
    RW_RETURN_IF_ERROR(communicator.Broadcast(bytes, collective_timeout));
    RW_ASSIGN_OR_RETURN(const StepPlan plan, DecodeStepPlan(bytes, executor.limits()));
    if (plan.step != ++expected_step) {
      return absl::DataLossError(
          absl::StrCat("rank ", communicator.rank(), " got step ", plan.step, " instead of ", expected_step));
    }
    communicator.EnterStep(plan.step);
    switch (plan.kind) {
      case StepKind::kRun:
        if (!executor.can_issue()) {
          RW_RETURN_IF_ERROR(
              executor.Execute(plan, [](int32_t, int32_t, std::span<float>) { return absl::OkStatus(); }));
          break;
        }
        [[fallthrough]];
      case StepKind::kRunOn:
        RW_RETURN_IF_ERROR(executor.Issue(plan));
        break;
      case StepKind::kReport: {
        std::vector<std::string> none;
        RW_RETURN_IF_ERROR(communicator.GatherMessages(report(), none, collective_timeout));
        break;
      }
      case StepKind::kHeartbeat:
        break;
      case StepKind::kStop:
        return absl::OkStatus();
    }
  }
}

}  // namespace rankwise::engine
