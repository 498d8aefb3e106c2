#include "proto/step_plan.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace rankwise {
namespace {

constexpr StepLimits kLimits = {
    .slot_count = 8, .block_count = 100, .max_rows = 64, .max_positions = 200, .vocab_size = 1000};

StepPlan Example() {
  return {
      .kind = StepKind::kRun,
      .step = 123456789012,
      .cleared_slots = {3, 7},
      .segments = {
          {.slot = 3, .first_position = 0, .logits = LogitsNeed::kNone, .tokens = {1, 999, 0}, .new_blocks = {99, 0}},
          {.slot = 1, .first_position = 199, .logits = LogitsNeed::kLast, .tokens = {5}}}};
}

TEST(StepPlanTest, SurvivesItsWireForm) {
  EXPECT_EQ(*DecodeStepPlan(EncodeStepPlan(Example()), kLimits), Example());
  for (const StepKind kind : {StepKind::kHeartbeat, StepKind::kReport, StepKind::kStop}) {
    const StepPlan plan{.kind = kind, .step = 7};
    EXPECT_EQ(*DecodeStepPlan(EncodeStepPlan(plan), kLimits), plan);
  }
}

TEST(StepPlanTest, APlanThatRunsOnNamesRowsForTokens) {
  StepPlan plan{.kind = StepKind::kRunOn, .segments = {{.slot = 2, .logits = LogitsNeed::kLast, .tokens = {63}}}};
  EXPECT_EQ(*DecodeStepPlan(EncodeStepPlan(plan), kLimits), plan);
  plan.segments[0].tokens = {64};
  EXPECT_FALSE(DecodeStepPlan(EncodeStepPlan(plan), kLimits).ok());
  plan.segments[0].tokens = {0, 1};
  EXPECT_FALSE(DecodeStepPlan(EncodeStepPlan(plan), kLimits).ok());
  plan.segments.clear();
  EXPECT_FALSE(DecodeStepPlan(EncodeStepPlan(plan), kLimits).ok());
}

TEST(StepPlanTest, ADecodeStepOfManySequencesIsSmall) {
  StepPlan plan{.kind = StepKind::kRun, .step = 1 << 20};
  for (int slot = 0; slot < 64; ++slot) {
    plan.segments.push_back(
        {.slot = slot, .first_position = 1000 + slot, .logits = LogitsNeed::kLast, .tokens = {30000}});
  }
  EXPECT_LT(EncodeStepPlan(plan).size(), 640u);
}

TEST(StepPlanTest, RefusesWhatItsLimitsForbid) {
  const auto refused = [](auto change) {
    StepPlan plan = Example();
    change(plan);
    return !DecodeStepPlan(EncodeStepPlan(plan), kLimits).ok();
  };
  EXPECT_FALSE(refused([](StepPlan&) {}));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].slot = 8; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].slot = 1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].tokens[0] = 1000; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].tokens.clear(); }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].tokens.resize(64); }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].new_blocks[0] = 100; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[1].tokens.push_back(1); }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].slot = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].tokens[0] = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].first_position = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments[0].new_blocks.resize(101); }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.cleared_slots[0] = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.cleared_slots[0] = 8; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.cleared_slots[0] = 7; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.kind = static_cast<StepKind>(4); }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.kind = StepKind::kStop; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments.clear(); }));
}

TEST(StepPlanTest, ErrorsNameTheFieldAndItsLimit) {
  StepPlan plan = Example();
  plan.segments[0].tokens[1] = 1234;
  EXPECT_EQ(DecodeStepPlan(EncodeStepPlan(plan), kLimits).status().message(),
            "step plan: token 1234 is not below 1000");
}

TEST(StepPlanTest, RefusesEveryOtherLength) {
  const std::string whole = EncodeStepPlan(Example());
  for (size_t length = 0; length < whole.size(); ++length) {
    EXPECT_FALSE(DecodeStepPlan(whole.substr(0, length), kLimits).ok()) << length;
  }
  EXPECT_FALSE(DecodeStepPlan(whole + '\0', kLimits).ok());
}

