#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace rankwise {

// Sends the log to stderr as "12:00:00.000 I program: message". `level` is one of trace, debug, info,
// warn, error, off. Call once, first thing in main().
void StartLog(const std::string& program, const std::string& level = "info");

}  // namespace rankwise
