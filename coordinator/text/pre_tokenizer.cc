#include "coordinator/text/pre_tokenizer.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "coordinator/text/byte_symbols.h"
#include "coordinator/text/json_file.h"
#include "coordinator/text/normalizer.h"

namespace rankwise::text {

// openai/gpt-2 src/encoder.py.
const char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// meta-llama/llama3 llama/tokenizer.py.
const char kLlama3Pattern[] = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
                              R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// tokenizer.json of Qwen2: as Llama 3, but digits one by one.
const char kQwen2Pattern[] = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
                             R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

absl::StatusOr<PreTokenizer> PreTokenizer::FromJson(const nlohmann::json& object) {
  PreTokenizer pre_tokenizer;
  if (!object.is_null()) RW_RETURN_IF_ERROR(pre_tokenizer.AddStages(object, 0));
  return pre_tokenizer;
}

absl::StatusOr<PreTokenizer> PreTokenizer::ByteLevelWords(const std::string& pattern, bool add_prefix_space) {
  RW_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(pattern));
  PreTokenizer pre_tokenizer;
  pre_tokenizer.stages_.emplace_back(ByteLevelStage{add_prefix_space, SplitStage{std::move(regex)}});
  pre_tokenizer.is_byte_level_ = true;
  return pre_tokenizer;
}

absl::Status PreTokenizer::AddStages(const nlohmann::json& object, int depth) {
  if (depth > kMaxSequenceDepth) return absl::InvalidArgumentError("pre_tokenizer Sequences are nested too deep");
  RW_ASSIGN_OR_RETURN(const std::string type, StringMember(object, "type"));
  if (type == "Sequence") {
    RW_ASSIGN_OR_RETURN(const nlohmann::json* parts, ArrayMember(object, "pretokenizers"));
    for (const auto& part : *parts) RW_RETURN_IF_ERROR(AddStages(part, depth + 1));
    return absl::OkStatus();
  }
  RW_ASSIGN_OR_RETURN(Stage stage, ParseStage(type, object));
  if (std::holds_alternative<ByteLevelStage>(stage)) {
    if (is_byte_level_) return absl::InvalidArgumentError("pre_tokenizer has ByteLevel twice");
    is_byte_level_ = true;
  }
  stages_.push_back(std::move(stage));
  return absl::OkStatus();
}

absl::StatusOr<PreTokenizer::Stage> PreTokenizer::ParseStage(const std::string& type, const nlohmann::json& object) {
  if (type == "Split") return ParseSplit(object);
  if (type == "ByteLevel") return ParseByteLevel(object);
  if (type == "Metaspace") return ParseMetaspace(object);
  return ParseFixedPattern(type, object);
}

absl::StatusOr<PreTokenizer::Behavior> PreTokenizer::ParseBehavior(const std::string& name) {
  static constexpr std::pair<std::string_view, Behavior> kNames[] = {
      {"Isolated", Behavior::kIsolated},
      {"Removed", Behavior::kRemoved},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous},
  };
  for (const auto& [known, behavior] : kNames)
    if (known == name) return behavior;
  return absl::UnimplementedError(absl::StrCat("split behavior '", name, "' is not supported"));
}

absl::StatusOr<PreTokenizer::Stage> PreTokenizer::ParseSplit(const nlohmann::json& object) {
  RW_ASSIGN_OR_RETURN(Regex pattern, ParsePattern(object));
  RW_ASSIGN_OR_RETURN(const std::string name, StringMember(object, "behavior"));
  RW_ASSIGN_OR_RETURN(const Behavior behavior, ParseBehavior(name));
  RW_ASSIGN_OR_RETURN(const bool invert, BoolOr(object, "invert", false));
  return SplitStage{std::move(pattern), behavior, invert};
}

absl::StatusOr<PreTokenizer::Stage> PreTokenizer::ParseByteLevel(const nlohmann::json& object) {
  ByteLevelStage stage;
  RW_ASSIGN_OR_RETURN(stage.add_prefix_space, BoolOr(object, "add_prefix_space", true));
  RW_ASSIGN_OR_RETURN(const bool use_regex, BoolOr(object, "use_regex", true));
  if (use_regex) {
    RW_ASSIGN_OR_RETURN(Regex pattern, Regex::Compile(kGpt2Pattern));
    stage.split = SplitStage{std::move(pattern)};
  }
  return stage;
}

absl::StatusOr<PreTokenizer::Stage> PreTokenizer::ParseMetaspace(const nlohmann::json& object) {
  MetaspaceStage stage;
  RW_ASSIGN_OR_RETURN(stage.replacement, StringMember(object, "replacement"));
  if (stage.replacement.empty()) return absl::InvalidArgumentError("Metaspace replacement is empty");
  RW_ASSIGN_OR_RETURN(const bool add_prefix_space, BoolOr(object, "add_prefix_space", true));
  RW_ASSIGN_OR_RETURN(const std::optional<std::string> scheme, OptionalString(object, "prepend_scheme"));
  if (scheme == "never" || (!scheme && !add_prefix_space)) {
    stage.prepend = PrependScheme::kNever;
  } else if (scheme == "first") {
    stage.prepend = PrependScheme::kFirst;
  } else if (scheme && scheme != "always") {
    return absl::UnimplementedError(absl::StrCat("prepend_scheme '", *scheme, "' is not supported"));
  }
  RW_ASSIGN_OR_RETURN(const bool split, BoolOr(object, "split", true));
  if (split) {
    RW_ASSIGN_OR_RETURN(Regex pattern, Regex::CompileLiteral(stage.replacement));
    stage.split = SplitStage{std::move(pattern), Behavior::kMergedWithNext};
  }
  return stage;
}

