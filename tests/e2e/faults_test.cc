// What must survive: killed ranks and coordinators, hostile models, and the end of everything.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <tuple>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/client.h"
#include "proto/health.grpc.pb.h"
#include "tests/chaos/deployment_processes.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using ::testing::HasSubstr;

constexpr char kPrompt[] = "Once upon a time";

class KilledRank : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Replicas, KilledRank, ::testing::Values(1, 2));

TEST_P(KilledRank, StreamsGoOnWithTheBitsOfAnUndisturbedRun) {
  GenerateRequest request = Sampled(kPrompt, 900, 11);
  request.mutable_sampling()->set_ignore_eos(true);
  const auto cluster = Serve({.tp = 2, .replicas = GetParam(), .kv = "int8-head"});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto& stub = (*cluster)->stub();
  const Reply undisturbed = Generate(stub, request);
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;

  // Rank 0 holds the stream to the coordinator, rank 1 only answers to rank 0.
  for (const size_t rank : {1, 0}) {
    // As many streams as groups, so that the killed group has one.
    std::vector<std::unique_ptr<Stream>> streams;
    for (int i = 0; i < GetParam(); ++i) streams.push_back(std::make_unique<Stream>(stub, request));
    ASSERT_TRUE(SuperviseUntil(**cluster,
                               [&] { return absl::c_all_of(streams, [](auto& s) { return s->received() >= 20; }); }));
    const std::vector<int64_t> pids = RankPids(stub);
    ASSERT_EQ(pids.size(), 2u * static_cast<size_t>(GetParam()));
    ASSERT_EQ(kill(static_cast<pid_t>(pids[rank]), SIGKILL), 0);
    ASSERT_FALSE(streams[0]->is_finished());
    uint32_t replays = 0;
    for (const auto& stream : streams) {
      ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return stream->is_finished(); }));
      const Reply reply = stream->Join();
      ASSERT_TRUE(reply.status.ok()) << reply.status;
      EXPECT_FALSE(reply.has_gap);
      EXPECT_EQ(reply.ids, undisturbed.ids);
      EXPECT_EQ(reply.text, undisturbed.text);
      ASSERT_TRUE(reply.finish);
      replays += reply.finish->replays();
    }
    EXPECT_GE(replays, 1u);
    ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return !IsRunning(pids[0]) && !IsRunning(pids[1]); }));
    const absl::Status serving = (*cluster)->WaitServing(GetParam(), absl::Now() + kPatience);
    ASSERT_TRUE(serving.ok()) << serving;
  }
  EXPECT_TRUE(WaitIdle(stub).ok());
  EXPECT_TRUE((*cluster)->Drain().ok());
}

bool IsHealthy(const std::string& endpoint) {
  const auto stub =
      grpc::health::v1::Health::NewStub(grpc::CreateChannel(endpoint, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
  grpc::health::v1::HealthCheckRequest request;
  request.set_service("rankwise.v1.Inference");
  grpc::health::v1::HealthCheckResponse response;
  const grpc::Status status = stub->Check(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.status() == grpc::health::v1::HealthCheckResponse::SERVING;
}

std::string LogOf(const launch::LocalCluster& cluster, const std::string& program) {
  return ReadTextFile(absl::StrCat(cluster.log_folder(), "/", program, ".log")).value_or("");
}

// Neither mpirun nor TCP notices a process that only stands still: a rank that answers to rank 0, rank 0 itself, and a
// group of one, each with work and without.
class StoppedRank : public ::testing::TestWithParam<std::tuple<int, size_t, bool>> {};
INSTANTIATE_TEST_SUITE_P(Ranks, StoppedRank,
                         ::testing::Combine(::testing::Values(2), ::testing::Values(0, 1), ::testing::Bool()));
INSTANTIATE_TEST_SUITE_P(Alone, StoppedRank,
                         ::testing::Combine(::testing::Values(1), ::testing::Values(0), ::testing::Bool()));

TEST_P(StoppedRank, IsNoticedWithinThreeSecondsReportedAndReplaced) {
  const auto [tp, rank, has_work] = GetParam();
  GenerateRequest request = Sampled(kPrompt, 900, 11);
  request.mutable_sampling()->set_ignore_eos(true);
  const auto cluster = Serve({.tp = tp});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto& stub = (*cluster)->stub();
  const Reply undisturbed = Generate(stub, request);
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;
  EXPECT_TRUE(IsHealthy((*cluster)->endpoint()));
  const std::vector<int64_t> pids = RankPids(stub);
  ASSERT_EQ(pids.size(), static_cast<size_t>(tp));
  std::optional<Stream> stream;
  if (has_work) {
    stream.emplace(stub, request);
    ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return stream->received() >= 20; }));
  }
  const absl::Time stopped = absl::Now();
  ASSERT_EQ(kill(static_cast<pid_t>(pids[rank]), SIGSTOP), 0);
  const auto log = [&cluster] { return LogOf(**cluster, "group-0"); };
  ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return absl::StrContains(log(), absl::StrCat("rank ", rank, " on ")); }));
  const absl::Duration noticed = absl::Now() - stopped;
  EXPECT_LE(noticed, absl::Seconds(3)) << log();
  EXPECT_THAT(log(), ::testing::ContainsRegex("rank [01] on [^ ]+ .*\\(step [0-9]+, [A-Za-z ]+, call [0-9]+\\)"));
  ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return !IsHealthy((*cluster)->endpoint()); }));
  ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return IsHealthy((*cluster)->endpoint()); }));
  spdlog::info("tp {}, rank {}, {}: noticed after {:.2f} s, served again after {:.2f} s", tp, rank,
               has_work ? "decoding" : "idle", absl::ToDoubleSeconds(noticed),
               absl::ToDoubleSeconds(absl::Now() - stopped));
  if (!has_work) stream.emplace(stub, request);
  ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return stream->is_finished(); }));
  const Reply reply = stream->Join();
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  EXPECT_EQ(reply.ids, undisturbed.ids);
  for (const int64_t pid : pids) EXPECT_FALSE(IsRunning(pid));
  EXPECT_TRUE((*cluster)->Drain().ok());
}

