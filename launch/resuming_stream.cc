#include "launch/resuming_stream.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "launch/client.h"
#include "proto/rpc_status.pb.h"

namespace rankwise::launch {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;

namespace {

uint64_t RandomBits() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

absl::Duration RetryDelayOf(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return absl::ZeroDuration();
  for (const auto& detail : details.details()) {
    google::rpc::RetryInfo info;
    if (detail.UnpackTo(&info)) {
      return absl::Seconds(info.retry_delay().seconds()) + absl::Nanoseconds(info.retry_delay().nanos());
    }
  }
  return absl::ZeroDuration();
}

ResumingStream::ResumingStream(rankwise::v1::Inference::Stub& stub, GenerateRequest request, ResumeOptions options)
    : stub_(stub),
      request_(std::move(request)),
      options_(std::move(options)),
      has_finished_(std::max(request_.n(), 1u)),
      pause_(options_.first_pause) {
  if (request_.request_id().empty()) request_.set_request_id(absl::StrFormat("%016x%016x", RandomBits(), RandomBits()));
  if (!request_.sampling().has_seed()) request_.mutable_sampling()->set_seed(RandomBits());
  if (request_.linger_ms() == 0)
    request_.set_linger_ms(static_cast<uint64_t>(absl::ToInt64Milliseconds(options_.linger)));
  Dial();
}

void ResumingStream::Dial() {
  const std::lock_guard lock(mutex_);
  context_ = std::make_unique<grpc::ClientContext>();
  if (options_.deadline != absl::InfiniteFuture()) context_->set_deadline(absl::ToChronoTime(options_.deadline));
  if (is_cancelled_) context_->TryCancel();
  reader_ = stub_.Generate(context_.get(), request_);
}

bool ResumingStream::Read(GenerateResponse* piece) {
  while (!has_ended_) {
    if (reader_->Read(piece)) {
      // The coordinator cannot know that the end of a sample has come through, and tells it again.
      if (piece->index() < has_finished_.size() && has_finished_[piece->index()]) continue;
      Note(*piece);
      return true;
    }
    const grpc::Status status = reader_->Finish();
    if (!Retry(status)) {
      has_ended_ = true;
      ended_ = IsOver() ? absl::OkStatus() : FromGrpc(status);
      if (ended_.ok() && !IsOver()) ended_ = absl::DataLossError("the stream ended before its samples did");
      return false;
    }
    Dial();
  }
  return false;
}

absl::Status ResumingStream::Finish() {
  for (GenerateResponse piece; Read(&piece);) continue;
  return ended_;
}

void ResumingStream::Note(const GenerateResponse& piece) {
  pause_ = options_.first_pause;
  const auto index = static_cast<int>(piece.index());
  auto& offsets = *request_.mutable_resume()->mutable_token_offsets();
  while (offsets.size() <= index) offsets.Add(0);
  offsets[index] = piece.token_offset() + static_cast<uint32_t>(piece.token_ids_size());
  if (piece.has_finish() && piece.index() < has_finished_.size()) has_finished_[piece.index()] = true;
}

bool ResumingStream::IsOver() const {
  return std::ranges::all_of(has_finished_, [](bool has_finished) { return has_finished; });
}

bool ResumingStream::Retry(const grpc::Status& status) {
  const bool is_full = status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
  const bool is_lost = status.error_code() == grpc::StatusCode::UNAVAILABLE;
  if (IsOver() || !(is_lost || (is_full && options_.waits_for_room))) return false;
  absl::Duration pause = RetryDelayOf(status);
  if (pause == absl::ZeroDuration()) pause = std::exchange(pause_, std::min(pause_ * 2, kLongestPause));
  if (absl::Now() + pause >= options_.deadline || !options_.may_retry(FromGrpc(status))) return false;
  // Short sleeps: somebody may cancel.
  for (const absl::Time end = absl::Now() + pause; absl::Now() < end;) {
    absl::SleepFor(std::min(absl::Milliseconds(20), end - absl::Now()));
    const std::lock_guard lock(mutex_);
    if (is_cancelled_) return false;
  }
  request_.mutable_resume();
  ++resumes_;
  return true;
}

void ResumingStream::Cancel() {
  {
    const std::lock_guard lock(mutex_);
    is_cancelled_ = true;
    context_->TryCancel();
  }
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
  rankwise::v1::AbortRequest request;
  request.set_request_id(request_id());
  rankwise::v1::AbortResponse response;
  stub_.Abort(&context, request, &response);  // a coordinator that is gone has nothing to abort
}

}  // namespace rankwise::launch
