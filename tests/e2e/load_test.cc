// 32 streams at once for RANKWISE_E2E_SECONDS (5 by default), with random cancels and deadlines: no error but the
// expected ones, every block comes back, and each finished stream equals its solo run.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

constexpr int kStreams = 32;
constexpr uint64_t kRequests = 24;  // different ones, so that solo runs are few

absl::Duration Length() {
  int seconds = 5;
  if (const char* text = std::getenv("RANKWISE_E2E_SECONDS")) RW_CHECK(absl::SimpleAtoi(text, &seconds));
  return absl::Seconds(seconds);
}

GenerateRequest RequestOf(uint64_t index) {
  static const char* const kPrompts[] = {"Once upon a time", "The old king had", "\"Who are you?\" said the fox. ",
                                         "In the middle of the forest there stood"};
  GenerateRequest request = Sampled(kPrompts[index % 4], 20 + static_cast<uint32_t>(index * 5), index);
  if (index % 3 == 0) request.mutable_sampling()->set_temperature(0);
  if (index % 5 == 0) request.mutable_sampling()->set_repetition_penalty(1.2f);
  return request;
}

struct Tally {
  absl::Mutex mutex;
  std::map<uint64_t, Reply> finished;  // the first of each request
  std::vector<std::string> errors;
  std::atomic<int> whole = 0, cancelled = 0, late = 0;
};

enum class Fate { kWhole, kCancelled, kLate };

void RunOne(rankwise::v1::Inference::Stub& stub, std::mt19937_64& random, Tally& tally) {
  const uint64_t index = random() % kRequests;
  const auto fate = static_cast<Fate>(std::array{0, 0, 0, 1, 2}[random() % 5]);
  const size_t cancel_at = random() % 20;
  CallOptions options;
  if (fate == Fate::kCancelled)
    options.should_cancel = [&](const Reply& reply) { return reply.ids.size() > cancel_at; };
  if (fate == Fate::kLate) options.deadline = absl::Milliseconds(1 + static_cast<int64_t>(random() % 400));
  const Reply reply = Generate(stub, RequestOf(index), options);

  const bool is_expected_end = (fate == Fate::kCancelled && absl::IsCancelled(reply.status)) ||
                               (fate == Fate::kLate && absl::IsDeadlineExceeded(reply.status));
  absl::MutexLock lock(&tally.mutex);
  if (is_expected_end) {
    ++(fate == Fate::kLate ? tally.late : tally.cancelled);
  } else if (!reply.status.ok() || !reply.finish || reply.has_gap) {
    tally.errors.push_back(absl::StrCat("request ", index, ": ", reply.status.ToString()));
  } else if (reply.finish->reason() == rankwise::v1::FINISH_REASON_DEADLINE && fate == Fate::kLate) {
    ++tally.late;
  } else {
    ++tally.whole;
    const auto [first, is_new] = tally.finished.emplace(index, reply);
    if (!is_new && first->second.ids != reply.ids)
      tally.errors.push_back(absl::StrCat("request ", index, " differs from itself"));
  }
}

TEST(Load, ThirtyTwoStreamsWithCancelsAndDeadlines) {
  // Less cache than 32 requests need, so that some are preempted.
  const auto cluster =
      Serve({.tp = 2, .kv = "int8-head", .worker_flags = {"--kv-memory", "320K", "--max-tokens", "256"}});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto& stub = (*cluster)->stub();
  const uint64_t seed = std::random_device()();
  RecordProperty("seed", absl::StrCat(seed));
  Tally tally;
  std::atomic<bool> is_over = false;
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i)
    threads.emplace_back([&, random = std::mt19937_64(seed + static_cast<uint64_t>(i))]() mutable {
      while (!is_over) RunOne(stub, random, tally);
    });
  // A slow machine may need longer until something is preempted.
  const absl::Time end = absl::Now() + Length();
  const auto has_preempted = [&] {
    const auto load = Load(stub);
    return load.ok() && load->groups_size() == 1 && load->groups(0).preemptions() > 0;
  };
  while (absl::Now() < end || (!has_preempted() && absl::Now() < end + kPatience))
    absl::SleepFor(absl::Milliseconds(100));
  is_over = true;
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : tally.errors) ADD_FAILURE() << error << " (seed " << seed << ")";
  const absl::Status idle = WaitIdle(stub);
  EXPECT_TRUE(idle.ok()) << idle;
  EXPECT_EQ((*cluster)->failures(), 0);
  const auto load = Load(stub);
  ASSERT_TRUE(load.ok()) << load.status();
  ASSERT_EQ(load->groups_size(), 1);
  const auto& group = load->groups(0);
  std::cout << "seed " << seed << ": " << tally.whole << " whole, " << tally.cancelled << " cancelled, " << tally.late
            << " late; " << group.generated_tokens() << " tokens, " << group.preemptions() << " preemptions\n";
  EXPECT_GT(group.preemptions(), 0u);
  EXPECT_GT(tally.whole, 0);
  EXPECT_GT(tally.cancelled, 0);
  EXPECT_GT(tally.late, 0);
  for (const auto& [index, reply] : tally.finished) {
    const Reply solo = Generate(stub, RequestOf(index));
    EXPECT_EQ(solo.ids, reply.ids) << "request " << index << ", seed " << seed;
    EXPECT_EQ(solo.text, reply.text);
  }
  EXPECT_TRUE((*cluster)->Drain().ok());
}

}  // namespace
}  // namespace rankwise::e2e
