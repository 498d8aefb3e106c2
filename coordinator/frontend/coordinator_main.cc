// The coordinator: clients on one side, worker groups on the other.

#include <csignal>
#include <atomic>
#include <filesystem>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/frontend/groups_service.h"
#include "coordinator/frontend/inference_service.h"

namespace rankwise {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(20);
constexpr char kServiceName[] = "rankwise.v1.Inference";

std::atomic<bool> g_should_stop{false};

struct Flags {
  std::string model_dir, model_name, listen = "127.0.0.1:0", endpoint_file, log_level = "info";
  cluster::ClusterOptions cluster;
  double group_timeout_seconds = 10, group_wait_seconds = 30, drain_timeout_seconds = 30;
};

void AddFlags(CLI::App& app, Flags& flags) {
  app.add_option("--model", flags.model_dir, "Model folder: its tokenizer is loaded, its name is reported")->required();
  app.add_option("--model-name", flags.model_name, "Name to report")->default_str("the folder's name");
  app.add_option("--listen", flags.listen, "HOST:PORT for clients and groups; port 0 takes a free one")->capture_default_str();
  app.add_option("--endpoint-file", flags.endpoint_file, "Write HOST:PORT here once it listens");
  app.add_option("--max-live", flags.cluster.max_live, "Sequences accepted and unfinished; more are refused at once")
      ->check(CLI::Range(1u, 1u << 20))
      ->capture_default_str();
  app.add_option("--group-timeout", flags.group_timeout_seconds, "Seconds without a heartbeat until a group is lost")
      ->check(CLI::Range(0.5, 3600.0))
      ->capture_default_str();
  app.add_option("--group-wait", flags.group_wait_seconds, "Seconds a request waits while there is no group")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  app.add_option("--drain-timeout", flags.drain_timeout_seconds, "Seconds that live requests get to finish on SIGTERM")
      ->check(CLI::AsNumberWithUnit(std::map<std::string, double>{{"s", 1}, {"m", 60}}, CLI::AsNumberWithUnit::UNIT_OPTIONAL))
      ->capture_default_str();
  app.add_option("--log-level", flags.log_level, "trace, debug, info, warn, error or off")->capture_default_str();
  app.footer(
      "Example:\n"
      "  rankwise-coordinator --model MODEL --listen 127.0.0.1:50051\n"
      "  mpirun -n 2 rankwise-worker --model MODEL --coordinator 127.0.0.1:50051\n"
      "SIGTERM stops admitting, finishes live requests, tells the groups to end, and exits 0.");
}

void SetHealth(grpc::Server& server, bool is_serving) {
  server.GetHealthCheckService()->SetServingStatus(kServiceName, is_serving);
  server.GetHealthCheckService()->SetServingStatus("", is_serving);
}

// Ticks until told to stop, then until nothing is live or the drain's time is over.
void Serve(const Flags& flags, cluster::Cluster& cluster, frontend::InferenceService& inference, grpc::Server& server) {
  bool was_serving = false;
  absl::Time give_up = absl::InfiniteFuture();
  while (true) {
    cluster.Tick(absl::Now());
    inference.Tick();
    if (const bool is_serving = cluster.is_serving(); is_serving != was_serving) {
      SetHealth(server, is_serving);
      was_serving = is_serving;
    }
    if (g_should_stop && give_up == absl::InfiniteFuture()) {
      give_up = absl::Now() + absl::Seconds(flags.drain_timeout_seconds);
      cluster.StartDrain();
      spdlog::info("draining {} live sequences", cluster.live());
    }
    if (g_should_stop && (cluster.live() == 0 || absl::Now() > give_up)) return;
    absl::SleepFor(kTick);
  }
}

int Run(const Flags& flags) {
  const absl::StatusOr<std::unique_ptr<text::Tokenizer>> tokenizer = text::Tokenizer::Load(flags.model_dir);
  if (!tokenizer.ok() && !absl::IsNotFound(tokenizer.status())) {
    spdlog::error("{}", std::string(tokenizer.status().message()));
    return 2;
  }
  if (!tokenizer.ok()) spdlog::warn("no tokenizer in {}: requests must bring token ids", flags.model_dir);
  std::string name = flags.model_name;
  if (name.empty()) name = std::filesystem::weakly_canonical(flags.model_dir).filename();
  cluster::Cluster cluster(flags.cluster);
  frontend::InferenceService inference(&cluster, tokenizer.ok() ? tokenizer->get() : nullptr, name);
  frontend::GroupsService groups(&cluster);

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(flags.listen, grpc::InsecureServerCredentials(), &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder.SetMaxReceiveMessageSize(64 << 20);
  builder.RegisterService(&inference);
  builder.RegisterService(&groups);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    spdlog::error("cannot listen on {}", flags.listen);
    return 2;
  }
  SetHealth(*server, false);
  const std::string endpoint = absl::StrCat(flags.listen.substr(0, flags.listen.rfind(':')), ":", port);
  if (!flags.endpoint_file.empty()) {
    if (const absl::Status written = WriteFileAtomically(flags.endpoint_file, endpoint + "\n"); !written.ok()) {
      spdlog::error("{}", std::string(written.message()));
      return 2;
    }
  }
  spdlog::info("{} listens on {}", name, endpoint);
  Serve(flags, cluster, inference, *server);
  cluster.StopGroups();
  server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(3));
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
    return app.exit(error) == 0 ? 0 : 2;
  }
  StartLog("coordinator", flags.log_level);
  flags.cluster.group_timeout = absl::Seconds(flags.group_timeout_seconds);
  flags.cluster.group_wait = absl::Seconds(flags.group_wait_seconds);
  for (const int signal : {SIGTERM, SIGINT}) {
    std::signal(signal, [](int) { g_should_stop = true; });
  }
  std::signal(SIGPIPE, SIG_IGN);
  return Run(flags);
}
