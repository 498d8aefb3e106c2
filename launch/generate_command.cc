#include <google/protobuf/util/json_util.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/resuming_stream.h"

namespace rankwise::launch {
namespace {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;

constexpr char kDescription[] = R"(Stream a continuation of a prompt to the terminal

The text goes to stdout as it comes; a summary goes to stderr. Ctrl-C cancels the request.)";

constexpr char kExamples[] = R"(Examples:
  rankwise generate --endpoint 127.0.0.1:8600 "Once upon a time"
  rankwise generate --endpoint-file /tmp/me/endpoint --temperature 0 --max-tokens 64 --stop "\n\n" "The fox said"
  rankwise generate --endpoint 127.0.0.1:8600 --json --logprobs 3 --seed 7 "Once" > pieces.jsonl
  rankwise generate --endpoint 127.0.0.1:8600 - < prompt.txt)";

struct GenerateFlags {
  EndpointFlags endpoint;
  std::string prompt;
  std::string token_ids;
  GenerateRequest request;
  double deadline_seconds = 600;
  double linger_seconds = 60;
  bool is_json = false;
};

// CLI11 fills plain variables; protobuf has only setters.
template <typename T, typename Setter>
void AddSetter(CLI::App& command, const std::string& name, const std::string& help, Setter setter) {
  command.add_option_function<T>(
      name, [setter](const T& value) { setter(value); }, help);
}

void SetLogitBias(const std::string& text, rankwise::v1::SamplingParams& sampling) {
  const std::vector<std::string> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
  int32_t id = 0;
  float bias = 0;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &id) || !absl::SimpleAtof(parts[1], &bias))
    throw CLI::ValidationError("--logit-bias", absl::StrCat("\"", text, "\" is not TOKEN_ID:BIAS"));
  (*sampling.mutable_logit_bias())[id] = bias;
}

void AddSamplingFlags(CLI::App& command, GenerateRequest& request) {
  rankwise::v1::SamplingParams& s = *request.mutable_sampling();
  AddSetter<uint32_t>(command, "--max-tokens",
                      "Most tokens to generate; 0: what the context has room for (default 256)",
                      [&s](uint32_t v) { s.set_max_tokens(v); });
  AddSetter<uint32_t>(command, "--min-tokens", "No end before this many", [&s](uint32_t v) { s.set_min_tokens(v); });
  AddSetter<float>(command, "--temperature", "0: always the likeliest token (default 1)",
                   [&s](float v) { s.set_temperature(v); });
  AddSetter<uint32_t>(command, "--top-k", "Draw from the K likeliest tokens only",
                      [&s](uint32_t v) { s.set_top_k(v); });
  AddSetter<float>(command, "--top-p", "Draw from the likeliest tokens that sum to this",
                   [&s](float v) { s.set_top_p(v); });
  AddSetter<float>(command, "--min-p", "Drop tokens below this share of the likeliest",
                   [&s](float v) { s.set_min_p(v); });
  AddSetter<float>(command, "--repetition-penalty", "Above 1: repeat less, prompt included",
                   [&s](float v) { s.set_repetition_penalty(v); });
  AddSetter<float>(command, "--frequency-penalty", "Subtracted per earlier occurrence",
                   [&s](float v) { s.set_frequency_penalty(v); });
  AddSetter<float>(command, "--presence-penalty", "Subtracted from what has occurred",
                   [&s](float v) { s.set_presence_penalty(v); });
  AddSetter<std::vector<std::string>>(command, "--logit-bias", "TOKEN_ID:BIAS, may be repeated",
                                      [&s](const auto& values) {
                                        for (const std::string& value : values) SetLogitBias(value, s);
                                      });
  AddSetter<uint64_t>(command, "--seed", "The same seed, prompt and model give the same text",
                      [&s](uint64_t v) { s.set_seed(v); });
  AddSetter<std::vector<std::string>>(command, "--stop", "Text that ends the continuation, may be repeated",
                                      [&request](const auto& values) {
                                        for (const std::string& value : values) request.add_stop(value);
                                      });
  AddSetter<std::vector<int32_t>>(command, "--stop-token", "Token id that ends it, may be repeated",
                                  [&s](const auto& ids) {
                                    for (const int32_t id : ids) s.add_stop_token_ids(id);
                                  });
  command.add_flag_function(
      "--include-stop", [&request](int64_t) { request.set_include_stop(true); }, "Print the stop text too");
  command.add_flag_function(
      "--ignore-eos", [&s](int64_t) { s.set_ignore_eos(true); }, "Go on after an end of sequence");
  AddSetter<uint32_t>(command, "--logprobs", "With --json: log-probabilities, and this many alternatives",
                      [&s](uint32_t v) { s.set_logprobs(v); });
  AddSetter<uint32_t>(command, "--prompt-logprobs", "The same for the prompt",
                      [&s](uint32_t v) { s.set_prompt_logprobs(v); });
}

