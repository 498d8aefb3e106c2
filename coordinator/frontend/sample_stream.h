#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "coordinator/text/detokenizer.h"
#include "coordinator/text/stop_matcher.h"
#include "proto/inference.pb.h"
#include "proto/worker.pb.h"

namespace rankwise::frontend {

// One sample of a request: tokens in, messages for the client out. Holds what its text still waits for. One thread at a time.
class SampleStream {
 public:
  struct Options {
    uint32_t index = 0;
    uint32_t prompt_tokens = 0;
    uint64_t seed = 0;
    const text::Tokenizer* tokenizer = nullptr;  // null: token ids only
  };
  static absl::StatusOr<SampleStream> Create(const rankwise::v1::GenerateRequest& request, const Options& options);

  struct Piece {
    rankwise::v1::GenerateResponse message;
    bool is_last = false;  // carries the finish; nothing follows
  };
  Piece Take(const worker::v1::SequenceOutput& output, uint32_t replays);
  // Ended from outside: what is held back is delivered with the finish.
  Piece End(rankwise::v1::FinishReason reason, uint32_t replays);

 private:
  SampleStream(const Options& options, text::StopMatcher stops) : options_(options), stops_(std::move(stops)) {}
  void Fill(rankwise::v1::Finish& finish, rankwise::v1::FinishReason reason, uint32_t replays) const;
  void CopyLogprobs(const worker::v1::Sampled& from, rankwise::v1::PositionLogprobs& to) const;

  Options options_;
  text::StopMatcher stops_;
  std::vector<std::string> stop_texts_;
  std::optional<text::IncrementalDetokenizer> detokenizer_;
  bool has_logprobs_ = false;
  uint32_t generated_ = 0;
};

}  // namespace rankwise::frontend
