#include "launch/eval/runner.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/eval/scoring.h"

namespace rankwise::eval {
namespace {

using launch::FromGrpc;
using nlohmann::json;
using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;

constexpr absl::Duration kCallTimeout = absl::Hours(1);
constexpr absl::Duration kPatience = absl::Minutes(10);  // for a queue to empty, for a group to come back

int64_t CommonPrefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

json Skipped(const std::string& why) { return {{"skipped", why}}; }

}  // namespace

void Asker::Cancel() {
  absl::MutexLock lock(&mutex_);
  is_cancelled_ = true;
  for (grpc::ClientContext* context : live_) context->TryCancel();
}

int64_t Asker::NewTokens(const TaskSpec& spec) const {
  return std::min<int64_t>(spec.max_new_tokens, context_tokens_ / 2);
}

template <typename Call>
absl::Status Asker::Retry(absl::Duration patience, const Call& call) {
  const absl::Time give_up = absl::Now() + patience;
  for (absl::Duration pause = absl::Milliseconds(50);; pause = std::min(2 * pause, absl::Seconds(2))) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kCallTimeout));
    {
      absl::MutexLock lock(&mutex_);
      if (is_cancelled_) return absl::CancelledError("interrupted");
      live_.insert(&context);
    }
    const absl::Status status = call(context);
    absl::MutexLock lock(&mutex_);
    live_.erase(&context);
    const bool may_pass = absl::IsUnavailable(status) || absl::IsResourceExhausted(status);
    if (!may_pass || is_cancelled_ || absl::Now() > give_up) return status;
    mutex_.AwaitWithTimeout(absl::Condition(&is_cancelled_), pause);
  }
}

absl::StatusOr<rankwise::v1::GetModelInfoResponse> Asker::GetModelInfo() {
  rankwise::v1::GetModelInfoResponse model;
  RW_RETURN_IF_ERROR(Retry(absl::Seconds(10), [&](grpc::ClientContext& context) {
    return FromGrpc(stub_.GetModelInfo(&context, {}, &model));
  }));
  return model;
}

absl::StatusOr<std::vector<int32_t>> Asker::Tokenize(const std::string& text, bool has_special) {
  rankwise::v1::TokenizeRequest request;
  request.set_text(text);
  request.set_omit_special(!has_special);
  rankwise::v1::TokenizeResponse response;
  RW_RETURN_IF_ERROR(Retry(
      kPatience, [&](grpc::ClientContext& context) { return FromGrpc(stub_.Tokenize(&context, request, &response)); }));
  return std::vector<int32_t>(response.token_ids().begin(), response.token_ids().end());
}

// The stream's messages as one.
absl::StatusOr<GenerateResponse> Asker::Generate(const GenerateRequest& request) {
  GenerateResponse whole;
  RW_RETURN_IF_ERROR(Retry(kPatience, [&](grpc::ClientContext& context) {
    whole.Clear();
    const auto reader = stub_.Generate(&context, request);
    GenerateResponse piece;
    while (reader->Read(&piece)) {
      const std::string text = whole.text() + piece.text();
      whole.MergeFrom(piece);
      whole.set_text(text);
    }
    return FromGrpc(reader->Finish());
  }));
  const auto reason = whole.finish().reason();
  if (reason != rankwise::v1::FINISH_REASON_STOP && reason != rankwise::v1::FINISH_REASON_LENGTH)
    return absl::InternalError(absl::StrCat("the stream ended with ", rankwise::v1::FinishReason_Name(reason)));
  return whole;
}

absl::StatusOr<Asker::Prompts> Asker::Fit(const Task& task, const Item& item, int shots,
                                          const std::vector<std::string>& texts, int64_t new_tokens) {
  const Exemplars* exemplars = FindExemplars(task, item);
  Prompts prompts;
  const int most = exemplars == nullptr ? 0 : std::min<int>(shots, static_cast<int>(exemplars->solved.size()));
  for (prompts.shots = most;; --prompts.shots) {
    prompts.prefix = exemplars == nullptr ? "" : exemplars->head;
    for (int i = 0; i < prompts.shots; ++i) prompts.prefix += exemplars->solved[i];
    prompts.tokens.clear();
    prompts.longest = 0;
    for (const std::string& text : texts) {
      RW_ASSIGN_OR_RETURN(prompts.tokens.emplace_back(), Tokenize(prompts.prefix + text, true));
      prompts.longest = std::max(prompts.longest, std::ssize(prompts.tokens.back()));
    }
    prompts.fits = prompts.longest + new_tokens <= context_tokens_;
    if (prompts.fits || prompts.shots == 0) return prompts;
  }
}

absl::StatusOr<GenerateResponse> Asker::Score(const std::vector<int32_t>& tokens, int top) {
  GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(tokens.begin(), tokens.end());
  request.mutable_sampling()->set_max_tokens(1);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_prompt_logprobs(top);
  RW_ASSIGN_OR_RETURN(GenerateResponse response, Generate(request));
  if (response.prompt_logprobs_size() + 1 != std::ssize(tokens)) {
    return absl::InternalError(absl::StrCat("log-probabilities of ", response.prompt_logprobs_size(),
                                            " tokens came back for a prompt of ", tokens.size()));
  }
  for (int i = 0; i + 1 < std::ssize(tokens); ++i) {
    if (response.prompt_logprobs(i).chosen().id() != tokens[i + 1])
      return absl::InternalError(absl::StrCat("the log-probability at ", i + 1, " is of another token"));
  }
  return response;
}