void AddRequestFlags(CLI::App& command, GenerateFlags& flags) {
  GenerateRequest& request = flags.request;
  AddSetter<uint32_t>(command, "-n", "Independent samples, printed one after another",
                      [&request](uint32_t v) { request.set_n(v); });
  AddSetter<int32_t>(command, "--priority", "Higher runs first", [&request](int32_t v) { request.set_priority(v); });
  AddSetter<std::string>(command, "--tenant", "Whom to account it to",
                         [&request](const auto& v) { request.set_tenant(v); });
  AddSetter<std::string>(command, "--request-id", "Idempotency key",
                         [&request](const auto& v) { request.set_request_id(v); });
  command.add_flag_function(
      "--omit-special", [&request](int64_t) { request.set_omit_special(true); },
      "Do not begin with the model's begin-of-sequence token");
  command.add_option("--token-ids", flags.token_ids, "Prompt as comma-separated token ids, instead of text");
  command.add_option("--deadline", flags.deadline_seconds, "Seconds")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--linger", flags.linger_seconds,
                  "Seconds to go on in the coordinator, and to look for it, when the connection is lost; 0: neither")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command.add_flag("--json", flags.is_json, "Print every message of the stream as a line of JSON");
}

absl::Status FillPrompt(GenerateFlags& flags) {
  if (flags.prompt.empty() == flags.token_ids.empty())
    return absl::InvalidArgumentError("give either PROMPT or --token-ids");
  if (flags.prompt == "-") {
    flags.request.set_text(std::string(std::istreambuf_iterator<char>(std::cin), {}));
  } else if (!flags.prompt.empty()) {
    flags.request.set_text(flags.prompt);
  }
  for (absl::string_view part : absl::StrSplit(flags.token_ids, ',', absl::SkipEmpty())) {
    int32_t id = 0;
    if (!absl::SimpleAtoi(part, &id))
      return absl::InvalidArgumentError(absl::StrCat("--token-ids: \"", part, "\" is no number"));
    flags.request.mutable_token_ids()->add_ids(id);
  }
  return absl::OkStatus();
}

// Cancels the request when a signal comes, until it is destroyed.
class CancelOnSignal {
 public:
  CancelOnSignal(const Interrupt& interrupt, ResumingStream& stream)
      : end_fd_(eventfd(0, EFD_CLOEXEC)), thread_([fd = interrupt.fd(), end = end_fd_, &stream] {
          pollfd events[] = {{fd, POLLIN, 0}, {end, POLLIN, 0}};
          while (poll(events, 2, -1) < 0) {
          }
          if (events[0].revents != 0) stream.Cancel();
        }) {}
  ~CancelOnSignal() {
    eventfd_write(end_fd_, 1);
    thread_.join();
    close(end_fd_);
  }

 private:
  const int end_fd_;
  std::thread thread_;
};

