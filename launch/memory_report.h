#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "launch/chart.h"
#include "launch/memory_plan.h"
#include "worker/weights/model_config.h"

// What `plan` and `bench memory` share: their flags, the model they speak of, and the chart they draw.
namespace rankwise::launch {

struct MemoryFlags {
  std::string model;
  int tp = 1;
  int threads = 0;  // of one rank; 0: as serve would choose on this host
  std::vector<int64_t> batches = {8, 16, 32, 48};
  int64_t sequence_tokens = 2048;
  std::vector<std::string> kv = {"f16", "int8"};
  std::string svg, png;  // files to write, empty: none
};

void AddMemoryFlags(CLI::App& command, MemoryFlags& flags);

struct PlannedModel {
  std::string name;
  weights::ModelConfig config;
  kernels::DType weight_dtype = kernels::DType::kF16;
};

// `name` is a model folder, a config.json, or a shape that rankwise-random-model knows, in this order. The dtype is
// that of the folder's first matrix, else what the configuration states, else f16. NotFound names all three.
absl::StatusOr<PlannedModel> FindModel(const std::string& name);

// The options of one row. InvalidArgument for a KV format that serve does not know.
absl::StatusOr<MemoryOptions> OptionsFor(const MemoryFlags& flags, const PlannedModel& model, const std::string& kv,
                                         int64_t batch);

// Ranks that need the same, as one: [first, last].
struct RankGroup {
  int first = 0, last = 0;
  RankMemory memory;
  std::string name() const;  // "0", "1-7"
};
absl::StatusOr<std::vector<RankGroup>> PlanRanks(const PlannedModel& model, const MemoryOptions& options,
                                                 const std::optional<Overhead>& overhead);

double Mib(int64_t bytes);

// Writes --svg and --png, those that are asked for; the title gets model, tp and length before it.
absl::Status WriteCharts(const MemoryFlags& flags, Chart chart);

}  // namespace rankwise::launch
