#include "coordinator/frontend/coordinator.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>

#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "coordinator/cluster/retry_delay.h"
#include "coordinator/frontend/groups_service.h"
#include "coordinator/frontend/inference_service.h"

namespace rankwise::frontend {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(20);
constexpr absl::Duration kStandstill = absl::Milliseconds(500);  // from tick to tick: somebody stopped this process
constexpr absl::Duration kGroupGoodbye = absl::Seconds(3);
constexpr char kServiceName[] = "rankwise.v1.Inference";
// Of one group's step: its sequences' tokens, with the alternatives of a whole prompt.
constexpr int kMaxMessageBytes = 64 << 20;

// The library registers reflection for every server, as soon as it is linked.
class WithoutReflection final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [](const auto& plugin) { return absl::StrContains(plugin->name(), "reflection"); });
  }
};

struct Listening {
  std::unique_ptr<grpc::Server> server;
  std::string endpoint;
};

absl::StatusOr<Listening> Listen(const std::string& address, const std::vector<grpc::Service*>& services,
                                 const wire::Credentials& credentials, bool has_reflection) {
  grpc::ServerBuilder builder;
  if (!has_reflection) builder.SetOption(std::make_unique<WithoutReflection>());
  int port = 0;
  builder.AddListeningPort(address, wire::ServerCredentials(credentials), &port);
  // Else a second coordinator at the same address would take half of the connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Groups ping every 10 s. Our own pings find the client that is stopped and the host that is gone within 10 s;
  // groups have heartbeats too.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  for (grpc::Service* service : services) builder.RegisterService(service);
  Listening listening{.server = builder.BuildAndStart()};
  if (listening.server == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", address));
  }
  listening.endpoint = absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
  return listening;
}

class GrpcCoordinator final : public Coordinator {
 public:
  GrpcCoordinator(const CoordinatorOptions& options, const text::Tokenizer* tokenizer,
                  std::unique_ptr<journal::Journal> journal)
      : cluster_(options.cluster),
        journal_(std::move(journal)),
        inference_(&cluster_, {.tokenizer = tokenizer,
                               .journal = journal_.get(),
                               .model_name = options.model_name,
                               .token = options.client_credentials.token,
                               .max_kept_bytes = options.max_kept_bytes}),
        groups_(&cluster_, options.worker_credentials.token) {}

  absl::Status Start(const CoordinatorOptions& options) {
    const bool is_shared = options.worker_listen.empty();
    const bool has_reflection = options.client_credentials.token.empty() && options.worker_credentials.token.empty();
    std::vector<grpc::Service*> services = {&inference_};
    if (is_shared) services.push_back(&groups_);
    auto clients = Listen(options.listen, services, options.client_credentials, has_reflection);
    if (!clients.ok()) return clients.status();
    clients_ = *std::move(clients);
    worker_endpoint_ = clients_.endpoint;
    if (!is_shared) {
      auto workers = Listen(options.worker_listen, {&groups_}, options.worker_credentials, has_reflection);
      if (!workers.ok()) return workers.status();
      workers_ = *std::move(workers);
      worker_endpoint_ = workers_.endpoint;
    }
    SetHealth(false);
    ticker_ = std::thread([this] { Tick(); });
    return absl::OkStatus();
  }

  ~GrpcCoordinator() override {
    should_end_.Notify();
    if (ticker_.joinable()) ticker_.join();
    FailLive();
    Shutdown(absl::Now() + absl::Milliseconds(500));
  }

  const std::string& endpoint() const override { return clients_.endpoint; }
  const std::string& worker_endpoint() const override { return worker_endpoint_; }
  cluster::Cluster& cluster() override { return cluster_; }

  void Drain(absl::Duration timeout, const std::function<bool()>& should_hurry) override {
    cluster_.StartDrain();
    const absl::Time deadline = absl::Now() + timeout;
    while (cluster_.live() > 0 && absl::Now() < deadline && !should_hurry()) absl::SleepFor(kTick);
    if (const uint32_t live = cluster_.live(); live > 0) {
      spdlog::warn("{} samples did not finish in time", live);
    }
    FailLive();
    cluster_.StopGroups();
    Shutdown(absl::Now() + kGroupGoodbye);
  }

 private:
  void FailLive() {
    cluster_.StartDrain();
    if (journal_) journal_->Close();  // the next coordinator goes on with what is there
    cluster_.FailAll(
        cluster::WithRetryDelay(absl::UnavailableError("the coordinator is shutting down"), absl::Seconds(2)));
  }

  void Tick() {
    bool was_serving = false;
    absl::Time ticked = absl::Now();
    do {
      const absl::Time now = absl::Now();
      const absl::Duration passed = now - std::exchange(ticked, now);
      if (passed > kStandstill) {
        spdlog::warn("stood still for {}", absl::FormatDuration(passed));
        cluster_.Excuse(passed, now);
      }
      cluster_.Tick(now);
      inference_.Tick(now);
      if (const bool is_serving = cluster_.is_serving(); is_serving != was_serving) {
        SetHealth(is_serving);
        was_serving = is_serving;
      }
    } while (!should_end_.WaitForNotificationWithTimeout(kTick));
  }

  void SetHealth(bool is_serving) {
    grpc::HealthCheckServiceInterface* health = clients_.server->GetHealthCheckService();
    health->SetServingStatus(kServiceName, is_serving);
    health->SetServingStatus("", is_serving);
  }

  // Calls that are still open at the deadline are cancelled.
  void Shutdown(absl::Time deadline) {
    for (Listening* listening : {&clients_, &workers_}) {
      if (listening->server != nullptr) listening->server->Shutdown(absl::ToChronoTime(deadline));
    }
  }

  cluster::Cluster cluster_;
  const std::unique_ptr<journal::Journal> journal_;
  InferenceService inference_;
  GroupsService groups_;
  Listening clients_, workers_;
  std::string worker_endpoint_;
  absl::Notification should_end_;
  std::thread ticker_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Coordinator>> Coordinator::Start(const CoordinatorOptions& options,
                                                                const text::Tokenizer* tokenizer) {
  static std::once_flag once;
  std::call_once(once, [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
  std::unique_ptr<journal::Journal> journal;
  if (!options.journal.folder.empty()) {
    RW_ASSIGN_OR_RETURN(journal, journal::Journal::Open(options.journal));
  }
  auto coordinator = std::make_unique<GrpcCoordinator>(options, tokenizer, std::move(journal));
  if (const absl::Status started = coordinator->Start(options); !started.ok()) return started;
  return coordinator;
}

}  // namespace rankwise::frontend
