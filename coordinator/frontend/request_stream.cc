#include "coordinator/frontend/request_stream.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::frontend {

using cluster::Delivered;
using cluster::Ending;
using rankwise::v1::GenerateRequest;
using rankwise::v1::Resume;
using worker::v1::SequenceOutput;

absl::StatusOr<std::shared_ptr<RequestStream>> RequestStream::Create(Options options) {
  std::shared_ptr<RequestStream> stream(new RequestStream(std::move(options)));
  const uint32_t count = std::max(stream->options_.request.n(), 1u);
  absl::MutexLock lock(&stream->mutex_);
  for (uint32_t index = 0; index < count; ++index) {
    RW_ASSIGN_OR_RETURN(SampleStream sample, stream->MakeStream(index, 0));
    stream->samples_.emplace_back(std::move(sample));
  }
  stream->unfinished_ = count;
  return stream;
}

RequestStream::RequestStream(Options options) : options_(std::move(options)), unread_since_(options_.started) {}

absl::StatusOr<SampleStream> RequestStream::MakeStream(uint32_t index, uint32_t skipped_tokens) const {
  return SampleStream::Create(options_.request, {.index = index,
                                                 .request_id = request_id(),
                                                 .prompt_tokens = options_.prompt_tokens,
                                                 .seed = options_.request.sampling().seed() + index,
                                                 .tokenizer = options_.tokenizer,
                                                 .started = options_.started,
                                                 .skipped_tokens = skipped_tokens});
}

bool RequestStream::IsOf(const GenerateRequest& request) const {
  const auto essence = [](GenerateRequest of) {
    of.clear_resume();
    of.clear_linger_ms();
    of.clear_timeout_ms();
    of.clear_priority();
    if (of.n() == 0) of.set_n(1);
    return of;
  };
  GenerateRequest ours = essence(options_.request), theirs = essence(request);
  if (!theirs.sampling().has_seed()) theirs.mutable_sampling()->set_seed(ours.sampling().seed());
  // Protobuf promises no order of a map's bytes, but within one process and one insertion order has one.
  std::vector<std::pair<int32_t, float>> biases[2];
  for (auto [of, to] : {std::pair(&ours, &biases[0]), std::pair(&theirs, &biases[1])}) {
    to->assign(of->sampling().logit_bias().begin(), of->sampling().logit_bias().end());
    std::ranges::sort(*to);
    of->mutable_sampling()->clear_logit_bias();
  }
  return biases[0] == biases[1] && ours.SerializeAsString() == theirs.SerializeAsString();
}

// Samples are made anew from what was kept; a request that does not linger has a reader only before its first output.
void RequestStream::Attach(StreamReader* reader, const Resume& resume) {
  absl::MutexLock lock(&mutex_);
  if (reader_ != nullptr) reader_->EndStream(absl::AbortedError("another call resumed this request"));
  reader_ = reader;
  is_writing_ = false;
  ready_.clear();
  for (uint32_t index = 0; index < samples_.size(); ++index) {
    Sample& sample = samples_[index];
    const bool has_offset = index < static_cast<uint32_t>(resume.token_offsets_size());
    auto stream = MakeStream(index, has_offset ? resume.token_offsets(static_cast<int>(index)) : 0);
    RW_CHECK(stream.ok(), stream.status().ToString());  // as Create has shown
    TakeKept(sample, *stream);
    sample.stream = *std::move(stream);
    sample.is_ready = sample.stream.has_piece();
    if (sample.is_ready) ready_.push_back(index);
  }
  WriteNext();
}

// True when the sample ends with it.
bool RequestStream::TakeKept(Sample& sample, SampleStream& stream) const {
  const SequenceOutput& kept = sample.kept;
  const bool is_ended =
      kept.reason() == rankwise::v1::FINISH_REASON_CANCELLED || kept.reason() == rankwise::v1::FINISH_REASON_DEADLINE;
  if (!is_ended) return stream.Take(kept, sample.replays, absl::Now());
  SequenceOutput before = kept;
  before.clear_finished();
  stream.Take(before, sample.replays, absl::Now());
  stream.End(kept.reason(), sample.replays, absl::Now());
  return true;
}

