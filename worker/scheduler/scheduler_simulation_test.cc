// A seeded simulation: random sequences that share prefixes, random pools, cancellations and preemptions, against a
// rank that knows only what the plans say. Each place of its KV memory holds a fingerprint of the whole prefix it
// belongs to, so that a block shared wrongly, used twice or used after it was given back shows as a wrong fingerprint,
// and a wrong table as well. Rejected drafts leave wrong fingerprints behind, which nobody may ever read, as do rows
// that were planned ahead for sequences that then ended.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <utility>

#include "worker/scheduler/scheduler.h"

namespace rankwise::scheduler {
namespace {

constexpr int32_t kVocabSize = 5;  // few tokens: chance alone makes prefixes equal

uint64_t Extend(uint64_t prefix, int32_t token) {
  uint64_t hash = (prefix ^ static_cast<uint64_t>(token + 1)) * 0x9E3779B97F4A7C15;
  return hash ^ hash >> 29;
}

// The model: of the whole prefix, or, repeating itself soon, of its last two tokens.
int32_t NextToken(uint64_t prefix, std::span<const int32_t> tokens, bool is_repetitive) {
  const auto last = tokens.last(std::min<size_t>(2, tokens.size()));
  const uint64_t cause = is_repetitive ? Extend(Extend(0, last.front()), last.back()) : prefix;
  return static_cast<int32_t>((cause >> 40) % kVocabSize);
}

// What a rank does with a plan that came over the wire.
class Rank {
 public:
  explicit Rank(const SchedulerOptions& options)
      : block_tokens_(options.block_tokens),
        limits_{.slot_count = options.slot_count,
                .block_count = options.block_count,
                .max_rows = options.max_step_rows,
                .max_positions = options.max_positions,
                .vocab_size = kVocabSize},
        tables_(options.slot_count),
        memory_(static_cast<size_t>(options.block_count) * options.block_tokens) {}

  // The fingerprints of each segment's rows, read when all rows were written. `drawn` are the tokens of the step before
  // that a plan which runs on names.
  std::vector<std::vector<uint64_t>> Execute(const StepPlan& sent, const std::vector<int32_t>& drawn = {}) {
    auto plan = DecodeStepPlan(EncodeStepPlan(sent), limits_);
    EXPECT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(*plan, sent);
    if (plan->kind == StepKind::kRunOn) {
      for (StepSegment& segment : plan->segments) segment.tokens[0] = drawn.at(segment.tokens[0]);
    }
    for (const int32_t slot : plan->cleared_slots) tables_[slot].clear();
    for (const StepSegment& segment : plan->segments) {
      auto& table = tables_[segment.slot];
      table.insert(table.end(), segment.new_blocks.begin(), segment.new_blocks.end());
    }
    // All rows are written before any is read, as in a layer of the model.
    for (const StepSegment& segment : plan->segments) Write(segment);
    std::vector<std::vector<uint64_t>> rows;
    for (const StepSegment& segment : plan->segments) {
      auto& prints = rows.emplace_back();
      for (size_t i = 0; i < segment.tokens.size(); ++i) {
        prints.push_back(Place(segment.slot, segment.first_position + static_cast<int32_t>(i)));
      }
    }
    return rows;
  }

  // Every place of a sequence must hold the fingerprint of its prefix.
  bool Holds(int32_t slot, std::span<const int32_t> tokens) {
    uint64_t prefix = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      prefix = Extend(prefix, tokens[i]);
      if (Place(slot, static_cast<int32_t>(i)) != prefix) return false;
    }
    return true;
  }

 private:
  uint64_t& Place(int32_t slot, int32_t position) {
    const int32_t block = tables_[slot].at(position / block_tokens_);
    return memory_.at(static_cast<size_t>(block) * block_tokens_ + position % block_tokens_);
  }

  void Write(const StepSegment& segment) {
    uint64_t prefix = segment.first_position == 0 ? 0 : Place(segment.slot, segment.first_position - 1);
    for (size_t i = 0; i < segment.tokens.size(); ++i) {
      prefix = Extend(prefix, segment.tokens[i]);
      Place(segment.slot, segment.first_position + static_cast<int32_t>(i)) = prefix;
    }
  }

