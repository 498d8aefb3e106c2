#include "coordinator/cluster/fair_share.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace rankwise::cluster {
namespace {

TEST(FairShareTest, WhoComesToWaitIsLiftedToTheLeastOfThoseThatWait) {
  FairShare share;
  share.Arrive("a");
  share.Pay("a", 100);
  share.Arrive("b");
  EXPECT_EQ(share.paid("b"), 100);
  share.Pay("b", 50);
  share.Arrive("c");
  EXPECT_EQ(share.paid("c"), 100);
}

TEST(FairShareTest, ATenantKeepsWhatItPaidBeyondThat) {
  FairShare share;
  share.Arrive("greedy");
  share.Pay("greedy", 1000);
  share.Arrive("modest");  // lifted: both waited
  share.Depart("greedy");
  share.Pay("greedy", 500);
  share.Pay("modest", 10);
  share.Arrive("greedy");
  EXPECT_EQ(share.paid("greedy"), 1500);
  EXPECT_EQ(share.paid("modest"), 1010);
}

TEST(FairShareTest, AnEmptyQueueIsNoFreshStart) {
  FairShare share;
  share.Arrive("a");
  share.Pay("a", 300);
  share.Depart("a");
  share.Arrive("b");
  EXPECT_EQ(share.paid("b"), 300);
}

TEST(FairShareTest, SeveralSequencesOfOneTenantWaitAsOne) {
  FairShare share;
  share.Arrive("a");
  share.Arrive("a");
  share.Depart("a");
  share.Pay("a", 7);
  share.Arrive("b");
  EXPECT_EQ(share.paid("b"), 7);  // "a" still waits
}

TEST(FairShareTest, InventedNamesAreForgotten) {
  FairShare share;
  share.Arrive("rich");
  share.Pay("rich", 1'000'000);
  for (int i = 0; i < 100'000; ++i) {
    const std::string name = absl::StrCat("t", i);
    share.Arrive(name);
    share.Depart(name);
  }
  EXPECT_LE(share.size(), size_t{1} << 14);
  EXPECT_EQ(share.paid("rich"), 1'000'000);
}

}  // namespace
}  // namespace rankwise::cluster
