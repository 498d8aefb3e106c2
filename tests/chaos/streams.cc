#include "tests/chaos/streams.h"

#include <algorithm>
#include <array>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "launch/resuming_stream.h"

namespace rankwise::chaos {
namespace {

constexpr size_t kComplaints = 10;

const std::array kPrompts = {
    "Once upon a time", "The old king had", "\"Who are you?\" said the fox. ",
    "In the middle of the forest there stood a house, and in the house there lived a woman who had three sons."};
// From those that end most samples soon to those that end few.
const std::array kStops = {"\n", " king", "said the", "daughter", " golden", "queen"};

}  // namespace

std::vector<Question> MakeQuestions(uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  const auto draw = [&random](uint32_t least, uint32_t most) {
    return std::uniform_int_distribution<uint32_t>(least, most)(random);
  };
  static constexpr std::array kKinds = {"greedy", "seeded", "n", "logprobs", "stop", "penalties"};
  std::vector<Question> questions;
  for (int i = 0; i < count; ++i) {
    const std::string kind = kKinds[static_cast<size_t>(i) % kKinds.size()];
    Question& question = questions.emplace_back();
    question.name = absl::StrCat(kind, " ", i);
    GenerateRequest& request = question.request;
    request.set_text(kPrompts[draw(0, kPrompts.size() - 1)]);
    auto& sampling = *request.mutable_sampling();
    sampling.set_max_tokens(draw(60, 400));
    sampling.set_ignore_eos(draw(0, 1) == 0);
    sampling.set_seed(random());
    request.set_tenant(absl::StrCat("tenant-", i % 4));
    if (kind == "greedy") sampling.set_temperature(0);
    if (kind == "n") request.set_n(draw(2, 4));
    if (kind == "n") sampling.set_max_tokens(draw(40, 150));
    if (kind == "logprobs") {
      sampling.set_logprobs(draw(0, 3));
      if (draw(0, 1) == 0) sampling.set_prompt_logprobs(2);
      if (draw(0, 2) == 0) request.set_n(2);
    }
    if (kind == "stop") {
      for (int stops = 2; stops > 0; --stops) request.add_stop(kStops[draw(0, kStops.size() - 1)]);
      request.set_include_stop(draw(0, 1) == 0);
    }
    if (kind == "penalties") {
      sampling.set_repetition_penalty(1.2F);
      sampling.set_top_k(40);
      sampling.set_frequency_penalty(0.3F);
    }
  }
  return questions;
}

absl::StatusOr<Answer> Ask(rankwise::v1::Inference::Stub& stub, const GenerateRequest& request,
                           absl::Duration patience) {
  launch::ResumingStream stream(stub, request, {.deadline = absl::Now() + patience, .waits_for_room = true});
  std::vector<GenerateResponse> samples(std::max(request.n(), 1U));
  for (GenerateResponse piece; stream.Read(&piece);) {
    if (piece.index() >= samples.size()) return absl::DataLossError(absl::StrCat("a sample ", piece.index()));
    GenerateResponse& sample = samples[piece.index()];
    if (sample.has_finish()) return absl::DataLossError("a piece after the end");
    if (piece.token_ids_size() > 0 && piece.token_offset() != static_cast<uint32_t>(sample.token_ids_size())) {
      return absl::DataLossError(absl::StrCat("token ", piece.token_offset(), " came after ", sample.token_ids_size()));
    }
    sample.mutable_token_ids()->MergeFrom(piece.token_ids());
    sample.mutable_logprobs()->MergeFrom(piece.logprobs());
    sample.mutable_prompt_logprobs()->MergeFrom(piece.prompt_logprobs());
    sample.mutable_text()->append(piece.text());
    if (!piece.has_finish()) continue;
    // The other fields tell of time and luck.
    auto& finish = *sample.mutable_finish();
    finish.set_reason(piece.finish().reason());
    finish.set_matched_stop(piece.finish().matched_stop());
    if (piece.finish().has_stop_token_id()) finish.set_stop_token_id(piece.finish().stop_token_id());
    finish.set_prompt_tokens(piece.finish().prompt_tokens());
    finish.set_generated_tokens(piece.finish().generated_tokens());
    finish.set_seed(piece.finish().seed());
  }
  if (absl::Status status = stream.Finish(); !status.ok()) return status;
  Answer answer{.resumes = stream.resumes()};
  for (const GenerateResponse& sample : samples) answer.samples.push_back(sample.SerializeAsString());
  return answer;
}

std::string Difference(const std::string& sample, const std::string& oracle) {
  GenerateResponse is, should;
  is.ParseFromString(sample);
  should.ParseFromString(oracle);
  const auto at = std::ranges::mismatch(is.token_ids(), should.token_ids()).in1 - is.token_ids().begin();
  std::string text = absl::StrCat(is.token_ids_size(), " of ", should.token_ids_size(), " tokens, equal up to ", at);
  if (is.text() != should.text()) absl::StrAppend(&text, "; text \"", is.text(), "\" for \"", should.text(), "\"");
  if (is.logprobs_size() != should.logprobs_size() || is.prompt_logprobs_size() != should.prompt_logprobs_size()) {
    absl::StrAppend(&text, "; ", is.logprobs_size(), "+", is.prompt_logprobs_size(), " log-probabilities for ",
                    should.logprobs_size(), "+", should.prompt_logprobs_size());
  }
  if (is.finish().SerializeAsString() != should.finish().SerializeAsString()) {
    absl::StrAppend(&text, "; end {", is.finish().ShortDebugString(), "} for {", should.finish().ShortDebugString(),
                    "}");
  }
  return text;
}

Clients::Clients(const std::vector<std::unique_ptr<rankwise::v1::Inference::Stub>>& stubs,
                 const std::vector<Question>& questions, const std::vector<Answer>& oracles, int count, uint64_t seed,
                 absl::Duration patience)
    : questions_(questions), oracles_(oracles), patience_(patience) {
  for (int i = 0; i < count; ++i) {
    rankwise::v1::Inference::Stub& stub = *stubs[static_cast<size_t>(i) % stubs.size()];
    threads_.emplace_back([this, &stub, seed = seed * 1000 + static_cast<uint64_t>(i)] { Run(stub, seed); });
  }
}

void Clients::Run(rankwise::v1::Inference::Stub& stub, uint64_t seed) {
  std::mt19937_64 random(seed);
  ++live_;
  while (!should_stop_) {
    const size_t index = random() % questions_.size();
    Note(questions_[index], oracles_[index], Ask(stub, questions_[index].request, patience_));
  }
  --live_;
}

void Clients::Note(const Question& question, const Answer& oracle, const absl::StatusOr<Answer>& answer) {
  absl::MutexLock lock(&mutex_);
  const auto complain = [&](const std::string& what) {
    if (tally_.complaints.size() < kComplaints) tally_.complaints.push_back(absl::StrCat(question.name, ": ", what));
  };
  if (!answer.ok()) {
    ++(absl::IsDataLoss(answer.status()) ? tally_.different : tally_.failed);
    return complain(answer.status().ToString());
  }
  ++tally_.finished;
  tally_.resumes += answer->resumes;
  tally_.resumed_streams += answer->resumes > 0;
  bool is_different = false;
  for (size_t i = 0; i < oracle.samples.size(); ++i) {
    GenerateResponse sample;
    sample.ParseFromString(answer->samples[i]);
    tally_.tokens += sample.token_ids_size();
    if (answer->samples[i] == oracle.samples[i]) continue;
    is_different = true;
    complain(Difference(answer->samples[i], oracle.samples[i]));
  }
  tally_.different += is_different;
}

void Clients::Stop() {
  should_stop_ = true;
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

Clients::Tally Clients::tally() const {
  absl::MutexLock lock(&mutex_);
  return tally_;
}

}  // namespace rankwise::chaos
