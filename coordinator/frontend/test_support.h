#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "proto/inference.grpc.pb.h"
#include "worker/link/coordinator_link.h"

// A worker group without a model, and a client, for tests in one process.
namespace rankwise::frontend {

inline constexpr absl::Duration kPatience = absl::Seconds(20);  // no test waits longer for anything
inline constexpr uint32_t kVocabulary = 300;
inline constexpr uint32_t kContext = 4096;

// "abc…zabc…": what the simulated model says to everything, from a letter that the seed chooses. With a byte-level
// tokenizer the ids are the bytes.
inline int32_t OracleToken(uint64_t seed, size_t position) {
  return 'a' + static_cast<int32_t>((seed + position) % 26);
}
inline std::string OracleText(uint64_t seed, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text.push_back(static_cast<char>(OracleToken(seed, i)));
  return text;
}

inline worker::v1::Join MakeJoin() {
  worker::v1::Join join;
  rankwise::v1::GetModelInfoResponse& model = *join.mutable_model();
  model.set_fingerprint("fingerprint");
  model.set_family("llama");
  model.set_kv_format("f32");
  model.set_vocab_size(kVocabulary);
  model.set_max_tokens(kContext);
  model.set_tp(1);
  join.set_blocks_total(64);
  join.set_block_tokens(16);
  join.set_max_running(64);
  join.set_max_waiting(64);
  return join;
}

// Joins over a real link and generates on a thread of its own, up to `limit` tokens per sequence. Ends with Stop, with
// its stream, or with this object, which drops the stream as a killed process would.
class FakeWorker {
 public:
  explicit FakeWorker(const std::string& endpoint, size_t limit = SIZE_MAX, worker::v1::Join join = MakeJoin())
      : limit_(limit) {
    auto link = link::CoordinatorLink::Connect({.address = endpoint, .connect_timeout = kPatience}, join);
    EXPECT_TRUE(link.ok()) << link.status();
    if (!link.ok()) return;
    link_ = *std::move(link);
    thread_ = std::thread([this] { Run(); });
  }
  ~FakeWorker() {
    {
      absl::MutexLock lock(&mutex_);
      should_die_ = true;
    }
    if (thread_.joinable()) thread_.join();
  }

  void SetLimit(size_t limit) {
    absl::MutexLock lock(&mutex_);
    limit_ = limit;
  }
  // No output and no heartbeat from now on.
  void Hang() {
    absl::MutexLock lock(&mutex_);
    is_hung_ = true;
  }
  bool AwaitSubmits(size_t count, absl::Duration patience = kPatience) {
    return Await([this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return submits_ >= count; }, patience);
  }
  bool AwaitCancels(size_t count) {
    return Await([this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return cancels_ >= count; });
  }
  bool AwaitEnd() {
    return Await([this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return is_over_; });
  }
  bool was_stopped() {
    absl::MutexLock lock(&mutex_);
    return was_stopped_;
  }
  uint64_t epoch() const { return link_->epoch(); }
  uint64_t group() const { return link_->group(); }

 private:
  struct Running {
    worker::v1::Submit submit;
    size_t generated = 0;
  };

