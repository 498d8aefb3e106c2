#include "launch/batch/runner.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "launch/client.h"

namespace rankwise::batch {
namespace {

constexpr int kServerFailures = 5;  // of one line, until its failure is its result
constexpr absl::Duration kFirstPause = absl::Milliseconds(50), kLongestPause = absl::Seconds(2);

// The server, or the way to it, cannot answer now.
bool MayPass(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsResourceExhausted(status) || absl::IsCancelled(status) ||
         absl::IsAborted(status);
}

// Every line would get the same.
bool ConcernsAll(const absl::Status& status) {
  return absl::IsUnauthenticated(status) || absl::IsPermissionDenied(status);
}

bool IsRefusal(const absl::Status& status) {
  return absl::IsInvalidArgument(status) || absl::IsOutOfRange(status) || absl::IsFailedPrecondition(status) ||
         absl::IsUnimplemented(status) || absl::IsNotFound(status);
}

}  // namespace

Runner::Runner(const Input& input, std::vector<size_t> todo, ResultFile& results, Walltime& walltime,
               FindServer find_server, RunnerOptions options)
    : input_(input),
      todo_(std::move(todo)),
      results_(results),
      find_server_(std::move(find_server)),
      options_(std::move(options)),
      progress_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      walltime_(walltime),
      last_word_(absl::Now()) {
  const int count = static_cast<int>(std::min<size_t>(options_.window, todo_.size()));
  {
    absl::MutexLock lock(&mutex_);
    running_ = count;
  }
  for (int i = 0; i < count; ++i) threads_.emplace_back([this] { Run(); });
}

Runner::~Runner() {
  Abandon();
  for (std::thread& thread : threads_) thread.join();
  close(progress_fd_);
}

void Runner::StopAdmitting() {
  absl::MutexLock lock(&mutex_);
  is_stopping_ = true;
}

void Runner::Abandon() {
  absl::MutexLock lock(&mutex_);
  is_stopping_ = is_abandoned_ = true;
  for (grpc::ClientContext* context : live_) context->TryCancel();
}

void Runner::Acknowledge() {
  eventfd_t count;
  eventfd_read(progress_fd_, &count);
}

size_t Runner::done() const {
  absl::MutexLock lock(&mutex_);
  return done_;
}

size_t Runner::errors() const {
  absl::MutexLock lock(&mutex_);
  return errors_;
}

uint64_t Runner::retries() const {
  absl::MutexLock lock(&mutex_);
  return retries_;
}

bool Runner::is_idle() const {
  absl::MutexLock lock(&mutex_);
  return running_ == 0;
}

bool Runner::is_out_of_time() const {
  absl::MutexLock lock(&mutex_);
  return is_out_of_time_;
}

absl::Status Runner::status() const {
  absl::MutexLock lock(&mutex_);
  return status_;
}

std::optional<size_t> Runner::Claim() {
  absl::MutexLock lock(&mutex_);
  if (next_ == todo_.size() || is_stopping_ || !status_.ok()) return std::nullopt;
  if (!walltime_.HasTimeFor(absl::Now())) {
    is_stopping_ = is_out_of_time_ = true;
    return std::nullopt;
  }
  return todo_[next_++];
}

void Runner::Run() {
  while (const std::optional<size_t> index = Claim()) {
    const Input::Line& line = input_.lines()[*index];
    const absl::Time begin = absl::Now();
    const absl::StatusOr<Result> result = Resolve(line);
    absl::Status status = result.status();
    if (result.ok()) status = results_.Append(result->line);
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      ++done_;
      errors_ += result->is_error;
      if (!result->is_error) walltime_.Observe(absl::Now() - begin);
    } else if (!absl::IsCancelled(status)) {
      status_.Update(status);
    }
    eventfd_write(progress_fd_, 1);
  }
  absl::MutexLock lock(&mutex_);
  --running_;
  eventfd_write(progress_fd_, 1);
}

absl::StatusOr<Runner::Result> Runner::Resolve(const Input::Line& line) {
  const std::string_view text = input_.text(line);
  const std::string id = ResultId(text);
  const absl::StatusOr<Question> question = ReadQuestion(text, options_.question);
  if (!question.ok()) return Result{UnreadableLine(line.custom_id, id, line.number, question.status()), true};
  return Ask(*question, id);
}

absl::StatusOr<Runner::Result> Runner::Ask(const Question& question, const std::string& id) {
  int failures = 0;
  std::optional<absl::Time> waiting_since;
  for (absl::Duration pause = kFirstPause;; pause = std::min(2 * pause, kLongestPause)) {
    Answer answer;
    absl::Status status = AskOnce(question, answer);
    if (status.ok()) status = answer.Check(question.request);
    std::string line = status.ok() ? answer.ToLine(question, id, options_.served) : "";
    absl::MutexLock lock(&mutex_);
    if (!MayPass(status)) last_word_ = absl::Now();
    if (status.ok()) return Result{std::move(line), false};
    if (IsRefusal(status)) return Result{RefusedLine(question.custom_id, id, status), true};
    if (ConcernsAll(status)) return status;
    if (!MayPass(status) && ++failures == kServerFailures) {
      return Result{RefusedLine(question.custom_id, id, status), true};
    }
    if (is_stopping_ || !status_.ok()) return absl::CancelledError("the batch is ending");
    if (!waiting_since) waiting_since = absl::Now();
    if (absl::Now() - std::max(last_word_, *waiting_since) > options_.patience)
      return absl::UnavailableError(
          absl::StrCat("no answer for ", absl::FormatDuration(options_.patience), ", last: ", status.message()));
    ++retries_;
    mutex_.AwaitWithTimeout(absl::Condition(&is_stopping_), pause);
    if (is_stopping_) return absl::CancelledError("the batch is ending");
  }
}

absl::Status Runner::AskOnce(const Question& question, Answer& answer) {
  RW_ASSIGN_OR_RETURN(const std::shared_ptr<rankwise::v1::Inference::Stub> stub, find_server_());
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.line_timeout));
  {
    absl::MutexLock lock(&mutex_);
    if (is_abandoned_) return absl::CancelledError("the batch is ending");
    live_.insert(&context);
  }
  const auto reader = stub->Generate(&context, question.request);
  for (rankwise::v1::GenerateResponse piece; reader->Read(&piece);) answer.Add(piece);
  const absl::Status status = launch::FromGrpc(reader->Finish());
  absl::MutexLock lock(&mutex_);
  live_.erase(&context);
  return status;
}

}  // namespace rankwise::batch
