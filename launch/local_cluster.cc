#include "launch/local_cluster.h"

#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/client.h"

namespace rankwise::launch {
namespace {

constexpr int kRefusedConfiguration = 2;  // exit code of our programs
constexpr absl::Duration kPollEndpoint = absl::Milliseconds(10);
constexpr absl::Duration kPollServing = absl::Milliseconds(50);
constexpr absl::Duration kKillGrace = absl::Seconds(5);    // mpirun takes one second to end its ranks
constexpr absl::Duration kGoodbye = absl::Seconds(5);      // from the last request's time to the end of a drain
constexpr absl::Duration kGroupGrace = absl::Seconds(15);  // from the coordinator's last word to a group's end

bool IsReadable(int fd) {
  pollfd event{fd, POLLIN, 0};
  return fd >= 0 && poll(&event, 1, 0) == 1;
}

std::string SharedMemoryParent() { return access("/dev/shm", W_OK | X_OK) == 0 ? "/dev/shm" : TemporaryParent(); }

}  // namespace

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(ClusterOptions options) {
  RW_ASSIGN_OR_RETURN(PrivateFolder folder, PrivateFolder::Create(TemporaryParent()));
  RW_ASSIGN_OR_RETURN(PrivateFolder shared_memory, PrivateFolder::Create(SharedMemoryParent()));
  AdoptOrphans();
  std::unique_ptr<LocalCluster> cluster(
      new LocalCluster(std::move(options), std::move(folder), std::move(shared_memory)));
  RW_RETURN_IF_ERROR(cluster->MakeCredentials());
  cluster->programs_.push_back({.name = "coordinator",
                                .options = cluster->CoordinatorOptions(),
                                .policy = RestartPolicy(cluster->options_.healthy_after)});
  RW_RETURN_IF_ERROR(cluster->StartProgram(cluster->programs_[0]));
  RW_RETURN_IF_ERROR(cluster->WaitEndpoint());
  for (int i = 0; i < cluster->options_.replicas; ++i) {
    cluster->programs_.push_back({.name = absl::StrCat("group-", i),
                                  .options = cluster->GroupOptions(i),
                                  .policy = RestartPolicy(cluster->options_.healthy_after)});
    RW_RETURN_IF_ERROR(cluster->StartProgram(cluster->programs_.back()));
  }
  return cluster;
}

LocalCluster::LocalCluster(ClusterOptions options, PrivateFolder folder, PrivateFolder shared_memory)
    : options_(std::move(options)), folder_(std::move(folder)), shared_memory_(std::move(shared_memory)) {}

LocalCluster::~LocalCluster() { Kill(); }

void LocalCluster::Kill() {
  // mpirun ends its ranks when asked to, and cannot when killed.
  for (Program& program : programs_)
    if (program.child) program.child->Signal(&program == &programs_[0] ? SIGKILL : SIGTERM);
  const absl::Time deadline = absl::Now() + kKillGrace;
  for (Program& program : programs_) {
    if (program.child) program.child->Wait(deadline);
    program.child.reset();
    program.is_finished = true;
  }
  KillOrphans();
  is_finished_ = true;
}

std::string LocalCluster::TokenFile(const char* of) const { return absl::StrCat(folder_.path(), "/", of, ".token"); }

absl::Status LocalCluster::MakeCredentials() {
  const wire::CredentialFiles& tls = options_.tls;
  if (tls.tls_cert.empty() != tls.tls_ca.empty() || (options_.is_tls_mutual && tls.tls_ca.empty()))
    return absl::InvalidArgumentError("TLS needs a certificate, its key, and the CA that has signed it");
  RW_ASSIGN_OR_RETURN(credentials_, wire::ReadCredentials(tls));
  if (!options_.has_tokens) return absl::OkStatus();
  credentials_.token = options_.client_token.empty() ? wire::FreshToken() : options_.client_token;
  RW_RETURN_IF_ERROR(wire::WriteToken(TokenFile("client"), credentials_.token));
  return wire::WriteToken(TokenFile("worker"), wire::FreshToken());
}

ChildOptions LocalCluster::CoordinatorOptions() const {
  ChildOptions child;
  // The coordinator's own limit ends first, so that it tells its clients before it is killed.
  child.command = {absl::StrCat(options_.program_folder, "/rankwise-coordinator"),
                   "--model",
                   options_.model,
                   "--listen",
                   endpoint_.empty() ? options_.listen : endpoint_,
                   "--endpoint-file",
                   absl::StrCat(folder_.path(), "/endpoint"),
                   "--drain-timeout",
                   absl::StrCat(absl::ToDoubleSeconds(options_.drain_timeout))};
  if (options_.has_tokens) {
    child.command.insert(child.command.end(),
                         {"--token-file", TokenFile("client"), "--worker-token-file", TokenFile("worker")});
  }
  const wire::CredentialFiles& tls = options_.tls;
  if (!tls.tls_cert.empty()) {
    child.command.insert(child.command.end(), {"--tls-cert", tls.tls_cert, "--tls-key", tls.tls_key});
    if (options_.is_tls_mutual) child.command.insert(child.command.end(), {"--tls-client-ca", tls.tls_ca});
  }
  child.command.insert(child.command.end(), options_.coordinator_flags.begin(), options_.coordinator_flags.end());
  if (!options_.log_folder.empty()) child.log_path = absl::StrCat(options_.log_folder, "/coordinator.log");
  return child;
}

ChildOptions LocalCluster::GroupOptions(int index) const {
  ChildOptions child;
  child.command = {options_.mpirun, "-n", absl::StrCat(options_.tp), "--oversubscribe", "--bind-to", "none",
                   // One host: shared memory, and nobody to log in to. Without MPI's TCP, whose listening rank any
                   // local caller could make wait for the rest of a greeting.
                   "--mca", "plm_rsh_agent", "sh", "--mca", "btl", "self,vader", "--mca", "oob_tcp_if_include", "lo",
                   "--mca", "btl_vader_backing_directory", shared_memory_.path(),
                   absl::StrCat(options_.program_folder, "/rankwise-worker"), "--model", options_.model,
                   "--coordinator", endpoint_};
  if (options_.has_tokens) child.command.insert(child.command.end(), {"--token-file", TokenFile("worker")});
  const wire::CredentialFiles& tls = options_.tls;
  if (!tls.tls_cert.empty()) child.command.insert(child.command.end(), {"--tls-ca", tls.tls_ca});
  if (options_.is_tls_mutual)
    child.command.insert(child.command.end(), {"--tls-cert", tls.tls_cert, "--tls-key", tls.tls_key});
  child.command.insert(child.command.end(), options_.worker_flags.begin(), options_.worker_flags.end());
  // Open MPI refuses root without these two words.
  // Each group has its own folder: two mpiruns that begin at once and make the same one are one too many.
  const std::string session = absl::StrCat(folder_.path(), "/", index);
  std::error_code error;
  std::filesystem::create_directory(session, error);  // mpirun says it better than we could
  child.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
                       absl::StrCat("TMPDIR=", session)};
  if (!options_.log_folder.empty()) child.log_path = absl::StrCat(options_.log_folder, "/group-", index, ".log");
  return child;
}

