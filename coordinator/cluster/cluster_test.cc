#include "coordinator/cluster/cluster.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>

#include "absl/strings/str_cat.h"

namespace rankwise::cluster {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using worker::v1::SequenceOutput;
using worker::v1::ToGroup;

constexpr uint32_t kVocabulary = 1000;
const absl::Time kStart = absl::FromUnixSeconds(1'000'000);

// The simulated model: any stream can be checked without trust. -1 ends it.
int32_t OracleToken(uint64_t seed, size_t position) {
  uint64_t x = (seed + 1) * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03;
  x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9;
  x ^= x >> 32;
  return x % 16 == 0 ? -1 : static_cast<int32_t>(x % kVocabulary);
}

std::vector<int32_t> OracleStream(uint64_t seed, uint32_t max_tokens) {
  std::vector<int32_t> stream;
  while (stream.size() < max_tokens && OracleToken(seed, stream.size()) >= 0) {
    stream.push_back(OracleToken(seed, stream.size()));
  }
  return stream;
}

worker::v1::Join MakeJoin(uint32_t max_running = 4, uint32_t max_waiting = 8) {
  worker::v1::Join join;
  join.mutable_model()->set_fingerprint("f");
  join.mutable_model()->set_kv_format("int8");
  join.mutable_model()->set_kv_scales_id("s");
  join.mutable_model()->set_vocab_size(kVocabulary);
  join.mutable_model()->set_max_tokens(4096);
  join.set_max_running(max_running);
  join.set_max_waiting(max_waiting);
  return join;
}

// A worker group: takes messages when it steps, gives every sequence it runs one token a step.
class SimulatedGroup : public GroupChannel {
 public:
  SimulatedGroup(Cluster& cluster, absl::Time now, const worker::v1::Join& join = MakeJoin()) : cluster_(cluster) {
    const auto welcome = cluster.Join(join, this, now);
    EXPECT_TRUE(welcome.ok()) << welcome.status();
    epoch_ = welcome->epoch();
    EXPECT_TRUE(!incoming_.empty() && incoming_.front().has_welcome());
    incoming_.pop_front();
  }

  void Send(ToGroup message) override {
    EXPECT_FALSE(closed_.has_value());
    incoming_.push_back(std::move(message));
  }
  void Close(const absl::Status& reason) override { closed_ = reason; }

  void TakeMessages() {
    for (const ToGroup& message : incoming_) {
      if (message.has_submit()) Take(message.submit());
      for (const uint64_t sequence : message.cancel().sequences()) running_.erase(sequence);
    }
    incoming_.clear();
  }

  // One step; the outputs are on their way and arrive with Deliver.
  void Step() {
    TakeMessages();
    worker::v1::Outputs outputs;
    outputs.set_epoch(epoch_);
    for (auto& [number, running] : running_) AddOutput(number, running, outputs);
    for (const SequenceOutput& output : outputs.sequences()) {
      if (output.finished()) running_.erase(output.sequence());
    }
    in_flight_.push_back(std::move(outputs));
  }

  bool Deliver(absl::Time now) {
    if (in_flight_.empty()) return false;
    cluster_.TakeOutputs(epoch_, in_flight_.front(), now);
    in_flight_.pop_front();
    return true;
  }
  void StepAndDeliver(absl::Time now) {
    Step();
    while (Deliver(now)) continue;
  }
  void Send(const SequenceOutput& output, absl::Time now = kStart) {
    worker::v1::Outputs outputs;
    outputs.set_epoch(epoch_);
    *outputs.add_sequences() = output;
    cluster_.TakeOutputs(epoch_, outputs, now);
  }

  uint64_t epoch() const { return epoch_; }
  const std::deque<ToGroup>& incoming() const { return incoming_; }
  const std::optional<absl::Status>& closed() const { return closed_; }
  std::vector<uint64_t> Submitted() const {
    std::vector<uint64_t> numbers;
    for (const ToGroup& message : incoming_) {
      if (message.has_submit()) numbers.push_back(message.submit().sequence());
    }
    return numbers;
  }
  size_t running() const { return running_.size(); }

 private:
  struct Running {
    worker::v1::Submit submit;
    size_t generated = 0;
  };

  void Take(const worker::v1::Submit& submit) {
    // A replay must go on where the delivered stream ends.
    const std::vector<int32_t> oracle = OracleStream(submit.sampling().seed(), submit.sampling().max_tokens());
    ASSERT_LE(submit.generated_size(), static_cast<int>(oracle.size()));
    EXPECT_TRUE(std::equal(submit.generated().begin(), submit.generated().end(), oracle.begin()));
    EXPECT_TRUE(
        running_.emplace(submit.sequence(), Running{submit, static_cast<size_t>(submit.generated_size())}).second);
  }

