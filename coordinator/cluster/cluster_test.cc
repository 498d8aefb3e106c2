#include "coordinator/cluster/cluster.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cluster/retry_delay.h"
#include "coordinator/cluster/simulation.h"

namespace rankwise::cluster {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using worker::v1::SequenceOutput;

TEST(ReplayTest, SurvivesTheLossOfAGroupAtEveryTwoSteps) {
  constexpr uint32_t kTokens = 8;
  const uint64_t seed = LongSeed(kTokens);
  for (uint32_t first = 0; first <= kTokens + 1; ++first) {
    for (uint32_t second = 0; second <= kTokens + 1; ++second) {
      SCOPED_TRACE(absl::StrCat("lost after steps ", first, " and ", second));
      Cluster cluster({});
      auto a = std::make_unique<SimulatedGroup>(cluster, kStart);
      Request request = MakeRequest("r", kTokens, seed);
      request.samples = 2;
      Client client(cluster, request, kStart);
      for (uint32_t step = 0; step < first; ++step) a->StepAndDeliver(kStart);
      a->Step();  // arrives after the epoch's end
      cluster.Leave(a->epoch(), kStart);
      cluster.CheckInvariants();
      auto b = std::make_unique<SimulatedGroup>(cluster, kStart);
      while (a->Deliver(kStart)) continue;
      for (uint32_t step = 0; step < second; ++step) b->StepAndDeliver(kStart);
      cluster.Leave(b->epoch(), kStart);
      SimulatedGroup c(cluster, kStart);
      for (uint32_t step = 0; step <= kTokens; ++step) c.StepAndDeliver(kStart);
      cluster.CheckInvariants();
      EXPECT_TRUE(client.is_whole());
      EXPECT_THAT(client.samples[0].tokens, SizeIs(kTokens));
      EXPECT_EQ(client.samples[0].replays, (first < kTokens) + (first + second < kTokens));
      EXPECT_EQ(cluster.live(), 0u);
    }
  }
}

TEST(ReplayTest, GoesOnOnAnotherGroup) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart), b(cluster, kStart);
  Client client(cluster, MakeRequest("r", 8, LongSeed(8)), kStart);
  a.StepAndDeliver(kStart);
  EXPECT_THAT(b.Submitted(), IsEmpty());
  cluster.Leave(a.epoch(), kStart);
  EXPECT_THAT(b.Submitted(), SizeIs(1));
  for (int step = 0; step < 8; ++step) b.StepAndDeliver(kStart);
  EXPECT_TRUE(client.is_whole());
}

TEST(ReplayTest, PromptLogprobsComeOnce) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart), b(cluster, kStart);
  Request request = MakeRequest("r", 8, LongSeed(8));
  request.sequence.mutable_sampling()->set_prompt_logprobs(0);
  Client client(cluster, request, kStart);
  a.StepAndDeliver(kStart);
  cluster.Leave(a.epoch(), kStart);
  for (int step = 0; step < 8; ++step) b.StepAndDeliver(kStart);
  EXPECT_TRUE(client.is_whole());
  EXPECT_EQ(client.samples[0].prompt_logprobs, 3);
}

TEST(ReplayTest, AGroupLostBetweenTheLastTokenAndTheFinish) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart), b(cluster, kStart);
  const uint64_t seed = LongSeed(2);
  Client client(cluster, MakeRequest("r", 2, seed), kStart);
  SequenceOutput output;
  output.set_sequence(a.Submitted().front());
  output.add_tokens()->set_id(OracleToken(seed, 0));
  output.add_tokens()->set_id(OracleToken(seed, 1));
  a.Send(output);
  EXPECT_FALSE(client.is_over());
  cluster.Leave(a.epoch(), kStart);
  EXPECT_TRUE(client.is_whole());
  EXPECT_THAT(b.Submitted(), IsEmpty());
  cluster.CheckInvariants();
}

