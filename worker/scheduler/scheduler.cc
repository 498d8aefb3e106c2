#include "worker/scheduler/scheduler.h"

#include <algorithm>
#include <compare>
#include <limits>
#include <map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/scheduler/block_ledger.h"
#include "worker/scheduler/prompt_lookup.h"

namespace rankwise::scheduler {
namespace {

// Who goes first: higher priority, then earlier arrival. A preempted sequence keeps its place.
struct Order {
  int64_t negated_priority;
  int64_t arrival;
  auto operator<=>(const Order&) const = default;
};

constexpr Order kBeforeAll{std::numeric_limits<int64_t>::min(), 0};
constexpr int32_t kNoSlot = -1;

// What a sequence may guess is bounded by what it has guessed right: a row of a draft costs kDraftRow of its credit
// when it is rejected, one that is accepted earns kAccepted, and each token a little, to try again. So of T tokens'
// rows at most kFirstDrafts + T / kDraftRow are in vain beside those that accepted ones pay for, two each, and whoever
// guesses one in three right goes on. A row in vain costs a fifth to a half of a decode step.
constexpr int32_t kDraftRow = 128, kAccepted = 256, kFirstDrafts = 2;

struct Entry {
  Sequence sequence;
  Order order;
  int32_t all_logits_end = 0;  // of the positions whose logits are all wanted
  int32_t slot = kNoSlot;
  std::vector<int32_t> blocks;
  int32_t announced_blocks = 0;  // of `blocks`, those in the ranks' table
  int32_t published_blocks = 0;  // of `blocks`, the full ones: their ledger records form a chain
  int32_t computed = 0;          // positions in the cache
  int32_t cached = 0;            // of those, found in the prefix cache
  int32_t planned_rows = 0;      // in the step under way, without drafts
  std::vector<int32_t> drafts;   // of the step under way: rows behind those
  int32_t logit_row = 0;         // of the step under way, the place of its last row among those with logits
  bool is_ahead = false;         // has a row in the step behind that
  int32_t credit = kFirstDrafts * kDraftRow;
  PromptLookup lookup;
  bool is_first = true;  // no segment since it got its slot
  bool must_yield = false;

  int32_t known() const { return static_cast<int32_t>(sequence.tokens.size()); }
  int32_t missing() const { return known() - computed; }
  bool ends_next() const { return known() + 1 >= sequence.max_tokens; }
};

}  // namespace

struct Scheduler::State {
  explicit State(const SchedulerOptions& given);

  int32_t BlocksFor(int32_t tokens) const { return (tokens + options.block_tokens - 1) / options.block_tokens; }
  std::span<const int32_t> TokensOfBlock(const Entry& entry, int32_t index) const;
  int32_t FindNext(const Entry& entry, int32_t parent, int32_t index) const;

  void GiveBack(Entry& entry);
  void Preempt(Entry& entry);
  bool HasRoomFor(const Entry& entry) const;
  bool Enter(Entry& entry);
  void AssignRows();
  void TakeBlocks();
  int32_t DraftLimit(const Entry& entry) const;
  void AssignDrafts();
  void Emit(Entry& entry, StepPlan& plan, std::vector<Planned>& planned);
  StepSegment& AddSegment(Entry& entry, StepPlan& plan);
  void ClearSlots(StepPlan& plan);
  bool CanPlanAhead() const;
  bool MayGuess(const Entry& entry) const;
  void EmitAhead(Entry& entry, StepPlan& plan, std::vector<Planned>& planned);
  void Append(Entry& entry, int32_t token);
  void Settle(Entry& entry);
  void Publish(Entry& entry);

  const SchedulerOptions options;
  BlockLedger ledger;
  absl::flat_hash_map<SequenceId, std::unique_ptr<Entry>> entries;  // never iterated but to check
  std::map<Order, Entry*> running, waiting;
  std::vector<int32_t> free_slots;
  std::vector<bool> must_clear;  // by slot: the ranks' table is stale
  int64_t next_arrival = 0;
  int64_t cached_tokens = 0, preemptions = 0, drafted_tokens = 0, accepted_tokens = 0;

