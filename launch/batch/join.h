#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launch/batch/input.h"

namespace rankwise::batch {

// The results that are there, checked against their questions.
struct Results {
  std::vector<std::string> lines;  // by index in Input::lines(); empty: no result
  std::string fingerprint;         // Served::fingerprint of them; empty: none has one
  size_t errors = 0;

  size_t missing() const;
};

// Takes the results of `text` into `results`, whose lines are as many as `input`'s. FailedPrecondition for a result
// whose question is not in `input` or was another one, and for the answers of two models; InvalidArgument for what is
// no result, and for one line answered twice.
absl::Status AddResult(const Input& input, std::string_view text, Results& results);

// The outputs of all shards as one, in the order of the input: reads "NAME.I-of-N.EXT" of every I (`output` is
// "NAME.EXT"), writes `output`. NotFound when a shard's output is not there; Unavailable when lines have no result yet,
// and then writes nothing.
absl::StatusOr<Results> JoinShards(const Input& input, const std::string& output, int count);

}  // namespace rankwise::batch