TEST(ReplayTest, ARequestThatEndsItsGroupsFails) {
  Cluster cluster({.max_fruitless_replays = 2});
  Client client(cluster, MakeRequest("r"), kStart);
  for (int loss = 0; loss < 3; ++loss) {
    EXPECT_TRUE(client.failed.ok());
    SimulatedGroup group(cluster, kStart);
    cluster.Leave(group.epoch(), kStart);
  }
  EXPECT_TRUE(absl::IsUnavailable(client.failed)) << client.failed;
  cluster.CheckInvariants();
}

TEST(ProtocolTest, AGroupThatBreaksItLosesItsEpoch) {
  const std::vector<std::pair<const char*, std::function<void(SequenceOutput&)>>> cases = {
      {"token_offset=1 after 0", [](auto& output) { output.set_token_offset(1); }},
      {"token 1000 is outside", [](auto& output) { output.add_tokens()->set_id(kVocabulary); }},
      {"token -1 is outside", [](auto& output) { output.add_tokens()->set_id(-1); }},
      {"exceed max_tokens=8",
       [](auto& output) {
         for (int i = 0; i < 9; ++i) output.add_tokens();
       }},
      {"finished with reason 3",
       [](auto& output) {
         output.set_finished(true);
         output.set_reason(rankwise::v1::FINISH_REASON_CANCELLED);
       }},
      {"4 prompt_logprobs for a prompt of 4",
       [](auto& output) {
         for (int i = 0; i < 4; ++i) output.add_prompt_logprobs();
       }},
      {"error_code=17", [](auto& output) { output.set_error_code(17); }},
  };
  for (const auto& [message, spoil] : cases) {
    SCOPED_TRACE(message);
    Cluster cluster({});
    SimulatedGroup bad(cluster, kStart), good(cluster, kStart);
    Client client(cluster, MakeRequest("r", 8, LongSeed(8)), kStart);
    ASSERT_THAT(bad.Submitted(), SizeIs(1));
    SequenceOutput output;
    output.set_sequence(bad.Submitted().front());
    spoil(output);
    bad.Send(output);
    ASSERT_TRUE(bad.closed().has_value());
    EXPECT_THAT(std::string(bad.closed()->message()), HasSubstr(message));
    for (int step = 0; step < 8; ++step) good.StepAndDeliver(kStart);
    EXPECT_TRUE(client.is_whole());
    cluster.CheckInvariants();
  }
}

TEST(ProtocolTest, OutputForAnotherGroupsSequenceChangesNothing) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart), b(cluster, kStart);
  const uint64_t seed = LongSeed(8);
  Client client(cluster, MakeRequest("r", 8, seed), kStart);
  ASSERT_THAT(a.Submitted(), SizeIs(1));
  SequenceOutput output;
  output.set_sequence(a.Submitted().front());
  output.add_tokens()->set_id(OracleToken(seed, 0));
  b.Send(output);
  EXPECT_THAT(client.samples[0].tokens, IsEmpty());
  for (int step = 0; step < 8; ++step) a.StepAndDeliver(kStart);
  EXPECT_TRUE(client.is_whole());
}

TEST(ProtocolTest, AGroupsErrorEndsTheRequestEverywhere) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart), b(cluster, kStart);
  Request request = MakeRequest("r");
  request.samples = 2;
  Client client(cluster, request, kStart);
  ASSERT_THAT(a.Submitted(), SizeIs(1));
  ASSERT_THAT(b.Submitted(), SizeIs(1));
  SequenceOutput output;
  output.set_sequence(a.Submitted().front());
  output.set_error_code(static_cast<uint32_t>(absl::StatusCode::kInvalidArgument));
  output.set_error_message("too long");
  a.Send(output);
  EXPECT_EQ(client.failed, absl::InvalidArgumentError("too long"));
  EXPECT_TRUE(b.incoming().back().has_cancel());
  EXPECT_EQ(cluster.live(), 0u);
}

