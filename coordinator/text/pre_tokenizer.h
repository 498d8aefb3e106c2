#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/regex.h"
#include "nlohmann/json.hpp"

namespace rankwise::text {

// The patterns that cut text into words before merging, as the models were trained with.
extern const char kGpt2Pattern[];
extern const char kLlama3Pattern[];
extern const char kQwen2Pattern[];

// The "pre_tokenizer" of a tokenizer.json: Split, ByteLevel, Metaspace, Digits, Punctuation, Whitespace,
// WhitespaceSplit and Sequences of them. May be called from several threads.
class PreTokenizer {
 public:
  // `object` may be JSON null: the text is one word. Unimplemented names a type that is not supported.
  static absl::StatusOr<PreTokenizer> FromJson(const nlohmann::json& object);
  // Words of `pattern`, spelt in byte symbols.
  static absl::StatusOr<PreTokenizer> ByteLevelWords(const std::string& pattern, bool add_prefix_space);

  // The words of `text`, none empty. `begins_text`: no text and no added token comes before. Requires: UTF-8.
  absl::StatusOr<std::vector<std::string>> Split(std::string text, bool begins_text) const;

  // Words are in byte symbols (byte_symbols.h).
  bool is_byte_level() const { return is_byte_level_; }

 private:
  using Words = std::vector<std::string>;
  enum class Behavior : uint8_t { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class PrependScheme : uint8_t { kAlways, kFirst, kNever };
  struct SplitStage {
    Regex pattern;
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;  // what does not match is the delimiter
  };
  struct ByteLevelStage {
    bool add_prefix_space = false;
    std::optional<SplitStage> split;
  };
  struct MetaspaceStage {
    std::string replacement;
    PrependScheme prepend = PrependScheme::kAlways;
    std::optional<SplitStage> split;
  };
  using Stage = std::variant<SplitStage, ByteLevelStage, MetaspaceStage>;

  absl::Status AddStages(const nlohmann::json& object, int depth);
  static absl::StatusOr<Stage> ParseStage(const std::string& type, const nlohmann::json& object);
  static absl::StatusOr<Stage> ParseSplit(const nlohmann::json& object);
  static absl::StatusOr<Stage> ParseByteLevel(const nlohmann::json& object);
  static absl::StatusOr<Stage> ParseMetaspace(const nlohmann::json& object);
  // Types that are a fixed pattern.
  static absl::StatusOr<Stage> ParseFixedPattern(const std::string& type, const nlohmann::json& object);
  static absl::StatusOr<Behavior> ParseBehavior(const std::string& name);

  static absl::Status ApplyStage(const SplitStage& stage, bool begins_text, Words& words);
  static absl::Status ApplyStage(const ByteLevelStage& stage, bool begins_text, Words& words);
  static absl::Status ApplyStage(const MetaspaceStage& stage, bool begins_text, Words& words);
  static absl::Status SplitWord(const SplitStage& stage, const std::string& word, Words& words);

  std::vector<Stage> stages_;
  bool is_byte_level_ = false;
};

}  // namespace rankwise::text
