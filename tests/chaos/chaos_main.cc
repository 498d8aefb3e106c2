// Minutes in the life of a deployment whose processes are killed and stopped, while clients hold every stream against
// its oracle.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "tests/chaos/chaos.h"
#include "tests/chaos/deployment_processes.h"
#include "tests/e2e/serving.h"

namespace rankwise::chaos {
namespace {

constexpr int kConnections = 4;

struct Flags {
  double seconds = 60;
  double pause_seconds = 5;
  uint64_t seed = 1;
  int groups = 2, tp = 2;
  int streams = 64;
  int questions = 48;
  std::string kv = "f16";
  std::string log_folder;
};

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

std::string Times(const std::vector<double>& seconds) {
  if (seconds.empty()) return "none";
  return absl::StrFormat("p50 %.2f s, max %.2f s (%d)", Quantile(seconds, 0.5), Quantile(seconds, 1), seconds.size());
}

// The stubs share a coordinator and not a connection.
std::vector<std::unique_ptr<rankwise::v1::Inference::Stub>> Connect(const launch::LocalCluster& cluster) {
  std::vector<std::unique_ptr<rankwise::v1::Inference::Stub>> stubs;
  for (int i = 0; i < kConnections; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    stubs.push_back(
        rankwise::v1::Inference::NewStub(wire::MakeChannel(cluster.endpoint(), cluster.credentials(), arguments)));
  }
  return stubs;
}

absl::StatusOr<std::vector<Answer>> Oracles(rankwise::v1::Inference::Stub& stub,
                                            const std::vector<Question>& questions) {
  std::vector<absl::StatusOr<Answer>> asked(questions.size(), absl::UnknownError(""));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < questions.size(); ++i) {
    threads.emplace_back([&, i] { asked[i] = Ask(stub, questions[i].request, absl::Minutes(5)); });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<Answer> oracles;
  for (const auto& answer : asked) {
    RW_RETURN_IF_ERROR(answer.status());
    oracles.push_back(*answer);
  }
  return oracles;
}

// Where this deployment's MPI keeps its segments.
std::string SharedMemoryFolder(const launch::LocalCluster& cluster) {
  const std::vector<std::string> command = absl::StrSplit(ReadProc(cluster.pid(0), "cmdline"), '\0');
  const auto name = std::ranges::find(command, "btl_vader_backing_directory");
  return name == command.end() || name + 1 == command.end() ? "" : *(name + 1);
}

void Print(const FaultReport& faults, const Clients::Tally& tally, int restarts) {
  std::printf("faults:");
  int sum = 0;
  for (const auto& [kind, count] : faults.injected) {
    std::printf(" %d x %s,", count, Name(kind));
    sum += count;
  }
  std::printf(" %d in all; %d restarts\n", sum, restarts);
  absl::PrintF("detection of lost ranks %s, in the start of MPI %s; unnoticed %d\n", Times(faults.detection_seconds),
               Times(faults.early_detection_seconds), faults.unnoticed);
  absl::PrintF("recovery of groups %s, of the coordinator %s\n", Times(faults.group_recovery_seconds),
               Times(faults.coordinator_recovery_seconds));
  absl::PrintF("beside the faults: %d groups ended for want of CPU time; the coordinator dropped %d silent epochs\n",
               faults.starved, faults.dropped_epochs);
  absl::PrintF(
      "streams finished %d (%d tokens; %d of them resumed, %d times), different from their oracle %d, failed %d\n",
      tally.finished, tally.tokens, tally.resumed_streams, tally.resumes, tally.different, tally.failed);
  for (const std::string& complaint : tally.complaints) std::printf("  %s\n", complaint.c_str());
  std::fflush(stdout);
}

// What should not be there any more, in words.
std::vector<std::string> Leftovers(const std::string& shared_memory, const std::vector<std::string>& segments_before) {
  std::vector<std::string> left;
  for (const absl::Time deadline = absl::Now() + absl::Seconds(10); absl::Now() < deadline;) {
    left.clear();
    for (const pid_t pid : MarkedProcesses()) {
      std::string command = ReadProc(pid, "cmdline");
      std::ranges::replace(command, '\0', ' ');
      left.push_back(absl::StrCat("process ", pid, ": ", command));
    }
    if (left.empty()) break;
    absl::SleepFor(absl::Milliseconds(50));
  }
  if (std::filesystem::exists(shared_memory)) left.push_back(shared_memory);
  for (const std::string& segment : OrphanedSegments()) {
    if (std::ranges::find(segments_before, segment) == segments_before.end()) {
      left.push_back(absl::StrCat("/dev/shm/", segment));
    }
  }
  return left;
}

absl::Status Main(const Flags& flags) {
  MarkDescendants();
  const std::vector<std::string> segments_before = OrphanedSegments();
  const std::string scratch = e2e::ScratchFolder();
  launch::ClusterOptions options{.model = e2e::DemoModel(), .tp = flags.tp, .replicas = flags.groups};
  options.log_folder = flags.log_folder.empty() ? absl::StrCat(scratch, "/logs") : flags.log_folder;
  std::filesystem::create_directories(options.log_folder);
  options.start_timeout = e2e::kPatience;
  options.drain_timeout = absl::Seconds(60);
  options.healthy_after = absl::Seconds(2);  // here failures are no sign of a broken program
  options.coordinator_flags = {"--journal", absl::StrCat(scratch, "/journal"), "--group-wait", "120"};
  options.worker_flags = {"--device", "cpu", "--threads", "1", "--kv", flags.kv};
  RW_ASSIGN_OR_RETURN(auto cluster, launch::LocalCluster::Start(options));
  RW_RETURN_IF_ERROR(cluster->WaitServing(flags.groups, absl::Now() + e2e::kPatience));
  const std::string shared_memory = SharedMemoryFolder(*cluster);
  auto stubs = Connect(*cluster);
  const std::vector<Question> questions = MakeQuestions(flags.seed, flags.questions);
  RW_ASSIGN_OR_RETURN(const std::vector<Answer> oracles, Oracles(*stubs[0], questions));
  absl::PrintF("%d groups x tp %d, kv %s, journal; %d streams of %d questions, seed %d, %.0f s\n", flags.groups,
               flags.tp, flags.kv, flags.streams, flags.questions, flags.seed, flags.seconds);
  std::fflush(stdout);

  std::vector<std::string> wrong;
  {
    Clients clients(stubs, questions, oracles, flags.streams, flags.seed, absl::Minutes(10));
    Chaos chaos(*cluster, flags.groups, options.log_folder, flags.seed, absl::Seconds(flags.pause_seconds));
    absl::Status survived = chaos.Run(absl::Seconds(flags.seconds));
    clients.AskToStop();
    if (survived.ok()) {
      survived = chaos.Settle([&] { return clients.live() == 0; }, absl::Minutes(5));
    } else {
      cluster->Kill();
    }
    if (!survived.ok()) wrong.push_back(survived.ToString());
    clients.Stop();
    const Clients::Tally tally = clients.tally();
    const FaultReport& faults = chaos.report();
    Print(faults, tally, cluster->failures());
    if (faults.injected.empty() || tally.finished == 0) wrong.push_back("nothing happened");
    if (tally.different + tally.failed > 0) wrong.push_back("streams are not what they should be");
    if (faults.unnoticed > 0) wrong.push_back("a fault was not noticed");
  }
  if (wrong.empty()) {
    if (const absl::Status idle = e2e::WaitIdle(*stubs[0]); !idle.ok()) {
      wrong.push_back(absl::StrCat("blocks or requests are left: ", idle.ToString()));
    }
    stubs.clear();
    if (const absl::Status drained = cluster->Drain(); !drained.ok()) wrong.push_back(drained.ToString());
  }
  stubs.clear();
  cluster.reset();
  for (const std::string& left : Leftovers(shared_memory, segments_before))
    wrong.push_back(absl::StrCat("left: ", left));
  for (const std::string& what : wrong) std::printf("WRONG  %s\n", what.c_str());
  if (!wrong.empty()) return absl::InternalError("chaos has won");
  std::printf("no process, no segment and no block is left\n");
  return absl::OkStatus();
}

}  // namespace
}  // namespace rankwise::chaos

int main(int argc, char** argv) {
  CLI::App app("rankwise-chaos: kills and stops the processes of a deployment while clients read from it");
  rankwise::chaos::Flags flags;
  app.add_option("--seconds", flags.seconds, "Of faults")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--every", flags.pause_seconds, "Seconds from fault to fault, on average")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--seed", flags.seed, "Draws questions and faults")->capture_default_str();
  app.add_option("--groups", flags.groups)->capture_default_str()->check(CLI::Range(1, 64));
  app.add_option("--tp", flags.tp)->capture_default_str()->check(CLI::Range(1, 4));
  app.add_option("--streams", flags.streams, "Open at once")->capture_default_str()->check(CLI::Range(1, 1024));
  app.add_option("--questions", flags.questions, "Different ones")->capture_default_str()->check(CLI::Range(1, 1024));
  app.add_option("--kv", flags.kv)
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "f16", "int8-online", "int4-online"}));
  app.add_option("--logs", flags.log_folder, "Keep the programs' logs there");
  CLI11_PARSE(app, argc, argv);
  rankwise::StartLog("chaos", "info");
  const absl::Status status = rankwise::chaos::Main(flags);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
