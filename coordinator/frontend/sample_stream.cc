#include "coordinator/frontend/sample_stream.h"

#include <utility>

#include "base/status_macros.h"

namespace rankwise::frontend {

using rankwise::v1::FinishReason;
using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;
using worker::v1::Sampled;
using worker::v1::SequenceOutput;

namespace {

// Positions in one message: with 20 alternatives of some 30 bytes each it stays far below the 4 MiB that gRPC clients
// accept.
constexpr int kMaxPiecePositions = 512;

}  // namespace

absl::StatusOr<SampleStream> SampleStream::Create(const GenerateRequest& request, Options options) {
  std::vector<std::string> stop_texts(request.stop().begin(), request.stop().end());
  RW_ASSIGN_OR_RETURN(text::StopMatcher stops,
                      text::StopMatcher::Create(stop_texts, {.include_stop = request.include_stop()}));
  SampleStream stream(std::move(options), std::move(stops));
  stream.stop_texts_ = std::move(stop_texts);
  stream.has_logprobs_ = request.sampling().has_logprobs();
  stream.min_tokens_ = request.sampling().min_tokens();
  if (stream.options_.tokenizer != nullptr) {
    stream.detokenizer_.emplace(stream.options_.tokenizer,
                                text::IncrementalDetokenizer::Options{.skip_special = true, .continues_text = true});
  }
  return stream;
}

bool SampleStream::Take(const SequenceOutput& output, uint32_t replays, absl::Time now) {
  for (const Sampled& token : output.prompt_logprobs()) {
    if (options_.skipped_tokens == 0) CopyLogprobs(token, *OpenPiece().add_prompt_logprobs());
  }
  for (const Sampled& token : output.tokens()) {
    TakeToken(token, now);
    if (stops_.matched()) break;
  }
  if (output.finished() && !stops_.matched()) FlushText();
  if (stops_.matched()) {
    Finish(rankwise::v1::FINISH_REASON_STOP, replays, now).set_matched_stop(stop_texts_[*stops_.matched()]);
    return true;
  }
  if (!output.finished()) return false;

  rankwise::v1::Finish& finish = Finish(output.reason(), replays, now);
  if (output.has_stop_token_id()) finish.set_stop_token_id(output.stop_token_id());
  finish.set_cached_prompt_tokens(output.cached_prompt_tokens());
  // After a replay the group knows only its own part.
  if (replays == 0) {
    finish.set_queue_seconds(output.queue_seconds());
    finish.set_prefill_seconds(output.prefill_seconds());
    finish.set_decode_seconds(output.decode_seconds());
  }
  return true;
}

void SampleStream::End(FinishReason reason, uint32_t replays, absl::Time now) {
  FlushText();
  Finish(reason, replays, now);
}

GenerateResponse SampleStream::TakePiece() {
  GenerateResponse piece = std::move(pieces_.front());
  pieces_.pop_front();
  return piece;
}

GenerateResponse& SampleStream::OpenPiece() {
  const auto positions = [](const GenerateResponse& piece) {
    return piece.token_ids_size() + piece.prompt_logprobs_size();
  };
  if (pieces_.empty() || positions(pieces_.back()) >= kMaxPiecePositions) {
    GenerateResponse& piece = pieces_.emplace_back();
    piece.set_index(options_.index);
    piece.set_token_offset(generated_);
    if (!std::exchange(has_begun_, true)) piece.set_request_id(options_.request_id);
  }
  return pieces_.back();
}

void SampleStream::TakeToken(const Sampled& token, absl::Time now) {
  GenerateResponse* piece = generated_ < options_.skipped_tokens ? nullptr : &OpenPiece();
  if (piece != nullptr) {
    piece->add_token_ids(token.id());
    if (has_logprobs_) CopyLogprobs(token, *piece->add_logprobs());
  }
  if (generated_++ == 0) first_token_ = now;
  if (!detokenizer_) return;
  std::string text = detokenizer_->Append(token.id());
  // A stop string before min_tokens is ordinary text.
  if (generated_ >= min_tokens_) text = stops_.Feed(text);
  if (piece != nullptr) piece->mutable_text()->append(text);
}

void SampleStream::FlushText() {
  if (!detokenizer_) return;
  std::string text = stops_.Feed(detokenizer_->Flush());
  text += stops_.Flush();
  if (!text.empty()) OpenPiece().mutable_text()->append(text);
}

// Times as the coordinator saw them.
rankwise::v1::Finish& SampleStream::Finish(FinishReason reason, uint32_t replays, absl::Time now) {
  rankwise::v1::Finish& finish = *OpenPiece().mutable_finish();
  finish.set_reason(reason);
  finish.set_prompt_tokens(options_.prompt_tokens);
  finish.set_generated_tokens(generated_);
  finish.set_seed(options_.seed);
  finish.set_replays(replays);
  if (generated_ == 0) {
    finish.set_queue_seconds(absl::ToDoubleSeconds(now - options_.started));
  } else {
    finish.set_prefill_seconds(absl::ToDoubleSeconds(first_token_ - options_.started));
    finish.set_decode_seconds(absl::ToDoubleSeconds(now - first_token_));
  }
  return finish;
}

void SampleStream::CopyLogprobs(const Sampled& from, rankwise::v1::PositionLogprobs& to) const {
  const auto fill = [this](int32_t id, float logprob, rankwise::v1::TokenLogprob& token) {
    token.set_id(id);
    token.set_logprob(logprob);
    if (options_.tokenizer != nullptr) token.set_token(options_.tokenizer->TokenBytes(id));
  };
  fill(from.id(), from.logprob(), *to.mutable_chosen());
  for (const auto& candidate : from.top()) fill(candidate.id(), candidate.logprob(), *to.add_top());
}

}  // namespace rankwise::frontend