absl::Status LocalCluster::StartProgram(Program& program) {
  auto child = ChildProcess::Start(program.options);
  if (!child.ok()) {
    const bool is_mpirun = program.options.command[0] == options_.mpirun;
    return absl::Status(
        child.status().code(),
        absl::StrCat(child.status().message(), is_mpirun ? "; install Open MPI (apt-get install openmpi-bin)" : ""));
  }
  program.child = *std::move(child);
  program.since = absl::Now();
  return absl::OkStatus();
}

absl::Status LocalCluster::WaitEndpoint() {
  const Program& coordinator = programs_[0];
  const std::string path = absl::StrCat(folder_.path(), "/endpoint");
  for (const absl::Time deadline = absl::Now() + options_.start_timeout; absl::Now() < deadline;) {
    if (auto text = ReadTextFile(path, 4096); text.ok() && !text->empty()) {
      endpoint_ = std::string(absl::StripAsciiWhitespace(*text));
      programs_[0].options = CoordinatorOptions();  // a restarted one comes back where it was
      stub_ = ConnectTo(endpoint_, credentials_);
      return absl::OkStatus();
    }
    if (const auto state = coordinator.child->Wait(absl::Now() + kPollEndpoint))
      return WithTail(absl::StatusCode::kFailedPrecondition,
                      absl::StrCat("the coordinator ended at its start with ", state->ToString()), coordinator);
  }
  return WithTail(
      absl::StatusCode::kDeadlineExceeded,
      absl::StrCat("the coordinator announced no endpoint within ", absl::FormatDuration(options_.start_timeout)),
      coordinator);
}

pid_t LocalCluster::pid(int index) const {
  const Program& program = programs_[static_cast<size_t>(index + 1)];
  return program.child ? program.child->pid() : 0;
}

absl::Status LocalCluster::WithTail(absl::StatusCode code, const std::string& message, const Program& program) const {
  const std::string tail = program.child ? program.child->LogTail() : "";
  return absl::Status(code, tail.empty() ? message : absl::StrCat(message, "; its last words:\n", tail));
}

void LocalCluster::KillOrphansOfGroups() {
  if (const int count = KillOrphans(); count > 0) spdlog::warn("killed {} processes that had lost their mpirun", count);
}

