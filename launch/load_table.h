#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/time/time.h"
#include "proto/inference.pb.h"

// What a coordinator says of its model and its load, as text for people: shared by `status` and `top`. Pure.
namespace rankwise::launch {

// "1.5 MiB"
std::string Mebibytes(uint64_t bytes);

// ", int8 activations", or nothing for floats.
std::string ActivationsWords(const rankwise::v1::GetModelInfoResponse& model);
// Three lines: name, shape, what it serves.
std::string ModelLines(const rankwise::v1::GetModelInfoResponse& model);
// What the cache holds, and what it would take as f16; empty while there is none.
std::string CacheLine(const rankwise::v1::GetModelInfoResponse& model, const rankwise::v1::GetLoadResponse& load);
std::string RequestsLine(const rankwise::v1::GetLoadResponse& load);
// A line for each group, with totals since its start.
std::string GroupTable(const rankwise::v1::GetLoadResponse& load);
// A line for each rank: what it holds, and of its latest steps how long it computed, how long it waited in collectives,
// and by how much its computing is off the group's mean.
std::string RankTable(const rankwise::v1::GetLoadResponse& load);
// Values that the cache could not hold; empty when calibration was wide enough.
std::string SaturationLines(const rankwise::v1::GetLoadResponse& load);

// What a group did between two looks at it; nothing for one that was started again in between.
struct GroupRate {
  double generated = 0, prompt = 0, steps = 0;  // per second
  double step_ms = 0;                           // of the latest step; 0: none between
};
// By epoch.
std::map<uint64_t, GroupRate> RatesBetween(const rankwise::v1::GetLoadResponse& before,
                                           const rankwise::v1::GetLoadResponse& after, absl::Duration passed);
// A line for each group with what it does now, a bar for its cache, and a line of their sum.
std::string RateTable(const rankwise::v1::GetLoadResponse& load, const std::map<uint64_t, GroupRate>& rates);

}  // namespace rankwise::launch