// Samples run side by side; the first one streams, the others wait for their turn so that texts do not mix.
class TextOutput {
 public:
  void Add(const GenerateResponse& piece) {
    pending_[piece.index()] += piece.text();
    if (piece.has_finish()) finished_[piece.index()] = piece.finish();
    for (;;) {
      absl::FPrintF(stdout, "%s", std::exchange(pending_[current_], ""));
      std::fflush(stdout);
      if (!finished_.contains(current_)) return;
      absl::FPrintF(stdout, "\n");
      std::fflush(stdout);
      ++current_;
      if (!pending_.contains(current_)) return;
    }
  }

 private:
  uint32_t current_ = 0;
  std::map<uint32_t, std::string> pending_;
  std::map<uint32_t, rankwise::v1::Finish> finished_;
};

struct Summary {
  absl::Time start = absl::Now();
  std::optional<absl::Time> first_token, last_token;
  int64_t tokens = 0;
  std::string reasons;

  void Add(const GenerateResponse& piece) {
    if (piece.token_ids_size() > 0) {
      last_token = absl::Now();
      if (!first_token) first_token = last_token;
    }
    tokens += piece.token_ids_size();
    if (!piece.has_finish()) return;
    std::string reason = rankwise::v1::FinishReason_Name(piece.finish().reason());
    reason = absl::AsciiStrToLower(absl::StripPrefix(reason, "FINISH_REASON_"));
    absl::StrAppend(&reasons, reasons.empty() ? "" : ", ", reason);
  }

  void Print() const {
    if (!first_token) return;
    const double decode_seconds = absl::ToDoubleSeconds(*last_token - *first_token);
    absl::FPrintF(stderr, "[%d tokens, %.1f tokens/s, time to first token %.1f ms, %s]\n", tokens,
                  tokens > 1 && decode_seconds > 0 ? static_cast<double>(tokens - 1) / decode_seconds : 0.0,
                  absl::ToDoubleMilliseconds(*first_token - start), reasons.empty() ? "unfinished" : reasons);
  }
};

absl::Status Generate(GenerateFlags& flags) {
  const Interrupt interrupt;
  RW_RETURN_IF_ERROR(FillPrompt(flags));
  RW_ASSIGN_OR_RETURN(const auto stub, Connect(flags.endpoint));
  ResumeOptions options{.deadline = absl::Now() + absl::Seconds(flags.deadline_seconds),
                        .linger = absl::Seconds(flags.linger_seconds)};
  int lost = 0;
  bool has_begun = false;
  // A coordinator that was never there is a mistake, one that is gone comes back.
  options.may_retry = [&](const absl::Status& status) {
    if (has_begun && lost++ == 0) absl::FPrintF(stderr, "[lost the coordinator: %s; going on]\n", status.message());
    return has_begun && flags.linger_seconds > 0;
  };
  ResumingStream stream(*stub, flags.request, options);
  const CancelOnSignal cancel(interrupt, stream);
  Summary summary;
  TextOutput output;
  for (GenerateResponse piece; stream.Read(&piece);) {
    has_begun = true;
    summary.Add(piece);
    if (flags.is_json) {
      std::string json;
      google::protobuf::util::JsonPrintOptions options;
      options.preserve_proto_field_names = true;
      RW_CHECK(google::protobuf::util::MessageToJsonString(piece, &json, options).ok());
      absl::PrintF("%s\n", json);
      std::fflush(stdout);
    } else {
      output.Add(piece);
    }
  }
  const absl::Status status = stream.Finish();
  if (!status.ok() && summary.tokens > 0 && !flags.is_json) absl::PrintF("\n");
  summary.Print();
  return status;
}

}  // namespace

void AddGenerate(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("generate", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<GenerateFlags>();
  flags->request.mutable_sampling()->set_max_tokens(256);
  command->add_option("PROMPT", flags->prompt, "The text to continue; - reads it from stdin");
  AddEndpointFlags(*command, flags->endpoint);
  AddSamplingFlags(*command, flags->request);
  AddRequestFlags(*command, *flags);
  command->callback([flags, &action] { action = [flags] { return Generate(*flags); }; });
}

}  // namespace rankwise::launch
