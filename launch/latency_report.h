#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launch/bench_record.h"
#include "launch/chart.h"

// What a load of streamed requests felt like to its clients.
namespace rankwise::launch {

// How one request went.
struct RequestRecord {
  absl::Status status;
  bool is_cut_off = false;  // by the end of the measurement: its tokens count, nothing else
  int32_t prompt_tokens = 0;
  int32_t cached_prompt_tokens = 0;
  int32_t output_tokens = 0;  // received
  double first_token_ms = 0;  // since it was due
  double total_ms = 0;        // from there to the end of its stream
  // Between successive messages with tokens, of which each has one unless tokens were drafted or the client lags.
  std::vector<double> gaps_ms;
};

// What a request must keep to count in the goodput; 0: anything.
struct Slo {
  double first_token_ms = 0;
  double per_output_token_ms = 0;
};

struct LatencyReport {
  // Milliseconds of the requests that succeeded, sorted: to the first token; between messages; (last token - first
  // token) / (tokens - 1) of those of two tokens or more; to the end.
  std::vector<double> first_token, gap, per_output_token, total;
  double seconds = 0;
  int64_t succeeded = 0, good = 0, failed = 0, cut_off = 0;
  int64_t prompt_tokens = 0, cached_prompt_tokens = 0, output_tokens = 0;  // of all, up to the end or the failure
  struct Failures {
    int64_t count = 0;
    std::string example;  // the first one's message
  };
  std::map<std::string, Failures> failures;  // by the name of the status' code
  Slo slo;
};

LatencyReport Summarize(std::span<const RequestRecord> records, double seconds, const Slo& slo);

// The value at rank ceil(q * count), 0 < q <= 1; 0 of none. REQUIRES: sorted.
double Quantile(std::span<const double> sorted, double q);

std::vector<Figure> FiguresOf(const LatencyReport& report);

// A table of latencies, rates, failures, and histograms of TTFT and ITL; whole lines.
std::string LatencyText(const LatencyReport& report);

// A bar for each of about a dozen intervals, each of which is as much longer than the last as that is than the one
// before. REQUIRES: sorted.
std::string Histogram(std::span<const double> sorted_ms);

// Distribution functions of all four.
Chart LatencyChart(const LatencyReport& report, const std::string& title);

}  // namespace rankwise::launch
