#include "worker/scheduler/scheduler.h"

#include <algorithm>
#include <compare>
#include <map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/scheduler/block_ledger.h"

namespace rankwise::scheduler {
namespace {

// Who goes first: higher priority, then earlier arrival. A preempted sequence keeps its place.
struct Order {
  int32_t negated_priority;
  int64_t arrival;
  auto operator<=>(const Order&) const = default;
};

constexpr int32_t kNoSlot = -1;

struct Entry {
  Sequence sequence;
  Order order;
  int32_t slot = kNoSlot;
  std::vector<int32_t> blocks;
  int32_t announced_blocks = 0;  // of `blocks`, those the ranks know
  int32_t computed = 0;          // positions in the cache
  int32_t cached = 0;            // of those, found in the prefix cache
  int32_t published_blocks = 0;
  BlockLedger::PrefixId prefix = BlockLedger::kRoot;  // of the last published block
  int32_t planned_rows = 0;      // in the step under way
  bool is_fresh = true;          // no segment since it got its slot
  bool must_yield = false;

  int32_t known() const { return static_cast<int32_t>(sequence.tokens.size()); }
  int32_t missing() const { return known() - computed; }
};

}  // namespace

struct Scheduler::State {
  explicit State(const SchedulerOptions& given) : options(given), ledger(given.block_count, given.block_tokens) {
    for (int32_t slot = options.slot_count - 1; slot >= 0; --slot) free_slots.push_back(slot);
  }

  int32_t BlocksFor(int32_t tokens) const { return (tokens + options.block_tokens - 1) / options.block_tokens; }

  void GiveBack(Entry& entry);
  void Preempt(Entry& entry);
  void MakeWay();
  bool PreemptBehind(const Order& order);
  bool Enter(Entry& entry);
  void PlanSequence(Entry& entry, int32_t rows, StepPlan& plan, std::vector<Planned>& planned);
  void PublishFullBlocks(Entry& entry);