TEST(KilledCoordinator, ComesBackAtItsEndpointAndItsGroupsJoinAgain) {
  const auto cluster = Serve({.tp = 2});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto& stub = (*cluster)->stub();
  const Reply before = Generate(stub, Greedy(kPrompt, 16));
  ASSERT_TRUE(before.status.ok()) << before.status;
  const std::vector<int64_t> pids = RankPids(stub);
  kill((*cluster)->pid(-1), SIGKILL);
  ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return (*cluster)->failures() == 1; }));
  const absl::Status serving = (*cluster)->WaitServing(1, absl::Now() + kPatience);
  ASSERT_TRUE(serving.ok()) << serving;
  EXPECT_EQ(Generate(stub, Greedy(kPrompt, 16)).ids, before.ids);
  EXPECT_EQ(RankPids(stub), pids);  // the group did not have to load its weights again
  EXPECT_TRUE((*cluster)->Drain().ok());
}

// A copy of the demo model whose files a test then spoils.
class HostileModel : public ::testing::Test {
 protected:
  void SetUp() override {
    static int count = 0;
    folder_ = absl::StrCat(ScratchFolder(), "/hostile-", count++);
    std::filesystem::copy(DemoModel(), folder_);
  }
  std::string Read(const std::string& name) { return ReadTextFile(folder_ + "/" + name).value(); }
  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(folder_ + "/" + name, std::ios::binary) << bytes;
  }
  void ExpectRefused(const std::string& word) {
    const auto ended =
        RunProgram("rankwise-worker", {"--model", folder_, "--coordinator", "127.0.0.1:1", "--threads", "1"});
    ASSERT_TRUE(ended.ok()) << ended.status();
    EXPECT_EQ(ended->state.code, 2) << ended->state.ToString() << "\n" << ended->log;
    EXPECT_EQ(ended->state.signal, 0);
    EXPECT_THAT(ended->log, HasSubstr(word));
  }
  std::string folder_;
};

TEST_F(HostileModel, TruncatedWeights) {
  const std::string weights = Read("model.safetensors");
  for (const size_t size : {size_t{0}, size_t{7}, size_t{100}, weights.size() / 2, weights.size() - 1}) {
    Write("model.safetensors", weights.substr(0, size));
    ExpectRefused("model.safetensors");
  }
}

TEST_F(HostileModel, LyingHeaders) {
  const std::string weights = Read("model.safetensors");
  std::string longer = weights;
  longer[7] = '\x7f';  // a header of 2^62 bytes
  Write("model.safetensors", longer);
  ExpectRefused("model.safetensors");
  std::string overflow = weights;
  const size_t at = overflow.find("\"data_offsets\":[");
  ASSERT_NE(at, std::string::npos);
  overflow[at + 16] = '9';  // moves or lengthens a tensor
  Write("model.safetensors", overflow);
  ExpectRefused("model.safetensors");
}

TEST_F(HostileModel, AbsurdShapes) {
  const std::string config = Read("config.json");
  for (const auto& [key, value] : {std::pair{"hidden_size", "1099511627776"},
                                   {"num_hidden_layers", "-1"},
                                   {"num_attention_heads", "0"},
                                   {"vocab_size", "1e400"},
                                   {"head_dim", "\"x\""}}) {
    std::string spoiled = config;
    const size_t begin = spoiled.find(absl::StrCat("\"", key, "\":"));
    ASSERT_NE(begin, std::string::npos) << key;
    spoiled.replace(begin, spoiled.find_first_of(",\n", begin) - begin, absl::StrCat("\"", key, "\": ", value));
    Write("config.json", spoiled);
    ExpectRefused(absl::string_view(value) == "1e400" ? "config.json" : key);
  }
  Write("config.json", "{");
  ExpectRefused("config.json");
}

