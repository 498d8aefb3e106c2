#include "launch/bench_record.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rankwise::launch {

NLOHMANN_JSON_SERIALIZE_ENUM(Better,
                             {{Better::kNeither, nullptr}, {Better::kHigher, "higher"}, {Better::kLower, "lower"}})

namespace {

std::string CpuModel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (absl::StartsWith(line, "model name")) {
      return std::string(absl::StripAsciiWhitespace(line.substr(std::min(line.find(':'), line.size() - 1) + 1)));
    }
  }
  return "unknown";
}

std::string CommandLine() {
  std::ifstream file("/proc/self/cmdline");
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  return absl::StrJoin(words, " ");
}

}  // namespace

BenchRecord StartRecord(const std::string& bench) {
  return {.bench = bench,
          .version = RANKWISE_VERSION,
          .date = absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone()),
          .cpu = CpuModel(),
          .cores = static_cast<int>(std::thread::hardware_concurrency()),
          .command = CommandLine()};
}

std::string ToJson(const BenchRecord& record) {
  nlohmann::ordered_json json{{"bench", record.bench},    {"subject", record.subject}, {"version", record.version},
                              {"date", record.date},      {"cpu", record.cpu},         {"cores", record.cores},
                              {"command", record.command}};
  json["figures"] = nlohmann::ordered_json::array();
  for (const Figure& figure : record.figures) {
    json["figures"].push_back(
        {{"name", figure.name}, {"unit", figure.unit}, {"value", figure.value}, {"better", figure.better}});
  }
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace rankwise::launch
