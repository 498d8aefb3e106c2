#include "tests/sim/simulation.h"

#include <time.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"

namespace rankwise::sim {
namespace {

using cluster::Cluster;
using cluster::Ending;
using scheduler::SequenceId;

const absl::Time kStart = absl::FromUnixSeconds(1'000'000);

int64_t CpuNanoseconds() {
  timespec used{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return used.tv_sec * int64_t{1'000'000'000} + used.tv_nsec;
}

class World;

// A client's side of one request: holds every sample against its oracle while it grows.
class Client final : public cluster::SampleListener {
 public:
  Client(World& world, uint64_t seed, const Arrival& arrival, absl::Time now)
      : world_(world), seed_(seed), arrival_(arrival), arrived_(now), samples_(static_cast<size_t>(arrival.samples)) {}

  bool OnOutput(uint32_t sample, const worker::v1::SequenceOutput& output, uint32_t replays) override;
  void OnEnd(uint32_t sample, Ending ending, uint32_t replays) override;
  void OnFailed(const absl::Status& status) override;
  void Cancel();

  const Arrival& arrival() const { return arrival_; }
  uint64_t seed() const { return seed_; }
  bool is_over() const {
    return std::ranges::all_of(samples_, [](const Sample& sample) { return sample.is_over; });
  }

  cluster::RequestKey key{};

 private:
  struct Sample {
    size_t tokens = 0;
    bool is_over = false;
  };
  void EndSample(uint32_t sample);

  World& world_;
  const uint64_t seed_;
  const Arrival arrival_;
  const absl::Time arrived_;
  std::vector<Sample> samples_;
};

// A worker group: the real scheduler, fed through a link that takes its time.
class Group final : public cluster::GroupChannel {
 public:
  Group(World& world, int index) : world_(world), index_(index) {}

  void Join();
  void Send(worker::v1::ToGroup message) override;
  void Close(const absl::Status& reason) override;

  void Receive(uint64_t epoch, const worker::v1::ToGroup& message);
  void Step(uint64_t epoch);
  void EndStep(uint64_t epoch);
  void Beat();
  // A new life: what was under way is void. Sequences of a cut group are dropped too, as the link does.
  void Crash();
  void Hang(absl::Duration time);
  void CheckLeaks();

  uint64_t epoch() const { return epoch_; }
  bool is_up() const { return is_up_; }

 private:
  struct Running {
    uint64_t seed = 0;
    size_t generated = 0, max_tokens = 0;
  };
  void Reset();
  void StartStep();

  World& world_;
  const int index_;
  uint64_t epoch_ = 0;
  bool is_up_ = false, is_closed_ = false, is_stepping_ = false;
  absl::Time hung_until_ = absl::InfinitePast();
  std::unique_ptr<scheduler::Scheduler> scheduler_;
  absl::flat_hash_map<uint64_t, Running> running_;
  StepPlan plan_;
  std::vector<scheduler::Planned> planned_;
};

class World {
 public:
  World(const Options& options, const std::vector<Arrival>& arrivals)
      : options(options), random_(options.seed), arrivals_(arrivals), cluster_(options.cluster) {
    for (int index = 0; index < options.groups; ++index) groups_.push_back(std::make_unique<Group>(*this, index));
  }

  Outcome Run();

  void At(absl::Time time, std::function<void()> what) { events_.push({time, next_event_++, std::move(what)}); }
  void Fail(const std::string& what) {
    if (outcome.failures.size() < 10) {
      outcome.failures.push_back(absl::StrCat("t=", absl::FormatDuration(now - kStart), ": ", what));
    }
  }
  // Calls the cluster, and counts what it costs.
  template <typename F>
  auto Ask(F f) {
    const int64_t before = CpuNanoseconds();
    struct Count {
      absl::Duration& sum;
      int64_t before;
      ~Count() { sum += absl::Nanoseconds(CpuNanoseconds() - before); }
    } count{outcome.cluster_cpu, before};
    return f(cluster_);
  }
  void NoteEnd(uint64_t seed) { ended_[seed] = now; }
  // When the sample with this seed ended for its client.
  std::optional<absl::Time> EndOf(uint64_t seed) const {
    const auto found = ended_.find(seed);
    return found == ended_.end() ? std::nullopt : std::optional(found->second);
  }
  // The longest that a group may go on with what has ended: the word takes its way, and a step its time.
  absl::Duration NoticeBound() const {
    return 4 * options.link_delay + 2 * options.tick + 3 * options.step_base +
           3 * options.scheduler.max_step_rows * options.step_per_row;
  }

  const Options options;
  absl::Time now = kStart;
  Outcome outcome;

 private:
  struct Event {
    absl::Time time;
    uint64_t number;
    std::function<void()> what;
    bool operator<(const Event& other) const {  // the earliest is the top
      return std::pair(other.time, other.number) < std::pair(time, number);
    }
  };

  double Uniform() { return std::uniform_real_distribution<double>(0, 1)(random_); }
  void Arrive(size_t index);
  void Tick();
  void InjectFaults();
  bool IsQuiet() const { return next_arrival_ >= arrivals_.size() && live_clients_ == 0; }

  std::mt19937_64 random_;
  const std::vector<Arrival>& arrivals_;
  Cluster cluster_;
  std::priority_queue<Event> events_;
  uint64_t next_event_ = 0;
  std::vector<std::unique_ptr<Group>> groups_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Client>> clients_;
  absl::flat_hash_map<uint64_t, absl::Time> ended_;
  size_t next_arrival_ = 0;
  int64_t live_clients_ = 0;

  friend class Client;
};

bool Client::OnOutput(uint32_t index, const worker::v1::SequenceOutput& output, uint32_t replays) {
  Sample& sample = samples_.at(index);
  if (sample.is_over) world_.Fail(absl::StrCat("output for a sample that is over, seed ", seed_ + index));
  for (const auto& token : output.tokens()) {
    if (token.id() != OracleToken(seed_ + index, sample.tokens)) {
      world_.Fail(
          absl::StrCat("token ", sample.tokens, " of seed ", seed_ + index, " is not the oracle's: twice or lost"));
    }
    if (sample.tokens++ == 0) {
      world_.outcome.first_token_seconds.push_back(absl::ToDoubleSeconds(world_.now - arrived_));
      world_.outcome.tokens_by_tenant[arrival_.tenant] += arrival_.prompt_tokens;
    }
    ++world_.outcome.tokens_by_tenant[arrival_.tenant];
    ++world_.outcome.tokens;
  }
  if (!output.finished()) return true;
  if (sample.tokens != static_cast<size_t>(arrival_.output_tokens)) {
    world_.Fail(absl::StrCat("seed ", seed_ + index, " ended after ", sample.tokens, " of ", arrival_.output_tokens));
  }
  ++world_.outcome.whole;
  world_.outcome.last_whole_by_tenant[arrival_.tenant] = world_.now - kStart;
  world_.outcome.replays += replays;
  EndSample(index);
  return true;
}

void Client::OnEnd(uint32_t index, Ending ending, uint32_t) {
  if (samples_.at(index).is_over) world_.Fail("a sample ended twice");
  if (ending == Ending::kDeadline && world_.now < arrived_ + arrival_.timeout) world_.Fail("expired before its time");
  ++(ending == Ending::kDeadline ? world_.outcome.expired : world_.outcome.cancelled);
  EndSample(index);
}

void Client::OnFailed(const absl::Status& status) {
  if (!absl::IsUnavailable(status)) world_.Fail(absl::StrCat("failed with ", status.ToString()));
  for (uint32_t index = 0; index < samples_.size(); ++index) {
    if (samples_[index].is_over) continue;
    ++world_.outcome.failed;
    EndSample(index);
  }
}

void Client::Cancel() {
  if (is_over()) return;
  world_.Ask([this](Cluster& cluster) { cluster.Forget(key); });
  for (uint32_t index = 0; index < samples_.size(); ++index) {
    if (samples_[index].is_over) continue;
    ++world_.outcome.cancelled;
    EndSample(index);
  }
}

void Client::EndSample(uint32_t index) {
  samples_[index].is_over = true;
  world_.NoteEnd(seed_ + index);
  if (is_over()) --world_.live_clients_;
}

void Group::Join() {
  worker::v1::Join join;
  join.mutable_model()->set_fingerprint("f");
  join.mutable_model()->set_vocab_size(1000);
  join.mutable_model()->set_max_tokens(static_cast<uint32_t>(world_.options.scheduler.max_positions));
  join.set_max_running(static_cast<uint32_t>(world_.options.scheduler.slot_count));
  join.set_max_waiting(static_cast<uint32_t>(world_.options.scheduler.max_waiting));
  join.set_max_step_seconds(60);
  Reset();
  is_up_ = true;
  is_closed_ = false;
  const auto welcome = world_.Ask([&](Cluster& cluster) { return cluster.Join(join, this, world_.now); });
  if (!welcome.ok()) world_.Fail(absl::StrCat("refused: ", welcome.status().ToString()));
}

void Group::Reset() {
  scheduler_ = std::make_unique<scheduler::Scheduler>(world_.options.scheduler);
  running_.clear();
  is_stepping_ = false;
}

void Group::Send(worker::v1::ToGroup message) {
  if (message.has_welcome()) epoch_ = message.welcome().epoch();
  if (is_closed_) world_.Fail("a message after the close");
  world_.At(world_.now + world_.options.link_delay,
            [this, epoch = epoch_, message = std::move(message)] { Receive(epoch, message); });
}

void Group::Close(const absl::Status& reason) {
  is_closed_ = true;
  if (absl::IsInvalidArgument(reason)) {
    world_.Fail(absl::StrCat("group ", index_, ", which did no wrong, is sent away: ", reason.ToString()));
  }
}

void Group::Receive(uint64_t epoch, const worker::v1::ToGroup& message) {
  if (!is_up_ || epoch != epoch_) return;
  if (world_.now < hung_until_) {
    world_.At(hung_until_, [this, epoch, message] { Receive(epoch, message); });
    return;
  }
  for (const uint64_t number : message.cancel().sequences()) {
    scheduler_->Remove(SequenceId{number});
    running_.erase(number);
  }
  if (message.has_submit()) {
    const worker::v1::Submit& submit = message.submit();
    const uint64_t seed = submit.sampling().seed();
    scheduler::Sequence sequence{
        .id = SequenceId{submit.sequence()},
        .tokens = {submit.prompt().begin(), submit.prompt().end()},
        .max_tokens = static_cast<int32_t>(submit.prompt_size() + submit.sampling().max_tokens()),
        .priority = submit.priority()};
    for (int i = 0; i < submit.generated_size(); ++i) {
      if (submit.generated(i) != OracleToken(seed, static_cast<size_t>(i))) world_.Fail("a replay with other tokens");
      sequence.tokens.push_back(submit.generated(i));
    }
    if (const absl::Status admitted = scheduler_->Admit(std::move(sequence)); !admitted.ok()) {
      world_.Fail(absl::StrCat("a group refused: ", admitted.ToString()));
    }
    running_[submit.sequence()] = {seed, static_cast<size_t>(submit.generated_size()), submit.sampling().max_tokens()};
  }
  StartStep();
}

void Group::StartStep() {
  if (is_stepping_ || running_.empty()) return;
  is_stepping_ = true;
  Step(epoch_);
}

void Group::Step(uint64_t epoch) {
  if (!is_up_ || epoch != epoch_) return;
  if (world_.now < hung_until_) return world_.At(hung_until_, [this, epoch] { Step(epoch); });
  if (!scheduler_->PlanStep(plan_, planned_)) {
    is_stepping_ = false;
    return;
  }
  int64_t rows = 0;
  for (const StepSegment& segment : plan_.segments) rows += static_cast<int64_t>(segment.tokens.size());
  world_.At(world_.now + world_.options.step_base + rows * world_.options.step_per_row,
            [this, epoch] { EndStep(epoch); });
}

void Group::EndStep(uint64_t epoch) {
  if (!is_up_ || epoch != epoch_) return;
  if (world_.now < hung_until_) return world_.At(hung_until_, [this, epoch] { EndStep(epoch); });
  auto outputs = std::make_shared<worker::v1::Outputs>();  // of the event that delivers it, which is copied
  outputs->set_epoch(epoch);
  std::vector<scheduler::Scheduler::Token> tokens;
  std::vector<SequenceId> ended;
  for (const scheduler::Planned& planned : planned_) {
    const auto number = static_cast<uint64_t>(planned.id);
    const auto found = running_.find(number);
    if (!planned.produces_token || found == running_.end()) continue;
    Running& running = found->second;
    // A group that hung has not heard of it yet, and one that was sent away never will.
    const bool could_hear = !is_closed_ && world_.now - hung_until_ > world_.NoticeBound();
    const auto end = world_.EndOf(running.seed);
    if (could_hear && end && world_.now - *end > world_.NoticeBound()) {
      world_.Fail(absl::StrCat("group ", index_, " still runs seed ", running.seed, ", which ended ",
                               absl::FormatDuration(world_.now - *end), " ago: a lost cancel"));
    }
    worker::v1::SequenceOutput& output = *outputs->add_sequences();
    output.set_sequence(number);
    output.set_token_offset(static_cast<uint32_t>(running.generated));
    const int32_t token = OracleToken(running.seed, running.generated++);
    output.add_tokens()->set_id(token);
    if (running.generated < running.max_tokens) {
      tokens.push_back({planned.id, token});
      continue;
    }
    output.set_finished(true);
    output.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
    ended.push_back(planned.id);
  }
  for (const SequenceId id : ended) {
    scheduler_->Remove(id);
    running_.erase(static_cast<uint64_t>(id));
  }
  scheduler_->CompleteStep(tokens);
  if (world_.options.checks_every_event) scheduler_->CheckInvariants();
  if (outputs->sequences_size() > 0) {
    // It arrives, whatever becomes of the group meanwhile: when its epoch is over by then, it is late.
    world_.At(world_.now + world_.options.link_delay, [this, epoch, outputs] {
      if (epoch != epoch_ || is_closed_) ++world_.outcome.late_outputs;
      world_.Ask([&](Cluster& cluster) { cluster.TakeOutputs(epoch, *outputs, world_.now); });
    });
  }
  Step(epoch);
}

void Group::Beat() {
  if (is_up_ && world_.now >= hung_until_) {
    world_.Ask([this](Cluster& cluster) { cluster.TakeLoad(epoch_, {}, world_.now); });
  }
}

void Group::Crash() {
  if (!is_up_) return;
  is_up_ = false;
  hung_until_ = absl::InfinitePast();
  world_.At(world_.now + world_.options.link_delay,
            [this, epoch = epoch_] { world_.Ask([&](Cluster& cluster) { cluster.Leave(epoch, world_.now); }); });
  world_.At(world_.now + world_.options.restart_delay, [this] { Join(); });
}

// It comes to after a while; if its epoch is over by then, it learns so, and joins again.
void Group::Hang(absl::Duration time) {
  if (!is_up_ || world_.now < hung_until_) return;
  hung_until_ = world_.now + time;
  world_.At(hung_until_ + world_.options.link_delay, [this, epoch = epoch_] {
    if (is_up_ && epoch == epoch_ && is_closed_) Join();
  });
}

// Nothing is live any more, and every word has arrived.
void Group::CheckLeaks() {
  if (!is_up_) return;
  const scheduler::SchedulerLoad load = scheduler_->load();
  if (load.running + load.waiting > 0) {
    world_.Fail(absl::StrCat("group ", index_, " holds ", load.running + load.waiting,
                             " sequences that nobody waits for: a lost cancel"));
  }
  if (load.blocks_free != load.blocks_total) {
    world_.Fail(
        absl::StrCat("group ", index_, " has ", load.blocks_free, " of ", load.blocks_total, " blocks: a block leak"));
  }
  scheduler_->CheckInvariants();
}

void World::Arrive(size_t index) {
  const Arrival& arrival = arrivals_[index];
  ++outcome.arrived;
  const uint64_t seed = (index + 1) * 100;  // room for the samples
  auto client = std::make_unique<Client>(*this, seed, arrival, now);
  cluster::Request request{.id = absl::StrCat(index), .tenant = absl::StrCat("t", arrival.tenant)};
  // Two prompts of three share their first tokens with others: something for the prefix cache.
  for (int32_t i = 0; i < arrival.prompt_tokens; ++i) {
    request.sequence.add_prompt(index % 3 < 2 && i < 40 ? i : OracleToken(~seed, static_cast<size_t>(i)));
  }
  request.sequence.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(arrival.output_tokens));
  request.sequence.mutable_sampling()->set_seed(seed);
  request.sequence.set_priority(arrival.priority);
  request.samples = static_cast<uint32_t>(arrival.samples);
  request.deadline = now + arrival.timeout;
  request.listener = client.get();
  ++live_clients_;
  const auto key = Ask([&](Cluster& cluster) { return cluster.Submit(std::move(request), now); });
  if (!key.ok()) {
    if (!absl::IsResourceExhausted(key.status())) Fail(key.status().ToString());
    ++outcome.refused;
    --live_clients_;
    return;
  }
  client->key = *key;
  if (arrival.patience != absl::InfiniteDuration()) {
    At(now + arrival.patience, [this, seed] {
      if (const auto found = clients_.find(seed); found != clients_.end()) found->second->Cancel();
    });
  }
  clients_.emplace(seed, std::move(client));
}

void World::Tick() {
  Ask([this](Cluster& cluster) { cluster.Tick(now); });
  InjectFaults();
}

void World::InjectFaults() {
  if (next_arrival_ >= arrivals_.size()) return;  // the calm
  const double seconds = absl::ToDoubleSeconds(options.tick);
  const FaultRates& rates = options.faults;
  if (rates.crash + rates.hang + rates.cut == 0) return;
  for (const auto& group : groups_) {
    const double draw = Uniform() / seconds;
    if (draw >= rates.crash + rates.hang + rates.cut) continue;
    ++outcome.faults;
    if (draw < rates.crash) {
      group->Crash();
    } else if (draw < rates.crash + rates.hang) {
      group->Hang(absl::Seconds(Uniform() * 4 * absl::ToDoubleSeconds(options.cluster.group_timeout)));
    } else if (group->is_up()) {
      const uint64_t epoch = group->epoch();
      Ask([&](Cluster& cluster) { cluster.Leave(epoch, now); });
      group->Join();
    }
  }
}

Outcome World::Run() {
  for (const auto& group : groups_) group->Join();
  // Everything that repeats makes its own next event, until the end.
  const std::function<void()> tick = [&] {
    Tick();
    if (!IsQuiet()) At(now + options.tick, tick);
  };
  const std::function<void()> beat = [&] {
    for (const auto& group : groups_) group->Beat();
    if (!IsQuiet()) At(now + options.heartbeat, beat);
  };
  const std::function<void()> arrive = [&] {
    Arrive(next_arrival_++);
    if (next_arrival_ < arrivals_.size()) At(kStart + arrivals_[next_arrival_].at, arrive);
  };
  if (!arrivals_.empty()) At(kStart + arrivals_[0].at, arrive);
  At(now, tick);
  At(now, beat);
  absl::Time calm = absl::InfiniteFuture();
  while (!events_.empty() && outcome.failures.empty()) {
    // The top is const only to keep its order, and it goes at once.
    const Event event = std::move(const_cast<Event&>(events_.top()));
    events_.pop();
    now = event.time;
    event.what();
    ++outcome.events;
    if (options.checks_every_event) cluster_.CheckInvariants();
    if (next_arrival_ >= arrivals_.size() && calm == absl::InfiniteFuture()) calm = now;
    if (outcome.events % 4096 == 0) {
      absl::erase_if(clients_, [](const auto& entry) { return entry.second->is_over(); });
      absl::erase_if(ended_, [this](const auto& entry) { return now - entry.second > absl::Minutes(1); });
    }
    // Liveness: every group heals, so all that was accepted ends.
    if (now - calm > absl::Hours(2)) Fail(absl::StrCat(live_clients_, " requests do not end"));
  }
  if (outcome.failures.empty()) {
    for (const auto& group : groups_) group->CheckLeaks();
    if (cluster_.live() > 0) Fail("the cluster holds samples that nobody waits for");
    cluster_.CheckInvariants();
  }
  outcome.virtual_time = now - kStart;
  return std::move(outcome);
}

}  // namespace

Outcome Simulate(const Options& options, const std::vector<Arrival>& arrivals) {
  return World(options, arrivals).Run();
}

Scenario DrawScenario(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto draw = [&random](int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); };
  const auto often = [&](int percent) { return draw(0, 99) < percent; };
  Scenario scenario;
  Options& options = scenario.options;
  options.seed = seed;
  options.groups = draw(1, 4);
  options.cluster.max_live = static_cast<uint32_t>(draw(4, 60));
  options.cluster.group_timeout = absl::Milliseconds(draw(300, 1500));
  options.cluster.group_wait = often(20) ? absl::Seconds(1) : absl::Seconds(60);
  options.cluster.max_fruitless_replays = often(20) ? 2 : 1000;
  options.heartbeat = absl::Milliseconds(100);
  options.scheduler.block_tokens = draw(1, 8);
  options.scheduler.slot_count = draw(1, 8);
  options.scheduler.max_positions = 64;
  options.scheduler.block_count = draw(64 / options.scheduler.block_tokens + 1, 120);
  options.scheduler.max_step_rows = draw(2, 48);
  options.scheduler.max_chunk_rows = options.scheduler.max_step_rows;
  options.scheduler.max_waiting = draw(4, 16);
  options.restart_delay = absl::Milliseconds(draw(100, 2000));
  // Swarm: some kinds of fault are off in a run.
  if (often(60)) options.faults.crash = draw(1, 40) / 100.0;
  if (often(60)) options.faults.hang = draw(1, 40) / 100.0;
  if (often(60)) options.faults.cut = draw(1, 60) / 100.0;
  const bool has_cancels = often(70), has_timeouts = often(50);
  absl::Duration at;
  for (int i = draw(10, 60); i > 0; --i) {
    at += absl::Milliseconds(draw(0, 250));
    Arrival& arrival = scenario.arrivals.emplace_back();
    arrival = {.at = at, .prompt_tokens = draw(1, 40), .output_tokens = draw(1, 24), .tenant = draw(0, 3)};
    arrival.samples = often(20) ? draw(2, 4) : 1;
    arrival.priority = often(20) ? draw(-1, 1) : 0;
    if (has_cancels && often(25)) arrival.patience = absl::Milliseconds(draw(0, 1500));
    if (has_timeouts && often(25)) arrival.timeout = absl::Milliseconds(draw(10, 4000));
  }
  return scenario;
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  const auto at = static_cast<ptrdiff_t>(q * static_cast<double>(values.size() - 1));
  std::ranges::nth_element(values, values.begin() + at);
  return values[static_cast<size_t>(at)];
}

}  // namespace rankwise::sim
