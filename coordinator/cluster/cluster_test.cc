#include "coordinator/cluster/cluster.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

namespace rankwise::cluster {
namespace {

using worker::v1::Outputs;
using worker::v1::Submit;
using worker::v1::ToGroup;

constexpr absl::Time kStart = absl::UnixEpoch();

// The token a model would give after `history` tokens of a sequence with this seed.
int32_t TokenAt(uint64_t seed, int history) { return static_cast<int32_t>((seed * 31 + history * 7) % 1000); }

worker::v1::Join MakeJoin(const std::string& fingerprint = "model") {
  worker::v1::Join join;
  join.mutable_model()->set_fingerprint(fingerprint);
  join.mutable_model()->set_vocab_size(1000);
  join.mutable_model()->set_max_tokens(64);
  join.set_max_running(4);
  join.set_max_waiting(4);
  return join;
}

// A group that answers from what was sent to it, one token a turn for each of its sequences.
class SimulatedGroup : public GroupChannel {
 public:
  void Send(ToGroup message) override {
    if (message.has_submit()) {
      const Submit& submit = message.submit();
      EXPECT_FALSE(held_.contains(submit.sequence()));
      held_[submit.sequence()] = submit;
    }
    for (const uint64_t number : message.cancel().sequences()) held_.erase(number);
    if (message.has_stop()) is_stopped = true;
  }
  void Close(const absl::Status&) override { is_closed = true; }

  Outputs Turn() {
    Outputs outputs;
    outputs.set_epoch(epoch);
    for (auto& [number, submit] : held_) {
      auto& output = *outputs.add_sequences();
      output.set_sequence(number);
      output.set_token_offset(submit.generated_size());
      const int32_t token = TokenAt(submit.sampling().seed(), submit.generated_size());
      output.add_tokens()->set_id(token);
      submit.add_generated(token);
      if (submit.generated_size() == static_cast<int>(submit.sampling().max_tokens())) {
        output.set_finished(true);
        output.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
      }
    }
    std::erase_if(held_, [](const auto& entry) {
      return entry.second.generated_size() == static_cast<int>(entry.second.sampling().max_tokens());
    });
    return outputs;
  }

  uint64_t epoch = 0;
  bool is_closed = false, is_stopped = false;
  std::map<uint64_t, Submit> held_;
};

class Client : public SequenceListener {
 public:
  bool OnOutput(uint64_t, const worker::v1::SequenceOutput& output, uint32_t replays) override {
    EXPECT_FALSE(is_over);
    for (const auto& token : output.tokens()) tokens.push_back(token.id());
    replay_count = replays;
    is_over = output.finished() || tokens.size() == stop_after;
    return tokens.size() != stop_after;
  }
  void OnEnd(uint64_t, Ending ending, uint32_t) override {
    EXPECT_FALSE(is_over);
    is_over = true;
    ended = ending;
  }
  void OnFailed(uint64_t, const absl::Status& status) override {
    EXPECT_FALSE(is_over);
    is_over = true;
    failed = status;
  }

  std::vector<int32_t> tokens;
  uint32_t replay_count = 0;
  size_t stop_after = SIZE_MAX;
  bool is_over = false;
  std::optional<Ending> ended;
  absl::Status failed;
};

Submit MakeSubmit(uint64_t seed, uint32_t max_tokens) {
  Submit submit;
  submit.add_prompt(1);
  submit.mutable_sampling()->set_seed(seed);
  submit.mutable_sampling()->set_max_tokens(max_tokens);
  return submit;
}

absl::StatusOr<std::vector<uint64_t>> SubmitOne(Cluster& cluster, Client* client, uint64_t seed, uint32_t max_tokens,
                                                absl::Time deadline = absl::InfiniteFuture()) {
  return cluster.Submit({MakeSubmit(seed, max_tokens)}, client, deadline, kStart, [](std::span<const uint64_t>) {});
}

std::unique_ptr<SimulatedGroup> JoinGroup(Cluster& cluster, absl::Time now = kStart) {
  auto group = std::make_unique<SimulatedGroup>();
  const auto welcome = cluster.Join(MakeJoin(), group.get(), now);
  EXPECT_TRUE(welcome.ok()) << welcome.status();
  group->epoch = welcome->epoch();
  return group;
}

std::vector<int32_t> Oracle(uint64_t seed, int count) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(TokenAt(seed, i));
  return tokens;
}

TEST(ClusterTest, AStreamGoesOnWhereALostGroupStoppedWhateverTheMoment) {
  for (int lost_after = 0; lost_after <= 10; ++lost_after) {
    Cluster cluster({});
    auto group = JoinGroup(cluster);
    Client client;
    ASSERT_TRUE(SubmitOne(cluster, &client, 5, 10).ok());
    for (int turn = 0; turn < lost_after; ++turn) cluster.TakeOutputs(group->epoch, group->Turn(), kStart);
    const Outputs late = group->Turn();
    cluster.Leave(group->epoch, kStart);
    cluster.TakeOutputs(group->epoch, late, kStart);  // of a dead epoch: refused
    EXPECT_EQ(client.tokens.size(), static_cast<size_t>(lost_after));
    auto next = JoinGroup(cluster);
    for (int turn = 0; turn < 10; ++turn) cluster.TakeOutputs(next->epoch, next->Turn(), kStart);
    EXPECT_EQ(client.tokens, Oracle(5, 10));
    EXPECT_EQ(client.replay_count, lost_after < 10 ? 1u : 0u);
    EXPECT_EQ(cluster.live(), 0u);
  }
}

TEST(ClusterTest, RandomFaultsNeverRepeatOrLoseAToken) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    Cluster cluster({});
    std::vector<std::unique_ptr<SimulatedGroup>> groups;
    std::deque<Client> clients;
    std::vector<uint64_t> numbers;
    std::vector<int> lengths;
    groups.push_back(JoinGroup(cluster));
    for (int turn = 0; turn < 200; ++turn) {
      if (turn < 100 && below(2) == 0) {
        Client& client = clients.emplace_back();
        lengths.push_back(1 + below(20));
        if (below(5) == 0) client.stop_after = 1 + below(20);
        numbers.push_back((*SubmitOne(cluster, &client, clients.size(), lengths.back()))[0]);
      }
      if (groups.size() < 3 && (groups.empty() || below(6) == 0)) groups.push_back(JoinGroup(cluster));
      if (turn < 150 && !groups.empty() && below(8) == 0) {
        const int victim = below(groups.size());
        const Outputs late = groups[victim]->Turn();
        cluster.Leave(groups[victim]->epoch, kStart);
        cluster.TakeOutputs(groups[victim]->epoch, late, kStart);
        groups.erase(groups.begin() + victim);
      }
      if (turn < 150 && !numbers.empty() && below(15) == 0) cluster.End(numbers[below(numbers.size())], Ending::kCancelled);
      for (auto& group : groups) cluster.TakeOutputs(group->epoch, group->Turn(), kStart);
    }
    EXPECT_EQ(cluster.live(), 0u);
    for (auto& group : groups) EXPECT_TRUE(group->held_.empty());
    for (size_t i = 0; i < clients.size(); ++i) {
      const Client& client = clients[i];
      EXPECT_TRUE(client.is_over);
      EXPECT_EQ(client.tokens, Oracle(i + 1, static_cast<int>(client.tokens.size())));
      if (!client.ended) {
        EXPECT_EQ(client.tokens.size(), std::min<size_t>(lengths[i], client.stop_after));
      }
    }
  }
}