  const int32_t block_tokens_;
  const StepLimits limits_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<uint64_t> memory_;
};

struct Client {
  std::vector<int32_t> tokens;  // as far as the oracle has seen them
  int32_t target = 0;           // ends when this many are known
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed), options_(DrawOptions()), scheduler_(options_), rank_(options_) {
    cancel_percent_ = Chance(50) ? Draw(1, 10) : 0;
    preempt_percent_ = Chance(50) ? Draw(1, 20) : 0;
    stop_percent_ = Chance(50) ? Draw(1, 10) : 0;
    ahead_percent_ = Chance(70) ? Draw(20, 100) : 0;
    is_repetitive_ = Chance(50);
    for (int i = 0; i < 3; ++i) stems_.push_back(DrawTokens(Draw(1, options_.max_positions)));
  }

  void Run() {
    const int32_t chaos_steps = Draw(5, 80);
    for (int32_t step = 0; step < chaos_steps && !::testing::Test::HasFailure(); ++step) {
      for (int32_t arrivals = Draw(0, 2); arrivals > 0; --arrivals) Arrive();
      if (Chance(cancel_percent_)) Cancel();
      if (!clients_.empty() && Chance(preempt_percent_)) scheduler_.Preempt(AnyClient());
      Step(/*has_chaos=*/true);
    }
    // Calm: whatever is live must end. A step computes one row at the least, and each preemption loses at most a
    // sequence.
    int64_t bound = 10;
    for (const auto& [id, client] : clients_) bound += int64_t{client.target} * 8;
    for (; !clients_.empty() && !::testing::Test::HasFailure(); --bound) {
      ASSERT_GT(bound, 0) << "no end in sight";
      Step(/*has_chaos=*/false);
    }
    if (ahead_.has_value()) Step(/*has_chaos=*/false);
    StepPlan plan;
    std::vector<Planned> planned;
    if (::testing::Test::HasFailure()) return;
    EXPECT_FALSE(scheduler_.PlanStep(plan, planned));
    const SchedulerLoad load = scheduler_.load();
    EXPECT_EQ(load.blocks_free, load.blocks_total);
    EXPECT_EQ(load.running + load.waiting, 0);
  }

  int64_t finished() const { return finished_; }
  int64_t steps_ahead() const { return steps_ahead_; }
  SchedulerLoad load() const { return scheduler_.load(); }

 private:
  int32_t Draw(int32_t least, int32_t most) {
    return least + static_cast<int32_t>(random_() % static_cast<uint64_t>(most - least + 1));
  }
  bool Chance(int32_t percent) { return Draw(0, 99) < percent; }

