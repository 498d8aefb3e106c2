#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/regex.h"
#include "nlohmann/json.hpp"

namespace rankwise::text {

// The "normalizer" of a tokenizer.json: NFC, NFD, NFKC, NFKD, Prepend, Replace and Sequences of them. May be called
// from several threads.
class Normalizer {
 public:
  // `object` may be JSON null: nothing is changed. Unimplemented names a type that is not supported.
  static absl::StatusOr<Normalizer> FromJson(const nlohmann::json& object);
  static Normalizer Nfc();

  // In time linearithmic in the text. Requires: `text` is UTF-8.
  absl::StatusOr<std::string> Apply(std::string_view text) const;

 private:
  enum class UnicodeForm : uint8_t { kNfc, kNfd, kNfkc, kNfkd };
  struct Prepend {
    std::string prefix;  // before text that is not empty
  };
  struct Replace {
    Regex pattern;
    std::string content;
  };
  using Stage = std::variant<UnicodeForm, Prepend, Replace>;

  absl::Status AddStages(const nlohmann::json& object, int depth);
  static absl::Status ApplyStage(UnicodeForm form, std::string& text);
  static absl::Status ApplyStage(const Prepend& stage, std::string& text);
  static absl::Status ApplyStage(const Replace& stage, std::string& text);

  std::vector<Stage> stages_;
};

// "pattern" of a Split or Replace: {"String": ...} or {"Regex": ...}.
absl::StatusOr<Regex> ParsePattern(const nlohmann::json& object);

// Sequences nested deeper are refused.
inline constexpr int kMaxSequenceDepth = 8;

}  // namespace rankwise::text
