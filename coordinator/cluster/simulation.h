#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/cluster/cluster.h"

// Worker groups and clients without processes, sockets or threads, for the tests of this folder.
namespace rankwise::cluster {

inline constexpr uint32_t kVocabulary = 1000;
inline const absl::Time kStart = absl::FromUnixSeconds(1'000'000);

// The simulated model: any stream can be checked without trust. -1 ends it.
inline int32_t OracleToken(uint64_t seed, size_t position) {
  uint64_t x = (seed + 1) * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03;
  x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9;
  x ^= x >> 32;
  return x % 16 == 0 ? -1 : static_cast<int32_t>(x % kVocabulary);
}

inline std::vector<int32_t> OracleStream(uint64_t seed, uint32_t max_tokens) {
  std::vector<int32_t> stream;
  while (stream.size() < max_tokens && OracleToken(seed, stream.size()) >= 0) {
    stream.push_back(OracleToken(seed, stream.size()));
  }
  return stream;
}

inline worker::v1::Join MakeJoin(uint32_t max_running = 4, uint32_t max_waiting = 8) {
  worker::v1::Join join;
  join.mutable_model()->set_fingerprint("f");
  join.mutable_model()->set_kv_format("int8");
  join.mutable_model()->set_kv_scales_id("s");
  join.mutable_model()->set_activations("float");
  join.mutable_model()->set_backend("cpu avx512, 2 threads");
  join.mutable_model()->set_tp(2);
  join.mutable_model()->set_vocab_size(kVocabulary);
  join.mutable_model()->set_max_tokens(4096);
  join.set_max_running(max_running);
  join.set_max_waiting(max_waiting);
  return join;
}

// A worker group: takes messages when it steps, gives every sequence it runs one token a step.
class SimulatedGroup : public GroupChannel {
 public:
  SimulatedGroup(Cluster& cluster, absl::Time now, const worker::v1::Join& join = MakeJoin()) : cluster_(cluster) {
    const auto welcome = cluster.Join(join, this, now);
    EXPECT_TRUE(welcome.ok()) << welcome.status();
    epoch_ = welcome->epoch();
    EXPECT_TRUE(!incoming_.empty() && incoming_.front().has_welcome());
    incoming_.pop_front();
  }

  void Send(worker::v1::ToGroup message) override {
    EXPECT_FALSE(closed_.has_value());
    incoming_.push_back(std::move(message));
  }
  void Close(const absl::Status& reason) override { closed_ = reason; }

  void TakeMessages() {
    for (const worker::v1::ToGroup& message : incoming_) {
      if (message.has_submit()) Take(message.submit());
      for (const uint64_t sequence : message.cancel().sequences()) running_.erase(sequence);
    }
    incoming_.clear();
  }

  // One step; the outputs are on their way and arrive with Deliver.
  void Step() {
    TakeMessages();
    worker::v1::Outputs outputs;
    outputs.set_epoch(epoch_);
    for (auto& [number, running] : running_) AddOutput(number, running, outputs);
    for (const worker::v1::SequenceOutput& output : outputs.sequences()) {
      if (output.finished()) running_.erase(output.sequence());
    }
    in_flight_.push_back(std::move(outputs));
  }

  bool Deliver(absl::Time now) {
    if (in_flight_.empty()) return false;
    cluster_.TakeOutputs(epoch_, in_flight_.front(), now);
    in_flight_.pop_front();
    return true;
  }
  void StepAndDeliver(absl::Time now) {
    Step();
    while (Deliver(now)) continue;
  }
  void Send(const worker::v1::SequenceOutput& output, absl::Time now = kStart) {
    worker::v1::Outputs outputs;
    outputs.set_epoch(epoch_);
    *outputs.add_sequences() = output;
    cluster_.TakeOutputs(epoch_, outputs, now);
  }

  uint64_t epoch() const { return epoch_; }
  const std::deque<worker::v1::ToGroup>& incoming() const { return incoming_; }
  const std::optional<absl::Status>& closed() const { return closed_; }
  std::vector<uint64_t> Submitted() const {
    std::vector<uint64_t> numbers;
    for (const worker::v1::ToGroup& message : incoming_) {
      if (message.has_submit()) numbers.push_back(message.submit().sequence());
    }
    return numbers;
  }
  size_t running() const { return running_.size(); }

 private:
  struct Running {
    worker::v1::Submit submit;
    size_t generated = 0;
  };

  void Take(const worker::v1::Submit& submit) {
    // A replay must go on where the delivered stream ends.
    const std::vector<int32_t> oracle = OracleStream(submit.sampling().seed(), submit.sampling().max_tokens());
    ASSERT_LE(submit.generated_size(), static_cast<int>(oracle.size()));
    EXPECT_TRUE(std::equal(submit.generated().begin(), submit.generated().end(), oracle.begin()));
    EXPECT_TRUE(
        running_.emplace(submit.sequence(), Running{submit, static_cast<size_t>(submit.generated_size())}).second);
  }

