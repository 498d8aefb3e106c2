#include "coordinator/frontend/sample_stream.h"

#include <utility>

#include "base/status_macros.h"

namespace rankwise::frontend {

using rankwise::v1::Finish;
using rankwise::v1::FinishReason;
using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;
using worker::v1::Sampled;
using worker::v1::SequenceOutput;

absl::StatusOr<SampleStream> SampleStream::Create(const GenerateRequest& request, const Options& options) {
  std::vector<std::string> stop_texts(request.stop().begin(), request.stop().end());
  RW_ASSIGN_OR_RETURN(text::StopMatcher stops,
                      text::StopMatcher::Create(stop_texts, {.include_stop = request.include_stop()}));
  SampleStream stream(options, std::move(stops));
  stream.stop_texts_ = std::move(stop_texts);
  stream.has_logprobs_ = request.sampling().has_logprobs();
  if (options.tokenizer != nullptr) {
    stream.detokenizer_.emplace(options.tokenizer,
                                text::IncrementalDetokenizer::Options{.skip_special = true, .continues_text = true});
  }
  return stream;
}

void SampleStream::CopyLogprobs(const Sampled& from, rankwise::v1::PositionLogprobs& to) const {
  const auto fill = [this](int32_t id, float logprob, rankwise::v1::TokenLogprob& token) {
    token.set_id(id);
    token.set_logprob(logprob);
    const auto* tokenizer = options_.tokenizer;
    if (tokenizer != nullptr && id >= 0 && id < tokenizer->vocab_size()) token.set_token(tokenizer->TokenBytes(id));
  };
  fill(from.id(), from.logprob(), *to.mutable_chosen());
  for (const auto& candidate : from.top()) fill(candidate.id(), candidate.logprob(), *to.add_top());
}

void SampleStream::Fill(Finish& finish, FinishReason reason, uint32_t replays) const {
  finish.set_reason(reason);
  finish.set_prompt_tokens(options_.prompt_tokens);
  finish.set_generated_tokens(generated_);
  finish.set_seed(options_.seed);
  finish.set_replays(replays);
}

SampleStream::Piece SampleStream::Take(const SequenceOutput& output, uint32_t replays) {
  Piece piece;
  GenerateResponse& message = piece.message;
  message.set_index(options_.index);
  message.set_token_offset(generated_);
  for (const Sampled& token : output.prompt_logprobs()) CopyLogprobs(token, *message.add_prompt_logprobs());
  for (const Sampled& token : output.tokens()) {
    message.add_token_ids(token.id());
    if (has_logprobs_) CopyLogprobs(token, *message.add_logprobs());
    ++generated_;
    if (detokenizer_) message.mutable_text()->append(stops_.Feed(detokenizer_->Append(token.id())));
    if (stops_.matched()) break;
  }
  if (output.finished() && !stops_.matched() && detokenizer_) {
    message.mutable_text()->append(stops_.Feed(detokenizer_->Flush()));
    message.mutable_text()->append(stops_.Flush());
  }
  if (!output.finished() && !stops_.matched()) return piece;

  piece.is_last = true;
  Finish& finish = *message.mutable_finish();
  Fill(finish, stops_.matched() ? rankwise::v1::FINISH_REASON_STOP : output.reason(), replays);
  if (stops_.matched()) {
    finish.set_matched_stop(stop_texts_[*stops_.matched()]);
  } else if (output.has_stop_token_id()) {
    finish.set_stop_token_id(output.stop_token_id());
  }
  finish.set_cached_prompt_tokens(output.cached_prompt_tokens());
  finish.set_queue_seconds(output.queue_seconds());
  finish.set_prefill_seconds(output.prefill_seconds());
  finish.set_decode_seconds(output.decode_seconds());
  return piece;
}

SampleStream::Piece SampleStream::End(FinishReason reason, uint32_t replays) {
  Piece piece;
  piece.message.set_index(options_.index);
  piece.message.set_token_offset(generated_);
  if (detokenizer_) {
    piece.message.mutable_text()->append(stops_.Feed(detokenizer_->Flush()));
    piece.message.mutable_text()->append(stops_.Flush());
  }
  Fill(*piece.message.mutable_finish(), reason, replays);
  piece.is_last = true;
  return piece;
}

}  // namespace rankwise::frontend