  // The step under way.
  bool is_open = false;
  int32_t rows_left = 0;
  int32_t logit_rows = 0;
  std::vector<SequenceId> planned_ids;
  std::vector<SequenceId> ahead_ids;  // of the step behind it; empty: there is none
};

Scheduler::State::State(const SchedulerOptions& given)
    : options(given), ledger(given.block_count, given.block_tokens), must_clear(given.slot_count) {
  RW_CHECK(options.slot_count > 0 && options.max_step_rows > 0 && options.max_chunk_rows > 0 &&
           options.max_drafts >= 0);
  // One row stays for prompts, so that a sequence that waits longest or matters most is never kept out by decoding
  // ones.
  const int32_t usable = std::min(options.slot_count, std::max(1, options.max_step_rows - 1));
  for (int32_t slot = usable - 1; slot >= 0; --slot) free_slots.push_back(slot);
}

std::span<const int32_t> Scheduler::State::TokensOfBlock(const Entry& entry, int32_t index) const {
  return std::span(entry.sequence.tokens)
      .subspan(static_cast<size_t>(index) * options.block_tokens, options.block_tokens);
}

// The published block that `entry` can share as its block `index`. Its last token is always computed, for its logits.
int32_t Scheduler::State::FindNext(const Entry& entry, int32_t parent, int32_t index) const {
  if (!options.has_prefix_cache || entry.sequence.needs_all_logits) return kNoBlock;
  if ((index + 1) * options.block_tokens >= entry.known()) return kNoBlock;
  return ledger.Find(parent, TokensOfBlock(entry, index));
}

void Scheduler::State::GiveBack(Entry& entry) {
  for (auto block = entry.blocks.rbegin(); block != entry.blocks.rend(); ++block) ledger.Release(*block);
  entry.blocks.clear();
  must_clear[entry.slot] = true;
  free_slots.push_back(std::exchange(entry.slot, kNoSlot));
}

// Back to waiting in its place. What it knows stays; its K and V are computed again, or found again in the cache.
void Scheduler::State::Preempt(Entry& entry) {
  GiveBack(entry);
  running.erase(entry.order);
  waiting.emplace(entry.order, &entry);
  rows_left += entry.planned_rows;
  entry.announced_blocks = entry.published_blocks = entry.computed = entry.cached = entry.planned_rows = 0;
  entry.is_first = true;
  entry.must_yield = false;
  ++preemptions;
}

// A slot, and blocks for all it knows beside what the running ones still need for theirs, plus one each: without that
// the newcomer would soon be preempted again, its work lost.
bool Scheduler::State::HasRoomFor(const Entry& entry) const {
  if (free_slots.empty()) return false;
  int32_t short_of = BlocksFor(entry.known()) - ledger.available();
  for (const auto& [order, other] : running) {
    short_of += std::max(0, BlocksFor(other->known()) - static_cast<int32_t>(other->blocks.size()) + 1);
  }
  // Sharing saves a block only where another sequence holds it; cached ones count as available already.
  for (int32_t index = 0, parent = kNoBlock; short_of > 0; ++index, --short_of) {
    parent = FindNext(entry, parent, index);
    if (parent == kNoBlock || !ledger.is_held(parent)) return false;
  }
  return true;
}

// From waiting to running, if there is room or lower priorities can make it.
bool Scheduler::State::Enter(Entry& entry) {
  while (!HasRoomFor(entry)) {
    RW_CHECK(!running.empty(), "a sequence does not fit the empty pool");
    Entry& last = *running.rbegin()->second;
    if (last.order.negated_priority <= entry.order.negated_priority) return false;
    Preempt(last);
  }
  entry.slot = free_slots.back();
  free_slots.pop_back();
  for (int32_t parent = kNoBlock;; ++entry.published_blocks) {
    parent = FindNext(entry, parent, entry.published_blocks);
    if (parent == kNoBlock) break;
    ledger.Hold(parent);
    entry.blocks.push_back(parent);
  }
  entry.computed = entry.cached = entry.published_blocks * options.block_tokens;
  cached_tokens += entry.cached;
  waiting.erase(entry.order);
  running.emplace(entry.order, &entry);
  return true;
}

// Whoever decodes has its row. Prompts share the rows that are left in order, and whoever waits enters in its turn.
void Scheduler::State::AssignRows() {
  rows_left = options.max_step_rows;
  for (const auto& [order, entry] : running) {
    RW_CHECK(entry->missing() > 0, absl::StrCat("sequence ", static_cast<uint64_t>(entry->sequence.id),
                                                " was neither given its token nor removed"));
    if (entry->missing() > 1) continue;
    entry->planned_rows = 1;
    --rows_left;
  }
  bool can_enter = true;
  for (Order turn = kBeforeAll; rows_left > 0;) {
    const auto prompt = std::find_if(running.upper_bound(turn), running.end(),
                                     [](const auto& item) { return item.second->missing() > 1; });
    Entry* next = prompt == running.end() ? nullptr : prompt->second;
    if (can_enter && !waiting.empty() && (next == nullptr || waiting.begin()->first < next->order)) {
      next = waiting.begin()->second;
      can_enter = Enter(*next);
      if (!can_enter) continue;
    }
    if (next == nullptr) break;
    next->planned_rows = std::min({next->missing(), rows_left, options.max_chunk_rows});
    rows_left -= next->planned_rows;
    turn = next->order;
  }
}

// In order, so that memory flows to the first: it preempts from the end, and the last one makes do with what it has.
void Scheduler::State::TakeBlocks() {
  for (const auto& [order, entry] : running) {
    const int32_t needed = BlocksFor(entry->computed + entry->planned_rows);
    while (static_cast<int32_t>(entry->blocks.size()) < needed) {
      if (ledger.available() > 0) {
        entry->blocks.push_back(ledger.Take());
        continue;
      }
      Entry* last = running.rbegin()->second;
      if (last == entry) break;
      Preempt(*last);
    }
    const auto room = static_cast<int32_t>(entry->blocks.size()) * options.block_tokens - entry->computed;
    entry->planned_rows = std::min(entry->planned_rows, room);
  }
}

// What `entry` may guess in this step, whatever the others do: a draft is a row whose logits decide, so the token
// behind the last one must still be within max_tokens.
int32_t Scheduler::State::DraftLimit(const Entry& entry) const {
  if (entry.missing() != 1 || entry.planned_rows != 1 || entry.computed < entry.all_logits_end) return 0;
  return std::min({options.max_drafts, entry.sequence.max_drafts, entry.credit / kDraftRow,
                   entry.sequence.max_tokens - entry.known() - 1});
}

// Sequences that decode share the rows that a small step has left. Blocks are taken ahead only while every sequence
// could still have one, so that no draft preempts anybody; a block that waits for its first token stays where it is.
void Scheduler::State::AssignDrafts() {
  int32_t left = std::min(options.draft_step_rows - (options.max_step_rows - rows_left), rows_left);
  if (options.max_drafts == 0 || left <= 0) return;
  auto sharers = static_cast<int32_t>(running.size());
  for (const auto& [order, entry] : running) {
    const int32_t share = (left + sharers - 1) / sharers;
    --sharers;
    const int32_t limit = std::min(share, DraftLimit(*entry));
    if (limit <= 0) continue;
    entry->lookup.Draft(entry->sequence.tokens, limit, entry->drafts);
    const auto wanted = static_cast<int32_t>(entry->drafts.size());
    while (static_cast<int32_t>(entry->blocks.size()) < BlocksFor(entry->known() + wanted) &&
           ledger.available() > static_cast<int32_t>(running.size())) {
      entry->blocks.push_back(ledger.Take());
    }
    const auto room = static_cast<int32_t>(entry->blocks.size()) * options.block_tokens - entry->known();
    entry->drafts.resize(std::min(wanted, room));
    left -= static_cast<int32_t>(entry->drafts.size());
    drafted_tokens += static_cast<int64_t>(entry->drafts.size());
  }
}

void Scheduler::State::Emit(Entry& entry, StepPlan& plan, std::vector<Planned>& planned) {
  const bool produces_token = entry.planned_rows == entry.missing();
  planned.push_back({.id = entry.sequence.id,
                     .segment = static_cast<int32_t>(plan.segments.size()),
                     .cached_tokens = entry.cached,
                     .is_first = entry.is_first,
                     .produces_token = produces_token,
                     .drafts = static_cast<int32_t>(entry.drafts.size())});
  StepSegment& segment = AddSegment(entry, plan);
  segment.first_position = entry.computed;
  if (entry.computed < entry.all_logits_end || !entry.drafts.empty()) {
    segment.logits = LogitsNeed::kAll;
  } else if (produces_token) {
    segment.logits = LogitsNeed::kLast;
  }
  const auto first = entry.sequence.tokens.begin() + entry.computed;
  segment.tokens.assign(first, first + entry.planned_rows);
  segment.tokens.insert(segment.tokens.end(), entry.drafts.begin(), entry.drafts.end());
  logit_rows += static_cast<int32_t>(segment.tokens.size()) - FirstLogitRow(segment);
  entry.logit_row = logit_rows - 1;
  entry.is_first = false;
  planned_ids.push_back(entry.sequence.id);
}

StepSegment& Scheduler::State::AddSegment(Entry& entry, StepPlan& plan) {
  StepSegment& segment = plan.segments.emplace_back();
  segment.slot = entry.slot;
  segment.new_blocks.assign(entry.blocks.begin() + entry.announced_blocks, entry.blocks.end());
  entry.announced_blocks = static_cast<int32_t>(entry.blocks.size());
  return segment;
}

void Scheduler::State::ClearSlots(StepPlan& plan) {
  for (int32_t slot = 0; slot < options.slot_count; ++slot) {
    if (!must_clear[slot]) continue;
    plan.cleared_slots.push_back(slot);
    must_clear[slot] = false;
  }
}

// Whether the next step could have drafts of it.
bool Scheduler::State::MayGuess(const Entry& entry) const {
  return std::min({options.max_drafts, entry.sequence.max_drafts, (entry.credit + 1) / kDraftRow,
                   entry.sequence.max_tokens - entry.known() - 2}) > 0;
}

// Of whoever waits only the first could enter, as long as nobody leaves.
bool Scheduler::State::CanPlanAhead() const {
  int32_t going_on = 0, blocks = 0;
  for (const auto& [order, entry] : running) {
    const bool is_plain = entry->planned_rows > 0 && entry->planned_rows == entry->missing() && entry->drafts.empty() &&
                          entry->computed >= entry->all_logits_end;
    if (!is_plain || entry->must_yield) return false;
    if (entry->ends_next()) continue;
    ++going_on;
    blocks += BlocksFor(entry->known() + 1) - static_cast<int32_t>(entry->blocks.size());
  }
  if (going_on == 0 || blocks > ledger.available()) return false;
  if (!waiting.empty()) {
    const Entry& first = *waiting.begin()->second;
    const bool can_push = running.rbegin()->first.negated_priority > first.order.negated_priority;
    if (going_on < static_cast<int32_t>(running.size()) || can_push || HasRoomFor(first)) return false;
  }
  const bool has_room_to_guess = going_on < std::min(options.draft_step_rows, options.max_step_rows);
  return !has_room_to_guess ||
         std::ranges::none_of(running, [this](const auto& item) { return MayGuess(*item.second); });
}

// A row for the token that is drawn behind the row of the step under way.
void Scheduler::State::EmitAhead(Entry& entry, StepPlan& plan, std::vector<Planned>& planned) {
  planned.push_back({.id = entry.sequence.id,
                     .segment = static_cast<int32_t>(plan.segments.size()),
                     .cached_tokens = entry.cached,
                     .produces_token = true});
  while (static_cast<int32_t>(entry.blocks.size()) < BlocksFor(entry.known() + 1)) {
    entry.blocks.push_back(ledger.Take());
  }
  StepSegment& segment = AddSegment(entry, plan);
  segment.first_position = entry.known();
  segment.logits = LogitsNeed::kLast;
  segment.tokens = {std::exchange(entry.logit_row, logit_rows++)};
  entry.is_ahead = true;
  ahead_ids.push_back(entry.sequence.id);
}

// The token sampled behind the last one known, which is the sequence's own or a draft that was sampled before.
void Scheduler::State::Append(Entry& entry, int32_t token) {
  std::vector<int32_t>& tokens = entry.sequence.tokens;
  RW_CHECK(entry.known() < entry.sequence.max_tokens, "a sequence grows beyond its max_tokens");
  const int32_t before = entry.missing() - entry.planned_rows;  // sampled in this step
  RW_CHECK(
      before == 0 || (before <= static_cast<int32_t>(entry.drafts.size()) && entry.drafts[before - 1] == tokens.back()),
      "a token behind one that was not computed");
  tokens.push_back(token);
}

// The rows of this step that hold what the sequence has at their positions are in the cache.
void Scheduler::State::Settle(Entry& entry) {
  entry.computed += std::exchange(entry.planned_rows, 0);
  int32_t accepted = 0;
  for (const int32_t draft : entry.drafts) {
    if (entry.missing() == 0 || entry.sequence.tokens[entry.computed] != draft) break;
    ++entry.computed;
    ++accepted;
  }
  const int32_t rejected = static_cast<int32_t>(entry.drafts.size()) - accepted;
  entry.credit = std::min(entry.credit + 1 + accepted * kAccepted - rejected * kDraftRow,
                          2 * std::max(options.max_drafts, kFirstDrafts) * kDraftRow);
  entry.drafts.clear();
  accepted_tokens += accepted;
  Publish(entry);
}

// Full blocks become shareable. Where an equal block is published already the sequence goes over to that one and its
// own is free again; the ranks then get its table anew.
void Scheduler::State::Publish(Entry& entry) {
  if (!options.has_prefix_cache) return;
  for (int32_t& index = entry.published_blocks; (index + 1) * options.block_tokens <= entry.computed; ++index) {
    const int32_t parent = index == 0 ? kNoBlock : entry.blocks[index - 1];
    const int32_t own = entry.blocks[index];
    entry.blocks[index] = ledger.Publish(own, parent, TokensOfBlock(entry, index));
    if (entry.blocks[index] == own) continue;
    entry.announced_blocks = 0;
    must_clear[entry.slot] = true;
  }
}

Scheduler::Scheduler(const SchedulerOptions& options) : state_(std::make_unique<State>(options)) {}
Scheduler::~Scheduler() = default;

absl::Status Scheduler::Admit(Sequence sequence) {
  State& state = *state_;
  const auto known = static_cast<int64_t>(sequence.tokens.size());
  if (sequence.max_tokens == 0) sequence.max_tokens = state.options.max_positions;
  const int32_t most = sequence.max_tokens;
  if (known < 1 || known > most || most > state.options.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("a sequence of ", known, " tokens that may grow to ", most,
                                                   " does not fit a context of ", state.options.max_positions));
  }
  if (state.BlocksFor(most) > state.options.block_count) {
    return absl::InvalidArgumentError(absl::StrCat("a sequence of up to ", most, " tokens does not fit a KV cache of ",
                                                   state.options.block_count, " blocks of ",
                                                   state.options.block_tokens));
  }
  if (state.entries.contains(sequence.id)) {
    return absl::AlreadyExistsError(absl::StrCat("sequence ", static_cast<uint64_t>(sequence.id), " is live"));
  }
  if (static_cast<int32_t>(state.waiting.size()) >= state.options.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat(state.options.max_waiting, " sequences wait already"));
  }
  auto entry = std::make_unique<Entry>();
  entry->order = {-static_cast<int64_t>(sequence.priority), state.next_arrival++};
  entry->all_logits_end = sequence.needs_all_logits ? static_cast<int32_t>(known) : 0;
  entry->sequence = std::move(sequence);
  state.waiting.emplace(entry->order, entry.get());
  state.entries.emplace(entry->sequence.id, std::move(entry));
  return absl::OkStatus();
}

