#include "tests/chaos/chaos.h"

#include <signal.h>

#include <algorithm>
#include <functional>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "tests/chaos/deployment_processes.h"

namespace rankwise::chaos {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(10);
// What ranks, guards and mpirun say of a rank that is gone.
constexpr const char* kAlarms[] = {"[error]", "rankwise-guard:", "mpirun noticed", "Primary job", "MPI_ABORT"};

bool IsOfCoordinator(FaultKind kind) {
  return kind == FaultKind::kKillCoordinator || kind == FaultKind::kPauseCoordinator;
}

}  // namespace

const char* Name(FaultKind kind) {
  static constexpr const char* kNames[] = {"kill rank",    "stop rank",        "pause rank",       "kill mpirun",
                                           "kill in both", "kill coordinator", "pause coordinator"};
  return kNames[static_cast<int>(kind)];
}

// Asks the coordinator all the time who serves: on a thread of its own, since a coordinator may stand still.
class Chaos::Watch {
 public:
  explicit Watch(const launch::LocalCluster& cluster)
      : stub_(launch::ConnectTo(cluster.endpoint(), cluster.credentials())), thread_([this] { Run(); }) {}
  ~Watch() {
    should_end_.Notify();
    thread_.join();
  }
  // Ranks of the groups that serve, as of an answer that was asked for after `since`; nullopt before there is one.
  std::optional<std::set<pid_t>> Serving(absl::Time since) const {
    absl::MutexLock lock(&mutex_);
    if (asked_ <= since) return std::nullopt;
    return serving_;
  }

 private:
  void Run() {
    while (!should_end_.WaitForNotificationWithTimeout(absl::Milliseconds(20))) {
      const absl::Time asked = absl::Now();
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(asked + absl::Seconds(2)));
      rankwise::v1::GetLoadResponse load;
      if (!stub_->GetLoad(&context, {}, &load).ok()) continue;
      absl::MutexLock lock(&mutex_);
      asked_ = asked;
      serving_.clear();
      for (const auto& group : load.groups()) {
        if (!group.serving()) continue;
        for (const auto& rank : group.ranks()) serving_.insert(static_cast<pid_t>(rank.pid()));
      }
    }
  }

  const std::unique_ptr<rankwise::v1::Inference::Stub> stub_;
  mutable absl::Mutex mutex_;
  absl::Time asked_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  std::set<pid_t> serving_ ABSL_GUARDED_BY(mutex_);
  absl::Notification should_end_;
  std::thread thread_;
};

Chaos::Chaos(launch::LocalCluster& cluster, int groups, const std::string& log_folder, uint64_t seed,
             absl::Duration pause)
    : cluster_(cluster),
      groups_(groups),
      log_folder_(log_folder),
      pause_(pause),
      random_(seed),
      watch_(std::make_unique<Watch>(cluster)),
      next_(absl::Now() + absl::Seconds(1)) {
  for (int group = 0; group < groups; ++group) launchers_.push_back(cluster.pid(group));
}

Chaos::~Chaos() { ResumePaused(absl::InfiniteFuture()); }

absl::Status Chaos::Run(absl::Duration time) {
  for (const absl::Time end = absl::Now() + time; absl::Now() < end;) {
    if (absl::Now() >= next_) {
      Inject();
      next_ = absl::Now() +
              absl::Seconds(std::exponential_distribution<double>(1 / absl::ToDoubleSeconds(pause_))(random_));
    }
    RW_RETURN_IF_ERROR(Step());
  }
  return absl::OkStatus();
}

absl::Status Chaos::Settle(const std::function<bool()>& is_over, absl::Duration patience) {
  const absl::Time deadline = absl::Now() + patience;
  while (!is_over() || !open_.empty()) {
    if (absl::Now() > deadline) {
      if (open_.empty()) return absl::DeadlineExceededError("the streams do not end");
      return absl::DeadlineExceededError(absl::StrCat("not survived: ", Name(open_[0].kind), " in program ",
                                                      open_[0].program, " ",
                                                      absl::FormatDuration(absl::Now() - open_[0].at), " ago"));
    }
    RW_RETURN_IF_ERROR(Step());
  }
  for (const absl::string_view line : absl::StrSplit(LogOf(-1), '\n')) {
    if (absl::StrContains(line, "no heartbeat for")) ++report_.dropped_epochs;
  }
  return absl::OkStatus();
}

absl::Status Chaos::Step() {
  RW_RETURN_IF_ERROR(cluster_.Supervise(absl::Now() + kPoll));
  ResumePaused(absl::Now());
  FollowLaunchers();
  Follow();
  return absl::OkStatus();
}

void Chaos::ResumePaused(absl::Time now) {
  std::erase_if(paused_, [now](const auto& paused) {
    if (paused.first <= now) kill(paused.second, SIGCONT);
    return paused.first <= now;
  });
}

