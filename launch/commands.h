#pragma once

#include <CLI/CLI.hpp>
#include <functional>

#include "absl/status/status.h"

namespace rankwise::launch {

// What the parsed command line asks for; main() runs it. Exit code: that of kExitCode where the status has it, else 0
// for OK, 130 for Cancelled, 2 for what the user must change (InvalidArgument, NotFound, FailedPrecondition,
// Unimplemented), else 1.
using Action = std::function<absl::Status()>;
// A payload of a status that is not OK: the command's exit code, in decimal.
inline constexpr char kExitCode[] = "rankwise/exit_code";

// Each adds one subcommand, which sets `action` when it is parsed.
void AddServe(CLI::App& app, Action& action);
void AddGenerate(CLI::App& app, Action& action);
void AddStatus(CLI::App& app, Action& action);
void AddCalibrate(CLI::App& app, Action& action);
void AddConvert(CLI::App& app, Action& action);
void AddQuantize(CLI::App& app, Action& action);
void AddKvQparams(CLI::App& app, Action& action);
void AddBench(CLI::App& app, Action& action);
void AddEval(CLI::App& app, Action& action);
void AddBenchMemory(CLI::App& bench, Action& action);
void AddBenchServe(CLI::App& bench, Action& action);
void AddPlan(CLI::App& app, Action& action);
void AddBatch(CLI::App& app, Action& action);
void AddPreflight(CLI::App& app, Action& action);
void AddTop(CLI::App& app, Action& action);

}  // namespace rankwise::launch