  static void AddOutput(uint64_t number, Running& running, worker::v1::Outputs& outputs) {
    SequenceOutput& output = *outputs.add_sequences();
    const rankwise::v1::SamplingParams& sampling = running.submit.sampling();
    output.set_sequence(number);
    output.set_token_offset(static_cast<uint32_t>(running.generated));
    const int32_t token = OracleToken(sampling.seed(), running.generated);
    if (sampling.has_prompt_logprobs() && running.generated == static_cast<size_t>(running.submit.generated_size())) {
      for (int i = 1; i < running.submit.prompt_size(); ++i)
        output.add_prompt_logprobs()->set_id(running.submit.prompt(i));
    }
    if (token >= 0) {
      output.add_tokens()->set_id(token);
      ++running.generated;
    }
    if (token >= 0 && running.generated < sampling.max_tokens()) return;
    output.set_finished(true);
    output.set_reason(token < 0 ? rankwise::v1::FINISH_REASON_STOP : rankwise::v1::FINISH_REASON_LENGTH);
  }

  Cluster& cluster_;
  uint64_t epoch_ = 0;
  std::deque<ToGroup> incoming_;
  std::deque<worker::v1::Outputs> in_flight_;
  std::map<uint64_t, Running> running_;
  std::optional<absl::Status> closed_;
};

// A client's side: holds every stream against its oracle while it grows.
class Client : public SampleListener {
 public:
  struct Sample {
    std::vector<int32_t> tokens;
    int prompt_logprobs = 0;
    bool is_finished = false;
    std::optional<Ending> ending;
    uint32_t replays = 0;
  };

  Client(Cluster& cluster, Request request, absl::Time now) : samples(request.samples) {
    request.listener = this;
    seed_ = request.sequence.sampling().seed();
    max_tokens_ = request.sequence.sampling().max_tokens();
    submitted = cluster.Submit(std::move(request), now);
  }

  bool OnOutput(uint32_t index, const SequenceOutput& output, uint32_t replays) override {
    Sample& sample = samples.at(index);
    EXPECT_TRUE(IsOpen(sample));
    EXPECT_EQ(output.token_offset(), sample.tokens.size());
    for (const auto& token : output.tokens()) {
      EXPECT_EQ(token.id(), OracleToken(seed_ + index, sample.tokens.size()));
      sample.tokens.push_back(token.id());
    }
    sample.prompt_logprobs += output.prompt_logprobs_size();
    sample.replays = replays;
    const bool has_enough = sample.tokens.size() >= enough;
    sample.is_finished = output.finished() || has_enough;
    if (output.finished()) {
      EXPECT_EQ(sample.tokens, OracleStream(seed_ + index, max_tokens_));
    }
    return !has_enough;
  }
  void OnEnd(uint32_t index, Ending ending, uint32_t replays) override {
    EXPECT_TRUE(IsOpen(samples.at(index)));
    samples[index].ending = ending;
    samples[index].replays = replays;
  }
  void OnFailed(const absl::Status& status) override {
    EXPECT_FALSE(status.ok());
    EXPECT_TRUE(failed.ok()) << "twice";
    failed = status;
  }

  bool IsOpen(const Sample& sample) const { return failed.ok() && !sample.is_finished && !sample.ending; }
  bool is_over() const {
    return !submitted.ok() || std::ranges::none_of(samples, [this](const Sample& s) { return IsOpen(s); });
  }
  bool is_whole() const {
    return submitted.ok() && std::ranges::all_of(samples, [](const Sample& s) { return s.is_finished; });
  }

  absl::StatusOr<RequestKey> submitted = absl::UnknownError("");
  std::vector<Sample> samples;
  absl::Status failed;
  size_t enough = SIZE_MAX;

