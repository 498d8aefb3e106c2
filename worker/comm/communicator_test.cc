#include "worker/comm/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "worker/comm/communicator_test_groups.h"

namespace rankwise::comm {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;

constexpr absl::Duration kTimeout = absl::Seconds(20);
constexpr int64_t kCounts[] = {0, 1, 7, 1024, 65537, 1 << 20};

class CommunicatorTest : public testing::TestWithParam<TestGroup> {
 protected:
  void OnEachRank(const std::function<void(Communicator&)>& body) { RunOnRanks(GetParam(), body); }
};

INSTANTIATE_TEST_SUITE_P(Groups, CommunicatorTest, testing::ValuesIn(TestGroups()), [](const auto& group) {
  std::string kind = group.param.kind;
  std::erase(kind, ' ');
  return group.param.size == 0 ? kind : absl::StrCat(kind, group.param.size);
});

// Magnitudes from 2^-16 to 2^16, so that another order of additions gives other bits.
std::vector<float> RandomValues(int rank, int64_t count) {
  std::mt19937 random(1000 + rank);
  std::vector<float> values(count);
  for (float& value : values) {
    const uint32_t bits = random();
    value = std::ldexp(static_cast<float>((bits & 0xffffff) | 1), static_cast<int>(bits >> 24 & 31) - 40);
    if (bits >> 31) value = -value;
  }
  return values;
}

// The order that AllReduceSum promises, as its comment has it.
float SumOfRanks(const std::vector<std::vector<float>>& ranks, size_t first, size_t count, int64_t element) {
  if (count == 1) return ranks[first][element];
  const size_t split = std::bit_floor(count - 1);
  return SumOfRanks(ranks, first, split, element) + SumOfRanks(ranks, first + split, count - split, element);
}

std::vector<float> RandomSum(int size, int64_t count) {
  std::vector<std::vector<float>> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.push_back(RandomValues(rank, count));
  std::vector<float> sum(count);
  for (int64_t i = 0; i < count; ++i) sum[i] = SumOfRanks(ranks, 0, size, i);
  return sum;
}

bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

std::string Pattern(int64_t size, int seed) {
  std::string text(size, '\0');
  for (int64_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 131 + i / 251 + seed);
  return text;
}

TEST(CommunicatorTestDataTest, RandomSumDependsOnTheOrder) {
  const std::vector<float> tree = RandomSum(4, 1024);
  std::vector<float> in_line(1024);
  for (int rank = 0; rank < 4; ++rank) {
    const std::vector<float> values = RandomValues(rank, 1024);
    for (size_t i = 0; i < values.size(); ++i) in_line[i] += values[i];
  }
  EXPECT_FALSE(SameBits(tree, in_line));
}

TEST_P(CommunicatorTest, KnowsItsPlace) {
  OnEachRank([&](Communicator& group) {
    EXPECT_GE(group.rank(), 0);
    EXPECT_LT(group.rank(), group.size());
    EXPECT_EQ(group.Description(),
              absl::StrCat(GetParam().kind, ", ", group.size(), group.size() == 1 ? " rank" : " ranks"));
  });
}

TEST_P(CommunicatorTest, AllReduceSumOfIntegersIsExact) {
  OnEachRank([](Communicator& group) {
    const int ranks = group.size();
    for (const int64_t count : kCounts) {
      std::vector<float> values(count);
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 1000 * (group.rank() + 1));
      ASSERT_TRUE(group.AllReduceSum(values, kTimeout).ok()) << count;
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(values[i], i % 1000 * ranks * (ranks + 1) / 2) << i;
    }
  });
}

TEST_P(CommunicatorTest, AllReduceSumAddsInTheOrderOfTheTree) {
  OnEachRank([](Communicator& group) {
    for (const int64_t count : kCounts) {
      std::vector<float> values = RandomValues(group.rank(), count);
      ASSERT_TRUE(group.AllReduceSum(values, kTimeout).ok()) << count;
      EXPECT_TRUE(SameBits(values, RandomSum(group.size(), count))) << count;
    }
  });
}

TEST_P(CommunicatorTest, AllReduceSumGivesTheSameBitsToAllRanks) {
  OnEachRank([](Communicator& group) {
    for (const int64_t count : kCounts) {
      std::vector<float> values = RandomValues(group.rank(), count);
      ASSERT_TRUE(group.AllReduceSum(values, kTimeout).ok()) << count;
      const std::vector<int64_t> part_counts(group.size(), count);
      std::vector<float> all(group.rank() == 0 ? count * group.size() : 0);
      ASSERT_TRUE(group.Gather(values, part_counts, all, kTimeout).ok()) << count;
      for (int64_t begin = 0; begin < std::ssize(all); begin += count) {
        EXPECT_TRUE(SameBits(std::span(all).subspan(begin, count), values)) << count;
      }
    }
  });
}

