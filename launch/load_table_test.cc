#include "launch/load_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace rankwise::launch {
namespace {

using rankwise::v1::GetLoadResponse;
using rankwise::v1::GroupLoad;
using ::testing::HasSubstr;
using ::testing::Not;

GroupLoad& AddGroup(GetLoadResponse& load, uint64_t group, uint64_t epoch, uint64_t steps, uint64_t generated) {
  GroupLoad& g = *load.add_groups();
  g.set_group(group);
  g.set_epoch(epoch);
  g.set_serving(true);
  g.set_steps(steps);
  g.set_generated_tokens(generated);
  g.set_prompt_tokens(10 * generated);
  g.set_step_seconds(0.004);
  g.set_blocks_total(100);
  g.set_blocks_free(25);
  return g;
}

TEST(Rates, AreOfTheSameEpochAlone) {
  GetLoadResponse before, after;
  AddGroup(before, 0, 1, 100, 1000);
  AddGroup(before, 1, 2, 100, 1000);
  AddGroup(after, 0, 1, 300, 1500);
  AddGroup(after, 1, 3, 50, 200);  // started again
  const auto rates = RatesBetween(before, after, absl::Seconds(2));
  ASSERT_EQ(rates.size(), 1u);
  EXPECT_EQ(rates.at(1).generated, 250);
  EXPECT_EQ(rates.at(1).prompt, 2500);
  EXPECT_EQ(rates.at(1).steps, 100);
  EXPECT_EQ(rates.at(1).step_ms, 4);
  EXPECT_TRUE(RatesBetween(before, after, absl::ZeroDuration()).empty());
}

TEST(Rates, OfAnIdleGroupAreZero) {
  GetLoadResponse load;
  AddGroup(load, 0, 1, 100, 1000);
  const auto rates = RatesBetween(load, load, absl::Seconds(1));
  EXPECT_EQ(rates.at(1).generated, 0);
  EXPECT_EQ(rates.at(1).step_ms, 0);
}

TEST(RateTable, ShowsBarsAndTheSum) {
  GetLoadResponse load;
  AddGroup(load, 0, 1, 0, 0);
  AddGroup(load, 1, 2, 0, 0).set_serving(false);
  const std::string table = RateTable(load, {{1, {.generated = 100.5}}, {2, {.generated = 200}}});
  EXPECT_THAT(table, HasSubstr("[###############.....]  75 %"));
  EXPECT_THAT(table, HasSubstr("not serving"));
  EXPECT_THAT(table, HasSubstr("all groups      300.5"));
}

TEST(Tables, NameWhatIsThere) {
  GetLoadResponse load;
  load.set_live(3);
  load.set_max_live(9);
  load.set_draining(true);
  GroupLoad& group = AddGroup(load, 7, 8, 5, 6);
  auto& rank = *group.add_ranks();
  rank.set_rank(1);
  rank.set_host("node-17");
  rank.set_weight_bytes(3 << 19);
  EXPECT_EQ(RequestsLine(load), "requests 3 live of 9, 0 queued, draining\n");
  EXPECT_THAT(GroupTable(load), HasSubstr("25/100"));
  group.set_drafted_tokens(40);
  group.set_accepted_tokens(31);
  EXPECT_THAT(GroupTable(load), HasSubstr(" 31/40\n"));
  EXPECT_THAT(RankTable(load), HasSubstr("node-17"));
  EXPECT_THAT(RankTable(load), HasSubstr("1.5 MiB"));
  EXPECT_EQ(SaturationLines(load), "");
  rank.set_saturated_values(4);
  rank.add_saturated_by_layer(0);
  rank.add_saturated_by_layer(4);
  EXPECT_THAT(SaturationLines(load), HasSubstr("group 7, rank 1: 4 K and V values"));
  EXPECT_THAT(SaturationLines(load), HasSubstr("4 in layer 1"));
  EXPECT_THAT(SaturationLines(load), Not(HasSubstr("layer 0")));
}

TEST(RankTable, ShowsWhoKeepsTheOthersWaiting) {
  GetLoadResponse load;
  GroupLoad& group = AddGroup(load, 0, 1, 5, 6);
  for (const double compute : {0.002, 0.006}) {
    auto& rank = *group.add_ranks();
    rank.set_recent_steps(10);
    rank.set_step_compute_seconds(compute);
    rank.set_step_collective_seconds(0.007 - compute);
  }
  EXPECT_THAT(RankTable(load), HasSubstr("2.000    5.000   -50%"));
  EXPECT_THAT(RankTable(load), HasSubstr("6.000    1.000   +50%"));
  group.mutable_ranks(1)->set_recent_steps(0);
  EXPECT_THAT(RankTable(load), Not(HasSubstr("+50%")));
}

TEST(ModelLines, NameTheArithmetic) {
  rankwise::v1::GetModelInfoResponse model;
  model.set_kv_format("int8");
  model.set_kv_scales_id("27ba");
  model.set_activations("float");
  EXPECT_THAT(ModelLines(model), HasSubstr("kv int8 (scales 27ba), up to"));
  model.set_activations("int8");
  EXPECT_THAT(ModelLines(model), HasSubstr("kv int8 (scales 27ba), int8 activations, up to"));
  model.set_activations("bf16");
  EXPECT_THAT(ModelLines(model), HasSubstr("kv int8 (scales 27ba), bf16 activations, up to"));
}

TEST(CacheLine, ComparesWithF16) {
  GetLoadResponse load;
  GroupLoad& group = AddGroup(load, 0, 1, 0, 0);
  group.set_block_tokens(16);
  group.add_ranks()->set_kv_bytes(1600 * 64);
  rankwise::v1::GetModelInfoResponse model;
  EXPECT_EQ(CacheLine(model, load), "");
  model.set_n_layers(2);
  model.set_n_kv_heads(2);
  model.set_head_dim(8);
  model.set_tp(1);
  EXPECT_THAT(CacheLine(model, load), HasSubstr("1600 tokens, 64 bytes each over all ranks; as f16 it would be 128"));
}

}  // namespace
}  // namespace rankwise::launch
