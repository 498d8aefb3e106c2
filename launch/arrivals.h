#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

// What a load on a deployment consists of: when requests come and how long they are.
namespace rankwise::launch {

struct Arrival {
  absl::Duration at;  // since the start of the load
  int32_t prompt_tokens = 1;
  int32_t output_tokens = 1;
};

// Trace files, in order of time: a .csv of TIMESTAMP,ContextTokens,GeneratedTokens (Azure's) or a .jsonl of timestamp
// (ms), input_length, output_length (Mooncake's). Lengths are divided by `length_divisor`; at least 1 remains.
// NotFound; InvalidArgument names the line that is neither.
absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path, int length_divisor);

// A number of tokens, or LEAST:MOST of which each is as likely.
struct TokenRange {
  int32_t least = 1, most = 1;
};
// InvalidArgument for what is neither "128" nor "64:256", both at least 1.
absl::StatusOr<TokenRange> ParseTokenRange(const std::string& text);

// `count` requests whose gaps are exponential with a mean of 1 / rate; at once when the rate is 0. The seed decides
// all.
std::vector<Arrival> DrawArrivals(int64_t count, double requests_per_second, TokenRange prompt, TokenRange output,
                                  uint64_t seed);

// The prompt of request `index`: `shared` tokens that all prompts of the seed begin with, and then its own.
std::vector<int32_t> DrawPrompt(uint64_t seed, int64_t index, int32_t tokens, int32_t shared, int32_t vocab_size);

}  // namespace rankwise::launch