absl::StatusOr<json> Asker::AnswerTargets(const Task& task, const Item& item, int shots) {
  std::vector<std::string> texts;
  for (const Choice& choice : item.choices) texts.push_back(choice.context + choice.target);
  RW_ASSIGN_OR_RETURN(const Prompts prompts, Fit(task, item, shots, texts, 1));
  if (!prompts.fits)
    return Skipped(absl::StrCat("takes ", prompts.longest + 1, " tokens of a context of ", context_tokens_));

  const bool is_last_word = task.spec.rule == Rule::kLastWord;
  std::vector<double> sums;
  bool is_greedy = true;
  for (size_t c = 0; c < item.choices.size(); ++c) {
    const std::vector<int32_t>& tokens = prompts.tokens[c];
    // The target may join the last token of its context, and is then scored from there. The first token of all has no
    // probability.
    const std::string context = prompts.prefix + item.choices[c].context;
    int64_t begin = 1;
    if (!context.empty()) {
      RW_ASSIGN_OR_RETURN(const std::vector<int32_t> context_tokens, Tokenize(context, true));
      begin = std::max<int64_t>(begin, CommonPrefix(context_tokens, tokens));
    }
    if (begin >= std::ssize(tokens)) return Skipped(absl::StrCat("choice ", c, " has no token to score"));
    RW_ASSIGN_OR_RETURN(const GenerateResponse response, Score(tokens, is_last_word ? 1 : 0));
    double sum = 0;
    for (int64_t i = begin; i < std::ssize(tokens); ++i) {
      const auto& position = response.prompt_logprobs(static_cast<int>(i - 1));
      sum += position.chosen().logprob();
      is_greedy = is_greedy && position.top_size() > 0 && position.top(0).id() == position.chosen().id();
    }
    sums.push_back(sum);
  }
  if (is_last_word) return json{{"shots", prompts.shots}, {"logprob", sums[0]}, {"greedy", is_greedy}};
  return json{{"shots", prompts.shots}, {"logprobs", sums}};
}

absl::StatusOr<json> Asker::AnswerGenerated(const Task& task, const Item& item, int shots) {
  const int64_t new_tokens = NewTokens(task.spec);
  RW_ASSIGN_OR_RETURN(const Prompts prompts, Fit(task, item, shots, {item.question}, new_tokens));
  if (!prompts.fits) {
    return Skipped(absl::StrCat("takes ", prompts.longest, " tokens and ", new_tokens,
                                " for its answer of a context of ", context_tokens_));
  }
  GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(prompts.tokens[0].begin(), prompts.tokens[0].end());
  request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(new_tokens));
  request.mutable_sampling()->set_temperature(0);
  for (const std::string& stop : task.spec.stops) request.add_stop(stop);
  RW_ASSIGN_OR_RETURN(const GenerateResponse response, Generate(request));
  const bool is_cut = response.finish().reason() == rankwise::v1::FINISH_REASON_LENGTH;
  return json{{"shots", prompts.shots},
              {"text", response.text()},
              {"answer", ExtractAnswer(item, response.text())},
              {"finish", is_cut ? "length" : "stop"}};
}

absl::StatusOr<json> Asker::AnswerText(const Item& item) {
  RW_ASSIGN_OR_RETURN(const GenerateResponse response, Score(item.tokens, kTopTokens));
  json log_probabilities = json::array(), top = json::array();
  for (const auto& position : response.prompt_logprobs()) {
    log_probabilities.push_back(position.chosen().logprob());
    json pairs = json::array();
    for (const auto& token : position.top()) {
      pairs.push_back(token.id());
      pairs.push_back(token.logprob());
    }
    top.push_back(std::move(pairs));
  }
  return json{{"logprobs", std::move(log_probabilities)}, {"top", std::move(top)}};
}

absl::StatusOr<json> Asker::Answer(const Task& task, const Item& item, int shots) {
  switch (task.spec.rule) {
    case Rule::kChoice:
    case Rule::kLastWord:
      return AnswerTargets(task, item, shots);
    case Rule::kGenerate:
      return AnswerGenerated(task, item, shots);
    case Rule::kText:
      return AnswerText(item);
  }
  return absl::InternalError("a rule that does not exist");
}

Runner::Runner(Asker& asker, const std::vector<Job>& jobs, int concurrency)
    : asker_(asker), jobs_(jobs), progress_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  for (int i = 0; i < concurrency; ++i) threads_.emplace_back([this] { Run(); });
}

Runner::~Runner() {
  if (done_ < jobs_.size()) asker_.Cancel();
  next_ = jobs_.size();
  for (std::thread& thread : threads_) thread.join();
  close(progress_fd_);
}

void Runner::Acknowledge() {
  eventfd_t count;
  eventfd_read(progress_fd_, &count);
}

absl::Status Runner::status() {
  absl::MutexLock lock(&mutex_);
  return status_;
}

void Runner::Run() {
  for (size_t i = next_++; i < jobs_.size(); i = next_++) {
    const Job& job = jobs_[i];
    absl::StatusOr<json> answer = asker_.Answer(*job.task, *job.item, job.shots);
    absl::Status status = answer.ok() ? job.store->Append(job.item->id, *std::move(answer)) : answer.status();
    if (status.ok()) {
      ++done_;
    } else {
      absl::MutexLock lock(&mutex_);
      status_.Update(
          absl::Status(status.code(), absl::StrCat(job.task->spec.name, " ", job.item->id, ": ", status.message())));
      next_ = jobs_.size();
    }
    eventfd_write(progress_fd_, 1);
  }
}

}  // namespace rankwise::eval
