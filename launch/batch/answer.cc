#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "launch/batch/question.h"
#include "nlohmann/json.hpp"

namespace rankwise::batch {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;
using rankwise::v1::PositionLogprobs;
using rankwise::v1::TokenLogprob;

// One line of JSON. A model's text is UTF-8 by the API's contract, the bytes of one token need not be.
std::string Dump(const ordered_json& object) {
  return object.dump(-1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace);
}

const char* ReasonName(rankwise::v1::FinishReason reason) {
  return reason == rankwise::v1::FINISH_REASON_LENGTH ? "length" : "stop";
}

ordered_json ChatToken(const TokenLogprob& token) {
  ordered_json bytes = ordered_json::array();
  for (const char byte : token.token()) bytes.push_back(static_cast<uint8_t>(byte));
  return {{"token", token.token()}, {"logprob", token.logprob()}, {"bytes", std::move(bytes)}};
}

ordered_json ChatLogprobs(const std::vector<PositionLogprobs>& positions) {
  ordered_json content = ordered_json::array();
  for (const PositionLogprobs& position : positions) {
    ordered_json token = ChatToken(position.chosen());
    token["top_logprobs"] = ordered_json::array();
    for (const TokenLogprob& other : position.top()) token["top_logprobs"].push_back(ChatToken(other));
    content.push_back(std::move(token));
  }
  return {{"content", std::move(content)}};
}

ordered_json CompletionLogprobs(const std::vector<PositionLogprobs>& positions) {
  ordered_json tokens = ordered_json::array(), logprobs = ordered_json::array(), top = ordered_json::array();
  for (const PositionLogprobs& position : positions) {
    tokens.push_back(position.chosen().token());
    logprobs.push_back(position.chosen().logprob());
    ordered_json others = ordered_json::object();
    for (const TokenLogprob& other : position.top()) others[other.token()] = other.logprob();
    top.push_back(std::move(others));
  }
  return {{"tokens", std::move(tokens)}, {"token_logprobs", std::move(logprobs)}, {"top_logprobs", std::move(top)}};
}

int HttpStatus(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
      return 400;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

ordered_json IdOrNull(const std::string& custom_id) {
  return custom_id.empty() ? ordered_json(nullptr) : ordered_json(custom_id);
}

}  // namespace

void Answer::Add(const rankwise::v1::GenerateResponse& piece) {
  constexpr uint32_t kMostSamples = 64;
  if (piece.index() >= kMostSamples) return;  // Check then misses a sample
  if (piece.index() >= samples_.size()) samples_.resize(piece.index() + 1);
  Sample& sample = samples_[piece.index()];
  sample.text += piece.text();
  sample.logprobs.insert(sample.logprobs.end(), piece.logprobs().begin(), piece.logprobs().end());
  if (piece.has_finish()) {
    sample.finish = piece.finish();
    sample.has_finish = true;
  }
}

absl::Status Answer::Check(const rankwise::v1::GenerateRequest& request) const {
  if (samples_.size() != request.n())
    return absl::InternalError(absl::StrCat(samples_.size(), " of ", request.n(), " samples came back"));
  for (size_t i = 0; i < samples_.size(); ++i) {
    const auto reason = samples_[i].finish.reason();
    if (samples_[i].has_finish &&
        (reason == rankwise::v1::FINISH_REASON_STOP || reason == rankwise::v1::FINISH_REASON_LENGTH))
      continue;
    return absl::InternalError(
        absl::StrCat("sample ", i, " ended with ",
                     samples_[i].has_finish ? rankwise::v1::FinishReason_Name(reason) : "no word of its end"));
  }
  return absl::OkStatus();
}

std::string Answer::ToLine(const Question& question, const std::string& id, const Served& served) const {
  ordered_json choices = ordered_json::array();
  uint64_t prompt_tokens = 0, generated_tokens = 0;
  for (size_t i = 0; i < samples_.size(); ++i) {
    const Sample& sample = samples_[i];
    ordered_json choice = {{"index", i}};
    if (question.is_chat) {
      choice["message"] = {{"role", "assistant"}, {"content", sample.text}};
    } else {
      choice["text"] = sample.text;
    }
    choice["logprobs"] = nullptr;
    if (question.request.sampling().has_logprobs())
      choice["logprobs"] = question.is_chat ? ChatLogprobs(sample.logprobs) : CompletionLogprobs(sample.logprobs);
    choice["finish_reason"] = ReasonName(sample.finish.reason());
    choices.push_back(std::move(choice));
    prompt_tokens = sample.finish.prompt_tokens();
    generated_tokens += sample.finish.generated_tokens();
  }
  const ordered_json body = {{"id", id},
                             {"object", question.is_chat ? "chat.completion" : "text_completion"},
                             {"created", 0},
                             {"model", served.model},
                             {"system_fingerprint", served.fingerprint},
                             {"seed", question.request.sampling().seed()},
                             {"choices", std::move(choices)},
                             {"usage",
                              {{"prompt_tokens", prompt_tokens},
                               {"completion_tokens", generated_tokens},
                               {"total_tokens", prompt_tokens + generated_tokens}}}};
  return Dump({{"id", id},
               {"custom_id", question.custom_id},
               {"response", {{"status_code", 200}, {"request_id", id}, {"body", body}}},
               {"error", nullptr}});
}

std::string UnreadableLine(const std::string& custom_id, const std::string& id, int64_t number,
                           const absl::Status& why) {
  return Dump({{"id", id},
               {"custom_id", IdOrNull(custom_id)},
               {"response", nullptr},
               {"error",
                {{"code", "invalid_line"},
                 {"message", absl::StrCat("line ", number, ": ", why.message())},
                 {"line", number}}}});
}

std::string RefusedLine(const std::string& custom_id, const std::string& id, const absl::Status& why) {
  const int status = HttpStatus(why.code());
  const ordered_json error = {{"message", std::string(why.message())},
                              {"type", status < 500 ? "invalid_request_error" : "server_error"},
                              {"param", nullptr},
                              {"code", absl::StatusCodeToString(why.code())}};
  return Dump({{"id", id},
               {"custom_id", custom_id},
               {"response", {{"status_code", status}, {"request_id", id}, {"body", {{"error", error}}}}},
               {"error", nullptr}});
}

absl::StatusOr<ResultKey> ReadResult(std::string_view line) {
  const json object = json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::InvalidArgumentError("is no JSON object");
  ResultKey key;
  const auto id = object.find("id"), custom_id = object.find("custom_id"), response = object.find("response"),
             error = object.find("error");
  if (id == object.end() || !id->is_string()) return absl::InvalidArgumentError("has no id");
  if (custom_id == object.end()) return absl::InvalidArgumentError("has no custom_id");
  if (response == object.end() || error == object.end())
    return absl::InvalidArgumentError("has no response and no error");
  key.id = id->get<std::string>();
  key.is_error = !response->is_object() || response->value("status_code", json()) != 200;
  if (custom_id->is_string()) {
    key.custom_id = custom_id->get<std::string>();
  } else if (error->is_object() && error->contains("line") && (*error)["line"].is_number_unsigned()) {
    key.number = (*error)["line"].get<int64_t>();
  } else {
    return absl::InvalidArgumentError("has neither a custom_id nor a line number");
  }
  if (!key.is_error) {
    const json body = response->value("body", json());
    const json fingerprint = body.is_object() ? body.value("system_fingerprint", json()) : json();
    if (!fingerprint.is_string()) return absl::InvalidArgumentError("has no system_fingerprint");
    key.fingerprint = fingerprint.get<std::string>();
  }
  return key;
}

}  // namespace rankwise::batch
