#include "worker/scheduler/block_ledger.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace rankwise::scheduler {
namespace {

using ::testing::ElementsAre;

constexpr int32_t kTokens[][2] = {{1, 2}, {3, 4}, {5, 6}};

TEST(BlockLedger, HandsOutEachBlockOnce) {
  BlockLedger ledger(3, 2);
  EXPECT_THAT((std::vector{ledger.Take(), ledger.Take(), ledger.Take()}), ElementsAre(0, 1, 2));
  EXPECT_EQ(ledger.available(), 0);
  ledger.Release(1);
  EXPECT_EQ(ledger.Take(), 1);
  ledger.Check(std::vector{1, 1, 1});
}

TEST(BlockLedger, FindsAPublishedBlockByItsTokensAndAllBeforeThem) {
  BlockLedger ledger(4, 2);
  const int32_t first = ledger.Take(), second = ledger.Take();
  EXPECT_EQ(ledger.Publish(first, kNoBlock, kTokens[0]), first);
  EXPECT_EQ(ledger.Publish(second, first, kTokens[1]), second);
  EXPECT_EQ(ledger.Find(kNoBlock, kTokens[0]), first);
  EXPECT_EQ(ledger.Find(first, kTokens[1]), second);
  EXPECT_EQ(ledger.Find(kNoBlock, kTokens[1]), kNoBlock) << "the same tokens at another place are another prefix";
  EXPECT_EQ(ledger.Find(first, kTokens[2]), kNoBlock);
}

// With one bucket per block and 4,096 records, every bucket holds unequal records: what is found must still be equal.
TEST(BlockLedger, EqualHashesOfUnequalTokensShareNothing) {
  constexpr int32_t kCount = 4096;
  BlockLedger ledger(kCount, 2);
  for (int32_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(ledger.Find(kNoBlock, std::vector{i % 64, i / 64}), kNoBlock) << i;
    ASSERT_EQ(ledger.Publish(ledger.Take(), kNoBlock, std::vector{i % 64, i / 64}), i);
  }
  for (int32_t i = 0; i < kCount; ++i) ASSERT_EQ(ledger.Find(kNoBlock, std::vector{i % 64, i / 64}), i);
}

TEST(BlockLedger, AnEqualBlockReplacesTheCallers) {
  BlockLedger ledger(3, 2);
  const int32_t ours = ledger.Take(), theirs = ledger.Take();
  ledger.Publish(ours, kNoBlock, kTokens[0]);
  EXPECT_EQ(ledger.Publish(theirs, kNoBlock, kTokens[0]), ours);
  ledger.Check(std::vector{2, 0, 0});
  EXPECT_EQ(ledger.available(), 2);
}

TEST(BlockLedger, EvictsTheLeastRecentlyUsedAndChildrenBeforeParents) {
  BlockLedger ledger(3, 2);
  const int32_t parent = ledger.Take(), child = ledger.Take(), other = ledger.Take();
  ledger.Publish(parent, kNoBlock, kTokens[0]);
  ledger.Publish(child, parent, kTokens[1]);
  ledger.Publish(other, kNoBlock, kTokens[2]);
  ledger.Release(child);
  ledger.Release(parent);
  ledger.Release(other);
  EXPECT_EQ(ledger.cached(), 3);
  ledger.Hold(parent);  // used again: now the youngest but for its child
  ledger.Release(parent);
  EXPECT_EQ(ledger.Take(), child);
  EXPECT_EQ(ledger.Take(), other);
  EXPECT_EQ(ledger.Find(kNoBlock, kTokens[2]), kNoBlock);
  EXPECT_EQ(ledger.Find(kNoBlock, kTokens[0]), parent);
  EXPECT_EQ(ledger.Take(), parent);
  EXPECT_EQ(ledger.available(), 0);
  ledger.Check(std::vector{1, 1, 1});
}

TEST(BlockLedger, UnusedBlocksGoBeforeCachedOnes) {
  BlockLedger ledger(2, 2);
  const int32_t published = ledger.Take();
  ledger.Publish(published, kNoBlock, kTokens[0]);
  ledger.Release(published);
  EXPECT_NE(ledger.Take(), published);
  EXPECT_EQ(ledger.cached(), 1);
}

TEST(BlockLedgerDeathTest, RefusesMisuse) {
  BlockLedger ledger(2, 2);
  const int32_t parent = ledger.Take(), child = ledger.Take();
  EXPECT_DEATH(ledger.Take(), "available");
  EXPECT_DEATH(ledger.Publish(child, parent, kTokens[1]), "is_published");
  EXPECT_DEATH(ledger.Check(std::vector{1, 2}), "block 1 has 1 references and 2 holders");
  ledger.Publish(parent, kNoBlock, kTokens[0]);
  ledger.Publish(child, parent, kTokens[1]);
  ledger.Release(parent);
  EXPECT_DEATH(ledger.Release(parent), "block 0 is released but not held");
  EXPECT_DEATH(ledger.Check(std::vector{0, 1}), "children of block 0 are held without it");
  EXPECT_DEATH(ledger.Take(), "block 0 is evicted before its children");
}

}  // namespace
}  // namespace rankwise::scheduler
