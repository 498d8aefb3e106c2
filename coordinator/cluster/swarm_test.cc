// Random groups, clients, losses and time against the real cluster. A failure prints its seed.

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/cluster/simulation.h"

namespace rankwise::cluster {
namespace {

// Groups, clients and time at random; then everything heals, and every request that still lives must end well.
class Swarm {
 public:
  explicit Swarm(uint64_t seed) : random_(seed) {
    options_.max_live = Draw(4, 40);
    options_.max_fruitless_replays = 1000;
    cluster_ = std::make_unique<Cluster>(options_);
  }

  int whole = 0, replays = 0;  // what there was to see

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
    for (const auto& client : clients_) {
      EXPECT_TRUE(client->is_over());
      if (client->is_whole()) ++whole;
      for (const Client::Sample& sample : client->samples) replays += sample.replays;
    }
  }

  std::mt19937_64 random_;
  ClusterOptions options_;
  std::unique_ptr<Cluster> cluster_;
  absl::Time now_ = kStart;
  std::vector<std::unique_ptr<SimulatedGroup>> groups_;  // dead ones too: their outputs may still arrive
  std::vector<std::unique_ptr<Client>> clients_;
};

TEST(SwarmTest, EveryStreamIsItsOracles) {
  int whole = 0, replays = 0;
  for (uint64_t seed = 0; seed < 300 && !HasFailure(); ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Swarm swarm(seed);
    swarm.Run();
    whole += swarm.whole;
    replays += swarm.replays;
  }
  EXPECT_GT(whole, 1000);
  EXPECT_GT(replays, 1000);
}

}  // namespace
}  // namespace rankwise::cluster