void Scheduler::Remove(SequenceId id) {
  const auto found = state_->entries.find(id);
  if (found == state_->entries.end()) return;
  Entry& entry = *found->second;
  if (entry.slot != kNoSlot) state_->GiveBack(entry);
  state_->running.erase(entry.order);
  state_->waiting.erase(entry.order);
  state_->entries.erase(found);
}

bool Scheduler::PlanStep(StepPlan& plan, std::vector<Planned>& planned) {
  State& state = *state_;
  RW_CHECK(!state.is_open, "PlanStep before CompleteStep");
  plan.kind = StepKind::kRun;
  plan.cleared_slots.clear();
  plan.segments.clear();
  planned.clear();
  if (state.entries.empty()) return false;

  std::vector<Entry*> yielding;
  for (const auto& [order, entry] : state.running) {
    if (entry->must_yield) yielding.push_back(entry);
  }
  for (Entry* entry : yielding) state.Preempt(*entry);
  state.AssignRows();
  state.TakeBlocks();
  state.AssignDrafts();
  state.logit_rows = 0;
  for (const auto& [order, entry] : state.running) {
    if (entry->planned_rows > 0) state.Emit(*entry, plan, planned);
  }
  RW_CHECK(!plan.segments.empty(), "sequences are live but none can run");
  state.ClearSlots(plan);
  state.is_open = true;
  return true;
}