TEST(JoinTest, GroupsMustServeTheSame) {
  const std::vector<std::pair<const char*, std::function<void(rankwise::v1::GetModelInfoResponse&)>>> cases = {
      {"fingerprint", [](auto& model) { model.set_fingerprint("g"); }},
      {"kv_format", [](auto& model) { model.set_kv_format("f16"); }},
      {"kv_scales_id", [](auto& model) { model.set_kv_scales_id("t"); }},
      {"activations", [](auto& model) { model.set_activations("int8"); }},
      {"activations", [](auto& model) { model.set_activations("bf16"); }},
      {"device", [](auto& model) { model.set_backend("cuda GPU 0"); }},
      {"tp", [](auto& model) { model.set_tp(3); }},
      {"vocab_size", [](auto& model) { model.set_vocab_size(7); }},
      {"max_tokens", [](auto& model) { model.set_max_tokens(7); }},
  };
  for (const auto& [name, change] : cases) {
    SCOPED_TRACE(name);
    Cluster cluster({});
    const auto first = std::make_unique<SimulatedGroup>(cluster, kStart);
    worker::v1::Join other = MakeJoin();
    change(*other.mutable_model());
    const auto refused = cluster.Join(other, first.get(), kStart);
    EXPECT_TRUE(absl::IsFailedPrecondition(refused.status())) << refused.status();
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr(name));
    // An idle cluster without groups may change its model; one with a request may not.
    Client client(cluster, MakeRequest("r"), kStart);
    cluster.Leave(first->epoch(), kStart);
    EXPECT_TRUE(absl::IsFailedPrecondition(cluster.Join(other, first.get(), kStart).status()));
    cluster.Forget(*client.submitted);
    const SimulatedGroup changed(cluster, kStart, other);
    EXPECT_EQ(cluster.model()->SerializeAsString(), other.model().SerializeAsString());
  }
  Cluster cluster({});
  EXPECT_TRUE(absl::IsInvalidArgument(cluster.Join(MakeJoin(0), nullptr, kStart).status()));
  // What the same tokens may come from.
  const SimulatedGroup first(cluster, kStart);
  worker::v1::Join other = MakeJoin();
  other.mutable_model()->set_tp(4);
  other.mutable_model()->set_backend("cpu avx2, 7 threads");
  const SimulatedGroup second(cluster, kStart, other);
}

TEST(RoutingTest, LeastOutstandingTokensThenLowestId) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart), b(cluster, kStart);
  const Client large(cluster, MakeRequest("large", 100), kStart);   // a: 104
  const Client small(cluster, MakeRequest("small", 10), kStart);    // b: 14
  const Client medium(cluster, MakeRequest("medium", 86), kStart);  // b: 104
  const Client tie(cluster, MakeRequest("tie", 1), kStart);         // a
  EXPECT_THAT(a.Submitted(), ElementsAre(1, 4));
  EXPECT_THAT(b.Submitted(), ElementsAre(2, 3));
  cluster.CheckInvariants();
}

TEST(RoutingTest, AGroupGetsNoMoreThanItAnnounced) {
  Cluster cluster({});
  SimulatedGroup a(cluster, kStart, MakeJoin(4, 1)), b(cluster, kStart, MakeJoin(4, 100));
  Request request = MakeRequest("r", 8, LongSeed(8));
  request.samples = 20;
  const Client client(cluster, request, kStart);
  // What comes at once waits at once: more than it lets wait it would refuse.
  EXPECT_THAT(a.Submitted(), SizeIs(1));
  EXPECT_THAT(b.Submitted(), SizeIs(6));
  EXPECT_EQ(cluster.Load(kStart).queued(), 13u);
}

// The order in which a group of one sequence gets them.
std::vector<uint64_t> Order(Cluster& cluster, SimulatedGroup& group) {
  std::vector<uint64_t> order;
  while (cluster.live() > 0) {
    for (const uint64_t number : group.Submitted()) order.push_back(number);
    group.StepAndDeliver(kStart);
  }
  return order;
}

TEST(FairnessTest, PriorityThenTenantThenAge) {
  Cluster cluster({});
  Request request = MakeRequest("burst", 1, LongSeed(1));
  request.tenant = "a";
  request.samples = 4;  // numbers 1 to 4
  const Client burst(cluster, request, kStart);
  request.id = "late";
  request.tenant = "b";
  request.samples = 2;  // 5, 6
  const Client late(cluster, request, kStart);
  request.id = "urgent";
  request.tenant = "a";
  request.sequence.set_priority(1);
  request.samples = 1;  // 7
  const Client urgent(cluster, request, kStart);
  SimulatedGroup group(cluster, kStart, MakeJoin(2, 2));
  EXPECT_THAT(group.Submitted(), ElementsAre(7, 5));  // a holds 7, so b's turn
  EXPECT_THAT(Order(cluster, group), ElementsAre(7, 5, 1, 6, 2, 3, 4));
}

