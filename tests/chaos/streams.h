#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/inference.grpc.pb.h"

// Streams of every kind, each held against what it gave when nobody disturbed it.
namespace rankwise::chaos {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;

struct Question {
  std::string name;  // of its kind, and its number
  GenerateRequest request;
};
// Greedy, seeded, n > 1, log-probabilities, stop strings, penalties: `count` different ones, the same for a seed.
std::vector<Question> MakeQuestions(uint64_t seed, int count);

// All that a client can rely on: of each sample the tokens, text, bits of log-probabilities and why it ended, in one
// message. DataLoss when a token came twice or was left out; else the stream's error. Resumes whatever happens.
struct Answer {
  std::vector<std::string> samples;  // serialised
  int resumes = 0;
};
absl::StatusOr<Answer> Ask(rankwise::v1::Inference::Stub& stub, const GenerateRequest& request,
                           absl::Duration patience);
// Where two samples part, in words.
std::string Difference(const std::string& sample, const std::string& oracle);

// `count` clients that ask one question after the other until they are told to stop.
class Clients {
 public:
  struct Tally {
    int64_t finished = 0, different = 0, failed = 0, tokens = 0, resumes = 0, resumed_streams = 0;
    std::vector<std::string> complaints;  // the first ones
  };

  // Borrows the stubs, which the clients share.
  Clients(const std::vector<std::unique_ptr<rankwise::v1::Inference::Stub>>& stubs,
          const std::vector<Question>& questions, const std::vector<Answer>& oracles, int count, uint64_t seed,
          absl::Duration patience);
  ~Clients() { Stop(); }

  // Waits until every stream under way has ended.
  void Stop();
  void AskToStop() { should_stop_ = true; }
  int live() const { return live_; }
  Tally tally() const;

 private:
  void Run(rankwise::v1::Inference::Stub& stub, uint64_t seed);
  void Note(const Question& question, const Answer& oracle, const absl::StatusOr<Answer>& answer);

  const std::vector<Question>& questions_;
  const std::vector<Answer>& oracles_;
  const absl::Duration patience_;
  std::atomic<bool> should_stop_ = false;
  std::atomic<int> live_ = 0;
  mutable absl::Mutex mutex_;
  Tally tally_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace rankwise::chaos
