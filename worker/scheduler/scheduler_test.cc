#include "worker/scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace rankwise::scheduler {
namespace {

constexpr int kBlockTokens = 4;

uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t z = a * 0x9E3779B97F4A7C15 + b + 0x7F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// A rank whose cache holds, for each position, the hash of all tokens up to it. It reads what its block tables say, so a
// shared block that does not belong, a block used twice or a missing row gives a wrong token.
class SimulatedRank {
 public:
  SimulatedRank(int slots, int blocks) : tables_(slots), cache_(blocks * kBlockTokens, 0) {}

  // The hash after each segment's last row.
  std::vector<uint64_t> Run(const StepPlan& plan) {
    for (const int32_t slot : plan.cleared_slots) tables_[slot].clear();
    std::vector<uint64_t> last;
    for (const StepSegment& segment : plan.segments) {
      auto& table = tables_[segment.slot];
      table.insert(table.end(), segment.new_blocks.begin(), segment.new_blocks.end());
      uint64_t hash = segment.first_position == 0 ? 1 : At(table, segment.first_position - 1);
      int32_t position = segment.first_position;
      for (const int32_t token : segment.tokens) {
        hash = Mix(hash, token);
        At(table, position++) = hash;
      }
      last.push_back(hash);
    }
    return last;
  }

