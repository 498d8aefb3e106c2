#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "launch/local_cluster.h"
#include "tests/chaos/streams.h"

// Real faults, drawn by a seed, on a real deployment: processes are killed and stopped, and what that leads to is
// timed.
namespace rankwise::chaos {

enum class FaultKind : uint8_t {
  kKillRank,
  kStopRank,        // for good: somebody has to notice
  kPauseRank,       // for less than anybody minds
  kKillLauncher,    // mpirun
  kKillBothGroups,  // a rank of each at once
  kKillCoordinator,
  kPauseCoordinator,  // for up to twice of what its groups put up with
};
constexpr int kFaultKinds = 7;
const char* Name(FaultKind kind);

struct FaultReport {
  std::map<FaultKind, int> injected;
  std::vector<double> detection_seconds;        // from a rank's death or stop to somebody's word of it
  std::vector<double> early_detection_seconds;  // the same, of ranks that had not met the others yet
  std::vector<double> group_recovery_seconds, coordinator_recovery_seconds;  // to serving again
  int unnoticed = 0;       // faults that should have ended a group and did not
  int starved = 0;         // groups that ended without a fault of ours: no time on a busy machine
  int dropped_epochs = 0;  // by the coordinator, which heard nothing; of our pauses or for want of time
};

// The supervisor of `cluster` and its enemy. One thread, that which started the cluster.
class Chaos {
 public:
  // Beyond it a stopped rank was not noticed in time.
  static constexpr absl::Duration kNoticeLimit = absl::Seconds(90);

  // Faults come on average every `pause`. Borrows the cluster and its options.
  Chaos(launch::LocalCluster& cluster, int groups, const std::string& log_folder, uint64_t seed, absl::Duration pause);
  ~Chaos();

  // Supervises, with faults, for `time`. An error of the supervisor.
  absl::Status Run(absl::Duration time);
  // Supervises, without new ones, until `is_over`, and the last faults have been survived. DeadlineExceeded names what
  // was not.
  absl::Status Settle(const std::function<bool()>& is_over, absl::Duration patience);

  const FaultReport& report() const { return report_; }

 private:
  struct Fault {
    FaultKind kind;
    int program;     // group, or -1 for the coordinator
    pid_t launcher;  // of that group at the time
    absl::Time at;
    size_t log_size;  // of the group's log at the time
    bool is_early;    // before the ranks had met
    bool is_noticed = false;
  };
  class Watch;

  absl::Status Step();
  void Inject();
  bool Hit(int group, FaultKind kind);
  void HitCoordinator(FaultKind kind);
  void Follow();
  void FollowLaunchers();
  bool IsNoticed(const Fault& fault) const;
  void ResumePaused(absl::Time now);
  std::string LogOf(int program) const;

  launch::LocalCluster& cluster_;
  const int groups_;
  const std::string log_folder_;
  const absl::Duration pause_;
  std::mt19937_64 random_;
  std::unique_ptr<Watch> watch_;
  absl::Time next_;
  std::vector<Fault> open_;  // not yet survived
  std::vector<std::pair<absl::Time, pid_t>> paused_;
  std::vector<pid_t> launchers_;  // of the groups; 0 between two
  FaultReport report_;
};

}  // namespace rankwise::chaos
