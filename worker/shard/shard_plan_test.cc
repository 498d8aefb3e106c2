#include "worker/shard/shard_plan.h"

#include <gtest/gtest.h>

namespace rankwise::shard {
namespace {

constexpr Dims kStories = {.n_heads = 8, .n_kv_heads = 4, .head_dim = 8, .intermediate_size = 172, .vocab_size = 512};

TEST(ShardPlanTest, RanksTileEveryDimension) {
  for (const int world : {1, 2, 4, 8}) {
    ShardPlan last;
    for (int rank = 0; rank < world; ++rank) {
      const auto plan = PlanShard(kStories, {.rank = rank, .world_size = world});
      ASSERT_TRUE(plan.ok()) << plan.status();
      EXPECT_EQ(plan->heads.begin, rank == 0 ? 0 : last.heads.end);
      EXPECT_EQ(plan->intermediate.begin, rank == 0 ? 0 : last.intermediate.end);
      EXPECT_EQ(plan->vocab.begin, rank == 0 ? 0 : last.vocab.end);
      last = *plan;
    }
    EXPECT_EQ(last.heads.end, 8);
    EXPECT_EQ(last.intermediate.end, 172);
    EXPECT_EQ(last.vocab.end, 512);
    EXPECT_EQ(last.kv_heads.end, 4);
  }
}

TEST(ShardPlanTest, ChunksOfAllRanksAreThoseOfOne) {
  const auto whole = *PlanShard(kStories, {.rank = 0, .world_size = 1});
  EXPECT_EQ(SumChunks(kStories), 8);
  EXPECT_EQ(whole.w2_boundaries, (std::vector<int64_t>{0, 21, 43, 64, 86, 107, 129, 150, 172}));
  for (const int world : {2, 4, 8}) {
    std::vector<int64_t> wo = {0}, w2 = {0};
    for (int rank = 0; rank < world; ++rank) {
      const auto plan = *PlanShard(kStories, {.rank = rank, .world_size = world});
      for (size_t c = 1; c < plan.wo_boundaries.size(); ++c) wo.push_back(plan.heads.begin * 8 + plan.wo_boundaries[c]);
      for (size_t c = 1; c < plan.w2_boundaries.size(); ++c)
        w2.push_back(plan.intermediate.begin + plan.w2_boundaries[c]);
    }
    EXPECT_EQ(wo, whole.wo_boundaries) << "tp " << world;
    EXPECT_EQ(w2, whole.w2_boundaries) << "tp " << world;
  }
}

TEST(ShardPlanTest, KvHeadsAreSharedWhenRanksOutnumberThem) {
  for (int rank = 0; rank < 8; ++rank) {
    const auto plan = *PlanShard(kStories, {.rank = rank, .world_size = 8});
    EXPECT_EQ(plan.heads, (Range{rank, rank + 1}));
    EXPECT_EQ(plan.kv_heads, (Range{rank / 2, rank / 2 + 1}));
  }
}

TEST(ShardPlanTest, OtherDegreesSumOneChunkPerRank) {
  const Dims dims = {.n_heads = 6, .n_kv_heads = 3, .head_dim = 4, .intermediate_size = 10, .vocab_size = 7};
  const auto plan = *PlanShard(dims, {.rank = 1, .world_size = 3});
  EXPECT_EQ(plan.wo_boundaries, (std::vector<int64_t>{0, 8}));
  EXPECT_EQ(plan.w2_boundaries, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(plan.intermediate, (Range{3, 6}));
}

TEST(ShardPlanTest, RefusesInWords) {
  const auto message = [](const Dims& dims, int world) {
    return std::string(PlanShard(dims, {.rank = 0, .world_size = world}).status().message());
  };
  EXPECT_EQ(message(kStories, 3), "tp=3 does not divide n_heads=8");
  EXPECT_EQ(message({.n_heads = 12, .n_kv_heads = 6, .head_dim = 4, .intermediate_size = 64, .vocab_size = 64}, 4),
            "tp=4 and n_kv_heads=6 do not divide one another");
  EXPECT_EQ(message({.n_heads = 8, .n_kv_heads = 8, .head_dim = 4, .intermediate_size = 4, .vocab_size = 64}, 8),
            "tp=8 exceeds intermediate_size=4 or vocab_size=64");
  EXPECT_FALSE(PlanShard(kStories, {.rank = 2, .world_size = 2}).ok());
}

}  // namespace
}  // namespace rankwise::shard