TEST_P(CommunicatorTest, AllReduceSumOfAnElementDoesNotDependOnTheCount) {
  OnEachRank([](Communicator& group) {
    const std::vector<float> all = RandomSum(group.size(), 65537);
    for (const int64_t count : {1, 2, 3, 1023, 65536}) {
      std::vector<float> values = RandomValues(group.rank(), count);
      ASSERT_TRUE(group.AllReduceSum(values, kTimeout).ok());
      EXPECT_TRUE(SameBits(values, std::span(all).first(count))) << count;
    }
  });
}

TEST_P(CommunicatorTest, CollectivesOfDifferentSizesFollowEachOther) {
  OnEachRank([](Communicator& group) {
    const std::vector<float> small_sum = RandomSum(group.size(), 3);
    const std::vector<float> large_sum = RandomSum(group.size(), 40000);
    for (int round = 0; round < 100; ++round) {
      std::vector<float> small = RandomValues(group.rank(), 3);
      std::vector<float> large = RandomValues(group.rank(), 40000);
      std::string plan = group.rank() == 0 ? Pattern(round * 100, round) : "";
      ASSERT_TRUE(group.Broadcast(plan, kTimeout).ok());
      ASSERT_TRUE(group.AllReduceSum(small, kTimeout).ok());
      ASSERT_TRUE(group.AllReduceSum(large, kTimeout).ok());
      ASSERT_EQ(plan, Pattern(round * 100, round));
      ASSERT_TRUE(SameBits(small, small_sum));
      ASSERT_TRUE(SameBits(large, large_sum));
    }
  });
}

// 4024 bytes fill the packet that a message starts with under MPI.
TEST_P(CommunicatorTest, BroadcastBringsEveryByte) {
  OnEachRank([](Communicator& group) {
    std::string message;
    for (const int64_t size : {0, 1, 4023, 4024, 4025, 4095, 4096, 4097, 1 << 20, 5, 0}) {
      message = group.rank() == 0 ? Pattern(size, 3) : Pattern(17, group.rank());
      ASSERT_TRUE(group.Broadcast(message, kTimeout).ok()) << size;
      ASSERT_EQ(std::ssize(message), size);
      EXPECT_TRUE(message == Pattern(size, 3)) << size;
    }
  });
}

TEST_P(CommunicatorTest, GatherPutsUnevenPartsInRankOrder) {
  OnEachRank([](Communicator& group) {
    for (const int64_t scale : {1, 1000, 50000}) {
      std::vector<int64_t> part_counts(group.size());
      for (int rank = 0; rank < group.size(); ++rank) part_counts[rank] = (rank + 2) % 3 * scale;
      std::vector<float> part(part_counts[group.rank()]);
      std::iota(part.begin(), part.end(), static_cast<float>(group.rank() * 1000000));
      const int64_t total = std::accumulate(part_counts.begin(), part_counts.end(), int64_t{0});
      std::vector<float> all(group.rank() == 0 ? total : 0);
      ASSERT_TRUE(group.Gather(part, part_counts, all, kTimeout).ok());
      if (group.rank() != 0) continue;
      auto value = all.begin();
      for (int rank = 0; rank < group.size(); ++rank) {
        for (int64_t i = 0; i < part_counts[rank]; ++i) ASSERT_EQ(*value++, rank * 1000000 + i);
      }
    }
  });
}

TEST_P(CommunicatorTest, GatherMessagesKeepsRankOrder) {
  OnEachRank([](Communicator& group) {
    for (const int64_t scale : {1, 4024, 100000}) {
      std::vector<std::string> messages(3, "old");
      ASSERT_TRUE(group.GatherMessages(Pattern(group.rank() * scale, group.rank()), messages, kTimeout).ok());
      ASSERT_EQ(std::ssize(messages), group.rank() == 0 ? group.size() : 0);
      for (size_t rank = 0; rank < messages.size(); ++rank) {
        EXPECT_TRUE(messages[rank] == Pattern(static_cast<int64_t>(rank) * scale, static_cast<int>(rank))) << rank;
      }
    }
  });
}

TEST_P(CommunicatorTest, BarrierLetsAllPassWhenAllCame) {
  OnEachRank([](Communicator& group) {
    for (int round = 0; round < 100; ++round) ASSERT_TRUE(group.Barrier(kTimeout).ok()) << round;
  });
}

// Sums come first.
enum class Call { kAllReduceSum, kLargeAllReduceSum, kGather, kBroadcast, kLargeBroadcast, kGatherMessages, kBarrier };