  std::vector<int32_t> DrawTokens(int32_t count) {
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens) token = Draw(0, kVocabSize - 1);
    return tokens;
  }

  SchedulerOptions DrawOptions() {
    SchedulerOptions options;
    options.block_tokens = Draw(1, 5);
    options.max_positions = Draw(4, 40);
    options.block_count = Draw(1, 40);
    options.slot_count = Draw(1, 8);
    options.max_step_rows = Draw(1, 24);
    options.max_chunk_rows = Draw(1, options.max_step_rows);
    options.max_waiting = Draw(1, 8);
    options.has_prefix_cache = Chance(80);
    options.max_drafts = Chance(70) ? Draw(1, 9) : 0;
    options.draft_step_rows = Draw(1, 24);
    return options;
  }

  SequenceId AnyClient() {
    return std::next(clients_.begin(), Draw(0, static_cast<int32_t>(clients_.size()) - 1))->first;
  }

  void Arrive() {
    const auto& stem = stems_[Draw(0, 2)];
    std::vector<int32_t> tokens(stem.begin(), stem.begin() + Draw(0, static_cast<int32_t>(stem.size())));
    for (const int32_t token : DrawTokens(Draw(0, 6))) tokens.push_back(token);
    const int32_t most = std::min(options_.max_positions, static_cast<int32_t>(tokens.size()) + Draw(0, 20));
    const SequenceId id{next_id_++};
    const bool fits = !tokens.empty() && static_cast<int32_t>(tokens.size()) <= most &&
                      (most + options_.block_tokens - 1) / options_.block_tokens <= options_.block_count;
    if (most == 0) return;  // would mean max_positions
    const bool has_room = scheduler_.load().waiting < options_.max_waiting;
    const absl::Status status = scheduler_.Admit({.id = id,
                                                  .tokens = tokens,
                                                  .max_tokens = most,
                                                  .priority = Draw(0, 9) < 7 ? 0 : Draw(-1, 1),
                                                  .needs_all_logits = Chance(10)});
    EXPECT_EQ(status.ok(), fits && has_room) << status;
    if (status.ok()) clients_[id] = {std::move(tokens), most};
  }

  void Cancel() {
    if (clients_.empty()) return;
    const SequenceId id = AnyClient();
    scheduler_.Remove(id);
    clients_.erase(id);
    scheduler_.CheckInvariants();
  }

  // What a plan made of the rank.
  struct Executed {
    StepPlan plan;
    std::vector<Planned> planned;
    std::vector<std::vector<uint64_t>> rows;
  };

  void Step(bool has_chaos) {
    Executed step;
    const auto& [plan, planned, rows] = step;
    if (ahead_.has_value()) {
      step = *std::exchange(ahead_, std::nullopt);
    } else {
      const bool is_live = !clients_.empty();
      ASSERT_EQ(scheduler_.PlanStep(step.plan, step.planned), is_live);
      scheduler_.CheckInvariants();
      if (!is_live) return;
      step.rows = rank_.Execute(plan);
    }
    ASSERT_EQ(planned.size(), plan.segments.size());
    CheckAgainstOracle(plan, planned);
    if (has_chaos && Chance(cancel_percent_)) Cancel();
    if (has_chaos && Chance(20)) Arrive();
    if (Chance(ahead_percent_)) RunAhead(step);
    if (has_chaos && Chance(cancel_percent_)) Cancel();

    std::vector<Scheduler::Token> tokens;
    std::vector<SequenceId> ended;
    for (const Planned& one : planned) {
      const auto client = clients_.find(one.id);
      if (!one.produces_token || client == clients_.end()) continue;
      const StepSegment& segment = plan.segments[one.segment];
      auto& known = client->second.tokens;
      for (size_t row = segment.tokens.size() - 1 - one.drafts; row < segment.tokens.size(); ++row) {
        if (row >= segment.tokens.size() - one.drafts && segment.tokens[row] != known.back()) break;
        if (static_cast<int32_t>(known.size()) == client->second.target || Chance(stop_percent_)) {
          ended.push_back(one.id);
          break;
        }
        const int32_t token = NextToken(rows[one.segment][row], known, is_repetitive_);
        tokens.push_back({one.id, token});
        known.push_back(token);
      }
    }
    scheduler_.CompleteStep(tokens);
    scheduler_.CheckInvariants();
    for (const SequenceId id : ended) {
      scheduler_.Remove(id);
      clients_.erase(id);
      ++finished_;
    }
    scheduler_.CheckInvariants();
  }

  // The next step is executed before anybody looks at what this one gave.
  void RunAhead(const Executed& step) {
    Executed next;
    if (!scheduler_.PlanAhead(next.plan, next.planned)) return;
    scheduler_.CheckInvariants();
    ++steps_ahead_;
    std::vector<int32_t> drawn;
    for (const Planned& one : step.planned) {
      const auto client = clients_.find(one.id);
      const auto& prints = step.rows[one.segment];
      const size_t count = prints.size() - FirstLogitRow(step.plan.segments[one.segment]);
      drawn.resize(drawn.size() + count);
      if (count > 0 && client != clients_.end()) {
        drawn.back() = NextToken(prints.back(), client->second.tokens, is_repetitive_);
      }
    }
    next.rows = rank_.Execute(next.plan, drawn);
    ahead_ = std::move(next);
  }

  void CheckAgainstOracle(const StepPlan& plan, const std::vector<Planned>& planned) {
    size_t rows = 0;
    int32_t drafts = 0;
    for (const Planned& one : planned) {
      const StepSegment& segment = plan.segments[one.segment];
      const bool was_ahead = plan.kind == StepKind::kRunOn;
      if (was_ahead && !clients_.contains(one.id)) continue;
      ASSERT_TRUE(clients_.contains(one.id));
      const auto& known = clients_[one.id].tokens;
      const size_t end = segment.first_position + segment.tokens.size() - one.drafts;
      ASSERT_LE(end, known.size());
      EXPECT_TRUE(was_ahead || std::equal(segment.tokens.begin(), segment.tokens.end() - one.drafts,
                                          known.begin() + segment.first_position));
      EXPECT_LE(one.drafts, options_.max_drafts);
      if (one.drafts > 0) {
        EXPECT_EQ(segment.tokens.size(), 1u + one.drafts) << "only who decodes drafts";
        EXPECT_LT(static_cast<int32_t>(known.size()) + one.drafts, clients_[one.id].target);
        EXPECT_EQ(segment.logits, LogitsNeed::kAll);
      }
      rows += segment.tokens.size();
      drafts += one.drafts;
      EXPECT_TRUE(rank_.Holds(segment.slot, std::span(known).first(end))) << "wrong K and V in slot " << segment.slot;
      EXPECT_EQ(one.produces_token, end == known.size());
      EXPECT_TRUE(!one.produces_token || segment.logits != LogitsNeed::kNone);
      EXPECT_TRUE(!one.is_first || segment.first_position == one.cached_tokens);
    }
    EXPECT_TRUE(drafts == 0 || static_cast<int32_t>(rows) <= options_.draft_step_rows);
  }

  std::mt19937_64 random_;
  const SchedulerOptions options_;
  Scheduler scheduler_;
  Rank rank_;
  std::vector<std::vector<int32_t>> stems_;  // prompts begin like one of these
  std::map<SequenceId, Client> clients_;
  uint64_t next_id_ = 1;
  std::optional<Executed> ahead_;
  int32_t cancel_percent_ = 0, preempt_percent_ = 0, stop_percent_ = 0, ahead_percent_ = 0;
  bool is_repetitive_ = false;
  int64_t finished_ = 0, steps_ahead_ = 0;
};