void RequestStream::Detach(StreamReader* reader, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (reader_ != reader) return;
  reader_ = nullptr;
  unread_since_ = now;
}

void RequestStream::OnWritten(StreamReader* reader) {
  absl::MutexLock lock(&mutex_);
  if (reader_ != reader) return;
  is_writing_ = false;
  WriteNext();
}

std::vector<Delivered> RequestStream::Restore(const std::vector<SequenceOutput>& samples) {
  absl::MutexLock lock(&mutex_);
  std::vector<Delivered> delivered(samples_.size());
  for (size_t index = 0; index < std::min(samples.size(), samples_.size()); ++index) {
    Sample& sample = samples_[index];
    sample.kept = samples[index];
    bytes_ += sample.kept.ByteSizeLong();
    sample.is_over = TakeKept(sample, sample.stream);
    sample.stream.DropPieces();
    if (sample.is_over) --unfinished_;
    for (const auto& token : sample.kept.tokens()) delivered[index].tokens.push_back(token.id());
    delivered[index].has_prompt_logprobs = sample.kept.prompt_logprobs_size() > 0;
    delivered[index].is_over = sample.is_over;
  }
  unread_since_ = absl::Now();
  return delivered;
}

RequestStream::State RequestStream::state() const {
  absl::MutexLock lock(&mutex_);
  return {.is_over = unfinished_ == 0,
          .has_failed = !ending_.ok(),
          .is_read = reader_ != nullptr,
          .unread_since = unread_since_,
          .bytes = bytes_};
}

bool RequestStream::OnOutput(uint32_t index, const SequenceOutput& output, uint32_t replays) {
  absl::MutexLock lock(&mutex_);
  Sample& sample = samples_[index];
  sample.replays = replays;
  sample.is_over = sample.stream.Take(output, replays, absl::Now());
  if (sample.is_over) --unfinished_;
  if (lingers()) Keep(index, output);
  Ready(index);
  return !sample.is_over;
}

void RequestStream::OnEnd(uint32_t index, Ending ending, uint32_t replays) {
  absl::MutexLock lock(&mutex_);
  Sample& sample = samples_[index];
  const auto reason =
      ending == Ending::kDeadline ? rankwise::v1::FINISH_REASON_DEADLINE : rankwise::v1::FINISH_REASON_CANCELLED;
  sample.replays = replays;
  sample.stream.End(reason, replays, absl::Now());
  sample.is_over = true;
  --unfinished_;
  if (lingers()) {
    SequenceOutput last;
    last.set_finished(true);
    last.set_reason(reason);
    Keep(index, last);
  }
  Ready(index);
}

void RequestStream::OnFailed(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  unfinished_ = 0;
  ending_ = status;
  WriteNext();
}

void RequestStream::Keep(uint32_t index, const SequenceOutput& output) {
  journal::Merge(output, samples_[index].kept);
  bytes_ += output.ByteSizeLong();
  if (options_.journal != nullptr) options_.journal->Append(request_id(), index, output);
}

void RequestStream::Ready(uint32_t index) {
  Sample& sample = samples_[index];
  if (reader_ == nullptr && lingers()) return sample.stream.DropPieces();
  if (sample.stream.has_piece() && !sample.is_ready) {
    sample.is_ready = true;
    ready_.push_back(index);
  }
  WriteNext();
}

void RequestStream::WriteNext() {
  if (reader_ == nullptr || is_writing_) return;
  if (ready_.empty()) {
    if (unfinished_ > 0) return;
    std::exchange(reader_, nullptr)->EndStream(ending_);
    unread_since_ = absl::Now();
    return;
  }
  const uint32_t index = ready_.front();
  Sample& sample = samples_[index];
  ready_.pop_front();
  rankwise::v1::GenerateResponse piece = sample.stream.TakePiece();
  sample.is_ready = sample.stream.has_piece();
  if (sample.is_ready) ready_.push_back(index);
  is_writing_ = true;
  reader_->StartWriting(std::move(piece));
}

}  // namespace rankwise::frontend