  static void AddOutput(uint64_t number, Running& running, worker::v1::Outputs& outputs) {
    worker::v1::SequenceOutput& output = *outputs.add_sequences();
    const rankwise::v1::SamplingParams& sampling = running.submit.sampling();
    output.set_sequence(number);
    output.set_token_offset(static_cast<uint32_t>(running.generated));
    const int32_t token = OracleToken(sampling.seed(), running.generated);
    if (sampling.has_prompt_logprobs() && running.generated == static_cast<size_t>(running.submit.generated_size())) {
      for (int i = 1; i < running.submit.prompt_size(); ++i)
        output.add_prompt_logprobs()->set_id(running.submit.prompt(i));
    }
    if (token >= 0) {
      output.add_tokens()->set_id(token);
      ++running.generated;
    }
    if (token >= 0 && running.generated < sampling.max_tokens()) return;
    output.set_finished(true);
    output.set_reason(token < 0 ? rankwise::v1::FINISH_REASON_STOP : rankwise::v1::FINISH_REASON_LENGTH);
  }

  Cluster& cluster_;
  uint64_t epoch_ = 0;
  std::deque<worker::v1::ToGroup> incoming_;
  std::deque<worker::v1::Outputs> in_flight_;
  std::map<uint64_t, Running> running_;
  std::optional<absl::Status> closed_;
};

// A client's side: holds every stream against its oracle while it grows.
class Client : public SampleListener {
 public:
  struct Sample {
    std::vector<int32_t> tokens;
    int prompt_logprobs = 0;
    bool is_finished = false;
    std::optional<Ending> ending;
    uint32_t replays = 0;
  };

  // `delivered`: tokens that it has of each sample already.
  Client(Cluster& cluster, Request request, absl::Time now, std::vector<size_t> delivered = {})
      : samples(request.samples) {
    for (size_t i = 0; i < delivered.size(); ++i) {
      for (size_t token = 0; token < delivered[i]; ++token) {
        samples[i].tokens.push_back(OracleToken(request.sequence.sampling().seed() + i, token));
      }
    }
    request.listener = this;
    seed_ = request.sequence.sampling().seed();
    max_tokens_ = request.sequence.sampling().max_tokens();
    submitted = cluster.Submit(std::move(request), now);
  }

  bool OnOutput(uint32_t index, const worker::v1::SequenceOutput& output, uint32_t replays) override {
    Sample& sample = samples.at(index);
    EXPECT_TRUE(IsOpen(sample));
    EXPECT_EQ(output.token_offset(), sample.tokens.size());
    for (const auto& token : output.tokens()) {
      EXPECT_EQ(token.id(), OracleToken(seed_ + index, sample.tokens.size()));
      sample.tokens.push_back(token.id());
    }
    sample.prompt_logprobs += output.prompt_logprobs_size();
    sample.replays = replays;
    const bool has_enough = sample.tokens.size() >= enough;
    sample.is_finished = output.finished() || has_enough;
    if (output.finished()) {
      EXPECT_EQ(sample.tokens, OracleStream(seed_ + index, max_tokens_));
    }
    return !has_enough;
  }
  void OnEnd(uint32_t index, Ending ending, uint32_t replays) override {
    EXPECT_TRUE(IsOpen(samples.at(index)));
    samples[index].ending = ending;
    samples[index].replays = replays;
  }
  void OnFailed(const absl::Status& status) override {
    EXPECT_FALSE(status.ok());
    EXPECT_TRUE(failed.ok()) << "twice";
    failed = status;
  }

  bool IsOpen(const Sample& sample) const { return failed.ok() && !sample.is_finished && !sample.ending; }
  bool is_over() const {
    return !submitted.ok() || std::ranges::none_of(samples, [this](const Sample& s) { return IsOpen(s); });
  }
  bool is_whole() const {
    return submitted.ok() && std::ranges::all_of(samples, [](const Sample& s) { return s.is_finished; });
  }

  absl::StatusOr<RequestKey> submitted = absl::UnknownError("");
  std::vector<Sample> samples;
  absl::Status failed;
  size_t enough = SIZE_MAX;

 private:
  uint64_t seed_ = 0;
  uint32_t max_tokens_ = 0;
};

// A seed whose stream does not end by itself before `tokens`.
inline uint64_t LongSeed(uint32_t tokens, uint64_t seed = 0) {
  while (OracleStream(seed, tokens).size() < tokens) ++seed;
  return seed;
}

inline Request MakeRequest(const std::string& id, uint32_t max_tokens = 8, uint64_t seed = 0) {
  Request request{.id = id};
  for (const int32_t token : {1, 2, 3, 4}) request.sequence.add_prompt(token);
  request.sequence.mutable_sampling()->set_max_tokens(max_tokens);
  request.sequence.mutable_sampling()->set_seed(seed);
  return request;
}

}  // namespace rankwise::cluster