// The memory of a call that fails must stay, hence thread_local: under MPI the thread is the main one.
absl::Status Make(Call call, Communicator& group, absl::Duration timeout) {
  thread_local std::vector<float> values;
  thread_local std::string message;
  thread_local std::vector<std::string> messages;
  thread_local std::vector<float> all;
  values.resize(65537);
  message.resize(1 << 20);
  const std::span<float> few = std::span(values).first(4);
  switch (call) {
    case Call::kAllReduceSum:
      return group.AllReduceSum(few, timeout);
    case Call::kLargeAllReduceSum:
      return group.AllReduceSum(values, timeout);
    case Call::kGather:
      all.resize(group.rank() == 0 ? 4 * group.size() : 0);
      return group.Gather(few, std::vector<int64_t>(group.size(), 4), all, timeout);
    case Call::kBroadcast:
      message.resize(100);
      return group.Broadcast(message, timeout);
    case Call::kLargeBroadcast:
      return group.Broadcast(message, timeout);
    case Call::kGatherMessages:
      return group.GatherMessages(message, messages, timeout);
    case Call::kBarrier:
      return group.Barrier(timeout);
  }
  return absl::UnknownError("no such call");
}

constexpr Call kCalls[] = {Call::kAllReduceSum,   Call::kLargeAllReduceSum, Call::kGather, Call::kBroadcast,
                           Call::kLargeBroadcast, Call::kGatherMessages,    Call::kBarrier};

// Which calls cannot succeed on `rank` without `missing`, whatever the transport. (MPI may accept a message for a rank
// that has not come.)
bool MustNotice(Call call, int rank, int missing) {
  switch (call) {
    case Call::kAllReduceSum:
    case Call::kLargeAllReduceSum:
    case Call::kBarrier:
      return true;
    case Call::kGather:
    case Call::kGatherMessages:
      return rank == 0;
    case Call::kBroadcast:
      return missing == 0;
    case Call::kLargeBroadcast:
      return rank == 0 || missing == 0;
  }
  return true;
}

TEST_P(CommunicatorTest, AMissingPeerEndsTheGroupAtTheDeadline) {
  constexpr absl::Duration kShort = absl::Milliseconds(50);
  for (const Call call : kCalls) {
    for (int missing = 0; missing < 5; ++missing) {
      if (GetParam().size != 0 && missing >= GetParam().size) continue;
      OnEachRank([&](Communicator& group) {
        if (group.size() == 1 || group.rank() == missing || missing >= group.size()) return;
        SCOPED_TRACE(absl::StrCat("call ", static_cast<int>(call), " on rank ", group.rank(), " without ", missing));
        const absl::Time start = absl::Now();
        const absl::Status status = Make(call, group, kShort);
        const absl::Duration waited = absl::Now() - start;
        if (!MustNotice(call, group.rank(), missing) && status.ok()) return;
        ASSERT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
        EXPECT_LT(waited, kShort + absl::Seconds(5));
        const bool names_them = GetParam().knows_peers || call > Call::kLargeAllReduceSum;
        EXPECT_THAT(std::string(status.message()),
                    ContainsRegex(names_them ? "^rank [0-9]: [A-Za-z]+: rank [0-9, ]+ did not come"
                                             : "^rank [0-9]: AllReduceSum: not done within 50ms"));
        for (const Call later : kCalls) EXPECT_EQ(Make(later, group, kTimeout), status);
        EXPECT_LT(absl::Now() - start, waited + absl::Seconds(5));
      });
    }
  }
}

TEST_P(CommunicatorTest, TheRanksMustBringTheSameCount) {
  OnEachRank([knows_peers = GetParam().knows_peers](Communicator& group) {
    if (group.size() == 1) return;
    std::vector<float> values(4 + group.rank());
    const absl::Status status = group.AllReduceSum(values, absl::Seconds(1));
    EXPECT_FALSE(status.ok());
    if (group.size() == 2 && knows_peers) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    }
    EXPECT_EQ(group.Barrier(kTimeout), status);
  });
}

TEST_P(CommunicatorTest, TheRanksMustCallTheSame) {
  OnEachRank([](Communicator& group) {
    if (group.size() == 1) return;
    const absl::Status status = Make(group.rank() == 0 ? Call::kBarrier : Call::kAllReduceSum, group, absl::Seconds(1));
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(group.Barrier(kTimeout), status);
  });
}

TEST_P(CommunicatorTest, AMessageOverTheLimitIsRefused) {
  OnEachRank([](Communicator& group) {
    std::string message(group.rank() == 0 ? Communicator::kMaxMessageBytes + 1 : 0, 'x');
    const absl::Status status = group.Broadcast(message, absl::Seconds(2));
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(group.Barrier(kTimeout), status);
    if (group.rank() != 0) return;
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("Broadcast: message of 67108865 bytes, at most 67108864"));
  });
}

}  // namespace
}  // namespace rankwise::comm
