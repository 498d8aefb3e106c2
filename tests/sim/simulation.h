#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "worker/scheduler/scheduler.h"

// A whole deployment in virtual time: the real Cluster (routing, replay, admission, fairness, deadlines) and in each
// group the real Scheduler, against simulated clients, links, clocks and faults. One thread; a seed replays all.
namespace rankwise::sim {

// The simulated model: any stream can be checked without trust.
inline int32_t OracleToken(uint64_t seed, size_t position) {
  uint64_t x = (seed + 1) * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03;
  x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9;
  return static_cast<int32_t>((x ^ (x >> 32)) % 1000);
}

struct Arrival {
  absl::Duration at;  // since the start
  int32_t prompt_tokens = 1;
  int32_t output_tokens = 1;
  int32_t tenant = 0;
  int32_t priority = 0;
  int32_t samples = 1;
  absl::Duration timeout = absl::InfiniteDuration();
  absl::Duration patience = absl::InfiniteDuration();  // the client cancels then
};

// Faults per group and second of virtual time.
struct FaultRates {
  double crash = 0;  // the stream ends at once, the group comes back later
  double hang = 0;   // nothing comes from it; then it wakes, and what it had to say with it
  double cut = 0;    // the stream breaks; the group lives and joins again
};

struct Options {
  uint64_t seed = 0;
  int groups = 4;
  cluster::ClusterOptions cluster;
  scheduler::SchedulerOptions scheduler;
  FaultRates faults;
  absl::Duration step_base = absl::Milliseconds(8), step_per_row = absl::Microseconds(40);
  absl::Duration link_delay = absl::Milliseconds(1);
  absl::Duration restart_delay = absl::Seconds(2);
  absl::Duration heartbeat = absl::Milliseconds(500), tick = absl::Milliseconds(20);
  bool checks_every_event = true;  // CheckInvariants of cluster and schedulers
};

struct Outcome {
  std::vector<std::string> failures;  // empty: all was well
  int64_t arrived = 0, refused = 0, whole = 0, cancelled = 0, expired = 0, failed = 0;
  int64_t tokens = 0, replays = 0, late_outputs = 0, faults = 0, events = 0;
  absl::Duration virtual_time;
  std::vector<double> first_token_seconds;      // of whole samples, from arrival
  std::map<int32_t, int64_t> tokens_by_tenant;  // prompt of what began, and generated
  std::map<int32_t, absl::Duration> last_whole_by_tenant;
  absl::Duration cluster_cpu;  // real CPU time in the cluster's methods
  double goodput() const { return static_cast<double>(tokens) / absl::ToDoubleSeconds(virtual_time); }
};

// Runs until all arrivals have come and ended; faults cease with the last arrival, and then everything must end well.
Outcome Simulate(const Options& options, const std::vector<Arrival>& arrivals);

// Random options and arrivals of a small deployment, a different mix of everything for each seed.
struct Scenario {
  Options options;
  std::vector<Arrival> arrivals;
};
Scenario DrawScenario(uint64_t seed);

double Quantile(std::vector<double> values, double q);

}  // namespace rankwise::sim
