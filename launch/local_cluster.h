#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/program_folder.h"
#include "launch/child_process.h"
#include "launch/restart_policy.h"
#include "proto/credentials.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::launch {

struct ClusterOptions {
  std::string model;
  int tp = 1;        // ranks of one group
  int replicas = 1;  // groups
  std::string listen = "127.0.0.1:0";
  // Who may call. With tokens, the default, clients and groups need one each, made anew for this cluster; the clients'
  // is `client_token` when that is set.
  bool has_tokens = true;
  std::string client_token;
  // TLS on both links: the coordinator's certificate, which names the address of `listen`, its key, and the CA that has
  // signed it. Mutual: clients and groups show one of that CA too, the groups the same.
  wire::CredentialFiles tls;
  bool is_tls_mutual = false;
  std::vector<std::string> coordinator_flags;  // beside those that follow from the above
  std::vector<std::string> worker_flags;
  std::string program_folder = ProgramFolder();
  std::string mpirun = "mpirun";
  std::string log_folder;  // must exist; empty: everybody logs to our stderr
  absl::Duration start_timeout = absl::Seconds(30);
  // How long live requests may take to finish in a drain. What has not ended some seconds later is killed.
  absl::Duration drain_timeout = absl::Seconds(30);
  // A program that has run for so long may fail again as if for the first time.
  absl::Duration healthy_after = RestartPolicy::kHealthy;
};

// A coordinator and its worker groups on this host. States: running → (Drain, or the coordinator drained by somebody
// else) → finished. All processes end with this object, and, when this process is killed, shortly after it.
// One thread, which must live as long as the cluster.
class LocalCluster {
 public:
  // Starts everything and waits for the coordinator's endpoint, not for the groups. An error of a program carries the
  // tail of its log.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> Start(ClusterOptions options);
  ~LocalCluster();

  const std::string& endpoint() const { return endpoint_; }
  // What a client has to show and to expect.
  const wire::Credentials& credentials() const { return credentials_; }
  // Where the clients' token lies, readable by our user, while the cluster lives.
  std::string token_file() const { return TokenFile("client"); }
  rankwise::v1::Inference::Stub& stub() { return *stub_; }
  const std::string& log_folder() const { return options_.log_folder; }
  bool is_finished() const { return is_finished_; }
  // The pid of mpirun for group `index`, 0 while it waits for its restart; of the coordinator for -1.
  pid_t pid(int index) const;
  int failures() const { return failures_; }  // programs that ended and had not been asked to

  // Restarts what ends, until `deadline`, `wake_fd` becomes readable, or is_finished(). FailedPrecondition when a
  // program refused its configuration (exit code 2); Aborted when one failed too often in a row.
  absl::Status Supervise(absl::Time deadline, int wake_fd = -1);
  // Supervises until `groups` groups serve. DeadlineExceeded; Cancelled when `wake_fd` becomes readable.
  absl::Status WaitServing(int groups, absl::Time deadline, int wake_fd = -1);
  // Finishes the live requests, then ends everything; at once when `wake_fd` becomes readable. stub() must not be in
  // use, and is gone afterwards. An error when something had to be killed or ended badly.
  absl::Status Drain(int wake_fd = -1);
  // Ends everything at once: calls in flight fail. The destructor does the same.
  void Kill();

 private:
  struct Program {
    std::string name;
    ChildOptions options;
    std::unique_ptr<ChildProcess> child;  // null while it waits for its restart, and once finished
    absl::Time since;                     // started, or to be restarted
    RestartPolicy policy;
    bool is_finished = false;
  };

  LocalCluster(ClusterOptions options, PrivateFolder folder, PrivateFolder shared_memory);
  ChildOptions CoordinatorOptions() const;
  ChildOptions GroupOptions(int index) const;
  absl::Status StartProgram(Program& program);
  absl::Status MakeCredentials();
  std::string TokenFile(const char* of) const;
  absl::Status WaitEndpoint();
  absl::Status OnEnd(Program& program, const ExitState& state);
  void KillOrphansOfGroups();
  // Waits for the first end, the first restart, `wake_fd` or `deadline`. True: `wake_fd` is readable.
  bool WaitEvent(absl::Time deadline, int wake_fd);
  absl::Status WithTail(absl::StatusCode code, const std::string& message, const Program& program) const;

  const ClusterOptions options_;
  const PrivateFolder folder_;
  const PrivateFolder shared_memory_;  // of MPI: a killed mpirun leaves its segments behind
  wire::Credentials credentials_;
  std::string endpoint_;
  std::unique_ptr<rankwise::v1::Inference::Stub> stub_;
  std::vector<Program> programs_;  // the coordinator, then the groups
  bool is_finished_ = false;
  int failures_ = 0;
};

}  // namespace rankwise::launch