TEST(SchedulerSimulation, EverySequenceGetsItsOwnTokensAndEnds) {
  // RANKWISE_SEED replays one seed.
  const char* only = std::getenv("RANKWISE_SEED");
  const uint64_t first = only == nullptr ? 1 : std::strtoull(only, nullptr, 10);
  const uint64_t last = only == nullptr ? 4000 : first;
  int64_t finished = 0, preemptions = 0, cached_tokens = 0, accepted = 0, rejected = 0, steps_ahead = 0;
  for (uint64_t seed = first; seed <= last; ++seed) {
    SCOPED_TRACE(testing::Message() << "RANKWISE_SEED=" << seed);
    Simulation simulation(seed);
    simulation.Run();
    if (HasFailure()) return;
    finished += simulation.finished();
    steps_ahead += simulation.steps_ahead();
    preemptions += simulation.load().preemptions;
    cached_tokens += simulation.load().cached_tokens;
    accepted += simulation.load().accepted_tokens;
    rejected += simulation.load().drafted_tokens - simulation.load().accepted_tokens;
  }
  if (only != nullptr) return;
  // The seeds reach what they are meant to reach.
  EXPECT_GT(finished, 10000);
  EXPECT_GT(preemptions, 10000);
  EXPECT_GT(cached_tokens, 10000);
  EXPECT_GT(accepted, 3000);
  EXPECT_GT(rejected, 3000);
  EXPECT_GT(steps_ahead, 10000);
}

}  // namespace
}  // namespace rankwise::scheduler