TEST(ClusterTest, RefusesAGroupThatServesSomethingElse) {
  Cluster cluster({});
  auto group = JoinGroup(cluster);
  SimulatedGroup other;
  const auto refused = cluster.Join(MakeJoin("another"), &other, kStart);
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status()));
  EXPECT_EQ(refused.status().message(), "this cluster serves model fingerprint model, the group has another");
}

TEST(ClusterTest, OverloadIsRefusedAtOnce) {
  Cluster cluster({.max_live = 2});
  Client client;
  ASSERT_TRUE(SubmitOne(cluster, &client, 1, 5).ok());
  ASSERT_TRUE(SubmitOne(cluster, &client, 2, 5).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(SubmitOne(cluster, &client, 3, 5).status()));
  cluster.StartDrain();
  EXPECT_TRUE(absl::IsUnavailable(SubmitOne(cluster, &client, 3, 5).status()));
}

TEST(ClusterTest, DeadlinesStrandedRequestsAndSilentGroups) {
  Cluster cluster({.group_timeout = absl::Seconds(10), .group_wait = absl::Seconds(30)});
  auto group = JoinGroup(cluster);
  Client hurried, patient;
  ASSERT_TRUE(SubmitOne(cluster, &hurried, 1, 5, kStart + absl::Seconds(5)).ok());
  ASSERT_TRUE(SubmitOne(cluster, &patient, 2, 5).ok());
  cluster.Tick(kStart + absl::Seconds(6));
  EXPECT_EQ(hurried.ended, Ending::kDeadline);
  EXPECT_EQ(group->held_.size(), 1u) << "the deadline frees the group's memory";
  EXPECT_TRUE(cluster.is_serving());
  cluster.Tick(kStart + absl::Seconds(11));
  EXPECT_TRUE(group->is_closed);
  EXPECT_FALSE(cluster.is_serving());
  EXPECT_FALSE(patient.is_over);
  cluster.Tick(kStart + absl::Seconds(42));
  EXPECT_TRUE(absl::IsUnavailable(patient.failed));
}

TEST(ClusterTest, TheLessLoadedGroupAndTheHigherPriorityComeFirst) {
  Cluster cluster({});
  auto a = JoinGroup(cluster);
  auto b = JoinGroup(cluster);
  Client client;
  ASSERT_TRUE(SubmitOne(cluster, &client, 1, 60).ok());
  ASSERT_TRUE(SubmitOne(cluster, &client, 2, 10).ok());
  ASSERT_TRUE(SubmitOne(cluster, &client, 3, 10).ok());
  EXPECT_EQ(a->held_.size(), 1u);
  EXPECT_EQ(b->held_.size(), 2u);
  for (uint64_t seed = 4; seed <= 12; ++seed) ASSERT_TRUE(SubmitOne(cluster, &client, seed, 10).ok());
  EXPECT_EQ(a->held_.size() + b->held_.size(), 12u);
  std::vector<Submit> low = {MakeSubmit(20, 5)}, high = {MakeSubmit(21, 5)};
  high[0].set_priority(3);
  const auto ignore = [](std::span<const uint64_t>) {};
  ASSERT_TRUE(cluster.Submit(low, &client, absl::InfiniteFuture(), kStart, ignore).ok());
  const uint64_t preferred = (*cluster.Submit(high, &client, absl::InfiniteFuture(), kStart, ignore))[0];
  cluster.Remove(a->held_.begin()->first);
  EXPECT_TRUE(a->held_.contains(preferred) || b->held_.contains(preferred));
}

}  // namespace
}  // namespace rankwise::cluster
