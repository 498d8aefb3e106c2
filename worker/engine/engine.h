#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"
#include "worker/engine/executor.h"
#include "worker/engine/sampler.h"
#include "worker/scheduler/scheduler.h"

namespace rankwise::engine {

using scheduler::SequenceId;

enum class FinishReason : uint8_t { kNone, kStop, kLength };

struct Request {
  SequenceId id{};
  std::vector<int32_t> prompt;
  std::vector<int32_t> generated;  // before a replay; the run goes on after it with the bits of an undisturbed one
  SamplingParams sampling;
  int32_t priority = 0;
  int32_t max_drafts = INT32_MAX;  // the scheduler's own limit holds too
};

// What one step gave one sequence.
struct Output {
  SequenceId id{};
  int32_t token_offset = 0;  // generated tokens before `tokens`, replayed ones included
  std::vector<SampledToken> tokens;
  std::vector<SampledToken> prompt_logprobs;  // of prompt tokens 1, 2, …, with the first token
  FinishReason reason = FinishReason::kNone;
  std::optional<int32_t> stop_token;  // ended the sequence; not among `tokens`
  absl::Status error;                 // refused or failed; then nothing else is set
  int32_t cached_prompt_tokens = 0;
  absl::Duration queue_time, prefill_time, decode_time;  // once finished
};

struct EngineCounters {
  uint64_t steps = 0;
  uint64_t steps_ahead = 0;  // of those, issued while the one before ran
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  absl::Duration latest_step_time;
};

// Rank 0's loop body: takes requests, plans a step, tells the other ranks, executes, samples. One thread calls it; the
// other ranks run Follow(). Where a device draws, and looks up what it drew, a step that decodes is planned, told and
// issued while the one before it runs; a row of it whose sequence ends there is thrown away.
class Engine {
 public:
  // `eos_ids` end a sequence unless it ignores them. Borrows executor and communicator.
  Engine(const scheduler::SchedulerOptions& options, Executor& executor, comm::Communicator& communicator,
         std::vector<int32_t> eos_ids, absl::Duration collective_timeout);

  // InvalidArgument (values out of range, never fits), ResourceExhausted (queue full), AlreadyExists.
  absl::Status Submit(Request request);
  // Frees what the sequence holds before the next step is planned. Idempotent; no output follows.
  void Cancel(SequenceId id);
  bool has_work() const { return !sequences_.empty() || is_issued_; }

  // Runs one step if there is work and returns its outputs, one for each sequence but before an error. An error is the
  // end of the group.
  absl::StatusOr<std::vector<Output>> Step();
  // Tells the other ranks that rank 0 lives; call at least every few seconds while there is no work.
  absl::Status Heartbeat();
  // Collects one message of every rank; `own` is rank 0's. Followers answer with what their `report` returns.
  absl::StatusOr<std::vector<std::string>> CollectReports(const std::string& own);
  // Ends the followers' loops.
  absl::Status Stop();

  // For tests: the next step to be planned recomputes this sequence as if memory had run out.
  void Preempt(SequenceId id) { scheduler_.Preempt(id); }
  const scheduler::Scheduler& scheduler() const { return scheduler_; }
  const EngineCounters& counters() const { return counters_; }

 private:
  struct Live {
    Request request;
    std::vector<int32_t> tokens;  // prompt, then generated
    std::vector<SampledToken> prompt_logprobs;
    int32_t cached_prompt_tokens = 0;
    absl::Time arrived, started, first_token;
    int32_t generated_count() const { return static_cast<int32_t>(tokens.size() - request.prompt.size()); }
  };

  absl::Status Broadcast(StepPlan& plan);
  // What plan_ begins and computes of prompts.
  void CountIn(absl::Time now);
  // Whether there are rows of plan_ whose logits are wanted, and all have a rule.
  bool IsDrawnWhole() const;
  // Plans, tells and issues the step behind plan_, if it needs nothing of it but the tokens. Whether it did.
  absl::StatusOr<bool> IssueAhead();
  // Whether all that the row at `position` attends is known to be of its sequence: false of a row behind a draft that
  // was not sampled, or behind the end.
  bool IsKnown(const scheduler::Planned& planned, int32_t position) const;
  std::optional<kernels::DrawRule> RuleOf(const scheduler::Planned& planned, int32_t position) const;
  absl::Status TakeLogits(const scheduler::Planned& planned, int32_t position, std::span<float> logits);
  absl::Status TakeToken(const scheduler::Planned& planned, int32_t position, int32_t token);
  void Deliver(const scheduler::Planned& planned, SampledToken sampled);
  void Finish(Live& live, Output& output);

  scheduler::Scheduler scheduler_;
  Executor& executor_;
  comm::Communicator& communicator_;
  const std::vector<int32_t> eos_ids_;
  const absl::Duration collective_timeout_;
  const int32_t max_positions_;
  Sampler sampler_;
  absl::flat_hash_map<SequenceId, std::unique_ptr<Live>> sequences_;
  EngineCounters counters_;
  uint64_t next_step_ = 0;

  // The step whose tokens come next, and whether it was issued. A row that is nobody's any more produces no token.
  StepPlan plan_;
  std::vector<scheduler::Planned> planned_;
  bool is_issued_ = false;
  // The one behind it.
  StepPlan next_plan_;
  std::vector<scheduler::Planned> next_planned_;

  // Scratch of one step.
  std::vector<Output> outputs_;
  std::vector<scheduler::Scheduler::Token> continued_;
};

// The loop of every other rank: executes plans until a kStop plan, answers kReport plans with `report`. An error (a
// lost or silent rank 0, a plan outside its limits) is the end of the group.
absl::Status Follow(Executor& executor, comm::Communicator& communicator, absl::Duration collective_timeout,
                    const std::function<std::string()>& report);

}  // namespace rankwise::engine
