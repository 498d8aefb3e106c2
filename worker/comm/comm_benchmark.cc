// rankwise-comm-bench: what the collectives of one group cost. Run it under mpirun or srun with the ranks of the group.

#include <mpi.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/log.h"
#include "worker/comm/mpi_communicator.h"

namespace rankwise::comm {
namespace {

using Clock = std::chrono::steady_clock;
constexpr absl::Duration kTimeout = absl::Seconds(30);

void Must(const absl::Status& status) { RW_CHECK(status.ok(), status.ToString()); }

double MicrosecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

struct Percentiles {
  double p50;
  double p99;
};

Percentiles PercentilesOf(std::vector<double> samples) {
  std::ranges::sort(samples);
  return {samples[samples.size() / 2], samples[samples.size() * 99 / 100]};
}

std::vector<double> Time(int rounds, const std::function<void()>& call) {
  for (int round = 0; round < rounds / 10 + 10; ++round) call();
  std::vector<double> samples;
  for (int round = 0; round < rounds; ++round) {
    const Clock::time_point start = Clock::now();
    call();
    samples.push_back(MicrosecondsSince(start));
  }
  return samples;
}

// They take turns in blocks, so that what else the machine does hits all alike.
void CompareAllReduce(const std::vector<Communicator*>& groups) {
  const bool is_lead = groups[0]->rank() == 0;
  if (is_lead) {
    std::printf("%-22s", "all-reduce sum [us]");
    for (const Communicator* group : groups) std::printf(" %22s p99", group->Description().c_str());
    std::printf(" %22s p99\n", "MPI_Allreduce");
  }
  for (const int64_t bytes : {8, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20}) {
    const int64_t count = bytes / static_cast<int64_t>(sizeof(float));
    std::vector<float> values(count, 0.0f);
    std::vector<std::function<void()>> calls;
    for (Communicator* group : groups) {
      calls.emplace_back([&values, group] { Must(group->AllReduceSum(values, kTimeout)); });
    }
    calls.emplace_back([&values] {
      MPI_Allreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    });
    std::vector<std::vector<double>> samples(calls.size());
    const int rounds = bytes <= (16 << 10) ? 1000 : bytes <= (256 << 10) ? 200 : 20;
    for (int block = 0; block < 5; ++block) {
      for (size_t i = 0; i < calls.size(); ++i) {
        const std::vector<double> now = Time(rounds, calls[i]);
        samples[i].insert(samples[i].end(), now.begin(), now.end());
      }
    }
    if (!is_lead) continue;
    std::printf("%20ld B", static_cast<long>(bytes));
    for (const std::vector<double>& of_one : samples) {
      const Percentiles p = PercentilesOf(of_one);
      std::printf(" %14.1f %11.1f", p.p50, p.p99);
    }
    std::printf("\n");
  }
}

// From the call on rank 0 to the return on rank 1, by the clock that ranks of one machine share.
void MeasureWakeUp(Communicator& group, absl::Duration idle) {
  std::vector<double> samples;
  for (int round = 0; round < 200; ++round) {
    Must(group.Barrier(kTimeout));
    std::string message(1024, '\0');
    if (group.rank() == 0) {
      absl::SleepFor(idle);
      const Clock::time_point now = Clock::now();
      std::memcpy(message.data(), &now, sizeof(now));
    }
    Must(group.Broadcast(message, kTimeout));
    Clock::time_point start;
    std::memcpy(&start, message.data(), sizeof(start));
    samples.push_back(MicrosecondsSince(start));
  }
  const Percentiles wake_up = PercentilesOf(samples);
  std::vector<int64_t> part_counts(group.size(), 2);
  std::vector<float> all(group.rank() == 0 ? 2 * group.size() : 0);
  const float part[] = {static_cast<float>(wake_up.p50), static_cast<float>(wake_up.p99)};
  Must(group.Gather(part, part_counts, all, kTimeout));
  if (group.rank() == 0 && group.size() > 1) {
    std::printf("broadcast of 1 KiB after %s idle: rank 1 has it after p50 %.1f us, p99 %.1f us\n",
                absl::FormatDuration(idle).c_str(), all[2], all[3]);
  }
}

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](timeval time) { return static_cast<double>(time.tv_sec) + 1e-6 * time.tv_usec; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void MeasureIdle(Communicator& group, absl::Duration idle) {
  Must(group.Barrier(kTimeout));
  const Clock::time_point start = Clock::now();
  const double cpu_start = CpuSeconds();
  std::string message;
  if (group.rank() == 0) absl::SleepFor(idle);
  Must(group.Broadcast(message, kTimeout));
  const float percent = static_cast<float>(100 * (CpuSeconds() - cpu_start) / (1e-6 * MicrosecondsSince(start)));
  std::vector<int64_t> part_counts(group.size(), 1);
  std::vector<float> all(group.rank() == 0 ? group.size() : 0);
  Must(group.Gather(std::span(&percent, 1), part_counts, all, kTimeout));
  for (int rank = 1; rank < static_cast<int>(all.size()); ++rank) {
    std::printf("rank %d waiting %s in a broadcast: %.2f %% of a core\n", rank, absl::FormatDuration(idle).c_str(),
                all[rank]);
  }
}

int Run() {
  auto session = MpiSession::Start();
  Must(session.status());
  auto mpi = CreateMpiCommunicator(**session, kTimeout);
  Must(mpi.status());
  auto group = CreateGroupCommunicator(**session, kTimeout);
  Must(group.status());
  if ((*group)->rank() == 0) {
    std::printf("%s\n", (*group)->Description().c_str());
    std::fflush(stdout);
  }
  CompareAllReduce({group->get(), mpi->get()});
  for (Communicator* each : {group->get(), mpi->get()}) {
    if (each->rank() == 0) std::printf("%s, waiting:\n", each->Description().c_str());
    if ((*session)->host_size() == (*session)->size()) {
      for (const int milliseconds : {0, 1, 5, 20}) MeasureWakeUp(*each, absl::Milliseconds(milliseconds));
    }
    MeasureIdle(*each, absl::Seconds(2));
  }
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace rankwise::comm

int main() {
  rankwise::StartLog("rankwise-comm-bench");
  return rankwise::comm::Run();
}
