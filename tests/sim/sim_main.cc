// The simulation at scale: a trace or a made-up load on many groups, with faults, in virtual time.

#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <random>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "launch/arrivals.h"
#include "tests/sim/simulation.h"

namespace rankwise::sim {
namespace {

struct Flags {
  int groups = 64;
  int64_t requests = 20'000;
  double rate = 0;  // per second; 0: 70 % of what the groups can do
  std::string trace;
  int divisor = 16;
  int tenants = 8;
  double crash = 0, hang = 0, cut = 0;  // per group and hour
  uint64_t seed = 1;
};

absl::StatusOr<std::vector<Arrival>> Load(const Flags& flags, const Options& options) {
  std::vector<Arrival> shape;
  std::mt19937_64 random(flags.seed);
  if (!flags.trace.empty()) {
    RW_ASSIGN_OR_RETURN(const auto trace, launch::ReadTrace(flags.trace, flags.divisor));
    for (const launch::Arrival& arrival : trace) {
      shape.push_back(
          {.at = arrival.at, .prompt_tokens = arrival.prompt_tokens, .output_tokens = arrival.output_tokens});
    }
  } else {
    std::lognormal_distribution<double> prompt(4, 1), output(2.5, 1);
    std::exponential_distribution<double> gap(1);
    absl::Duration at;
    for (int i = 0; i < 20'000; ++i) {
      at += absl::Seconds(gap(random));
      shape.push_back({.at = at,
                       .prompt_tokens = static_cast<int32_t>(1 + prompt(random)),
                       .output_tokens = static_cast<int32_t>(1 + output(random))});
    }
  }
  if (shape.empty()) return absl::InvalidArgumentError("the trace is empty");
  double rows = 0, outputs = 0;
  for (Arrival& arrival : shape) {
    arrival.prompt_tokens = std::min(arrival.prompt_tokens, options.scheduler.max_positions / 2);
    arrival.output_tokens = std::min(arrival.output_tokens, options.scheduler.max_positions / 2);
    rows += arrival.prompt_tokens + arrival.output_tokens;
    outputs += arrival.output_tokens;
  }
  // A group whose slots are full decodes slot_count tokens a step.
  const auto count = static_cast<double>(shape.size());
  const double seconds_each =
      outputs / count / options.scheduler.slot_count * absl::ToDoubleSeconds(options.step_base) +
      rows / count * absl::ToDoubleSeconds(options.step_per_row);
  const double rate = flags.rate > 0 ? flags.rate : 0.7 * flags.groups / seconds_each;
  const double stretch = count / rate / absl::ToDoubleSeconds(shape.back().at + absl::Milliseconds(1));
  // The trace again and again, its gaps scaled to the rate.
  std::vector<Arrival> arrivals;
  const absl::Duration period = absl::Seconds(count / rate);
  for (int64_t i = 0; i < flags.requests; ++i) {
    const auto round = i / static_cast<int64_t>(shape.size()), place = i % static_cast<int64_t>(shape.size());
    Arrival& arrival = arrivals.emplace_back(shape[static_cast<size_t>(place)]);
    arrival.at = round * period + arrival.at * stretch;
    arrival.tenant = static_cast<int32_t>(random() % static_cast<uint64_t>(flags.tenants));
  }
  return arrivals;
}

int Report(const Flags& flags, const Outcome& outcome, absl::Duration took) {
  for (const std::string& failure : outcome.failures) std::printf("FAILED  %s\n", failure.c_str());
  double sum = 0, squares = 0;
  for (const auto& [tenant, tokens] : outcome.tokens_by_tenant) {
    sum += static_cast<double>(tokens);
    squares += static_cast<double>(tokens) * static_cast<double>(tokens);
  }
  const double jain = squares == 0 ? 1 : sum * sum / (squares * static_cast<double>(outcome.tokens_by_tenant.size()));
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const double cpu_seconds = static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec);
  absl::PrintF("groups %d, requests %d, virtual time %.1f s, %d events in %.1f s, CPU %.0f s, %d MiB\n", flags.groups,
               outcome.arrived, absl::ToDoubleSeconds(outcome.virtual_time), outcome.events,
               absl::ToDoubleSeconds(took), cpu_seconds, used.ru_maxrss >> 10);
  absl::PrintF("whole %d, refused %d, failed %d; faults %d, replays %d, late outputs refused %d\n", outcome.whole,
               outcome.refused, outcome.failed, outcome.faults, outcome.replays, outcome.late_outputs);
  absl::PrintF("goodput %.0f tokens/s, time to first token p50 %.1f ms, p99 %.1f ms, fairness (Jain) %.4f\n",
               outcome.goodput(), 1e3 * Quantile(outcome.first_token_seconds, 0.5),
               1e3 * Quantile(outcome.first_token_seconds, 0.99), jain);
  const double cpu_us = absl::ToDoubleMicroseconds(outcome.cluster_cpu);
  absl::PrintF("CPU time of routing, replay, admission and fairness: %.2f us a request, %.3f us a token\n",
               cpu_us / static_cast<double>(std::max<int64_t>(outcome.arrived, 1)),
               cpu_us / static_cast<double>(std::max<int64_t>(outcome.tokens, 1)));
  return outcome.failures.empty() ? 0 : 1;
}

int Main(const Flags& flags) {
  Options options{.seed = flags.seed, .groups = flags.groups, .checks_every_event = false};
  options.cluster.max_live = 1 << 20;
  options.cluster.max_live_tokens = uint64_t{1} << 32;
  options.scheduler.block_count = 4096;
  options.scheduler.max_positions = 1024;
  options.faults = {flags.crash / 3600, flags.hang / 3600, flags.cut / 3600};
  options.tick = absl::Milliseconds(100);
  const auto arrivals = Load(flags, options);
  if (!arrivals.ok()) {
    std::fprintf(stderr, "%s\n", arrivals.status().ToString().c_str());
    return 2;
  }
  const absl::Time begin = absl::Now();
  const Outcome outcome = Simulate(options, *arrivals);
  return Report(flags, outcome, absl::Now() - begin);
}

}  // namespace
}  // namespace rankwise::sim

int main(int argc, char** argv) {
  CLI::App app(
      "rankwise-sim: the coordinator's and the scheduler's real code against simulated groups, in virtual time");
  rankwise::sim::Flags flags;
  app.add_option("--groups", flags.groups)->capture_default_str()->check(CLI::Range(1, 1 << 16));
  app.add_option("--requests", flags.requests)->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--rate", flags.rate, "Requests a second; 0: 70 % of what the groups can do")->capture_default_str();
  app.add_option("--trace", flags.trace, "A trace: azure .csv or mooncake .jsonl; else made up");
  app.add_option("--divisor", flags.divisor, "Divides the trace's lengths")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--tenants", flags.tenants)->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--crash", flags.crash, "Crashes per group and hour")->capture_default_str();
  app.add_option("--hang", flags.hang, "The same of hangs")->capture_default_str();
  app.add_option("--cut", flags.cut, "The same of broken streams")->capture_default_str();
  app.add_option("--seed", flags.seed)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return rankwise::sim::Main(flags);
}