  const SchedulerOptions options;
  BlockLedger ledger;
  absl::flat_hash_map<SequenceId, std::unique_ptr<Entry>> entries;
  std::map<Order, Entry*> running, waiting;
  std::vector<int32_t> free_slots;
  std::vector<int32_t> cleared_slots;  // not yet told to the ranks
  std::vector<SequenceId> planned_ids;
  int64_t next_arrival = 0;
  int64_t cached_tokens = 0, preemptions = 0;
};

Scheduler::Scheduler(const SchedulerOptions& options) : state_(std::make_unique<State>(options)) {}
Scheduler::~Scheduler() = default;

// Slot and blocks go back, the tail first so that it is evicted before the prefix it needs.
void Scheduler::State::GiveBack(Entry& entry) {
  for (auto block = entry.blocks.rbegin(); block != entry.blocks.rend(); ++block) ledger.Release(*block);
  entry.blocks.clear();
  cleared_slots.push_back(entry.slot);
  free_slots.push_back(entry.slot);
  entry.slot = kNoSlot;
}

void Scheduler::State::Preempt(Entry& entry) {
  GiveBack(entry);
  running.erase(entry.order);
  waiting.emplace(entry.order, &entry);
  entry.announced_blocks = entry.computed = entry.cached = entry.published_blocks = entry.planned_rows = 0;
  entry.prefix = BlockLedger::kRoot;
  entry.is_fresh = true;
  entry.must_yield = false;
  ++preemptions;
}

// Before a step: those told to yield do, and lower priorities make room for a higher one that waits.
void Scheduler::State::MakeWay() {
  std::vector<Entry*> yielding;
  for (const auto& [order, entry] : running) {
    if (entry->must_yield) yielding.push_back(entry);
  }
  for (Entry* entry : yielding) Preempt(*entry);
  while (!waiting.empty() && !running.empty()) {
    const Entry& first = *waiting.begin()->second;
    Entry& last = *running.rbegin()->second;
    const bool has_room = !free_slots.empty() && ledger.available() >= BlocksFor(first.known());
    if (has_room || last.order.negated_priority <= first.order.negated_priority) break;
    Preempt(last);
  }
}

// Takes the blocks of the last sequence behind `order` that has no part in this step; false when there is none.
bool Scheduler::State::PreemptBehind(const Order& order) {
  for (auto last = running.rbegin(); last != running.rend() && order < last->first; ++last) {
    if (last->second->planned_rows > 0) continue;
    Preempt(*last->second);
    return true;
  }
  return false;
}

// From waiting to running, if a slot and blocks for all it knows are there; what the prefix cache has it shares.
bool Scheduler::State::Enter(Entry& entry) {
  if (free_slots.empty()) return false;
  BlockLedger::Match match;
  if (options.has_prefix_cache && !entry.sequence.needs_all_logits) {
    match = ledger.Find(entry.sequence.tokens, (entry.known() - 1) / options.block_tokens);
  }
  const auto shared = static_cast<int32_t>(match.blocks.size());
  if (ledger.available() < BlocksFor(entry.known()) - shared) {
    for (auto block = match.blocks.rbegin(); block != match.blocks.rend(); ++block) ledger.Release(*block);
    return false;
  }
  entry.slot = free_slots.back();
  free_slots.pop_back();
  entry.blocks = std::move(match.blocks);
  entry.prefix = match.prefix;
  entry.published_blocks = shared;
  entry.computed = entry.cached = shared * options.block_tokens;
  cached_tokens += entry.cached;
  waiting.erase(entry.order);
  running.emplace(entry.order, &entry);
  return true;
}

// Up to `rows` rows, as far as blocks can be had.
void Scheduler::State::PlanSequence(Entry& entry, int32_t rows, StepPlan& plan, std::vector<Planned>& planned) {
  const int32_t needed = BlocksFor(entry.computed + rows);
  while (static_cast<int32_t>(entry.blocks.size()) < needed) {
    if (ledger.available() == 0 && !PreemptBehind(entry.order)) break;
    if (ledger.available() > 0) entry.blocks.push_back(ledger.Take());
  }
  const auto room = static_cast<int32_t>(entry.blocks.size()) * options.block_tokens - entry.computed;
  rows = std::min(rows, room);
  if (rows <= 0) return;

  const auto first = entry.sequence.tokens.begin() + entry.computed;
  const bool produces_token = rows == entry.missing();
  planned.push_back({.id = entry.sequence.id,
                     .segment = static_cast<int32_t>(plan.segments.size()),
                     .cached_tokens = entry.cached,
                     .is_first = entry.is_fresh,
                     .produces_token = produces_token});
  StepSegment& segment = plan.segments.emplace_back();
  segment.slot = entry.slot;
  segment.first_position = entry.computed;
  segment.tokens.assign(first, first + rows);
  segment.new_blocks.assign(entry.blocks.begin() + entry.announced_blocks, entry.blocks.end());
  if (entry.sequence.needs_all_logits) {
    segment.logits = LogitsNeed::kAll;
  } else if (produces_token) {
    segment.logits = LogitsNeed::kLast;
  }
  entry.announced_blocks = static_cast<int32_t>(entry.blocks.size());
  entry.planned_rows = rows;
  entry.is_fresh = false;
  planned_ids.push_back(entry.sequence.id);
}

void Scheduler::State::PublishFullBlocks(Entry& entry) {
  if (!options.has_prefix_cache) return;
  for (; (entry.published_blocks + 1) * options.block_tokens <= entry.computed; ++entry.published_blocks) {
    const std::span<const int32_t> tokens = std::span<const int32_t>(entry.sequence.tokens)
                                                .subspan(entry.published_blocks * options.block_tokens, options.block_tokens);
    entry.prefix = ledger.Publish(entry.blocks[entry.published_blocks], entry.prefix, tokens);
  }
}

absl::Status Scheduler::Admit(Sequence sequence) {
  State& state = *state_;
  const auto known = static_cast<int32_t>(sequence.tokens.size());
  const int32_t most = sequence.max_tokens > 0 ? sequence.max_tokens : state.options.max_positions;
  if (known < 1 || known > most || most > state.options.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("a sequence of ", known, " tokens that may grow to ", most,
                                                   " does not fit a context of ", state.options.max_positions));
  }
  if (state.BlocksFor(most) > state.options.block_count) {
    return absl::InvalidArgumentError(absl::StrCat("a sequence of up to ", most, " tokens does not fit a KV cache of ",
                                                   state.options.block_count, " blocks of ", state.options.block_tokens));
  }
  if (state.entries.contains(sequence.id)) {
    return absl::AlreadyExistsError(absl::StrCat("sequence ", static_cast<uint64_t>(sequence.id), " is live"));
  }
  if (static_cast<int32_t>(state.waiting.size()) >= state.options.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat(state.options.max_waiting, " sequences wait already"));
  }
  auto entry = std::make_unique<Entry>();
  entry->order = {-sequence.priority, state.next_arrival++};
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
  if (state.entries.empty()) return false;
  state.planned_ids.clear();
  planned.clear();
  plan.segments.clear();
  state.MakeWay();

  // Sequences that decode have their row for sure; prompts share what is left.
  std::vector<Entry*> turn;
  int32_t decoding = 0;
  for (const auto& [order, entry] : state.running) {
    turn.push_back(entry);
    decoding += entry->missing() == 1;
  }
  int32_t prompt_rows = std::max(0, state.options.max_step_rows - decoding);
  const auto plan_one = [&](Entry& entry) {
    const bool decodes = entry.missing() == 1 && !entry.is_fresh;
    const int32_t limit = decodes ? 1 : std::min(prompt_rows, state.options.max_chunk_rows);
    const int32_t rows = std::min(entry.missing(), limit);
    if (rows <= 0) return;
    state.PlanSequence(entry, rows, plan, planned);
    if (!decodes) prompt_rows -= entry.planned_rows;
  };
  for (Entry* entry : turn) {
    if (entry->slot != kNoSlot) plan_one(*entry);
  }
  while (!state.waiting.empty() && prompt_rows > 0) {
    Entry& next = *state.waiting.begin()->second;
    if (!state.Enter(next)) break;
    plan_one(next);
  }
  RW_CHECK(!plan.segments.empty(), "sequences are live but none can run");
  plan.cleared_slots = std::exchange(state.cleared_slots, {});
  std::ranges::sort(plan.cleared_slots);
  const auto repeated = std::ranges::unique(plan.cleared_slots);
  plan.cleared_slots.erase(repeated.begin(), repeated.end());
  return true;
}

