#include "launch/arrivals.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace rankwise::launch {
namespace {

struct Line {
  absl::Time at;
  int64_t prompt = 0, output = 0;
};

std::optional<Line> ParseCsv(const std::string& text) {
  const std::vector<std::string> fields = absl::StrSplit(text, ',');
  Line line;
  std::string error;
  if (fields.size() != 3 || !absl::SimpleAtoi(fields[1], &line.prompt) || !absl::SimpleAtoi(fields[2], &line.output) ||
      !absl::ParseTime("%Y-%m-%d %H:%M:%E*S", fields[0], &line.at, &error))
    return std::nullopt;
  return line;
}

std::optional<Line> ParseJson(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return std::nullopt;
  if (!json.contains("timestamp") || !json["timestamp"].is_number()) return std::nullopt;
  for (const char* key : {"input_length", "output_length"}) {
    if (!json.contains(key) || !json[key].is_number_integer()) return std::nullopt;
  }
  return Line{absl::UnixEpoch() + absl::Milliseconds(json["timestamp"].get<double>()),
              json["input_length"].get<int64_t>(), json["output_length"].get<int64_t>()};
}

}  // namespace

absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path, int length_divisor) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("no trace ", path));
  const bool is_json = absl::EndsWith(path, ".jsonl");
  std::vector<Line> lines;
  int64_t number = 0;
  for (std::string text; std::getline(file, text);) {
    const std::optional<Line> line = is_json ? ParseJson(text) : ParseCsv(text);
    const bool is_header = ++number == 1 && !is_json;
    if (line && std::min(line->prompt, line->output) >= 0 &&
        std::max(line->prompt, line->output) <= std::numeric_limits<int32_t>::max()) {
      lines.push_back(*line);
    } else if (!is_header) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ", line ", number, ": not ",
                       is_json ? "{\"timestamp\": ms, \"input_length\": tokens, \"output_length\": tokens}"
                               : "TIMESTAMP,ContextTokens,GeneratedTokens",
                       ": ", text.substr(0, 200)));
    }
  }
  std::ranges::stable_sort(lines, {}, &Line::at);
  std::vector<Arrival> arrivals;
  for (const Line& line : lines) {
    arrivals.push_back({.at = line.at - lines.front().at,
                        .prompt_tokens = static_cast<int32_t>(std::max<int64_t>(line.prompt / length_divisor, 1)),
                        .output_tokens = static_cast<int32_t>(std::max<int64_t>(line.output / length_divisor, 1))});
  }
  return arrivals;
}

absl::StatusOr<TokenRange> ParseTokenRange(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
  TokenRange range;
  if (!absl::SimpleAtoi(parts.front(), &range.least) || !absl::SimpleAtoi(parts.back(), &range.most) ||
      range.least < 1 || range.most < range.least) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text, "\" is neither a number of tokens, as 128, nor a range of them, as 64:256"));
  }
  return range;
}

std::vector<Arrival> DrawArrivals(int64_t count, double requests_per_second, TokenRange prompt, TokenRange output,
                                  uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> prompt_tokens(prompt.least, prompt.most),
      output_tokens(output.least, output.most);
  std::exponential_distribution<double> gap(1);
  std::vector<Arrival> arrivals;
  absl::Duration at;
  for (int64_t i = 0; i < count; ++i) {
    if (requests_per_second > 0) at += absl::Seconds(gap(random) / requests_per_second);
    Arrival& arrival = arrivals.emplace_back();
    arrival.at = at;
    arrival.prompt_tokens = prompt_tokens(random);
    arrival.output_tokens = output_tokens(random);
  }
  return arrivals;
}

std::vector<int32_t> DrawPrompt(uint64_t seed, int64_t index, int32_t tokens, int32_t shared, int32_t vocab_size) {
  std::vector<int32_t> ids;
  std::uniform_int_distribution<int32_t> id(0, vocab_size - 1);
  const auto draw_until = [&](int32_t end, std::seed_seq words) {
    std::mt19937_64 random(words);
    while (std::ssize(ids) < end) ids.push_back(id(random));
  };
  const uint64_t number = static_cast<uint64_t>(index) + 1;  // 0 is what all begin with
  draw_until(std::min(tokens, shared), {seed, seed >> 32, uint64_t{0}, uint64_t{0}});
  draw_until(tokens, {seed, seed >> 32, number, number >> 32});
  return ids;
}

}  // namespace rankwise::launch
