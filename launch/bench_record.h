#pragma once

#include <string>
#include <vector>

// What a benchmark has found, in the one form that all of them print, keep and compare.
namespace rankwise::launch {

enum class Better { kNeither, kHigher, kLower };

// Name and unit together tell a figure from the others of its record.
struct Figure {
  std::string name, unit;
  double value = 0;
  Better better = Better::kNeither;
};

struct BenchRecord {
  std::string bench;    // "serve"
  std::string subject;  // what was measured: model, ranks, formats, device
  std::string version;  // of Rankwise
  std::string date;     // UTC, RFC 3339
  std::string cpu;      // its model
  int cores = 0;
  std::string command;
  std::vector<Figure> figures;
};

// Without figures: this program, this machine and this moment.
BenchRecord StartRecord(const std::string& bench);

std::string ToJson(const BenchRecord& record);

}  // namespace rankwise::launch