absl::Status LocalCluster::OnEnd(Program& program, const ExitState& state) {
  const bool is_coordinator = &program == &programs_[0];
  if (state.is_success()) {  // stopped in good order: the coordinator by a signal, a group by the coordinator
    program.is_finished = true;
    program.child.reset();
    is_finished_ = is_finished_ || is_coordinator;
    return absl::OkStatus();
  }
  ++failures_;
  if (state.code == kRefusedConfiguration)
    return WithTail(absl::StatusCode::kFailedPrecondition, absl::StrCat(program.name, " refused to start"), program);
  const auto delay = program.policy.NextDelay(absl::Now() - program.since);
  if (!delay)
    return WithTail(absl::StatusCode::kAborted,
                    absl::StrCat(program.name, " failed ", RestartPolicy::kLimit + 1, " times in a row, last with ",
                                 state.ToString()),
                    program);
  spdlog::warn("{} ended: {}; restart in {}", program.name, state.ToString(), absl::FormatDuration(*delay));
  program.child.reset();
  program.since = absl::Now() + *delay;
  KillOrphansOfGroups();
  return absl::OkStatus();
}

bool LocalCluster::WaitEvent(absl::Time deadline, int wake_fd) {
  std::vector<pollfd> events{{wake_fd, POLLIN, 0}};
  for (const Program& program : programs_) {
    if (program.child) events.push_back({program.child->pidfd(), POLLIN, 0});
    if (!program.child && !program.is_finished) deadline = std::min(deadline, program.since);
  }
  const absl::Duration left = std::clamp(deadline - absl::Now(), absl::ZeroDuration(), absl::Hours(1));
  poll(events.data(), events.size(),
       static_cast<int>(absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1)))));
  return (events[0].revents & POLLIN) != 0;
}

absl::Status LocalCluster::Supervise(absl::Time deadline, int wake_fd) {
  for (;;) {
    const bool is_woken = WaitEvent(deadline, wake_fd);
    for (Program& program : programs_) {
      if (program.child) {
        if (const auto state = program.child->Wait(absl::InfinitePast())) RW_RETURN_IF_ERROR(OnEnd(program, *state));
      } else if (!program.is_finished && absl::Now() >= program.since) {
        RW_RETURN_IF_ERROR(StartProgram(program));
      }
    }
    if (is_woken || is_finished_ || absl::Now() >= deadline) return absl::OkStatus();
  }
}

absl::Status LocalCluster::WaitServing(int groups, absl::Time deadline, int wake_fd) {
  for (;;) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(std::min(deadline, absl::Now() + absl::Seconds(2))));
    rankwise::v1::GetLoadResponse load;
    if (stub_->GetLoad(&context, {}, &load).ok()) {
      const auto serving =
          std::count_if(load.groups().begin(), load.groups().end(), [](const auto& group) { return group.serving(); });
      if (serving >= groups) return absl::OkStatus();
    }
    RW_RETURN_IF_ERROR(Supervise(std::min(absl::Now() + kPollServing, deadline), wake_fd));
    if (is_finished_) return absl::CancelledError("the coordinator was stopped");
    if (IsReadable(wake_fd)) return absl::CancelledError("interrupted before the start was complete");
    if (absl::Now() >= deadline)
      return WithTail(absl::StatusCode::kDeadlineExceeded, absl::StrCat("fewer than ", groups, " groups serve"),
                      programs_.back());
  }
}

absl::Status LocalCluster::Drain(int wake_fd) {
  absl::Status result;
  absl::Time deadline = absl::Now() + options_.drain_timeout + kGoodbye;
  stub_.reset();  // an idle connection would keep the coordinator waiting
  bool has_coordinator = programs_[0].child != nullptr;
  if (has_coordinator) programs_[0].child->Signal(SIGTERM);
  for (;;) {
    bool is_running = false;
    for (Program& program : programs_) {
      if (const auto state = program.child ? program.child->Wait(absl::InfinitePast()) : std::nullopt) {
        if (!state->is_success())
          result.Update(
              WithTail(absl::StatusCode::kAborted, absl::StrCat(program.name, " ended: ", state->ToString()), program));
        program.child.reset();
      }
      program.is_finished = program.child == nullptr;
      is_running = is_running || !program.is_finished;
    }
    if (has_coordinator && programs_[0].is_finished) {
      // Groups that had joined were told to stop; one that had not looks for its coordinator in vain.
      has_coordinator = false;
      deadline = std::min(deadline, absl::Now() + kGroupGrace);
    }
    if (!is_running || absl::Now() >= deadline || WaitEvent(deadline, wake_fd)) break;
  }
  for (Program& program : programs_) {
    if (!program.child) continue;
    result.Update(absl::DeadlineExceededError(absl::StrCat(program.name, " did not end when asked to and was killed")));
    program.child->Signal(SIGTERM);
    program.child->Wait(absl::Now() + kKillGrace);
    program.child.reset();
  }
  KillOrphansOfGroups();
  is_finished_ = true;
  return result;
}

}  // namespace rankwise::launch
