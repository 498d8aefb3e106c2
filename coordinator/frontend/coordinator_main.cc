// The coordinator: clients on one side, worker groups on the other.

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "coordinator/frontend/coordinator.h"

namespace rankwise {
namespace {

constexpr int kExitConfiguration = 2;  // bad flags, an unreadable tokenizer, an address in use

std::atomic<int> g_signals{0};

void CountSignal(int) { ++g_signals; }

struct Flags {
  frontend::CoordinatorOptions coordinator;
  std::string model_dir, endpoint_file, worker_endpoint_file, log_level = "info";
  wire::CredentialFiles clients, workers;
  double group_timeout_seconds = 2.5, group_wait_seconds = 30, drain_timeout_seconds = 30;
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
  app.add_option("--max-live-tokens", flags.coordinator.cluster.max_live_tokens,
                 "Prompt and max_tokens of these together; more are refused at once")
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 40))
      ->capture_default_str();
  app.add_option(
         "--journal", flags.coordinator.journal.folder,
         "Folder for what was accepted and delivered of requests that linger: the next coordinator with it goes "
         "on with them")
      ->default_str("none");
  app.add_flag("--journal-sync", flags.coordinator.journal.syncs,
               "Wait for the disk at each commit: requests outlive the loss of power too, not only of the process");
  app.add_option("--token-file", flags.clients.token, "File with the bearer token that clients must bring")
      ->default_str("none is asked for");
  app.add_option("--worker-token-file", flags.workers.token, "The same for worker groups")
      ->default_str("that of the clients");
  app.add_option("--tls-cert", flags.clients.tls_cert, "PEM certificate chain to show; TLS from then on");
  app.add_option("--tls-key", flags.clients.tls_key, "Its PEM key");
  app.add_option("--tls-client-ca", flags.clients.tls_ca,
                 "PEM certificates that those of clients and groups must be signed by: mutual TLS");
  AddSeconds(app, "--group-timeout", flags.group_timeout_seconds, 0.5,
             "Seconds without a heartbeat until a group is lost");
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
      "does not wait for the requests. Without --tls-cert all travels readable, the tokens too: listen on loopback or\n"
      "inside a trusted network then.");
}

absl::Status WriteEndpoint(const std::string& path, const std::string& endpoint) {
  return path.empty() ? absl::OkStatus() : WriteFileAtomically(path, endpoint + "\n");
}

int Refuse(const absl::Status& status) {
  spdlog::error("{}", std::string(status.message()));
  return kExitConfiguration;
}

absl::Status ReadCredentials(Flags& flags) {
  if (flags.workers.token.empty()) flags.workers.token = flags.clients.token;
  flags.workers.tls_cert = flags.clients.tls_cert;
  flags.workers.tls_key = flags.clients.tls_key;
  flags.workers.tls_ca = flags.clients.tls_ca;
  RW_ASSIGN_OR_RETURN(flags.coordinator.client_credentials, wire::ReadCredentials(flags.clients));
  RW_ASSIGN_OR_RETURN(flags.coordinator.worker_credentials, wire::ReadCredentials(flags.workers));
  const bool is_mutual = !flags.clients.tls_ca.empty();
  if (is_mutual && flags.clients.tls_cert.empty()) {
    return absl::InvalidArgumentError("--tls-client-ca needs --tls-cert and --tls-key");
  }
  return absl::OkStatus();
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
  if (const absl::Status read = ReadCredentials(flags); !read.ok()) return Refuse(read);
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
  // A library that was built with its assertions checks every lock for cycles, in a graph with one lock of its own.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  flags.coordinator.cluster.group_timeout = absl::Seconds(flags.group_timeout_seconds);
  flags.coordinator.cluster.group_wait = absl::Seconds(flags.group_wait_seconds);
  std::signal(SIGTERM, CountSignal);
  std::signal(SIGINT, CountSignal);
  std::signal(SIGPIPE, SIG_IGN);
  return Run(std::move(flags));
}
