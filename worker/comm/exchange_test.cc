#include "worker/comm/exchange.h"

#include <gtest/gtest.h>

#include <functional>
#include <thread>

namespace rankwise::comm {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(20);

using Answers = absl::StatusOr<std::vector<std::string>>;

// What each of three ranks gets when rank r brings `bring(r)`.
std::vector<Answers> ExchangeOfThree(const std::function<absl::StatusOr<std::string>(int rank)>& bring) {
  const auto ranks = CreateThreadCommunicators(3);
  std::vector<Answers> results(3, absl::UnknownError("not called"));
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < 3; ++r) threads.emplace_back([&, r] { results[r] = Exchange(bring(r), *ranks[r], kTimeout); });
  }
  return results;
}

TEST(ExchangeTest, EveryRankGetsAllTextsInOrder) {
  const std::vector<std::string> expected = {"", "a|b", "2"};
  for (const Answers& answers : ExchangeOfThree([&](int rank) { return expected[rank]; })) {
    ASSERT_TRUE(answers.ok()) << answers.status();
    EXPECT_EQ(*answers, expected);
  }
}

TEST(ExchangeTest, TheFirstErrorIsEverybodysAndNamesItsRank) {
  const auto bring = [](int rank) -> absl::StatusOr<std::string> {
    if (rank == 0) return "fine";
    return absl::NotFoundError(rank == 1 ? "no\nGPU" : "no driver");
  };
  for (const Answers& answers : ExchangeOfThree(bring)) {
    EXPECT_EQ(answers.status(), absl::NotFoundError("rank 1: no GPU"));
  }
}

TEST(ExchangeTest, WhatAllSayIsSaidOnce) {
  for (const Answers& answers : ExchangeOfThree([](int) { return absl::NotFoundError("no driver"); })) {
    EXPECT_EQ(answers.status(), absl::NotFoundError("no driver"));
  }
}

TEST(ExchangeTest, AgreeIsOkOnlyWhenAllAre) {
  for (const bool is_last_ok : {true, false}) {
    const auto ranks = CreateThreadCommunicators(2);
    std::vector<absl::Status> results(2, absl::UnknownError("not called"));
    {
      std::jthread peer(
          [&] { results[1] = Agree(is_last_ok ? absl::OkStatus() : absl::AbortedError("x"), *ranks[1], kTimeout); });
      results[0] = Agree(absl::OkStatus(), *ranks[0], kTimeout);
    }
    EXPECT_EQ(results[0], is_last_ok ? absl::OkStatus() : absl::AbortedError("rank 1: x"));
    EXPECT_EQ(results[1], results[0]);
  }
}

}  // namespace
}  // namespace rankwise::comm