// "b" comes when "a" has had much: it does not catch up on what it never asked for, and then they take turns.
TEST(FairnessTest, ATenantThatComesLateIsNoCreditor) {
  Cluster cluster({});
  SimulatedGroup group(cluster, kStart, MakeJoin(1, 1));
  Request request = MakeRequest("a", 1, LongSeed(1));
  request.tenant = "a";
  request.samples = 10;  // 1 to 10
  const Client a(cluster, request, kStart);
  for (int step = 0; step < 4; ++step) group.StepAndDeliver(kStart);  // 1 to 4
  request.id = "b";
  request.tenant = "b";
  request.samples = 3;  // 11 to 13
  const Client b(cluster, request, kStart);
  EXPECT_THAT(Order(cluster, group), ElementsAre(5, 11, 6, 12, 7, 13, 8, 9, 10));
}

TEST(AdmissionTest, TokensAreALimitAndARefusalNamesADelay) {
  Cluster cluster({.max_live = 10, .max_live_tokens = 100});
  SimulatedGroup group(cluster, kStart);
  const Client held(cluster, MakeRequest("held", 76, LongSeed(76)), kStart);  // 80 with the prompt
  const Client fits(cluster, MakeRequest("fits", 11, LongSeed(11)), kStart);
  const absl::Status refused = Client(cluster, MakeRequest("more", 2), kStart).submitted.status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("limit of 100"));
  ASSERT_TRUE(RetryDelay(refused).has_value());
  EXPECT_EQ(*RetryDelay(refused), absl::Seconds(5));  // nothing has ended yet
  cluster.CheckInvariants();
  // Four end each second; one has to.
  absl::Time now = kStart;
  for (int second = 0; second < 30; ++second) {
    for (int i = 0; i < 4; ++i) cluster.Forget(*Client(cluster, MakeRequest("short", 1), now).submitted);
    cluster.Tick(now += absl::Seconds(1));
    cluster.TakeHeartbeat(group.epoch(), now);
  }
  const absl::Status later = Client(cluster, MakeRequest("more", 2), now).submitted.status();
  EXPECT_NEAR(absl::ToDoubleSeconds(*RetryDelay(later)), 0.25, 0.05);
  cluster.StartDrain();
  EXPECT_TRUE(RetryDelay(cluster.CheckRoom(1)).has_value());
}

TEST(AdmissionTest, WhatWasAcceptedBeforeGoesOnWhereItWas) {
  const uint64_t seed = LongSeed(8);
  Cluster cluster({.max_live = 1});
  SimulatedGroup group(cluster, kStart);
  const Client other(cluster, MakeRequest("other"), kStart);  // there is no room
  Request request = MakeRequest("r", 8, seed);
  request.samples = 4;
  request.delivered.resize(4);
  for (size_t i = 0; i < 3; ++i) request.delivered[0].tokens.push_back(OracleToken(seed, i));
  request.delivered[1].is_over = true;
  Client client(cluster, std::move(request), kStart, {3, 0, 0, 0});
  ASSERT_TRUE(client.submitted.ok()) << client.submitted.status();
  EXPECT_EQ(cluster.live(), 4u);
  for (int step = 0; step < 40 && cluster.live() > 0; ++step) group.StepAndDeliver(kStart);
  EXPECT_TRUE(client.samples[0].is_finished);
  EXPECT_FALSE(client.samples[1].is_finished);  // nobody said anything of it again
  EXPECT_TRUE(client.samples[2].is_finished && client.samples[3].is_finished);
  cluster.CheckInvariants();
}

