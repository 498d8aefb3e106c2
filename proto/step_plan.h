#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// What rank 0 tells all ranks to do in one step, and its compact wire form. Both ends are ours, yet the bytes cross a
// network: decoding validates everything that later indexes memory.
namespace rankwise {

enum class LogitsNeed : uint8_t { kNone, kLast, kAll };

// Consecutive positions of one sequence.
struct StepSegment {
  int32_t slot = 0;  // where the ranks keep the sequence's block table
  int32_t first_position = 0;
  LogitsNeed logits = LogitsNeed::kNone;
  std::vector<int32_t> tokens;      // [rows], at least one; in a kRunOn plan where they will be: StepKind
  std::vector<int32_t> new_blocks;  // appended to the slot's block table before the step
  bool operator==(const StepSegment&) const = default;
};

// Of the segment's rows, the first whose logits are wanted: so are those behind it.
inline int32_t FirstLogitRow(const StepSegment& segment) {
  const auto count = static_cast<int32_t>(segment.tokens.size());
  return segment.logits == LogitsNeed::kAll ? 0 : count - (segment.logits == LogitsNeed::kLast);
}

enum class StepKind : uint8_t {
  kRun,
  // Comes while the step before it still runs: each segment is one row, whose token is the one drawn in that step, and
  // `tokens` names the row: its place among those whose logits are wanted there.
  kRunOn,
  kHeartbeat,  // nothing to do; rank 0 is alive
  kReport,     // every rank answers with its load (GatherMessages)
  kStop,       // leave the loop
};

struct StepPlan {
  StepKind kind = StepKind::kHeartbeat;
  uint64_t step = 0;                   // counts up by one per plan
  std::vector<int32_t> cleared_slots;  // block tables emptied before anything else
  std::vector<StepSegment> segments;   // at most one per slot
  bool operator==(const StepPlan&) const = default;
};

// What a plan may name; the ranks of a group share these.
struct StepLimits {
  int32_t slot_count = 0;
  int32_t block_count = 0;
  int32_t max_rows = 0;       // Σ tokens
  int32_t max_positions = 0;  // of one sequence
  int32_t vocab_size = 0;
};

std::string EncodeStepPlan(const StepPlan& plan);
// InvalidArgument names the first field outside `limits`, a short or long buffer, or a slot named twice.
absl::StatusOr<StepPlan> DecodeStepPlan(absl::string_view bytes, const StepLimits& limits);

}  // namespace rankwise
