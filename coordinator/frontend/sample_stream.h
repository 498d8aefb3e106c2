#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/text/detokenizer.h"
#include "coordinator/text/stop_matcher.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.pb.h"
#include "proto/worker.pb.h"

namespace rankwise::frontend {

// One sample of a request: tokens in, pieces for the client out. What comes faster than the client reads is joined, so
// the pieces hold no more than the sample's tokens. One thread at a time.
class SampleStream {
 public:
  struct Options {
    uint32_t index = 0;
    std::string request_id;
    uint32_t prompt_tokens = 0;
    uint64_t seed = 0;
    const text::Tokenizer* tokenizer = nullptr;  // null: token ids only
    absl::Time started;
    uint32_t skipped_tokens = 0;  // the first ones, which the client has: they come in and do not go out
  };
  // InvalidArgument for stop strings that cannot be.
  static absl::StatusOr<SampleStream> Create(const rankwise::v1::GenerateRequest& request, Options options);

  // True when the sample ends with this output, by the group's word or by a stop string. What follows the stop is
  // dropped.
  bool Take(const worker::v1::SequenceOutput& output, uint32_t replays, absl::Time now);
  // Ended from outside: text that was held back is delivered.
  void End(rankwise::v1::FinishReason reason, uint32_t replays, absl::Time now);

  bool has_piece() const { return !pieces_.empty(); }
  void DropPieces() { pieces_.clear(); }
  // Requires: has_piece().
  rankwise::v1::GenerateResponse TakePiece();

 private:
  SampleStream(Options options, text::StopMatcher stops) : options_(std::move(options)), stops_(std::move(stops)) {}
  rankwise::v1::GenerateResponse& OpenPiece();
  void TakeToken(const worker::v1::Sampled& token, absl::Time now);
  void FlushText();
  rankwise::v1::Finish& Finish(rankwise::v1::FinishReason reason, uint32_t replays, absl::Time now);
  void CopyLogprobs(const worker::v1::Sampled& from, rankwise::v1::PositionLogprobs& to) const;

  Options options_;
  text::StopMatcher stops_;
  std::vector<std::string> stop_texts_;
  std::optional<text::IncrementalDetokenizer> detokenizer_;
  uint32_t min_tokens_ = 0;
  bool has_logprobs_ = false;

  uint32_t generated_ = 0;
  absl::Time first_token_ = absl::InfiniteFuture();
  bool has_begun_ = false;  // a piece was opened
  std::deque<rankwise::v1::GenerateResponse> pieces_;
};

}  // namespace rankwise::frontend