TEST(AdmissionTest, OfWhatIsWhollyDeliveredOnlyTheEndIsTold) {
  const uint64_t seed = LongSeed(2);
  Cluster cluster({});
  Request request = MakeRequest("r", 2, seed);
  request.delivered.push_back({.tokens = {OracleToken(seed, 0), OracleToken(seed, 1)}});
  Client client(cluster, std::move(request), kStart, {2});
  ASSERT_TRUE(client.submitted.ok());
  EXPECT_TRUE(client.is_whole());
  EXPECT_EQ(cluster.live(), 0u);
  const Client again(cluster, MakeRequest("r"), kStart);  // the id is free
  EXPECT_TRUE(again.submitted.ok());
  cluster.CheckInvariants();
}

TEST(AdmissionTest, MaxLiveCountsSamplesAndRefusesAllOrNone) {
  Cluster cluster({.max_live = 4});
  Request request = MakeRequest("a");
  request.samples = 3;
  const Client first(cluster, request, kStart);
  EXPECT_TRUE(cluster.CheckRoom(1).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(cluster.CheckRoom(2)));
  request.id = "b";
  EXPECT_TRUE(absl::IsResourceExhausted(Client(cluster, request, kStart).submitted.status()));
  EXPECT_EQ(cluster.live(), 3u);
  const auto same = Client(cluster, MakeRequest("a"), kStart).submitted.status();
  EXPECT_TRUE(absl::IsAlreadyExists(same)) << same;
  cluster.Forget(*first.submitted);
  cluster.Forget(*first.submitted);
  const Client again(cluster, MakeRequest("a"), kStart);
  EXPECT_TRUE(again.submitted.ok());
  cluster.CheckInvariants();
}

TEST(AdmissionTest, DrainingAdmitsNothingButLosesNothing) {
  Cluster cluster({});
  auto a = std::make_unique<SimulatedGroup>(cluster, kStart);
  Client client(cluster, MakeRequest("r", 8, LongSeed(8)), kStart);
  EXPECT_TRUE(cluster.is_serving());
  cluster.StartDrain();
  EXPECT_FALSE(cluster.is_serving());
  EXPECT_TRUE(absl::IsUnavailable(Client(cluster, MakeRequest("s"), kStart).submitted.status()));
  cluster.Leave(a->epoch(), kStart);
  SimulatedGroup b(cluster, kStart);
  for (int step = 0; step < 8; ++step) b.StepAndDeliver(kStart);
  EXPECT_TRUE(client.is_whole());
  cluster.StopGroups();
  EXPECT_TRUE(b.incoming().back().has_stop());
  EXPECT_TRUE(absl::IsUnavailable(cluster.Join(MakeJoin(), &b, kStart).status()));
}

TEST(EndingTest, CancelsReachTheGroup) {
  Cluster cluster({});
  SimulatedGroup group(cluster, kStart);
  const uint64_t seed = LongSeed(8);
  Client forgotten(cluster, MakeRequest("forgotten", 8, seed), kStart);
  Client aborted(cluster, MakeRequest("aborted", 8, seed), kStart);
  Client satisfied(cluster, MakeRequest("satisfied", 8, seed), kStart);
  Request hurried_request = MakeRequest("hurried", 8, seed);
  hurried_request.deadline = kStart + absl::Seconds(1);
  Client hurried(cluster, hurried_request, kStart);
  satisfied.enough = 2;
  group.StepAndDeliver(kStart);
  EXPECT_EQ(group.running(), 4u);
  cluster.Forget(*forgotten.submitted);
  EXPECT_TRUE(cluster.Abort("aborted"));
  EXPECT_FALSE(cluster.Abort("aborted"));
  EXPECT_FALSE(cluster.Abort("never"));
  group.StepAndDeliver(kStart);  // the second token satisfies
  group.TakeMessages();
  EXPECT_EQ(group.running(), 1u);
  cluster.Tick(kStart + absl::Milliseconds(999));
  EXPECT_FALSE(hurried.is_over());
  cluster.Tick(kStart + absl::Seconds(1));
  group.TakeMessages();
  EXPECT_EQ(group.running(), 0u);
  EXPECT_EQ(aborted.samples[0].ending, Ending::kCancelled);
  EXPECT_EQ(hurried.samples[0].ending, Ending::kDeadline);
  EXPECT_THAT(satisfied.samples[0].tokens, SizeIs(2));
  EXPECT_FALSE(forgotten.is_over());  // nobody told it
  EXPECT_EQ(cluster.live(), 0u);
  cluster.CheckInvariants();
}

