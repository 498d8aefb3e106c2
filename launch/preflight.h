#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launch/memory_plan.h"
#include "launch/memory_report.h"

// What must hold before an allocation is spent on a server, one check at a time. Each returns what it found in words
// and, when that is bad, what to do.
namespace rankwise::launch {

struct Finding {
  enum Kind { kGood, kDoubtful, kBad };
  Kind kind = kGood;
  std::string what;    // a word: "memory"
  std::string detail;  // a sentence with the numbers
  std::string fix;     // what to do; empty when good
};

std::string ToText(const Finding& finding);

// What rankwise-comm-bench has printed so far.
struct CommReport {
  std::vector<int> group_sizes;      // one for each group that has announced itself: several are ranks that do not meet
  std::map<int64_t, double> p50_us;  // of an all-reduce, by its bytes
};
CommReport ParseCommReport(const std::string& text);
// `log_tail`: the launcher's last words. `least_gigabytes` per second of one rank, 0: none asked for.
std::vector<Finding> JudgeLaunch(const CommReport& report, int tp, const std::string& launcher,
                                 const std::string& log_tail, double least_gigabytes,
                                 const weights::ModelConfig* config);

// Opens all of it: configuration, tokenizer, weights, and, where a manifest came with them, every rank's checksums.
Finding CheckModel(const std::string& folder, int tp, std::optional<PlannedModel>& model);
Finding JudgeMemory(const std::vector<RankGroup>& ranks, int ranks_on_host, int64_t available_bytes);
// Of this host and our control group or Slurm job: the least. 0: unknown.
int64_t AvailableMemory();
Finding JudgeCpus(int ranks_on_host, int threads, int usable_cpus);
// That HOST:PORT can be listened on, port 0 at any.
Finding CheckListen(const std::string& address);
Finding CheckSharedMemory(const std::string& folder = "/dev/shm");
// `dev` is /dev, or a test's.
Finding JudgeDevice(const std::string& device, const std::string& dev = "/dev");

}  // namespace rankwise::launch