bool Scheduler::PlanAhead(StepPlan& plan, std::vector<Planned>& planned) {
  State& state = *state_;
  RW_CHECK(state.is_open && state.ahead_ids.empty(), "PlanAhead without an open step, or twice");
  if (!state.CanPlanAhead()) return false;
  plan.kind = StepKind::kRunOn;
  plan.cleared_slots.clear();
  plan.segments.clear();
  planned.clear();
  state.logit_rows = 0;
  for (const auto& [order, entry] : state.running) {
    if (!entry->ends_next()) state.EmitAhead(*entry, plan, planned);
  }
  state.ClearSlots(plan);
  return true;
}

void Scheduler::CompleteStep(std::span<const Token> tokens) {
  State& state = *state_;
  RW_CHECK(std::exchange(state.is_open, false), "CompleteStep without PlanStep");
  // A sequence without planned rows is not the one that was planned: its id was removed and admitted again since.
  for (const Token& token : tokens) {
    const auto found = state.entries.find(token.id);
    if (found != state.entries.end() && found->second->planned_rows > 0) state.Append(*found->second, token.token);
  }
  for (const SequenceId id : state.planned_ids) {
    const auto found = state.entries.find(id);
    if (found != state.entries.end() && found->second->planned_rows > 0) state.Settle(*found->second);
  }
  state.planned_ids = std::exchange(state.ahead_ids, {});
  state.is_open = !state.planned_ids.empty();
  for (const SequenceId id : state.planned_ids) {
    const auto found = state.entries.find(id);
    if (found == state.entries.end() || !std::exchange(found->second->is_ahead, false)) continue;
    // Without its token it has ended, and is removed next.
    found->second->planned_rows = found->second->missing();
  }
}

