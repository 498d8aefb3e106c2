#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/inference.pb.h"

// What one line of a batch asks and what its result says, in the shape of OpenAI's batch files. Pure.
namespace rankwise::batch {

inline constexpr size_t kLongestLine = size_t{8} << 20;  // bytes; a request is smaller than its line
inline constexpr size_t kLongestId = 512;

// How messages become the model's text. "none": lines with messages get an error that says so.
enum class ChatFormat { kNone, kChatml, kLlama3, kPlain };

struct QuestionOptions {
  ChatFormat chat_format = ChatFormat::kNone;
  std::string tenant;
  int32_t priority = 0;
};

// A line understood: {"custom_id", "method": "POST", "url": "/v1/completions" or "/v1/chat/completions", "body"}.
struct Question {
  std::string custom_id;
  bool is_chat = false;
  // Always carries a seed: the body's, else one that follows from the custom_id. So a line asked again gets the same
  // answer.
  rankwise::v1::GenerateRequest request;
};

// The custom_id of a line. InvalidArgument says what is wrong with the line.
absl::StatusOr<std::string> ReadCustomId(std::string_view line);

// InvalidArgument names the field and its value; nothing is ignored but "model", "user" and "metadata", which say
// nothing about the answer.
absl::StatusOr<Question> ReadQuestion(std::string_view line, const QuestionOptions& options);

// The name of a line's result: a function of its bytes, so that a changed line is told from the one that was answered.
std::string ResultId(std::string_view line);

// What the answers of a run have in common; a mixture of two is refused.
struct Served {
  std::string model;
  std::string fingerprint;  // of weights, KV format and scales
};

// The messages of one call, put together per sample.
class Answer {
 public:
  void Add(const rankwise::v1::GenerateResponse& piece);
  // Internal when a sample is missing or did not end by itself.
  absl::Status Check(const rankwise::v1::GenerateRequest& request) const;
  // The result line without its newline. `created` is 0 in all: a line is a function of its question and the model.
  std::string ToLine(const Question& question, const std::string& id, const Served& served) const;

 private:
  struct Sample {
    std::string text;
    std::vector<rankwise::v1::PositionLogprobs> logprobs;
    rankwise::v1::Finish finish;
    bool has_finish = false;
  };
  std::vector<Sample> samples_;
};

// The result of a line that cannot be understood: no response, and an error that names the line. `custom_id` may be
// empty: then it is null in the result, and the line's number stands for it.
std::string UnreadableLine(const std::string& custom_id, const std::string& id, int64_t number,
                           const absl::Status& why);
// The result of a line that the server refused: a response with a status of 400 or more, and OpenAI's error object.
std::string RefusedLine(const std::string& custom_id, const std::string& id, const absl::Status& why);

// What a result line says of itself. InvalidArgument when it is no result of ours.
struct ResultKey {
  std::string custom_id;  // empty: an unreadable line, see `number`
  int64_t number = 0;
  std::string id;           // ResultId of its question
  std::string fingerprint;  // Served::fingerprint; empty in errors
  bool is_error = false;
};
absl::StatusOr<ResultKey> ReadResult(std::string_view line);

}  // namespace rankwise::batch
