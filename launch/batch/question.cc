#include "launch/batch/question.h"

#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/status_macros.h"
#include "launch/batch/fields.h"
#include "nlohmann/json.hpp"

namespace rankwise::batch {
namespace {

using nlohmann::json;
using rankwise::v1::GenerateRequest;
using rankwise::v1::SamplingParams;

constexpr uint32_t kDefaultCompletionTokens = 16;  // OpenAI's for completions; chat answers may fill the context

absl::Status Wrong(const std::string& what) { return absl::InvalidArgumentError(what); }

absl::StatusOr<json> ParseObject(std::string_view line) {
  if (line.size() > kLongestLine)
    return Wrong(absl::StrCat("is ", line.size(), " bytes long; the limit is ", kLongestLine));
  json parsed = json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return Wrong("is not JSON");
  if (!parsed.is_object()) return Wrong("is not a JSON object");
  return parsed;
}

absl::StatusOr<std::string> CustomIdOf(const json& line) {
  const auto it = line.find("custom_id");
  if (it == line.end()) return Wrong("has no custom_id");
  if (!it->is_string()) return Wrong(absl::StrCat("custom_id is ", Shown(*it), ", not a string"));
  const auto& id = it->get_ref<const std::string&>();
  if (id.empty() || id.size() > kLongestId)
    return Wrong(absl::StrCat("custom_id has ", id.size(), " bytes; it needs 1 to ", kLongestId));
  return id;
}

// The text of a message: a string, or OpenAI's list of text parts.
absl::StatusOr<std::string> ContentOf(const json& message) {
  const auto content = message.find("content");
  if (content == message.end()) return Wrong("a message has no content");
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) return Wrong(absl::StrCat("content is ", Shown(*content), ", not a string"));
  std::string text;
  for (const json& part : *content) {
    if (!part.is_object() || part.value("type", json()) != "text" || !part.contains("text") ||
        !part["text"].is_string())
      return Wrong(absl::StrCat("content part ", Shown(part), " is no text"));
    text += part["text"].get<std::string>();
  }
  return text;
}

absl::StatusOr<std::string> Render(const json& messages, ChatFormat format) {
  if (format == ChatFormat::kNone)
    return Wrong("messages need a --chat-format that suits the model; without one, send prompts to /v1/completions");
  if (!messages.is_array() || messages.empty()) return Wrong("messages is not a list of messages");
  std::string text;
  for (const json& message : messages) {
    if (!message.is_object() || !message.contains("role") || !message["role"].is_string())
      return Wrong(absl::StrCat("message ", Shown(message), " has no role"));
    const auto role = message["role"].get<std::string>();
    if (role != "system" && role != "user" && role != "assistant")
      return Wrong(absl::StrCat("role ", Shown(message["role"]), " is not system, user or assistant"));
    for (const auto& [name, value] : message.items())
      if (name != "role" && name != "content") return Wrong(absl::StrCat("a message's ", name, " is not supported"));
    RW_ASSIGN_OR_RETURN(const std::string content, ContentOf(message));
    switch (format) {
      case ChatFormat::kNone:
        break;
      case ChatFormat::kChatml:
        absl::StrAppend(&text, "<|im_start|>", role, "\n", content, "<|im_end|>\n");
        break;
      case ChatFormat::kLlama3:
        absl::StrAppend(&text, "<|start_header_id|>", role, "<|end_header_id|>\n\n", content, "<|eot_id|>");
        break;
      case ChatFormat::kPlain:
        absl::StrAppend(&text, role == "system" ? "" : role == "user" ? "User: " : "Assistant: ", content, "\n");
        break;
    }
  }
  switch (format) {
    case ChatFormat::kNone:
      break;
    case ChatFormat::kChatml:
      return text + "<|im_start|>assistant\n";
    case ChatFormat::kLlama3:
      return text + "<|start_header_id|>assistant<|end_header_id|>\n\n";
    case ChatFormat::kPlain:
      return text + "Assistant:";
  }
  return text;
}

// Text, or token ids, or a list of one text.
absl::Status SetPrompt(const json& prompt, GenerateRequest& request) {
  if (prompt.is_string()) {
    request.set_text(prompt.get<std::string>());
    return absl::OkStatus();
  }
  if (prompt.is_array() && prompt.size() == 1 && prompt[0].is_string()) return SetPrompt(prompt[0], request);
  if (!prompt.is_array() || prompt.empty())
    return Wrong(absl::StrCat("prompt is ", Shown(prompt), ", neither text nor a list of token ids"));
  for (const json& id : prompt) {
    if (id.is_string()) return Wrong(absl::StrCat("prompt has ", prompt.size(), " texts; a line may ask one"));
    if (!id.is_number_integer() || id < 0 || id > std::numeric_limits<int32_t>::max())
      return Wrong(absl::StrCat("prompt holds ", Shown(id), ", which is no token id"));
    request.mutable_token_ids()->add_ids(id.get<int32_t>());
  }
  return absl::OkStatus();
}

absl::Status SetStop(const json& stop, GenerateRequest& request) {
  if (stop.is_string()) {
    request.add_stop(stop.get<std::string>());
    return absl::OkStatus();
  }
  if (!stop.is_array()) return Wrong(absl::StrCat("stop is ", Shown(stop), ", neither text nor a list of texts"));
  for (const json& text : stop) {
    if (!text.is_string()) return Wrong(absl::StrCat("stop holds ", Shown(text), ", which is no text"));
    request.add_stop(text.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status SetLogitBias(const json& biases, SamplingParams& sampling) {
  if (!biases.is_object()) return Wrong(absl::StrCat("logit_bias is ", Shown(biases), ", not an object"));
  for (const auto& [name, value] : biases.items()) {
    int32_t id = 0;
    if (!absl::SimpleAtoi(name, &id) || !value.is_number())
      return Wrong(absl::StrCat("logit_bias ", Shown(json(name)), ": ", Shown(value), " is no token id and bias"));
    (*sampling.mutable_logit_bias())[id] = value.get<float>();
  }
  return absl::OkStatus();
}

absl::Status SetStopTokens(const json& ids, SamplingParams& sampling) {
  if (!ids.is_array()) return Wrong(absl::StrCat("stop_token_ids is ", Shown(ids), ", not a list"));
  for (const json& id : ids) {
    if (!id.is_number_integer() || id < 0 || id > std::numeric_limits<int32_t>::max())
      return Wrong(absl::StrCat("stop_token_ids holds ", Shown(id), ", which is no token id"));
    sampling.add_stop_token_ids(id.get<int32_t>());
  }
  return absl::OkStatus();
}

// Completions ask for `logprobs: N`; chats for `logprobs: true` and `top_logprobs: N`.
absl::Status SetLogprobs(Fields& body, bool is_chat, SamplingParams& sampling) {
  if (!is_chat) {
    RW_ASSIGN_OR_RETURN(const auto count, body.Integer("logprobs", 0, 20));
    if (count) sampling.set_logprobs(static_cast<uint32_t>(*count));
    return absl::OkStatus();
  }
  RW_ASSIGN_OR_RETURN(const bool is_wanted, body.Bool("logprobs"));
  RW_ASSIGN_OR_RETURN(const auto count, body.Integer("top_logprobs", 0, 20));
  if (count && !is_wanted) return Wrong("top_logprobs needs logprobs: true");
  if (is_wanted) sampling.set_logprobs(static_cast<uint32_t>(count.value_or(0)));
  return absl::OkStatus();
}

absl::Status SetNumbers(Fields& body, SamplingParams& s) {
  constexpr double kAny = std::numeric_limits<float>::max();
  RW_ASSIGN_OR_RETURN(const auto temperature, body.Number("temperature", 0, kAny));
  if (temperature) s.set_temperature(*temperature);
  RW_ASSIGN_OR_RETURN(const auto top_p, body.Number("top_p", 0, 1));
  if (top_p) s.set_top_p(*top_p);
  RW_ASSIGN_OR_RETURN(const auto min_p, body.Number("min_p", 0, 1));
  if (min_p) s.set_min_p(*min_p);
  RW_ASSIGN_OR_RETURN(const auto repetition, body.Number("repetition_penalty", 0, kAny));
  if (repetition) s.set_repetition_penalty(*repetition);
  RW_ASSIGN_OR_RETURN(const auto frequency, body.Number("frequency_penalty", -2, 2));
  if (frequency) s.set_frequency_penalty(*frequency);
  RW_ASSIGN_OR_RETURN(const auto presence, body.Number("presence_penalty", -2, 2));
  if (presence) s.set_presence_penalty(*presence);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  RW_ASSIGN_OR_RETURN(const auto top_k, body.Integer("top_k", 0, kMost));
  if (top_k) s.set_top_k(static_cast<uint32_t>(*top_k));
  RW_ASSIGN_OR_RETURN(const auto min_tokens, body.Integer("min_tokens", 0, kMost));
  if (min_tokens) s.set_min_tokens(static_cast<uint32_t>(*min_tokens));
  return absl::OkStatus();
}

absl::Status SetLengths(Fields& body, Question& question) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  SamplingParams& s = *question.request.mutable_sampling();
  RW_ASSIGN_OR_RETURN(auto most, body.Integer("max_tokens", 1, kMost));
  RW_ASSIGN_OR_RETURN(const auto most_chat, body.Integer("max_completion_tokens", 1, kMost));
  if (most && most_chat) return Wrong("max_tokens and max_completion_tokens are both given");
  if (most_chat) most = most_chat;
  s.set_max_tokens(most ? static_cast<uint32_t>(*most) : question.is_chat ? 0 : kDefaultCompletionTokens);
  RW_ASSIGN_OR_RETURN(const auto n, body.Integer("n", 1, 64));
  question.request.set_n(static_cast<uint32_t>(n.value_or(1)));
  RW_ASSIGN_OR_RETURN(const auto best_of, body.Integer("best_of", 1, 64));
  if (best_of && *best_of != n.value_or(1))
    return Wrong(absl::StrCat("best_of is ", *best_of, "; only n is supported"));
  RW_ASSIGN_OR_RETURN(const auto seed,
                      body.Integer("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()));
  uint64_t chosen = 0;
  if (seed) {
    chosen = static_cast<uint64_t>(*seed);
  } else {
    // 48 bits: every JSON reader keeps them, and seed + n stays so.
    RW_CHECK(absl::SimpleHexAtoi(Digest(question.custom_id).substr(0, 12), &chosen));
  }
  s.set_seed(chosen);
  return absl::OkStatus();
}

absl::Status SetFlags(Fields& body, GenerateRequest& request) {
  for (const char* name : {"stream", "echo"}) {
    RW_ASSIGN_OR_RETURN(const bool is_set, body.Bool(name));
    if (is_set) return Wrong(absl::StrCat(name, " is not supported in a batch"));
  }
  RW_ASSIGN_OR_RETURN(const bool ignores_eos, body.Bool("ignore_eos"));
  request.mutable_sampling()->set_ignore_eos(ignores_eos);
  RW_ASSIGN_OR_RETURN(const bool includes_stop, body.Bool("include_stop_str_in_output"));
  request.set_include_stop(includes_stop);
  if (const json* stop = body.Take("stop"); stop != nullptr) RW_RETURN_IF_ERROR(SetStop(*stop, request));
  SamplingParams& s = *request.mutable_sampling();
  if (const json* bias = body.Take("logit_bias"); bias != nullptr) RW_RETURN_IF_ERROR(SetLogitBias(*bias, s));
  if (const json* ids = body.Take("stop_token_ids"); ids != nullptr) RW_RETURN_IF_ERROR(SetStopTokens(*ids, s));
  return absl::OkStatus();
}

absl::Status SetBody(const json& object, const QuestionOptions& options, Question& question) {
  Fields body(object);
  for (const char* name : {"model", "user", "metadata"}) body.Take(name);
  const json* prompt = body.Take(question.is_chat ? "messages" : "prompt");
  if (prompt == nullptr) return Wrong(question.is_chat ? "the body has no messages" : "the body has no prompt");
  if (question.is_chat) {
    RW_ASSIGN_OR_RETURN(std::string text, Render(*prompt, options.chat_format));
    question.request.set_text(std::move(text));
  } else {
    RW_RETURN_IF_ERROR(SetPrompt(*prompt, question.request));
  }
  RW_RETURN_IF_ERROR(SetLengths(body, question));
  RW_RETURN_IF_ERROR(SetNumbers(body, *question.request.mutable_sampling()));
  RW_RETURN_IF_ERROR(SetLogprobs(body, question.is_chat, *question.request.mutable_sampling()));
  RW_RETURN_IF_ERROR(SetFlags(body, question.request));
  return body.CheckAllTaken();
}

}  // namespace

absl::StatusOr<std::string> ReadCustomId(std::string_view line) {
  RW_ASSIGN_OR_RETURN(const json object, ParseObject(line));
  return CustomIdOf(object);
}

absl::StatusOr<Question> ReadQuestion(std::string_view line, const QuestionOptions& options) {
  RW_ASSIGN_OR_RETURN(const json object, ParseObject(line));
  Question question;
  RW_ASSIGN_OR_RETURN(question.custom_id, CustomIdOf(object));
  for (const auto& [name, value] : object.items())
    if (name != "custom_id" && name != "method" && name != "url" && name != "body")
      return Wrong(absl::StrCat(Shown(json(name)), " is none of custom_id, method, url, body"));
  if (const json method = object.value("method", json("POST")); method != "POST")
    return Wrong(absl::StrCat("method is ", Shown(method), ", not \"POST\""));
  const json url = object.value("url", json());
  question.is_chat = url == "/v1/chat/completions";
  if (!question.is_chat && url != "/v1/completions")
    return Wrong(absl::StrCat("url is ", Shown(url), ", neither \"/v1/completions\" nor \"/v1/chat/completions\""));
  const auto body = object.find("body");
  if (body == object.end() || !body->is_object()) return Wrong("has no body that is an object");
  question.request.set_tenant(options.tenant);
  question.request.set_priority(options.priority);
  RW_RETURN_IF_ERROR(SetBody(*body, options, question));
  return question;
}

std::string ResultId(std::string_view line) { return absl::StrCat("batch_req_", Digest(line)); }

}  // namespace rankwise::batch
