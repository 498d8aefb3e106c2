#include "coordinator/text/bpe_tokenizer.h"

#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "coordinator/text/byte_symbols.h"
#include "coordinator/text/json_file.h"

namespace rankwise::text {
namespace {

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(TokenizerParts parts, BpeComponents components, AddedTokenMatcher normalized_added)
      : Tokenizer(std::move(parts)),
        components_(std::move(components)),
        normalized_added_(std::move(normalized_added)) {}

 private:
  absl::Status EncodeSegment(const Segment& segment, std::vector<int32_t>& ids) const override {
    RW_ASSIGN_OR_RETURN(const std::string normalized, components_.normalizer.Apply(segment.text));
    BpeModel::Scratch scratch;
    for (const AddedTokenMatcher::Segment& part : normalized_added_.Split(normalized, segment.parse_special)) {
      if (part.token) {
        ids.push_back(*part.token);
        continue;
      }
      const bool begins_text = segment.begins_text && part.text.data() == normalized.data();
      RW_ASSIGN_OR_RETURN(const std::vector<std::string> words,
                          components_.pre_tokenizer.Split(std::string(part.text), begins_text));
      for (const std::string& word : words) RW_RETURN_IF_ERROR(components_.model.Encode(word, scratch, ids));
    }
    return absl::OkStatus();
  }

  BpeComponents components_;
  AddedTokenMatcher normalized_added_;  // added tokens looked for in normalized text
};

}  // namespace

Piece PieceOfSpelling(const std::string& spelling, const SpellingRules& rules) {
  if (rules.is_byte_level) {
    std::optional<std::string> bytes = FromByteSymbols(spelling);
    return bytes ? Piece{PieceKind::kByte, *std::move(bytes)} : Piece{PieceKind::kLiteral, spelling};
  }
  if (rules.has_byte_fallback) {
    // A space spelt as a byte is text: the rule for leading spaces holds for it too.
    if (const std::optional<uint8_t> byte = ParseByteToken(spelling))
      return Piece{*byte == ' ' ? PieceKind::kText : PieceKind::kByte, std::string(1, static_cast<char>(*byte))};
  }
  Piece piece{PieceKind::kText, spelling};
  for (const auto& [from, to] : rules.replacements) piece.bytes = absl::StrReplaceAll(piece.bytes, {{from, to}});
  return piece;
}

absl::Status AddVocabulary(const nlohmann::json& object, const SpellingRules& rules, BpeModel& model,
                           Vocabulary& vocabulary) {
  if (!object.is_object()) return absl::InvalidArgumentError("the vocabulary is not an object");
  for (const auto& [spelling, value] : object.items()) {
    RW_ASSIGN_OR_RETURN(const int32_t id, ToTokenId(value, absl::StrCat("id of token '", spelling, "'")));
    RW_RETURN_IF_ERROR(model.AddToken(spelling, id));
    RW_RETURN_IF_ERROR(vocabulary.Add(id, PieceOfSpelling(spelling, rules)));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(TokenizerParts parts, BpeComponents components,
                                                            const ModelSettings& settings) {
  VocabularyBase base;
  base.lookup = [&components](const std::string& name) { return components.model.Find(name); };
  base.added_tokens = std::move(components.added_tokens);
  RW_ASSIGN_OR_RETURN(const std::vector<AddedToken> added, ApplySettings(settings, base, parts));
  AddedTokenMatcher normalized_added;
  for (const AddedToken& token : added) {
    if (token.normalized) {
      RW_ASSIGN_OR_RETURN(const std::string spelling, components.normalizer.Apply(token.content));
      normalized_added.Add(spelling, token);
    } else {
      parts.added.Add(token.content, token);
    }
  }
  return std::make_unique<BpeTokenizer>(std::move(parts), std::move(components), std::move(normalized_added));
}

}  // namespace rankwise::text
