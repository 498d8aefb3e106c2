#include "launch/batch/question.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "launch/batch/fields.h"
#include "nlohmann/json.hpp"

namespace rankwise::batch {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string Line(const std::string& body, const std::string& url = "/v1/completions", const std::string& id = "a") {
  return absl::StrCat(R"({"custom_id": ")", id, R"(", "method": "POST", "url": ")", url, R"(", "body": )", body, "}");
}

std::string WhyNot(const std::string& line, const QuestionOptions& options = {}) {
  const auto question = ReadQuestion(line, options);
  EXPECT_FALSE(question.ok()) << line;
  return std::string(question.status().message());
}

TEST(Question, EveryFieldReachesTheRequest) {
  const auto question = ReadQuestion(Line(R"({
      "model": "any", "user": "me", "metadata": {"k": "v"}, "prompt": "Once", "max_tokens": 7, "min_tokens": 2, "n": 3,
      "temperature": 0.5, "top_p": 0.75, "top_k": 11, "min_p": 0.25, "repetition_penalty": 1.5, "frequency_penalty": -2,
      "presence_penalty": 2, "seed": 99, "stop": ["x", "y"], "stop_token_ids": [5, 6], "logprobs": 4, "best_of": 3,
      "logit_bias": {"17": -100}, "ignore_eos": true, "include_stop_str_in_output": true, "stream": false, "echo": false,
      "suffix": null})"),
                                     {.tenant = "t", .priority = -7});
  ASSERT_TRUE(question.ok()) << question.status();
  EXPECT_EQ(question->custom_id, "a");
  EXPECT_FALSE(question->is_chat);
  const auto& r = question->request;
  const auto& s = r.sampling();
  EXPECT_EQ(r.text(), "Once");
  EXPECT_EQ(s.max_tokens(), 7u);
  EXPECT_EQ(s.min_tokens(), 2u);
  EXPECT_EQ(r.n(), 3u);
  EXPECT_EQ(s.temperature(), 0.5f);
  EXPECT_EQ(s.top_p(), 0.75f);
  EXPECT_EQ(s.top_k(), 11u);
  EXPECT_EQ(s.min_p(), 0.25f);
  EXPECT_EQ(s.repetition_penalty(), 1.5f);
  EXPECT_EQ(s.frequency_penalty(), -2.0f);
  EXPECT_EQ(s.presence_penalty(), 2.0f);
  EXPECT_EQ(s.seed(), 99u);
  EXPECT_EQ(r.stop_size(), 2);
  EXPECT_EQ(s.stop_token_ids_size(), 2);
  EXPECT_EQ(s.logprobs(), 4u);
  EXPECT_EQ(s.logit_bias().at(17), -100.0f);
  EXPECT_TRUE(s.ignore_eos());
  EXPECT_TRUE(r.include_stop());
  EXPECT_EQ(r.tenant(), "t");
  EXPECT_EQ(r.priority(), -7);
}

TEST(Question, PromptsOfTokenIdsAndOfOneText) {
  const auto ids = ReadQuestion(Line(R"({"prompt": [1, 2, 3]})"), {});
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(ids->request.token_ids().ids_size(), 3);
  EXPECT_EQ(ids->request.sampling().max_tokens(), 16u);
  EXPECT_FALSE(ids->request.sampling().has_temperature());
  EXPECT_EQ(ids->request.n(), 1u);
  const auto text = ReadQuestion(Line(R"({"prompt": ["one"]})"), {});
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(text->request.text(), "one");
}

TEST(Question, ASeedFollowsFromTheCustomIdAlone) {
  const auto seed = [](const std::string& id, const std::string& prompt) {
    return ReadQuestion(Line(absl::StrCat(R"({"prompt": ")", prompt, R"("})"), "/v1/completions", id), {})
        ->request.sampling()
        .seed();
  };
  EXPECT_EQ(seed("a", "x"), seed("a", "y"));
  EXPECT_NE(seed("a", "x"), seed("b", "x"));
  EXPECT_LT(seed("a", "x"), uint64_t{1} << 48);
}