void Scheduler::Preempt(SequenceId id) {
  const auto found = state_->entries.find(id);
  if (found != state_->entries.end() && found->second->slot != kNoSlot) found->second->must_yield = true;
}

SchedulerLoad Scheduler::load() const {
  const State& state = *state_;
  return {.running = static_cast<int32_t>(state.running.size()),
          .waiting = static_cast<int32_t>(state.waiting.size()),
          .blocks_free = state.ledger.available(),
          .blocks_cached = state.ledger.cached(),
          .blocks_total = state.ledger.block_count(),
          .cached_tokens = state.cached_tokens,
          .preemptions = state.preemptions,
          .drafted_tokens = state.drafted_tokens,
          .accepted_tokens = state.accepted_tokens};
}

void Scheduler::CheckInvariants() const {
  const State& state = *state_;
  std::vector<int32_t> held(state.options.block_count);
  std::vector<bool> is_taken(state.options.slot_count);
  const auto take_slot = [&](int32_t slot) {
    RW_CHECK(!is_taken[slot], absl::StrCat("slot ", slot, " has two owners"));
    is_taken[slot] = true;
  };
  for (const int32_t slot : state.free_slots) take_slot(slot);
  for (const auto& [id, entry] : state.entries) {
    const bool is_running = entry->slot != kNoSlot;
    RW_CHECK(state.running.contains(entry->order) == is_running && state.waiting.contains(entry->order) != is_running);
    RW_CHECK(is_running || (entry->blocks.empty() && entry->computed == 0), "a waiting sequence owns something");
    RW_CHECK(entry->computed + entry->planned_rows + static_cast<int32_t>(entry->drafts.size()) + entry->is_ahead <=
             static_cast<int32_t>(entry->blocks.size()) * state.options.block_tokens);
    RW_CHECK(is_running || entry->drafts.empty());
    RW_CHECK(static_cast<int32_t>(entry->blocks.size()) <= state.BlocksFor(entry->sequence.max_tokens));
    RW_CHECK(entry->computed + entry->planned_rows <= entry->known());
    if (!is_running) continue;
    take_slot(entry->slot);
    for (const int32_t block : entry->blocks) ++held[block];
  }
  RW_CHECK(state.running.size() + state.waiting.size() == state.entries.size());
  state.ledger.Check(held);
}

}  // namespace rankwise::scheduler