void Scheduler::CompleteStep(std::span<const Token> tokens) {
  State& state = *state_;
  for (const SequenceId id : state.planned_ids) {
    const auto found = state.entries.find(id);
    if (found == state.entries.end()) continue;
    Entry& entry = *found->second;
    entry.computed += std::exchange(entry.planned_rows, 0);
    state.PublishFullBlocks(entry);
  }
  state.planned_ids.clear();
  for (const Token& token : tokens) {
    const auto found = state.entries.find(token.id);
    if (found == state.entries.end()) continue;
    RW_CHECK(found->second->missing() == 0, "a token for a sequence whose rows are not all computed");
    found->second->sequence.tokens.push_back(token.token);
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
          .preemptions = state.preemptions};
}

void Scheduler::CheckInvariants() const {
  const State& state = *state_;
  std::vector<int32_t> held(state.options.block_count, 0);
  std::vector<bool> is_owned(state.options.slot_count, false);
  for (const auto& [id, entry] : state.entries) {
    const bool is_running = entry->slot != kNoSlot;
    RW_CHECK(state.running.contains(entry->order) == is_running && state.waiting.contains(entry->order) != is_running);
    RW_CHECK(is_running || entry->blocks.empty(), "a waiting sequence owns blocks");
    RW_CHECK(entry->computed + entry->planned_rows <=
             static_cast<int32_t>(entry->blocks.size()) * state.options.block_tokens);
    if (!is_running) continue;
    RW_CHECK(!is_owned[entry->slot], absl::StrCat("slot ", entry->slot, " has two owners"));
    is_owned[entry->slot] = true;
    for (const int32_t block : entry->blocks) ++held[block];
  }
  RW_CHECK(state.running.size() + state.waiting.size() == state.entries.size());
  RW_CHECK(state.free_slots.size() + state.running.size() == static_cast<size_t>(state.options.slot_count));
  state.ledger.Check(held);
}

}  // namespace rankwise::scheduler