TEST(Question, SaysWhatIsWrong) {
  EXPECT_THAT(WhyNot("{"), HasSubstr("is not JSON"));
  EXPECT_THAT(WhyNot("[1]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(WhyNot(R"({"body": {}})"), HasSubstr("has no custom_id"));
  EXPECT_THAT(WhyNot(R"({"custom_id": 7})"), HasSubstr("custom_id is 7"));
  EXPECT_THAT(WhyNot(R"({"custom_id": ""})"), HasSubstr("0 bytes"));
  EXPECT_THAT(WhyNot(Line("{}", "/v1/embeddings")), HasSubstr("/v1/embeddings"));
  EXPECT_THAT(WhyNot(R"({"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}})"), HasSubstr("GET"));
  EXPECT_THAT(WhyNot(R"({"custom_id": "a", "url": "/v1/completions", "bodi": {}})"), HasSubstr("bodi"));
  EXPECT_THAT(WhyNot(Line("7")), HasSubstr("no body"));
  EXPECT_THAT(WhyNot(Line("{}")), HasSubstr("no prompt"));
  for (const auto& [body, words] : std::initializer_list<std::pair<const char*, const char*>>{
           {R"("prompt": 7)", "prompt is 7"},
           {R"("prompt": [])", "prompt is []"},
           {R"("prompt": ["a", "b"])", "2 texts"},
           {R"("prompt": [1, -1])", "-1"},
           {R"("prompt": [1, 4294967296])", "4294967296"},
           {R"("prompt": "a", "max_tokens": 0)", "max_tokens is 0"},
           {R"("prompt": "a", "max_tokens": "x")", "max_tokens is \"x\""},
           {R"("prompt": "a", "max_tokens": 1.5)", "max_tokens is 1.5"},
           {R"("prompt": "a", "max_tokens": 18446744073709551615)", "18446744073709551615"},
           {R"("prompt": "a", "max_tokens": 5, "max_completion_tokens": 5)", "both"},
           {R"("prompt": "a", "n": 65)", "n is 65"},
           {R"("prompt": "a", "best_of": 2)", "best_of is 2"},
           {R"("prompt": "a", "temperature": -1)", "temperature is -1"},
           {R"("prompt": "a", "top_p": 2)", "top_p is 2"},
           {R"("prompt": "a", "seed": 1.5)", "seed is 1.5"},
           {R"("prompt": "a", "stop": 7)", "stop is 7"},
           {R"("prompt": "a", "stop": [7])", "stop holds 7"},
           {R"("prompt": "a", "logprobs": 21)", "logprobs is 21"},
           {R"("prompt": "a", "logit_bias": {"x": 1})", "\"x\""},
           {R"("prompt": "a", "logit_bias": [1])", "logit_bias is [1]"},
           {R"("prompt": "a", "stop_token_ids": ["x"])", "stop_token_ids holds \"x\""},
           {R"("prompt": "a", "stream": true)", "stream"},
           {R"("prompt": "a", "ignore_eos": 1)", "ignore_eos is 1"},
           {R"("prompt": "a", "tools": [])", "tools is not supported"}})
    EXPECT_THAT(WhyNot(Line(absl::StrCat("{", body, "}"))), HasSubstr(words));
  EXPECT_THAT(WhyNot(std::string(kLongestLine + 1, ' ')), HasSubstr("limit"));
}

TEST(Question, MessagesNeedAFormat) {
  const std::string line = Line(
      R"({"messages": [{"role": "system", "content": "Be kind."},
          {"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "logprobs": true, "top_logprobs": 2})",
      "/v1/chat/completions");
  EXPECT_THAT(WhyNot(line), HasSubstr("--chat-format"));
  const auto render = [&](ChatFormat format) {
    const auto question = ReadQuestion(line, {.chat_format = format});
    EXPECT_TRUE(question.ok()) << question.status();
    EXPECT_TRUE(question->is_chat);
    EXPECT_EQ(question->request.sampling().max_tokens(), 0u);
    EXPECT_EQ(question->request.sampling().logprobs(), 2u);
    return question->request.text();
  };
  EXPECT_EQ(render(ChatFormat::kChatml),
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(render(ChatFormat::kLlama3),
            "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(render(ChatFormat::kPlain), "Be kind.\nUser: Hi\nAssistant:");
  const auto chat = [](const std::string& messages) {
    return WhyNot(Line(R"({"messages": )" + messages + "}", "/v1/chat/completions"),
                  {.chat_format = ChatFormat::kPlain});
  };
  EXPECT_THAT(chat("[]"), HasSubstr("messages is not"));
  EXPECT_THAT(chat(R"([{"role": "tool", "content": "x"}])"), HasSubstr("\"tool\""));
  EXPECT_THAT(chat(R"([{"role": "user"}])"), HasSubstr("no content"));
  EXPECT_THAT(chat(R"([{"role": "user", "content": [{"type": "image_url"}]}])"), HasSubstr("image_url"));
  EXPECT_THAT(chat(R"([{"role": "user", "content": "x", "name": "n"}])"), HasSubstr("name is not supported"));
}

// The messages of a call whose two samples are interleaved.
Answer TwoSamples() {
  Answer answer;
  for (const uint32_t index : {1, 0, 0, 1}) {
    rankwise::v1::GenerateResponse piece;
    piece.set_index(index);
    piece.set_text(index == 0 ? "a" : "b");
    auto& position = *piece.add_logprobs();
    position.mutable_chosen()->set_token("\xff");
    position.mutable_chosen()->set_logprob(-0.5f);
    auto& other = *position.add_top();
    other.set_token("o");
    other.set_logprob(-1.25f);
    answer.Add(piece);
  }
  for (const uint32_t index : {0, 1}) {
    rankwise::v1::GenerateResponse piece;
    piece.set_index(index);
    piece.set_text("!");
    piece.mutable_finish()->set_reason(index == 0 ? rankwise::v1::FINISH_REASON_STOP
                                                  : rankwise::v1::FINISH_REASON_LENGTH);
    piece.mutable_finish()->set_prompt_tokens(5);
    piece.mutable_finish()->set_generated_tokens(2);
    answer.Add(piece);
  }
  return answer;
}

TEST(Answer, IsAnOpenAiResultLine) {
  const std::string line = Line(R"({"prompt": "x", "n": 2, "seed": 3, "logprobs": 1})");
  const auto question = ReadQuestion(line, {});
  ASSERT_TRUE(question.ok());
  const Answer answer = TwoSamples();
  ASSERT_TRUE(answer.Check(question->request).ok());
  const std::string id = ResultId(line), text = answer.ToLine(*question, id, {.model = "m", .fingerprint = "f"});
  EXPECT_EQ(text.find('\n'), std::string::npos);
  const json result = json::parse(text);
  EXPECT_EQ(result["custom_id"], "a");
  EXPECT_TRUE(result["error"].is_null());
  EXPECT_EQ(result["response"]["status_code"], 200);
  const json& body = result["response"]["body"];
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["model"], "m");
  EXPECT_EQ(body["seed"], 3);
  EXPECT_EQ(body["choices"][0]["text"], "aa!");
  EXPECT_EQ(body["choices"][1]["text"], "bb!");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(body["choices"][1]["finish_reason"], "length");
  EXPECT_EQ(body["choices"][0]["logprobs"]["token_logprobs"], json::parse("[-0.5, -0.5]"));
  EXPECT_EQ(body["choices"][0]["logprobs"]["top_logprobs"][0]["o"], -1.25);
  EXPECT_EQ(body["usage"]["prompt_tokens"], 5);
  EXPECT_EQ(body["usage"]["completion_tokens"], 4);
  const auto key = ReadResult(text);
  ASSERT_TRUE(key.ok()) << key.status();
  EXPECT_EQ(key->custom_id, "a");
  EXPECT_EQ(key->id, id);
  EXPECT_EQ(key->fingerprint, "f");
  EXPECT_FALSE(key->is_error);
}

TEST(Answer, OfAChatHasAMessageAndBytes) {
  const auto question = ReadQuestion(
      Line(R"({"messages": [{"role": "user", "content": "x"}], "n": 2, "logprobs": true})", "/v1/chat/completions"),
      {.chat_format = ChatFormat::kPlain});
  ASSERT_TRUE(question.ok()) << question.status();
  const json body = json::parse(TwoSamples().ToLine(*question, "i", {}))["response"]["body"];
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["choices"][0]["message"], json::parse(R"({"role": "assistant", "content": "aa!"})"));
  EXPECT_EQ(body["choices"][0]["logprobs"]["content"][0]["bytes"], json::parse("[255]"));
}

TEST(Answer, MustBeWhole) {
  rankwise::v1::GenerateRequest request;
  request.set_n(3);
  EXPECT_THAT(std::string(TwoSamples().Check(request).message()), HasSubstr("2 of 3"));
  request.set_n(1);
  Answer unfinished;
  rankwise::v1::GenerateResponse piece;
  unfinished.Add(piece);
  EXPECT_TRUE(absl::IsInternal(unfinished.Check(request)));
  piece.mutable_finish()->set_reason(rankwise::v1::FINISH_REASON_DEADLINE);
  unfinished.Add(piece);
  EXPECT_THAT(std::string(unfinished.Check(request).message()), HasSubstr("DEADLINE"));
}

TEST(Errors, SayTheLineOrTheRefusal) {
  const auto unreadable = ReadResult(UnreadableLine("", "i", 12, absl::InvalidArgumentError("is not JSON")));
  ASSERT_TRUE(unreadable.ok());
  EXPECT_EQ(unreadable->number, 12);
  EXPECT_TRUE(unreadable->custom_id.empty());
  EXPECT_TRUE(unreadable->is_error);
  const json named = json::parse(UnreadableLine("c", "i", 12, absl::InvalidArgumentError("is not JSON")));
  EXPECT_EQ(named["custom_id"], "c");
  EXPECT_EQ(named["error"]["message"], "line 12: is not JSON");
  const std::string refused = RefusedLine("c", "i", absl::InvalidArgumentError("too long"));
  EXPECT_EQ(json::parse(refused)["response"]["status_code"], 400);
  EXPECT_EQ(json::parse(refused)["response"]["body"]["error"]["message"], "too long");
  EXPECT_TRUE(ReadResult(refused)->is_error);
  EXPECT_EQ(json::parse(RefusedLine("c", "i", absl::InternalError("")))["response"]["status_code"], 500);
}

TEST(Errors, WhatIsNoResultIsRefused) {
  for (const char* text :
       {"", "{}", "[]", R"({"id": "i"})", R"({"id": "i", "custom_id": null, "response": null, "error": {}})",
        R"({"id": "i", "custom_id": "a", "response": {"status_code": 200}, "error": null})"})
    EXPECT_FALSE(ReadResult(text).ok()) << text;
}

}  // namespace
}  // namespace rankwise::batch