TEST_F(HostileModel, TheLauncherStopsAtOnceAndTellsWhy) {
  Write("model.safetensors", "short");
  const absl::Time begin = absl::Now();
  const auto cluster = Serve({.model = folder_, .tp = 2});
  EXPECT_TRUE(absl::IsFailedPrecondition(cluster.status())) << cluster.status();
  EXPECT_THAT(std::string(cluster.status().message()), HasSubstr("model.safetensors"));
  EXPECT_LT(absl::Now() - begin, kPatience / 2);
}

TEST(Int8, IsRefusedWithoutScalesAndWithScalesOfAnotherParallelism) {
  const auto scales = DemoScales(1);
  ASSERT_TRUE(scales.ok()) << scales.status();
  const auto without = RunProgram("rankwise", {"serve", DemoModel(), "--kv", "int8"});
  ASSERT_TRUE(without.ok());
  EXPECT_EQ(without->state.code, 2);
  EXPECT_THAT(without->log, HasSubstr("--kv-scales"));
  const auto other =
      RunProgram("rankwise", {"serve", DemoModel(), "--tp", "2", "--kv", "int8", "--kv-scales", *scales});
  ASSERT_TRUE(other.ok());
  EXPECT_EQ(other->state.code, 2) << other->log;
  EXPECT_THAT(other->log, HasSubstr("kv-qparams"));
}

// `rankwise serve`, whose whole family is watched.
class ServeCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    static int count = 0;
    const std::string folder = absl::StrCat(ScratchFolder(), "/serve-", count++);
    std::filesystem::create_directories(folder);
    const std::string endpoint_file = folder + "/endpoint";
    auto child = launch::ChildProcess::Start(
        {.command = {ProgramFolder() + "/rankwise", "serve", DemoModel(), "--tp", "2", "--kv", "f16", "--threads", "1",
                     "--endpoint-file", endpoint_file, "--drain-timeout", "60"},
         .environment = {absl::StrCat("XDG_RUNTIME_DIR=", folder), absl::StrCat("HOME=", ScratchFolder())},
         .log_path = folder + "/log"});
    ASSERT_TRUE(child.ok()) << child.status();
    serve_ = *std::move(child);
    folder_ = folder;
    for (const absl::Time deadline = absl::Now() + kPatience; !std::filesystem::exists(endpoint_file);) {
      ASSERT_LT(absl::Now(), deadline) << serve_->LogTail();
      ASSERT_FALSE(serve_->Wait(absl::Now() + absl::Milliseconds(10))) << serve_->LogTail();
    }
    auto stub = launch::Connect({.endpoint_file = endpoint_file});
    ASSERT_TRUE(stub.ok()) << stub.status();
    stub_ = *std::move(stub);
    family_ = RankPids(*stub_);
    ASSERT_EQ(family_.size(), 2u);
    for (const pid_t child : chaos::ChildrenOf(serve_->pid())) family_.push_back(child);  // coordinator and mpirun
    EXPECT_GE(family_.size(), 4u);
  }
  void ExpectNothingLeft() {
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
    for (const int64_t pid : family_) {
      while (IsRunning(pid) && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(20));
      EXPECT_FALSE(IsRunning(pid)) << pid;
    }
  }
  std::string folder_;
  std::unique_ptr<launch::ChildProcess> serve_;
  std::unique_ptr<rankwise::v1::Inference::Stub> stub_;
  std::vector<int64_t> family_;
};

TEST_F(ServeCommand, TermFinishesLiveStreamsAndEndsEverything) {
  GenerateRequest request = Greedy(kPrompt, 900);
  request.mutable_sampling()->set_ignore_eos(true);
  Stream stream(*stub_, request);
  while (stream.received() < 10 && !stream.is_finished()) absl::SleepFor(absl::Milliseconds(2));
  ASSERT_FALSE(stream.is_finished());
  serve_->Signal(SIGTERM);
  const auto state = serve_->Wait(absl::Now() + 2 * kPatience);
  ASSERT_TRUE(state);
  EXPECT_TRUE(state->is_success()) << state->ToString() << "\n" << serve_->LogTail();
  const Reply reply = stream.Join();
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  EXPECT_EQ(reply.ids.size(), 900u);
  ExpectNothingLeft();
  for (const auto& entry : std::filesystem::directory_iterator(folder_))
    EXPECT_EQ(entry.path().filename(), "log") << "left behind";
}

TEST_F(ServeCommand, NothingSurvivesItsViolentDeath) {
  kill(serve_->pid(), SIGKILL);
  ASSERT_TRUE(serve_->Wait(absl::Now() + kPatience));
  ExpectNothingLeft();
}

}  // namespace
}  // namespace rankwise::e2e