void Chaos::Inject() {
  // What is most common in life is most common here.
  static constexpr int kWeights[kFaultKinds] = {30, 20, 15, 5, 8, 14, 8};
  const auto kind =
      static_cast<FaultKind>(std::discrete_distribution<int>(std::begin(kWeights), std::end(kWeights))(random_));
  const int first = std::uniform_int_distribution<int>(0, groups_ - 1)(random_);
  bool is_hit = false;
  if (IsOfCoordinator(kind)) {
    if (cluster_.pid(-1) == 0) return;
    HitCoordinator(kind);
    is_hit = true;
  } else {
    for (int group = 0; group < groups_; ++group) {
      if (group == first || kind == FaultKind::kKillBothGroups) is_hit = Hit(group, kind) || is_hit;
    }
  }
  if (is_hit) ++report_.injected[kind];
}

bool Chaos::Hit(int group, FaultKind kind) {
  const pid_t launcher = cluster_.pid(group);
  const std::vector<pid_t> ranks = launcher == 0 ? std::vector<pid_t>() : RanksOf(launcher);
  if (ranks.empty()) return false;  // it waits for its restart
  const bool is_stricken = std::ranges::any_of(open_, [&](const Fault& fault) { return fault.launcher == launcher; });
  if (is_stricken) return false;  // what would be timed?
  const pid_t rank = ranks[std::uniform_int_distribution<size_t>(0, ranks.size() - 1)(random_)];
  const Fault fault{kind, group, launcher, absl::Now(), LogOf(group).size(), !HasHeartbeat(rank)};
  switch (kind) {
    case FaultKind::kStopRank:
      kill(rank, SIGSTOP);
      break;
    case FaultKind::kPauseRank:
      kill(rank, SIGSTOP);
      paused_.emplace_back(absl::Now() + absl::Milliseconds(std::uniform_int_distribution<int>(50, 1200)(random_)),
                           rank);
      return true;
    case FaultKind::kKillLauncher:
      kill(launcher, SIGKILL);
      break;
    default:
      kill(rank, SIGKILL);
  }
  open_.push_back(fault);
  return true;
}

void Chaos::HitCoordinator(FaultKind kind) {
  const pid_t pid = cluster_.pid(-1);
  if (kind == FaultKind::kPauseCoordinator) {
    kill(pid, SIGSTOP);
    paused_.emplace_back(absl::Now() + absl::Milliseconds(std::uniform_int_distribution<int>(100, 5000)(random_)), pid);
    return;
  }
  open_.push_back({kind, -1, pid, absl::Now(), 0, false});
  kill(pid, SIGKILL);
}

// A launcher that has gone and that no open fault explains.
void Chaos::FollowLaunchers() {
  for (int group = 0; group < groups_; ++group) {
    pid_t& known = launchers_[static_cast<size_t>(group)];
    const pid_t is = cluster_.pid(group);
    if (is == known) continue;
    const bool is_ours = std::ranges::any_of(open_, [&](const Fault& fault) { return fault.launcher == known; });
    if (known != 0 && !is_ours) ++report_.starved;
    known = is;
  }
}

void Chaos::Follow() {
  const absl::Time now = absl::Now();
  std::erase_if(open_, [&](Fault& fault) {
    const double seconds = absl::ToDoubleSeconds(now - fault.at);
    if (!fault.is_noticed && IsNoticed(fault)) {
      fault.is_noticed = true;
      auto& detection = fault.is_early ? report_.early_detection_seconds : report_.detection_seconds;
      if (!IsOfCoordinator(fault.kind)) detection.push_back(seconds);
      spdlog::info("{} ({}{}): noticed after {:.2f} s", Name(fault.kind), fault.program,
                   fault.is_early ? ", in the start of MPI" : "", seconds);
    }
    if (!fault.is_noticed && now - fault.at > kNoticeLimit) {
      ++report_.unnoticed;
      spdlog::error("{} ({}): not noticed for {:.0f} s", Name(fault.kind), fault.program, seconds);
      kill(fault.launcher, SIGKILL);
      return true;
    }
    const pid_t launcher = cluster_.pid(fault.program);
    const auto serving = watch_->Serving(fault.at);
    if (!fault.is_noticed || launcher == 0 || launcher == fault.launcher || !serving) return false;
    const bool is_back = std::ranges::any_of(*serving, [&](pid_t rank) {
      return fault.program == -1 || ParentOf(rank) == launcher;  // a coordinator is back once any group serves
    });
    if (!is_back) return false;
    auto& recovery =
        IsOfCoordinator(fault.kind) ? report_.coordinator_recovery_seconds : report_.group_recovery_seconds;
    recovery.push_back(seconds);
    spdlog::info("{} ({}): serves again after {:.2f} s", Name(fault.kind), fault.program, seconds);
    return true;
  });
}

bool Chaos::IsNoticed(const Fault& fault) const {
  if (cluster_.pid(fault.program) != fault.launcher) return true;
  if (IsOfCoordinator(fault.kind)) return false;
  const std::string log = LogOf(fault.program);
  const absl::string_view news = absl::string_view(log).substr(std::min(log.size(), fault.log_size));
  return std::ranges::any_of(kAlarms, [&](const char* alarm) { return absl::StrContains(news, alarm); });
}

std::string Chaos::LogOf(int program) const {
  const std::string name = program == -1 ? "coordinator" : absl::StrCat("group-", program);
  return ReadTextFile(absl::StrCat(log_folder_, "/", name, ".log")).value_or("");
}

}  // namespace rankwise::chaos