TEST(StepPlanTest, RefusesNumbersBeyond64Bits) {
  // kHeartbeat, the step, no slots, no segments: the largest step in ten bytes, then one with a bit more, then one
  // without end.
  const auto with_step = [](std::string step) {
    return static_cast<char>(StepKind::kHeartbeat) + step + std::string(2, '\0');
  };
  EXPECT_TRUE(DecodeStepPlan(with_step("\xfe" + std::string(8, '\xff') + "\x01"), kLimits).ok());
  EXPECT_FALSE(DecodeStepPlan(with_step(std::string(9, '\xff') + "\x02"), kLimits).ok());
  EXPECT_FALSE(DecodeStepPlan(with_step(std::string(40, '\xff')), kLimits).ok());
}

TEST(StepPlanTest, RandomPlansSurvive) {
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % n); };
    StepPlan plan{.kind = StepKind::kRun, .step = random() >> below(64)};
    for (int32_t slot = 0; slot < kLimits.slot_count; ++slot) {
      if (below(3) == 0) plan.cleared_slots.push_back(slot);
      if (slot > 0 && below(2) == 0) continue;
      StepSegment segment{.slot = slot, .logits = static_cast<LogitsNeed>(below(3)), .tokens = {}, .new_blocks = {}};
      segment.tokens.resize(1 + below(kLimits.max_rows / kLimits.slot_count));
      for (int32_t& token : segment.tokens) token = below(kLimits.vocab_size);
      segment.first_position = below(kLimits.max_positions - static_cast<int32_t>(segment.tokens.size()) + 1);
      segment.new_blocks.resize(below(4));
      for (int32_t& block : segment.new_blocks) block = below(kLimits.block_count);
      plan.segments.push_back(std::move(segment));
    }
    const auto decoded = DecodeStepPlan(EncodeStepPlan(plan), kLimits);
    ASSERT_TRUE(decoded.ok()) << "seed " << seed << ": " << decoded.status();
    ASSERT_EQ(*decoded, plan) << "seed " << seed;
  }
}

TEST(StepPlanTest, MutatedBytesNeverCrashOrPassTheLimits) {
  const std::string whole = EncodeStepPlan(Example());
  std::mt19937_64 random(3);
  int accepted = 0;
  for (int round = 0; round < 50000; ++round) {
    std::string bytes = whole;
    for (int i = 0; i < 1 + static_cast<int>(random() % 4); ++i)
      bytes[random() % bytes.size()] = static_cast<char>(random());
    if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 1));
    const auto plan = DecodeStepPlan(bytes, kLimits);
    if (!plan.ok()) continue;
    ++accepted;
    int32_t rows = 0;
    std::set<int32_t> slots;
    for (const int32_t slot : plan->cleared_slots) ASSERT_LT(static_cast<uint32_t>(slot), 8u);
    for (const StepSegment& segment : plan->segments) {
      ASSERT_LT(static_cast<uint32_t>(segment.slot), 8u);
      ASSERT_TRUE(slots.insert(segment.slot).second) << "slot " << segment.slot << " twice";
      ASSERT_GE(segment.first_position, 0);
      ASSERT_FALSE(segment.tokens.empty());
      ASSERT_LE(segment.first_position + segment.tokens.size(), 200u);
      for (const int32_t token : segment.tokens) ASSERT_LT(static_cast<uint32_t>(token), 1000u);
      for (const int32_t block : segment.new_blocks) ASSERT_LT(static_cast<uint32_t>(block), 100u);
      rows += static_cast<int32_t>(segment.tokens.size());
    }
    ASSERT_LE(rows, 64);
    ASSERT_EQ(*DecodeStepPlan(EncodeStepPlan(*plan), kLimits), *plan);
  }
  EXPECT_GT(accepted, 1000);
}

}  // namespace
}  // namespace rankwise
