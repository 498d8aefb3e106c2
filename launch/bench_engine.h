#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/machine_limits.h"
#include "launch/bench_record.h"
#include "worker/comm/communicator.h"
#include "worker/device/device.h"
#include "worker/engine/rank.h"

namespace rankwise::launch {

inline constexpr char kDefaultKvFormat[] = "int8 for a workspace with quant_policy = 4, else f16";

// Of every benchmark that runs ranks.
struct RankFlags {
  engine::RankOptions rank;
  device::DeviceOptions device;
};
void AddRankFlags(CLI::App& app, RankFlags& flags);

struct EngineFlags {
  std::vector<int> batches = {1};
  int depth = 0;
  int prompt = 512;
  int steps = 24;
  int repeats = 5;
  int step_rows = 0;  // 0: Backend::step_rows
  RecordFlags record;
};
void AddEngineFlags(CLI::App& app, RankFlags& ranks, EngineFlags& flags);

// Collective: decodes and prefills as the flags say, and reports on rank 0 how near that comes to the limits of the
// ranks' devices, which are measured first. Errors of `Report` (launch/bench_record.h) among others.
absl::Status BenchEngine(const RankFlags& ranks, const EngineFlags& flags, const device::Device& device,
                         comm::Communicator& communicator);

double SecondsNow();  // of a clock that nobody sets
double Median(std::vector<double> values);
// Collective: Σ over ranks.
absl::StatusOr<double> SumOverRanks(double value, const device::Device& device, comm::Communicator& communicator);

}  // namespace rankwise::launch
