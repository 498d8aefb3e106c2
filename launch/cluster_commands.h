#pragma once

#include "launch/commands.h"

// The commands for life in a cluster, and how one of them ends a script's loop.
namespace rankwise::launch {

// A status with this payload, a number in decimal, ends the command with that exit code.
inline constexpr char kExitCode[] = "rankwise/exit_code";

void AddBatch(CLI::App& app, Action& action);
void AddPreflight(CLI::App& app, Action& action);
void AddTop(CLI::App& app, Action& action);

}  // namespace rankwise::launch