absl::StatusOr<PreTokenizer::Stage> PreTokenizer::ParseFixedPattern(const std::string& type,
                                                                    const nlohmann::json& object) {
  const char* pattern = nullptr;
  Behavior behavior = Behavior::kIsolated;
  bool invert = false;
  if (type == "Digits") {
    RW_ASSIGN_OR_RETURN(const bool individual, BoolOr(object, "individual_digits", false));
    pattern = R"(\p{N})";
    behavior = individual ? Behavior::kIsolated : Behavior::kContiguous;
  } else if (type == "Punctuation") {
    pattern = R"([!-/:-@\[-`{-~\p{P}])";
    RW_ASSIGN_OR_RETURN(const std::optional<std::string> name, OptionalString(object, "behavior"));
    RW_ASSIGN_OR_RETURN(behavior, ParseBehavior(name.value_or("Isolated")));
  } else if (type == "Whitespace") {
    pattern = R"(\w+|[^\w\s]+)";
    behavior = Behavior::kRemoved;
    invert = true;
  } else if (type == "WhitespaceSplit") {
    pattern = R"(\s)";
    behavior = Behavior::kRemoved;
  } else {
    return absl::UnimplementedError(absl::StrCat("pre_tokenizer type '", type, "' is not supported"));
  }
  RW_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(pattern));
  return SplitStage{std::move(regex), behavior, invert};
}

absl::StatusOr<std::vector<std::string>> PreTokenizer::Split(std::string text, bool begins_text) const {
  Words words;
  words.push_back(std::move(text));
  for (const Stage& stage : stages_)
    RW_RETURN_IF_ERROR(std::visit([&](const auto& kind) { return ApplyStage(kind, begins_text, words); }, stage));
  return words;
}

absl::Status PreTokenizer::ApplyStage(const SplitStage& stage, bool, Words& words) {
  Words split;
  for (const std::string& word : words) RW_RETURN_IF_ERROR(SplitWord(stage, word, split));
  words = std::move(split);
  return absl::OkStatus();
}

absl::Status PreTokenizer::ApplyStage(const ByteLevelStage& stage, bool begins_text, Words& words) {
  if (stage.add_prefix_space)
    for (std::string& word : words)
      if (!word.starts_with(' ')) word.insert(0, " ");
  if (stage.split) RW_RETURN_IF_ERROR(ApplyStage(*stage.split, begins_text, words));
  for (std::string& word : words) word = ToByteSymbols(word);
  return absl::OkStatus();
}

absl::Status PreTokenizer::ApplyStage(const MetaspaceStage& stage, bool begins_text, Words& words) {
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = absl::StrReplaceAll(words[i], {{" ", stage.replacement}});
    const bool prepends =
        stage.prepend == PrependScheme::kAlways || (stage.prepend == PrependScheme::kFirst && begins_text && i == 0);
    if (prepends && !words[i].starts_with(stage.replacement)) words[i].insert(0, stage.replacement);
  }
  return stage.split ? ApplyStage(*stage.split, begins_text, words) : absl::OkStatus();
}

// NormalizedString::split of Hugging Face tokenizers.
absl::Status PreTokenizer::SplitWord(const SplitStage& stage, const std::string& word, Words& words) {
  struct Part {
    ByteRange range;
    bool is_delimiter;
  };
  RW_ASSIGN_OR_RETURN(const std::vector<ByteRange> matches, stage.pattern.FindAll(word));
  std::vector<Part> parts;
  size_t done = 0;
  for (const ByteRange& match : matches) {
    if (done < match.begin) parts.push_back({{done, match.begin}, stage.invert});
    parts.push_back({match, !stage.invert});
    done = match.end;
  }
  if (done < word.size()) parts.push_back({{done, word.size()}, stage.invert});

  bool was_delimiter = false;
  const auto joins_previous = [&](const Part& part) {
    switch (stage.behavior) {
      case Behavior::kContiguous:
        return part.is_delimiter == was_delimiter;
      case Behavior::kMergedWithPrevious:
        return part.is_delimiter && !was_delimiter;
      case Behavior::kMergedWithNext:  // one delimiter joins what follows it, and of several the last
        return was_delimiter && !part.is_delimiter;
      case Behavior::kIsolated:
      case Behavior::kRemoved:
        break;
    }
    return false;
  };
  const size_t first = words.size();
  for (const Part& part : parts) {
    const std::string_view text = std::string_view(word).substr(part.range.begin, part.range.end - part.range.begin);
    const bool is_removed = part.is_delimiter && stage.behavior == Behavior::kRemoved;
    if (joins_previous(part) && words.size() > first) {
      words.back() += text;
    } else if (!is_removed) {
      words.emplace_back(text);
    }
    was_delimiter = part.is_delimiter;
  }
  return absl::OkStatus();
}

}  // namespace rankwise::text