 private:
  uint64_t seed_ = 0;
  uint32_t max_tokens_ = 0;
};

// A seed whose stream does not end by itself before `tokens`.
uint64_t LongSeed(uint32_t tokens, uint64_t seed = 0) {
  while (OracleStream(seed, tokens).size() < tokens) ++seed;
  return seed;
}

Request MakeRequest(const std::string& id, uint32_t max_tokens = 8, uint64_t seed = 0) {
  Request request{.id = id};
  for (const int32_t token : {1, 2, 3, 4}) request.sequence.add_prompt(token);
  request.sequence.mutable_sampling()->set_max_tokens(max_tokens);
  request.sequence.mutable_sampling()->set_seed(seed);
  return request;
}

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
  EXPECT_THAT(a.Submitted(), SizeIs(5));
  EXPECT_THAT(b.Submitted(), SizeIs(6));
  EXPECT_EQ(cluster.Load(kStart).queued(), 9u);
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
  SimulatedGroup group(cluster, kStart, MakeJoin(2, 0));
  EXPECT_THAT(group.Submitted(), ElementsAre(7, 5));  // a holds 7, so b's turn
  EXPECT_THAT(Order(cluster, group), ElementsAre(7, 5, 1, 6, 2, 3, 4));
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

// Groups, clients and time at random; then everything heals, and every request that still lives must end well.
class Swarm {
 public:
  explicit Swarm(uint64_t seed) : random_(seed) {
    options_.max_live = Draw(4, 40);
    options_.max_fruitless_replays = 1000;
    cluster_ = std::make_unique<Cluster>(options_);
  }

  void Run() {
    for (int event = 0; event < 300; ++event) {
      Act();
      cluster_->CheckInvariants();
      ASSERT_FALSE(testing::Test::HasFailure()) << "event " << event;
    }
    Heal();
  }

 private:
  uint32_t Draw(uint32_t least, uint32_t most) { return std::uniform_int_distribution<uint32_t>(least, most)(random_); }

  void Act() {
    SimulatedGroup* group = groups_.empty() ? nullptr : groups_[Draw(0, groups_.size() - 1)].get();
    switch (Draw(0, 11)) {
      case 0:
        groups_.push_back(std::make_unique<SimulatedGroup>(*cluster_, now_, MakeJoin(Draw(1, 6), Draw(0, 6))));
        break;
      case 1:
        if (group != nullptr && Draw(0, 2) == 0) cluster_->Leave(group->epoch(), now_);
        break;
      case 2:
      case 3:
        Submit();
        break;
      case 4:
        if (!clients_.empty()) Cancel(*clients_[Draw(0, clients_.size() - 1)]);
        break;
      case 5:
        now_ += absl::Milliseconds(Draw(1, 1500));
        cluster_->Tick(now_);
        break;
      case 6:
        if (group != nullptr) cluster_->TakeLoad(group->epoch(), {}, now_);
        break;
      case 7:
      case 8:
        if (group != nullptr) group->Step();
        break;
      default:
        if (group != nullptr) group->Deliver(now_);
    }
  }

  void Submit() {
    Request request = MakeRequest(absl::StrCat("r", Draw(0, 30)), Draw(1, 12), Draw(0, 1000));
    request.samples = Draw(1, 4);
    request.tenant = absl::StrCat("t", Draw(0, 2));
    request.sequence.set_priority(static_cast<int32_t>(Draw(0, 2)) - 1);
    if (Draw(0, 3) == 0) request.deadline = now_ + absl::Milliseconds(Draw(0, 3000));
    clients_.push_back(std::make_unique<Client>(*cluster_, request, now_));
    if (Draw(0, 3) == 0) clients_.back()->enough = Draw(1, 6);
    if (!clients_.back()->submitted.ok()) clients_.pop_back();
  }

  void Cancel(Client& client) {
    if (client.is_over()) return;
    cluster_->Forget(*client.submitted);
    client.failed = absl::CancelledError("forgotten");
  }

  void Heal() {
    for (const auto& group : groups_) cluster_->Leave(group->epoch(), now_);
    SimulatedGroup last(*cluster_, now_);
    for (int step = 0; step < 500 && cluster_->live() > 0; ++step) last.StepAndDeliver(now_);
    cluster_->CheckInvariants();
    EXPECT_EQ(cluster_->live(), 0u);
    for (const auto& client : clients_) EXPECT_TRUE(client->is_over());
  }

  std::mt19937_64 random_;
  ClusterOptions options_;
  std::unique_ptr<Cluster> cluster_;
  absl::Time now_ = kStart;
  std::vector<std::unique_ptr<SimulatedGroup>> groups_;  // dead ones too: their outputs may still arrive
  std::vector<std::unique_ptr<Client>> clients_;
};

TEST(SwarmTest, EveryStreamIsItsOracles) {
  for (uint64_t seed = 0; seed < 300 && !HasFailure(); ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Swarm(seed).Run();
  }
}

}  // namespace
}  // namespace rankwise::cluster