 private:
  uint64_t& At(const std::vector<int32_t>& table, int32_t position) {
    return cache_.at(table.at(position / kBlockTokens) * kBlockTokens + position % kBlockTokens);
  }
  std::vector<std::vector<int32_t>> tables_;
  std::vector<uint64_t> cache_;
};

int32_t TokenFrom(uint64_t hash) { return static_cast<int32_t>(hash % 5); }

std::vector<int32_t> Oracle(std::vector<int32_t> tokens, size_t length) {
  uint64_t hash = 1;
  for (const int32_t token : tokens) hash = Mix(hash, token);
  while (tokens.size() < length) {
    tokens.push_back(TokenFrom(hash));
    hash = Mix(hash, tokens.back());
  }
  return tokens;
}

struct Live {
  std::vector<int32_t> prompt, tokens;
  size_t length = 0;
};

// One seed: random pool, limits and arrivals with shared prefixes, cancels and forced preemptions; every sequence must equal
// its oracle and every block come back.
void Simulate(uint64_t seed) {
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  SchedulerOptions options;
  options.block_tokens = kBlockTokens;
  options.block_count = 6 + below(30);
  options.slot_count = 1 + below(6);
  options.max_step_rows = options.slot_count + below(20);
  options.max_chunk_rows = 1 + below(12);
  options.max_positions = std::min(options.block_count * kBlockTokens, 16 + below(60));
  options.has_prefix_cache = below(4) != 0;
  Scheduler scheduler(options);
  SimulatedRank rank(options.slot_count, options.block_count);
  std::map<SequenceId, Live> live;
  uint64_t next_id = 1;
  int finished = 0;
  for (int turn = 0; turn < 400 && (turn < 120 || !live.empty()); ++turn) {
    while (turn < 120 && below(3) == 0 && live.size() < 12) {
      Live sequence;
      const int prompt = 1 + below(options.max_positions - 1);
      for (int i = 0; i < prompt; ++i) sequence.prompt.push_back(i < 9 ? i : below(2));
      sequence.length = prompt + 1 + below(options.max_positions - prompt);
      sequence.tokens = sequence.prompt;
      const SequenceId id{next_id++};
      ASSERT_EQ(scheduler.Admit({.id = id,
                                 .tokens = sequence.prompt,
                                 .max_tokens = static_cast<int32_t>(sequence.length),
                                 .priority = below(3) - 1,
                                 .needs_all_logits = below(8) == 0}),
                absl::OkStatus());
      live.emplace(id, std::move(sequence));
    }
    if (!live.empty() && below(10) == 0) scheduler.Preempt(std::next(live.begin(), below(live.size()))->first);
    StepPlan plan;
    std::vector<Planned> planned;
    const bool has_step = scheduler.PlanStep(plan, planned);
    ASSERT_EQ(has_step, !live.empty());
    scheduler.CheckInvariants();
    if (!has_step) continue;
    ASSERT_EQ(planned.size(), plan.segments.size());
    int rows = 0;
    std::set<int32_t> slots;
    for (const StepSegment& segment : plan.segments) {
      rows += static_cast<int>(segment.tokens.size());
      ASSERT_TRUE(slots.insert(segment.slot).second);
    }
    ASSERT_LE(rows, options.max_step_rows);
    const std::vector<uint64_t> hashes = rank.Run(plan);
    std::vector<Scheduler::Token> tokens;
    std::vector<SequenceId> done;
    for (const Planned& part : planned) {
      Live& sequence = live.at(part.id);
      const StepSegment& segment = plan.segments[part.segment];
      const size_t end = segment.first_position + segment.tokens.size();
      ASSERT_EQ(part.produces_token, end == sequence.tokens.size());
      if (!part.produces_token) continue;
      ASSERT_NE(segment.logits, LogitsNeed::kNone);
      const int32_t token = TokenFrom(hashes[part.segment]);
      sequence.tokens.push_back(token);
      tokens.push_back({part.id, token});
      if (sequence.tokens.size() == sequence.length) done.push_back(part.id);
    }
    if (below(12) == 0) done.push_back(std::next(live.begin(), below(live.size()))->first);
    const bool removes_first = below(2) == 0;
    if (!removes_first) scheduler.CompleteStep(tokens);
    for (const SequenceId id : done) scheduler.Remove(id);
    if (removes_first) scheduler.CompleteStep(tokens);
    scheduler.CheckInvariants();
    for (const SequenceId id : done) {
      const auto found = live.find(id);
      if (found == live.end()) continue;
      ASSERT_EQ(found->second.tokens, Oracle(found->second.prompt, found->second.tokens.size()));
      live.erase(found);
      ++finished;
    }
  }
  EXPECT_TRUE(live.empty()) << live.size() << " sequences did not end";
  EXPECT_GT(finished, 0);
  EXPECT_EQ(scheduler.load().blocks_free, options.block_count);
}

TEST(SchedulerTest, RandomRunsEqualTheirOracle) {
  for (uint64_t seed = 1; seed <= 2000 && !HasFatalFailure(); ++seed) Simulate(seed);
}

SchedulerOptions SmallOptions() {
  return {.block_count = 8, .block_tokens = kBlockTokens, .slot_count = 4, .max_step_rows = 8, .max_chunk_rows = 6, .max_positions = 32};
}

std::vector<int32_t> Tokens(int count) {
  std::vector<int32_t> tokens(count);
  for (int i = 0; i < count; ++i) tokens[i] = i;
  return tokens;
}

TEST(SchedulerTest, PromptsAreChunkedAndDecodersAlwaysHaveTheirRow) {
  Scheduler scheduler(SmallOptions());
  ASSERT_EQ(scheduler.Admit({.id = SequenceId{1}, .tokens = Tokens(3), .max_tokens = 8}), absl::OkStatus());
  StepPlan plan;
  std::vector<Planned> planned;
  ASSERT_TRUE(scheduler.PlanStep(plan, planned));
  EXPECT_EQ(plan.segments[0].logits, LogitsNeed::kLast);
  const Scheduler::Token token{SequenceId{1}, 42};
  scheduler.CompleteStep({&token, 1});

  ASSERT_EQ(scheduler.Admit({.id = SequenceId{2}, .tokens = Tokens(15), .max_tokens = 16}), absl::OkStatus());
  ASSERT_TRUE(scheduler.PlanStep(plan, planned));
  ASSERT_EQ(plan.segments.size(), 2u);
  EXPECT_EQ(plan.segments[0].tokens, std::vector<int32_t>{42});
  EXPECT_EQ(plan.segments[0].first_position, 3);
  EXPECT_EQ(plan.segments[1].tokens.size(), 6u);
  EXPECT_EQ(plan.segments[1].logits, LogitsNeed::kNone);
  EXPECT_FALSE(planned[1].produces_token);
}

TEST(SchedulerTest, SharesAPublishedPrefixButNeverAllOfAPrompt) {
  Scheduler scheduler(SmallOptions());
  StepPlan plan;
  std::vector<Planned> planned;
  for (const uint64_t id : {1, 2}) {
    ASSERT_EQ(scheduler.Admit({.id = SequenceId{id}, .tokens = Tokens(8), .max_tokens = 12}), absl::OkStatus());
    for (int step = 0; step < 2; ++step) {
      ASSERT_TRUE(scheduler.PlanStep(plan, planned));
      if (id == 2 && step == 0) {
        EXPECT_EQ(planned[0].cached_tokens, 4);
        EXPECT_EQ(plan.segments[0].first_position, 4);
        EXPECT_EQ(plan.segments[0].new_blocks.size(), 2u);
      }
      scheduler.CompleteStep({});
      if (planned[0].produces_token) break;
    }
    scheduler.Remove(SequenceId{id});
  }
  EXPECT_EQ(scheduler.load().cached_tokens, 4);
}

TEST(SchedulerTest, AHigherPriorityTakesTheRoomOfALowerOne) {
  SchedulerOptions options = SmallOptions();
  options.slot_count = 1;
  Scheduler scheduler(options);
  StepPlan plan;
  std::vector<Planned> planned;
  ASSERT_EQ(scheduler.Admit({.id = SequenceId{1}, .tokens = Tokens(2), .max_tokens = 8}), absl::OkStatus());
  ASSERT_TRUE(scheduler.PlanStep(plan, planned));
  scheduler.CompleteStep({});
  ASSERT_EQ(scheduler.Admit({.id = SequenceId{2}, .tokens = Tokens(2), .max_tokens = 8, .priority = 1}), absl::OkStatus());
  ASSERT_TRUE(scheduler.PlanStep(plan, planned));
  EXPECT_EQ(planned[0].id, SequenceId{2});
  EXPECT_EQ(plan.cleared_slots, std::vector<int32_t>{0});
  EXPECT_EQ(scheduler.load().preemptions, 1);
}

TEST(SchedulerTest, RefusesWhatCannotRun) {
  SchedulerOptions options = SmallOptions();
  options.max_waiting = 1;
  options.max_positions = 64;
  Scheduler scheduler(options);
  EXPECT_TRUE(absl::IsInvalidArgument(scheduler.Admit({.id = SequenceId{1}, .tokens = {}})));
  EXPECT_TRUE(absl::IsInvalidArgument(scheduler.Admit({.id = SequenceId{1}, .tokens = Tokens(70)})));
  EXPECT_TRUE(absl::IsInvalidArgument(scheduler.Admit({.id = SequenceId{1}, .tokens = Tokens(4), .max_tokens = 40})));
  EXPECT_EQ(scheduler.Admit({.id = SequenceId{1}, .tokens = Tokens(4), .max_tokens = 8}), absl::OkStatus());
  EXPECT_TRUE(absl::IsAlreadyExists(scheduler.Admit({.id = SequenceId{1}, .tokens = Tokens(4), .max_tokens = 8})));
  EXPECT_TRUE(absl::IsResourceExhausted(scheduler.Admit({.id = SequenceId{2}, .tokens = Tokens(4), .max_tokens = 8})));
}

}  // namespace
}  // namespace rankwise::scheduler
