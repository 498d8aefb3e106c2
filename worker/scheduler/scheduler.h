#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "proto/step_plan.h"

// Decides what runs next, and nothing else: no thread, clock, socket or log. Continuous batching over paged KV blocks,
// chunked prefill under a row budget, prefix cache, priorities, preemption by recomputation, speculation by prompt
// lookup.
namespace rankwise::scheduler {

enum class SequenceId : uint64_t {};

struct SchedulerOptions {
  int32_t block_count = 0;
  int32_t block_tokens = 16;
  int32_t slot_count = 64;       // sequences that can hold blocks at once; less than max_step_rows of them are used
  int32_t max_step_rows = 512;   // rows of one step
  int32_t max_chunk_rows = 512;  // prompt rows of one sequence in one step
  int32_t max_positions = 2048;  // prompt + generated of one sequence
  int32_t max_waiting = 1024;
  bool has_prefix_cache = true;
  int32_t max_drafts = 0;        // tokens guessed for one sequence in one step; 0: none
  int32_t draft_step_rows = 16;  // a step of more rows has no drafts: there another row costs what it computes
};

struct Sequence {
  SequenceId id{};
  std::vector<int32_t> tokens;     // prompt, then tokens generated before a replay; at least one
  int32_t max_tokens = 0;          // what `tokens` may grow to; 0: max_positions
  int32_t priority = 0;            // higher first, then by arrival
  int32_t max_drafts = INT32_MAX;  // of this sequence in one step; SchedulerOptions::max_drafts holds too
  bool needs_all_logits = false;   // of `tokens`, for prompt logprobs; such a sequence reads no cached prefix
};

// Whose rows a segment of the plan holds: one of these for each, in the same order.
struct Planned {
  SequenceId id{};
  int32_t segment = 0;          // index in plan.segments
  int32_t cached_tokens = 0;    // prefix rows found in the cache when the sequence last entered
  bool is_first = false;        // first segment since admission or preemption
  bool produces_token = false;  // its last position is the sequence's last known token: sample after the step
  // Rows behind that position: guesses of the tokens to be sampled, whose logits are wanted too. Row i counts only if
  // the tokens sampled before it are those guessed.
  int32_t drafts = 0;
};

struct SchedulerLoad {
  int32_t running = 0;
  int32_t waiting = 0;
  int32_t blocks_free = 0;    // unused or only cached
  int32_t blocks_cached = 0;  // reusable prefixes no live sequence holds
  int32_t blocks_total = 0;
  int64_t cached_tokens = 0;  // since the start
  int64_t preemptions = 0;
  int64_t drafted_tokens = 0;
  int64_t accepted_tokens = 0;  // of those, the ones that were sampled
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();

  // InvalidArgument when it can never run (max_tokens beyond max_positions or the whole pool), ResourceExhausted when
  // max_waiting others wait, AlreadyExists.
  absl::Status Admit(Sequence sequence);

  // Gives back all it holds. Idempotent, and right at any time: also between PlanStep and CompleteStep, whose result
  // for it is then ignored. Used for finished, cancelled and expired sequences alike.
  void Remove(SequenceId id);

  // The next step, or nothing when no sequence is live. `plan.step` is left to the caller. plan.cleared_slots are those
  // whose sequence left, or whose table follows anew in this plan or a later one. Between PlanStep and CompleteStep the
  // only calls allowed are Admit, Remove, Preempt and PlanAhead.
  bool PlanStep(StepPlan& plan, std::vector<Planned>& planned);

  // While a step is open: the one behind it, as a plan of kind kRunOn, where it can be made without the tokens of the
  // open one. So every sequence must produce one there and leave it at that (no prompt, no drafts before or after, no
  // logits of all rows), have its next block, and nobody enter or yield; else false, and nothing is changed. Sequences
  // that will have their last token are not in it; who ends by the token itself is removed, and its row with it. The
  // next CompleteStep is the open step's, and this one is open then.
  bool PlanAhead(StepPlan& plan, std::vector<Planned>& planned);

  struct Token {
    SequenceId id{};
    int32_t token = 0;
  };
  // The step ran: its rows are in the cache. `tokens`: those sampled, at least one for every planned sequence that
  // produces one and is to go on; the others that produce one are removed before the next PlanStep. Behind a token that
  // was drafted there may be another one of the same sequence. Rows of drafts that were not sampled count for nothing:
  // their places in the cache are written again.
  void CompleteStep(std::span<const Token> tokens);

  // Asks the next PlanStep to preempt this sequence, as if memory had run out; PlanAhead is off until then. For tests.
  void Preempt(SequenceId id);

  SchedulerLoad load() const;
  // Aborts the process on a broken invariant: free + held + cached blocks = total; a block's reference count is the
  // number of its holders; no slot has two owners; a waiting sequence owns nothing.
  void CheckInvariants() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rankwise::scheduler
