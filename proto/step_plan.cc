#include "proto/step_plan.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace rankwise {
namespace {

// Unsigned LEB128, at most five bytes for 32 bits and ten for 64.
void Put(std::string& bytes, uint64_t value) {
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>(value | 0x80));
  bytes.push_back(static_cast<char>(value));
}

class Reader {
 public:
  explicit Reader(absl::string_view bytes) : bytes_(bytes) {}

  // A number below `limit`; `what` names it in the error.
  absl::StatusOr<uint64_t> Take(uint64_t limit, const char* what) {
    uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      if (at_ == bytes_.size()) return absl::InvalidArgumentError(absl::StrCat("step plan ends within ", what));
      const auto byte = static_cast<uint8_t>(bytes_[at_++]);
      if (shift == 63 && byte > 1) break;
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) {
        if (value < limit) return value;
        return absl::InvalidArgumentError(absl::StrCat("step plan: ", what, " ", value, " is not below ", limit));
      }
    }
    return absl::InvalidArgumentError(absl::StrCat("step plan: ", what, " is longer than 64 bits"));
  }

  absl::StatusOr<std::vector<int32_t>> TakeList(uint64_t count_limit, uint64_t limit, const char* what) {
    RW_ASSIGN_OR_RETURN(const uint64_t count, Take(count_limit + 1, what));
    if (count > bytes_.size() - at_) return absl::InvalidArgumentError(absl::StrCat("step plan ends within ", what));
    std::vector<int32_t> values(count);
    for (int32_t& value : values) {
      RW_ASSIGN_OR_RETURN(const uint64_t taken, Take(limit, what));
      value = static_cast<int32_t>(taken);
    }
    return values;
  }

  bool is_at_end() const { return at_ == bytes_.size(); }

 private:
  const absl::string_view bytes_;
  size_t at_ = 0;
};

void PutList(std::string& bytes, const std::vector<int32_t>& values) {
  Put(bytes, values.size());
  for (const int32_t value : values) Put(bytes, static_cast<uint32_t>(value));
}

constexpr int kKinds = static_cast<int>(StepKind::kStop) + 1;
constexpr bool HasSegments(StepKind kind) { return kind == StepKind::kRun || kind == StepKind::kRunOn; }
constexpr int kNeeds = static_cast<int>(LogitsNeed::kAll) + 1;

}  // namespace

std::string EncodeStepPlan(const StepPlan& plan) {
  std::string bytes;
  Put(bytes, static_cast<uint64_t>(plan.kind));
  Put(bytes, plan.step);
  PutList(bytes, plan.cleared_slots);
  Put(bytes, plan.segments.size());
  for (const StepSegment& segment : plan.segments) {
    Put(bytes, static_cast<uint64_t>(segment.slot) * kNeeds + static_cast<uint64_t>(segment.logits));
    Put(bytes, static_cast<uint32_t>(segment.first_position));
    PutList(bytes, segment.tokens);
    PutList(bytes, segment.new_blocks);
  }
  return bytes;
}

absl::StatusOr<StepPlan> DecodeStepPlan(absl::string_view bytes, const StepLimits& limits) {
  Reader reader(bytes);
  StepPlan plan;
  RW_ASSIGN_OR_RETURN(const uint64_t kind, reader.Take(kKinds, "kind"));
  plan.kind = static_cast<StepKind>(kind);
  RW_ASSIGN_OR_RETURN(plan.step, reader.Take(UINT64_MAX, "step"));
  RW_ASSIGN_OR_RETURN(plan.cleared_slots, reader.TakeList(limits.slot_count, limits.slot_count, "cleared slot"));
  std::vector<bool> is_cleared(limits.slot_count);
  for (const int32_t slot : plan.cleared_slots) {
    if (is_cleared[slot]) return absl::InvalidArgumentError(absl::StrCat("step plan clears slot ", slot, " twice"));
    is_cleared[slot] = true;
  }
  RW_ASSIGN_OR_RETURN(const uint64_t segment_count, reader.Take(uint64_t(limits.slot_count) + 1, "segment count"));
  std::vector<bool> is_named(limits.slot_count);
  int64_t rows = 0;
  for (uint64_t s = 0; s < segment_count; ++s) {
    StepSegment& segment = plan.segments.emplace_back();
    RW_ASSIGN_OR_RETURN(const uint64_t slot_and_need, reader.Take(uint64_t(limits.slot_count) * kNeeds, "slot"));
    segment.slot = static_cast<int32_t>(slot_and_need / kNeeds);
    segment.logits = static_cast<LogitsNeed>(slot_and_need % kNeeds);
    if (is_named[segment.slot]) {
      return absl::InvalidArgumentError(absl::StrCat("step plan names slot ", segment.slot, " twice"));
    }
    is_named[segment.slot] = true;
    RW_ASSIGN_OR_RETURN(const uint64_t first, reader.Take(limits.max_positions, "position"));
    segment.first_position = static_cast<int32_t>(first);
    const bool is_drawn = plan.kind == StepKind::kRunOn;
    RW_ASSIGN_OR_RETURN(segment.tokens, reader.TakeList(is_drawn ? 1 : limits.max_rows,
                                                        is_drawn ? limits.max_rows : limits.vocab_size, "token"));
    RW_ASSIGN_OR_RETURN(segment.new_blocks, reader.TakeList(limits.block_count, limits.block_count, "block"));
    const auto count = static_cast<int64_t>(segment.tokens.size());
    rows += count;
    if (count == 0 || segment.first_position + count > limits.max_positions) {
      return absl::InvalidArgumentError(absl::StrCat("step plan: slot ", segment.slot, " has ", count,
                                                     " rows from position ", segment.first_position, " of ",
                                                     limits.max_positions));
    }
  }
  if (rows > limits.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat("step plan has ", rows, " rows of at most ", limits.max_rows));
  }
  if (HasSegments(plan.kind) != (segment_count > 0)) {
    return absl::InvalidArgumentError(absl::StrCat("step plan of kind ", kind, " has ", segment_count, " segments"));
  }
  if (!reader.is_at_end()) return absl::InvalidArgumentError("step plan has bytes behind its end");
  return plan;
}

}  // namespace rankwise
