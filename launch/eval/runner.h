#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "launch/eval/store.h"
#include "launch/eval/tasks.h"
#include "nlohmann/json.hpp"
#include "proto/inference.grpc.pb.h"

namespace rankwise::eval {

inline constexpr int kTopTokens = 20;  // the most that the API reports of a distribution

// Asks a coordinator. A full queue and a group that is being restarted are waited for. All methods for several threads.
class Asker {
 public:
  // `context_tokens` bounds prompt and continuation together. Borrows `stub`.
  Asker(rankwise::v1::Inference::Stub& stub, int64_t context_tokens) : stub_(stub), context_tokens_(context_tokens) {}

  // Waits for 10 seconds, not more: the first call tells a wrong endpoint.
  absl::StatusOr<rankwise::v1::GetModelInfoResponse> GetModelInfo();
  // With or without what the model puts before every text.
  absl::StatusOr<std::vector<int32_t>> Tokenize(const std::string& text, bool has_special);

  // The answer as an object, by rule:
  //   kChoice   {"shots", "logprobs": [one for each choice]}
  //   kGenerate {"shots", "text", "answer", "finish": "stop" or "length"}
  //   kLastWord {"shots", "logprob", "greedy": whether each token of the word was the likeliest}
  //   kText     {"logprobs": [token 1, 2, …], "top": [[id, logprob, id, logprob, …] of each]}
  // An item gets `shots` exemplars, or as many as fit the context; {"skipped": why} when it does not fit without any.
  absl::StatusOr<nlohmann::json> Answer(const Task& task, const Item& item, int shots);

  // Calls in flight and all later ones end with Cancelled.
  void Cancel();

  // Tokens that a continuation may take: half of a small context is left to the prompt.
  int64_t NewTokens(const TaskSpec& spec) const;

 private:
  struct Prompts {
    int shots;
    std::string prefix;
    std::vector<std::vector<int32_t>> tokens;  // of each text behind the prefix
    int64_t longest = 0;
    bool fits = false;
  };

  template <typename Call>
  absl::Status Retry(absl::Duration patience, const Call& call);
  absl::StatusOr<rankwise::v1::GenerateResponse> Generate(const rankwise::v1::GenerateRequest& request);
  absl::StatusOr<Prompts> Fit(const Task& task, const Item& item, int shots, const std::vector<std::string>& texts,
                              int64_t new_tokens);
  // Scores tokens 1, 2, …, each with its `top` likeliest.
  absl::StatusOr<rankwise::v1::GenerateResponse> Score(const std::vector<int32_t>& tokens, int top);
  absl::StatusOr<nlohmann::json> AnswerTargets(const Task& task, const Item& item, int shots);
  absl::StatusOr<nlohmann::json> AnswerGenerated(const Task& task, const Item& item, int shots);
  absl::StatusOr<nlohmann::json> AnswerText(const Item& item);

  rankwise::v1::Inference::Stub& stub_;
  const int64_t context_tokens_;
  absl::Mutex mutex_;
  bool is_cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<grpc::ClientContext*> live_ ABSL_GUARDED_BY(mutex_);
};

// An item without an answer, and where the answer goes.
struct Job {
  const Task* task;
  const Item* item;
  int shots;
  AnswerStore* store;
};

// Answers jobs from `concurrency` threads. Its end cancels what is left.
class Runner {
 public:
  Runner(Asker& asker, const std::vector<Job>& jobs, int concurrency);
  ~Runner();

  int progress_fd() const { return progress_fd_; }  // readable when done() or status() may have changed
  void Acknowledge();
  size_t done() const { return done_; }
  absl::Status status();  // the first failure; nothing new begins after it

 private:
  void Run();

  Asker& asker_;
  const std::vector<Job>& jobs_;
  const int progress_fd_;
  std::atomic<size_t> next_ = 0, done_ = 0;
  absl::Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace rankwise::eval