  bool Await(std::function<bool()> condition, absl::Duration patience = kPatience) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&condition), patience);
  }

  void Run() {
    bool goes_on = true;
    while (goes_on) {
      auto inbox = link_->Poll(absl::Milliseconds(2));
      absl::MutexLock lock(&mutex_);
      if (inbox.ok()) TakeIn(*inbox);
      if (inbox.ok() && !is_hung_) Step();
      goes_on = inbox.ok() && !should_die_ && !(was_stopped_ && running_.empty());
    }
    bool says_goodbye;
    {
      absl::MutexLock lock(&mutex_);
      says_goodbye = was_stopped_ && !should_die_;
    }
    if (says_goodbye) {
      EXPECT_TRUE(link_->Finish(kPatience).ok());
    }
    link_.reset();
    absl::MutexLock lock(&mutex_);
    is_over_ = true;
  }

  void TakeIn(const link::Inbox& inbox) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const uint64_t sequence : inbox.cancels) {
      if (running_.erase(sequence) == 1) ++cancels_;
    }
    for (const worker::v1::Submit& submit : inbox.submits) {
      running_[submit.sequence()] = {submit, static_cast<size_t>(submit.generated_size())};
      ++submits_;
    }
    was_stopped_ = was_stopped_ || inbox.should_stop;
  }

  void Step() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    worker::v1::Outputs outputs;
    outputs.set_epoch(link_->epoch());
    for (auto& [number, running] : running_) {
      if (running.generated < limit_) AddOutput(number, running, outputs);
    }
    for (const auto& output : outputs.sequences()) {
      if (output.finished()) running_.erase(output.sequence());
    }
    if (outputs.sequences_size() > 0) link_->SendOutputs(std::move(outputs));
    link_->SendLoad({});
  }

  static void AddOutput(uint64_t number, Running& running, worker::v1::Outputs& outputs) {
    worker::v1::SequenceOutput& output = *outputs.add_sequences();
    const rankwise::v1::SamplingParams& sampling = running.submit.sampling();
    output.set_sequence(number);
    output.set_token_offset(static_cast<uint32_t>(running.generated));
    const int32_t token = OracleToken(sampling.seed(), running.generated);
    for (const int32_t stop : sampling.stop_token_ids()) {
      if (stop != token) continue;
      output.set_finished(true);
      output.set_reason(rankwise::v1::FINISH_REASON_STOP);
      output.set_stop_token_id(token);
      return;
    }
    worker::v1::Sampled& sampled = *output.add_tokens();
    sampled.set_id(token);
    if (sampling.has_logprobs()) {
      sampled.set_logprob(-1);
      for (uint32_t i = 0; i < sampling.logprobs(); ++i) sampled.add_top()->set_id(static_cast<int32_t>(i));
    }
    if (++running.generated < sampling.max_tokens()) return;
    output.set_finished(true);
    output.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
  }

  std::unique_ptr<link::CoordinatorLink> link_;
  absl::Mutex mutex_;
  size_t limit_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, Running> running_ ABSL_GUARDED_BY(mutex_);
  size_t submits_ ABSL_GUARDED_BY(mutex_) = 0, cancels_ ABSL_GUARDED_BY(mutex_) = 0;
  bool should_die_ ABSL_GUARDED_BY(mutex_) = false, is_hung_ ABSL_GUARDED_BY(mutex_) = false;
  bool was_stopped_ ABSL_GUARDED_BY(mutex_) = false, is_over_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// One Generate call, read in the test's thread.
class Stream {
 public:
  struct Sample {
    std::string text;
    std::vector<int32_t> ids;
    std::vector<rankwise::v1::PositionLogprobs> logprobs;
    std::optional<rankwise::v1::Finish> finish;
    std::string request_id;
  };

  Stream(rankwise::v1::Inference::Stub& stub, const rankwise::v1::GenerateRequest& request,
         absl::Duration timeout = kPatience) {
    context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    reader_ = stub.Generate(&context_, request);
  }

  // False at the stream's end. Every piece must go on where the one before ended.
  bool Read() {
    rankwise::v1::GenerateResponse piece;
    if (!reader_->Read(&piece)) return false;
    const bool is_first = !samples.contains(piece.index());
    Sample& sample = samples[piece.index()];
    if (is_first) sample.request_id = piece.request_id();
    EXPECT_EQ(is_first, !piece.request_id().empty());
    EXPECT_EQ(piece.token_offset(), sample.ids.size());
    EXPECT_FALSE(sample.finish.has_value());
    sample.text += piece.text();
    sample.ids.insert(sample.ids.end(), piece.token_ids().begin(), piece.token_ids().end());
    sample.logprobs.insert(sample.logprobs.end(), piece.logprobs().begin(), piece.logprobs().end());
    if (piece.has_finish()) sample.finish = piece.finish();
    return true;
  }
  // False when the stream ends before sample 0 has `count` tokens.
  bool ReadTokens(size_t count) {
    while (!samples.contains(0) || samples.at(0).ids.size() < count) {
      if (!Read()) return false;
    }
    return true;
  }
  grpc::Status Finish() {
    while (Read()) continue;
    return reader_->Finish();
  }
  void Cancel() { context_.TryCancel(); }

  std::map<uint32_t, Sample> samples;

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<rankwise::v1::GenerateResponse>> reader_;
};

}  // namespace rankwise::frontend
