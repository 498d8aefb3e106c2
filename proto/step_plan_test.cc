#include "proto/step_plan.h"

#include <gtest/gtest.h>

#include <random>

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
  EXPECT_TRUE(refused([](StepPlan& p) { p.cleared_slots[0] = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.kind = StepKind::kStop; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.segments.clear(); }));
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
    for (const StepSegment& segment : plan->segments) {
      ASSERT_LT(segment.slot, kLimits.slot_count);
      ASSERT_LE(segment.first_position + segment.tokens.size(), static_cast<size_t>(kLimits.max_positions));
      for (const int32_t token : segment.tokens) ASSERT_LT(static_cast<uint32_t>(token), 1000u);
      for (const int32_t block : segment.new_blocks) ASSERT_LT(static_cast<uint32_t>(block), 100u);
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace rankwise
