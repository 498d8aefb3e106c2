// Seeded simulations of a small deployment with faults. RANKWISE_SIM_SEEDS=N runs N seeds, from RANKWISE_SIM_FIRST on.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/sim/simulation.h"

namespace rankwise::sim {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;

uint64_t Setting(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  uint64_t value = 0;
  return text != nullptr && absl::SimpleAtoi(text, &value) ? value : otherwise;
}

TEST(SimulationTest, EveryStreamIsItsOracleWhateverFails) {
  const uint64_t first = Setting("RANKWISE_SIM_FIRST", 0), count = Setting("RANKWISE_SIM_SEEDS", 150);
  Outcome sum;
  for (uint64_t seed = first; seed < first + count && !HasFailure(); ++seed) {
    const Scenario scenario = DrawScenario(seed);
    const Outcome outcome = Simulate(scenario.options, scenario.arrivals);
    EXPECT_THAT(outcome.failures, IsEmpty())
        << "seed " << seed << ", " << scenario.options.groups << " groups, " << outcome.events << " events";
    EXPECT_EQ(outcome.refused + outcome.whole + outcome.cancelled + outcome.expired + outcome.failed > 0, true);
    sum.whole += outcome.whole;
    sum.cancelled += outcome.cancelled;
    sum.expired += outcome.expired;
    sum.failed += outcome.failed;
    sum.replays += outcome.replays;
    sum.late_outputs += outcome.late_outputs;
    sum.faults += outcome.faults;
    sum.events += outcome.events;
  }
  std::printf(
      "%lu seeds, %ld events, %ld faults: %ld samples whole with %ld replays, %ld cancelled, %ld expired, "
      "%ld failed; %ld late outputs\n",
      count, sum.events, sum.faults, sum.whole, sum.replays, sum.cancelled, sum.expired, sum.failed, sum.late_outputs);
  // There was something to see.
  for (const int64_t seen : {sum.whole, sum.replays, sum.cancelled, sum.expired, sum.failed, sum.late_outputs}) {
    EXPECT_GT(seen, static_cast<int64_t>(count) / 50);
  }
}

// Four tenants, of which one sends ten times what the others do, on a deployment that has work for a third of it.
TEST(SimulationTest, AGreedyTenantTakesNoMoreThanItsShare) {
  Options options{.groups = 2, .checks_every_event = false};
  options.cluster.max_live = 100'000;
  options.scheduler = {.block_count = 400,
                       .slot_count = 8,
                       .max_step_rows = 64,
                       .max_chunk_rows = 64,
                       .max_positions = 128,
                       .max_waiting = 100};
  std::vector<Arrival> arrivals;
  for (int i = 0; i < 6000; ++i) {
    const bool is_greedy = i % 13 < 10;
    arrivals.push_back(
        {.at = absl::Milliseconds(i), .prompt_tokens = 20, .output_tokens = 30, .tenant = is_greedy ? 0 : i % 13 - 9});
  }
  // The modest ones' requests alone are a load that has to wait; by when they are all served the greedy one has had as
  // much as each of them.
  std::vector<Arrival> modest;
  for (const Arrival& arrival : arrivals) {
    if (arrival.tenant != 0) modest.push_back(arrival);
  }
  const Outcome alone = Simulate(options, modest), both = Simulate(options, arrivals);
  EXPECT_THAT(alone.failures, IsEmpty());
  EXPECT_THAT(both.failures, IsEmpty());
  // A fourth tenant's worth of work is between them: 4/3 of the time, not 13/3 of it.
  ASSERT_THAT(both.last_whole_by_tenant, SizeIs(4));
  const double before = absl::ToDoubleSeconds(alone.last_whole_by_tenant.at(1));
  const double after = absl::ToDoubleSeconds(both.last_whole_by_tenant.at(1));
  EXPECT_NEAR(after / before, 4.0 / 3, 0.1);
}

}  // namespace
}  // namespace rankwise::sim