TEST(TimeTest, ACoordinatorThatStoodStillBlamesNobody) {
  Cluster cluster({.group_timeout = absl::Seconds(2)});
  SimulatedGroup group(cluster, kStart);
  const absl::Time woken = kStart + absl::Seconds(7);
  cluster.Excuse(absl::Seconds(6), woken);
  cluster.Tick(woken);
  EXPECT_TRUE(cluster.is_serving());
  cluster.Tick(woken + absl::Seconds(2));  // silent for 3 s that count
  EXPECT_FALSE(cluster.is_serving());
}

TEST(TimeTest, ASilentGroupIsLostAndAnAbsentOneIsWaitedFor) {
  Cluster cluster({.group_timeout = absl::Seconds(10), .group_wait = absl::Seconds(30)});
  absl::Time now = kStart;
  SimulatedGroup group(cluster, now);
  Client early(cluster, MakeRequest("early", 8, LongSeed(8)), now);
  now += absl::Seconds(10);
  cluster.TakeLoad(group.epoch(), {}, now);
  now += absl::Seconds(10);
  cluster.Tick(now);
  EXPECT_TRUE(cluster.is_serving());
  now += absl::Milliseconds(1);
  cluster.Tick(now);
  EXPECT_FALSE(cluster.is_serving());
  EXPECT_TRUE(absl::IsUnavailable(*group.closed()));
  group.Step();
  group.Deliver(now);  // too late
  EXPECT_THAT(early.samples[0].tokens, IsEmpty());

  now += absl::Seconds(20);
  Client late(cluster, MakeRequest("late"), now);
  now += absl::Seconds(10);
  cluster.Tick(now);
  EXPECT_TRUE(early.failed.ok());
  cluster.Tick(now + absl::Milliseconds(1));
  EXPECT_TRUE(absl::IsUnavailable(early.failed)) << early.failed;
  EXPECT_FALSE(late.is_over());
  cluster.FailAll(absl::UnavailableError("over"));
  EXPECT_TRUE(absl::IsUnavailable(late.failed));
  cluster.CheckInvariants();
}

TEST(TimeTest, AGroupThatBeatsMayTakeLongOverAStepButNotForEver) {
  Cluster cluster({.group_timeout = absl::Seconds(2)});
  worker::v1::Join join = MakeJoin();
  join.set_max_step_seconds(60);
  SimulatedGroup group(cluster, kStart, join);
  Client client(cluster, MakeRequest("r", 1, LongSeed(1)), kStart);
  absl::Time now = kStart;
  const auto beat_until = [&](absl::Time end) {
    for (; now < end; now += absl::Seconds(1)) {
      cluster.TakeHeartbeat(group.epoch(), now);
      cluster.Tick(now);
    }
  };
  beat_until(kStart + absl::Seconds(60));
  EXPECT_FALSE(group.closed().has_value());
  group.StepAndDeliver(now);
  EXPECT_TRUE(client.is_whole());
  beat_until(kStart + absl::Seconds(120));
  EXPECT_FALSE(group.closed().has_value());
  beat_until(kStart + absl::Seconds(122));
  ASSERT_TRUE(group.closed().has_value());
  EXPECT_THAT(std::string(group.closed()->message()), HasSubstr("no step for"));
}

TEST(TimeTest, AHeartbeatOfADeadEpochChangesNothing) {
  Cluster cluster({.group_timeout = absl::Seconds(2)});
  SimulatedGroup group(cluster, kStart);
  cluster.Tick(kStart + absl::Seconds(3));
  ASSERT_TRUE(group.closed().has_value());
  cluster.TakeHeartbeat(group.epoch(), kStart + absl::Seconds(3));
  EXPECT_FALSE(cluster.is_serving());
}

}  // namespace
}  // namespace rankwise::cluster
