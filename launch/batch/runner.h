#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "launch/batch/input.h"
#include "launch/batch/question.h"
#include "launch/batch/result_file.h"
#include "launch/batch/walltime.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::batch {

// A stub to ask next; a server that comes back at another address, or with another token, is found by asking again.
using FindServer = std::function<absl::StatusOr<std::shared_ptr<rankwise::v1::Inference::Stub>>()>;

struct RunnerOptions {
  QuestionOptions question;
  Served served;
  int window = 64;                               // lines asked at once
  absl::Duration line_timeout = absl::Hours(1);  // for one attempt
  absl::Duration patience = absl::Minutes(10);   // without any answer from the server, while lines wait for one
};

// Asks the lines of `todo` and appends each result once. A lost connection, a full queue and a group that is being
// restarted are waited for: the same line is asked again, and its answer is the same. A line that the server refuses
// gets an error for its result.
class Runner {
 public:
  // Borrows all but `options`; `todo` holds indices of input.lines().
  Runner(const Input& input, std::vector<size_t> todo, ResultFile& results, Walltime& walltime, FindServer find_server,
         RunnerOptions options);
  // Abandons what still runs.
  ~Runner();

  // Begins no more lines; those that run go on until they have an answer, or need a second attempt.
  void StopAdmitting();
  // Also ends those that run; they have no result.
  void Abandon();

  int progress_fd() const { return progress_fd_; }  // readable when anything below may have changed
  void Acknowledge();
  size_t done() const;
  size_t errors() const;        // of done(): lines whose result is an error
  uint64_t retries() const;     // attempts that had to be repeated
  bool is_idle() const;         // nothing runs, and nothing will begin
  bool is_out_of_time() const;  // the walltime has stopped the admission
  absl::Status status() const;  // the first failure that concerns all lines; nothing begins after it

 private:
  struct Result {
    std::string line;
    bool is_error;
  };

  void Run();
  // nullopt: nothing more is to be begun.
  std::optional<size_t> Claim();
  absl::StatusOr<Result> Resolve(const Input::Line& line);
  // Cancelled: given up.
  absl::StatusOr<Result> Ask(const Question& question, const std::string& id);
  absl::Status AskOnce(const Question& question, Answer& answer);

  const Input& input_;
  const std::vector<size_t> todo_;
  ResultFile& results_;
  const FindServer find_server_;
  const RunnerOptions options_;
  const int progress_fd_;
  mutable absl::Mutex mutex_;
  Walltime& walltime_ ABSL_GUARDED_BY(mutex_);
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0, done_ ABSL_GUARDED_BY(mutex_) = 0, errors_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t retries_ ABSL_GUARDED_BY(mutex_) = 0;
  int running_ ABSL_GUARDED_BY(mutex_) = 0;  // threads that have not ended
  bool is_stopping_ ABSL_GUARDED_BY(mutex_) = false, is_abandoned_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_out_of_time_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time last_word_ ABSL_GUARDED_BY(mutex_);  // of the server
  std::set<grpc::ClientContext*> live_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace rankwise::batch
