// The coordinator: clients on one side, worker groups on the other.

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "coordinator/frontend/coordinator.h"

namespace rankwise {
namespace {

constexpr int kExitConfiguration = 2;  // bad flags, an unreadable tokenizer, an address in use

std::atomic<int> g_signals{0};

void CountSignal(int) { ++g_signals; }

struct Flags {
  frontend::CoordinatorOptions coordinator;
  std::string model_dir, endpoint_file, worker_endpoint_file, log_level = "info";
  double group_timeout_seconds = 10, group_wait_seconds = 30, drain_timeout_seconds = 30;
};

void AddSeconds(CLI::App& app, const std::string& name, double& seconds, double least, const std::string& what) {
  app.add_option(name, seconds, what)->check(CLI::Range(least, 86400.0))->capture_default_str();
}

void AddFlags(CLI::App& app, Flags& flags) {
  app.add_option("--model", flags.model_dir, "Model folder: its tokenizer is loaded")->required();
  app.add_option("--model-name", flags.coordinator.model_name, "Name to report")->default_str("the folder's name");
  app.add_option("--listen", flags.coordinator.listen, "HOST:PORT for clients; port 0 takes a free one")
      ->capture_default_str();
  app.add_option("--worker-listen", flags.coordinator.worker_listen,
                 "HOST:PORT for worker groups alone, who then no longer find --listen")
      ->default_str("they dial --listen");
  app.add_option("--endpoint-file", flags.endpoint_file, "Write the HOST:PORT for clients here once it listens");
  app.add_option("--worker-endpoint-file", flags.worker_endpoint_file, "The same for worker groups");
  app.add_option("--max-live", flags.coordinator.cluster.max_live,
                 "Samples accepted and unfinished; more are refused at once")
      ->check(CLI::Range(1u, 1u << 20))
      ->capture_default_str();
  AddSeconds(app, "--group-timeout", flags.group_timeout_seconds, 0.5,
             "Seconds without a heartbeat until a group is lost; more than its longest step");
  AddSeconds(app, "--group-wait", flags.group_wait_seconds, 0, "Seconds a request waits while there is no group");
  AddSeconds(app, "--drain-timeout", flags.drain_timeout_seconds, 0,
             "Seconds that live requests get to finish on SIGTERM");
  app.add_option("--log-level", flags.log_level, "trace, debug, info, warn, error or off")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}))
      ->capture_default_str();
  app.footer(
      "Example:\n"
      "  rankwise-coordinator --model MODEL --listen 127.0.0.1:50051\n"
      "  mpirun -n 2 rankwise-worker --model MODEL --coordinator 127.0.0.1:50051\n"
      "SIGTERM and SIGINT stop admitting, finish live requests, tell the groups to end, and exit with 0; a second one\n"
      "does not wait for the requests. There is no encryption: listen on loopback or inside a trusted network.");
}

absl::Status WriteEndpoint(const std::string& path, const std::string& endpoint) {
  return path.empty() ? absl::OkStatus() : WriteFileAtomically(path, endpoint + "\n");
}

int Refuse(const absl::Status& status) {
  spdlog::error("{}", std::string(status.message()));
  return kExitConfiguration;
}

int Run(Flags flags) {
  const auto tokenizer = text::Tokenizer::Load(flags.model_dir);
  if (absl::IsNotFound(tokenizer.status()) && std::filesystem::is_directory(flags.model_dir)) {
    spdlog::warn("no tokenizer in {}: requests must bring token ids", flags.model_dir);
  } else if (!tokenizer.ok()) {
    return Refuse(tokenizer.status());
  }
  if (flags.coordinator.model_name.empty()) {
    const std::filesystem::path folder = std::filesystem::weakly_canonical(flags.model_dir);
    flags.coordinator.model_name = folder.has_filename() ? folder.filename() : folder.parent_path().filename();
  }
  auto coordinator = frontend::Coordinator::Start(flags.coordinator, tokenizer.ok() ? tokenizer->get() : nullptr);
  if (!coordinator.ok()) return Refuse(coordinator.status());
  for (const auto& [path, endpoint] : {std::pair(flags.endpoint_file, (*coordinator)->endpoint()),
                                       std::pair(flags.worker_endpoint_file, (*coordinator)->worker_endpoint())}) {
    if (const absl::Status written = WriteEndpoint(path, endpoint); !written.ok()) return Refuse(written);
  }
  spdlog::info("{} listens on {}", flags.coordinator.model_name, (*coordinator)->endpoint());

  while (g_signals == 0) absl::SleepFor(absl::Milliseconds(20));
  spdlog::info("draining {} live samples", (*coordinator)->cluster().live());
  (*coordinator)->Drain(absl::Seconds(flags.drain_timeout_seconds), [] { return g_signals > 1; });
  return 0;
}

}  // namespace
}  // namespace rankwise

int main(int argc, char** argv) {
  using namespace rankwise;
  CLI::App app("rankwise-coordinator: takes requests over gRPC and shards them over worker groups");
  Flags flags;
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitConfiguration;
  }
  StartLog("coordinator", flags.log_level);
  flags.coordinator.cluster.group_timeout = absl::Seconds(flags.group_timeout_seconds);
  flags.coordinator.cluster.group_wait = absl::Seconds(flags.group_wait_seconds);
  std::signal(SIGTERM, CountSignal);
  std::signal(SIGINT, CountSignal);
  std::signal(SIGPIPE, SIG_IGN);
  return Run(std::move(flags));
}
