#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "coordinator/text/bpe_tokenizer.h"
#include "coordinator/text/json_file.h"

namespace rankwise::text {
namespace {

using nlohmann::json;

// The "decoder" of a tokenizer.json.
struct Decoder {
  SpellingRules spelling;
  DecodeRules rules;
};

absl::Status Unsupported(const std::string& what) {
  return absl::UnimplementedError(absl::StrCat(what, " is not supported"));
}

absl::Status AddReplacement(const json& object, SpellingRules& spelling) {
  RW_ASSIGN_OR_RETURN(std::string from, StringMember(Member(object, "pattern"), "String"));
  RW_ASSIGN_OR_RETURN(std::string to, StringMember(object, "content"));
  if (from.empty()) return absl::InvalidArgumentError("decoder Replace has an empty pattern");
  spelling.replacements.emplace_back(std::move(from), std::move(to));
  return absl::OkStatus();
}

absl::Status AddStrip(const json& object, DecodeRules& rules) {
  RW_ASSIGN_OR_RETURN(const std::string content, StringMember(object, "content"));
  if (content != " " || Member(object, "start") != 1 || Member(object, "stop") != 0)
    return Unsupported("decoder Strip of anything but one leading space");
  rules.leading_space = LeadingSpace::kDropOne;
  return absl::OkStatus();
}

absl::Status AddMetaspace(const json& object, Decoder& decoder) {
  RW_ASSIGN_OR_RETURN(std::string replacement, StringMember(object, "replacement"));
  RW_ASSIGN_OR_RETURN(const bool add_prefix_space, BoolOr(object, "add_prefix_space", true));
  RW_ASSIGN_OR_RETURN(const std::optional<std::string> scheme, OptionalString(object, "prepend_scheme"));
  if (replacement.empty()) return absl::InvalidArgumentError("decoder Metaspace replacement is empty");
  decoder.spelling.replacements.emplace_back(std::move(replacement), " ");
  const bool prepends = scheme ? *scheme != "never" : add_prefix_space;
  if (prepends) decoder.rules.leading_space = LeadingSpace::kDropAllOfFirst;
  return absl::OkStatus();
}

absl::Status AddDecoder(const json& object, int depth, Decoder& decoder) {
  if (depth > kMaxSequenceDepth) return absl::InvalidArgumentError("decoder Sequences are nested too deep");
  RW_ASSIGN_OR_RETURN(const std::string type, StringMember(object, "type"));
  if (type == "Sequence") {
    RW_ASSIGN_OR_RETURN(const json* decoders, ArrayMember(object, "decoders"));
    for (const json& part : *decoders) RW_RETURN_IF_ERROR(AddDecoder(part, depth + 1, decoder));
    return absl::OkStatus();
  }
  if (type == "Replace") return AddReplacement(object, decoder.spelling);
  if (type == "Strip") return AddStrip(object, decoder.rules);
  if (type == "Metaspace") return AddMetaspace(object, decoder);
  if (type == "ByteLevel") {
    decoder.spelling.is_byte_level = true;
  } else if (type == "ByteFallback") {
    decoder.spelling.has_byte_fallback = true;
    decoder.rules.replaces_each_byte = true;
  } else if (type != "Fuse") {
    return Unsupported(absl::StrCat("decoder type '", type, "'"));
  }
  return absl::OkStatus();
}

absl::StatusOr<BpeModel::Options> ParseModelOptions(const json& model) {
  const json& dropout = Member(model, "dropout");
  if (!dropout.is_null() && dropout != 0) return Unsupported("BPE dropout");
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    RW_ASSIGN_OR_RETURN(const std::optional<std::string> affix, OptionalString(model, name));
    if (affix && !affix->empty()) return Unsupported(absl::StrCat("BPE ", name, " '", *affix, "'"));
  }
  BpeModel::Options options;
  RW_ASSIGN_OR_RETURN(options.fuse_unknown, BoolOr(model, "fuse_unk", false));
  RW_ASSIGN_OR_RETURN(options.byte_fallback, BoolOr(model, "byte_fallback", false));
  RW_ASSIGN_OR_RETURN(options.ignore_merges, BoolOr(model, "ignore_merges", false));
  return options;
}

// Merges are "left right" or ["left", "right"].
absl::Status AddMerges(const json& merges, BpeModel& model) {
  if (!merges.is_array()) return absl::InvalidArgumentError("model.merges is not an array");
  for (const json& merge : merges) {
    std::vector<std::string> pair;
    if (merge.is_string()) {
      pair = absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
    } else if (merge.is_array()) {
      for (const json& token : merge)
        if (token.is_string()) pair.push_back(token.get_ref<const std::string&>());
    }
    if (pair.size() != 2)
      return absl::InvalidArgumentError(absl::StrCat("merge ", merge.dump(), " is no pair of tokens"));
    RW_RETURN_IF_ERROR(model.AddMerge(pair[0], pair[1]));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<AddedToken>> ParseAddedTokens(const json& array) {
  std::vector<AddedToken> tokens;
  if (array.is_null()) return tokens;
  if (!array.is_array()) return absl::InvalidArgumentError("added_tokens is not an array");
  for (const json& object : array) {
    RW_ASSIGN_OR_RETURN(const int32_t id, ToTokenId(Member(object, "id"), "id of an added token"));
    RW_ASSIGN_OR_RETURN(AddedToken token, ParseAddedToken(id, object));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// BOS is the special token that a TemplateProcessing puts before a single text. What it puts behind (EOS) is for
// training: a prompt goes on.
absl::Status ParsePostProcessor(const json& object, int depth, TokenizerParts& parts) {
  if (object.is_null()) return absl::OkStatus();
  if (depth > kMaxSequenceDepth) return absl::InvalidArgumentError("post_processor Sequences are nested too deep");
  RW_ASSIGN_OR_RETURN(const std::string type, StringMember(object, "type"));
  if (type == "Sequence") {
    RW_ASSIGN_OR_RETURN(const json* processors, ArrayMember(object, "processors"));
    for (const json& part : *processors) RW_RETURN_IF_ERROR(ParsePostProcessor(part, depth + 1, parts));
    return absl::OkStatus();
  }
  if (type == "ByteLevel") return absl::OkStatus();
  if (type != "TemplateProcessing") return Unsupported(absl::StrCat("post_processor type '", type, "'"));
  RW_ASSIGN_OR_RETURN(const json* steps, ArrayMember(object, "single"));
  for (const json& step : *steps) {
    if (!Member(step, "Sequence").is_null()) break;
    RW_ASSIGN_OR_RETURN(const std::string name, StringMember(Member(step, "SpecialToken"), "id"));
    const json& ids = Member(Member(Member(object, "special_tokens"), name.c_str()), "ids");
    if (parts.adds_bos || !ids.is_array() || ids.size() != 1) return Unsupported("a prefix of more than one token");
    RW_ASSIGN_OR_RETURN(parts.bos_id, ToTokenId(ids[0], absl::StrCat("id of '", name, "'")));
    parts.adds_bos = true;
  }
  return absl::OkStatus();
}

absl::Status ParseModel(const json& object, const SpellingRules& spelling, BpeModel& model, Vocabulary& pieces) {
  RW_ASSIGN_OR_RETURN(const std::optional<std::string> type, OptionalString(object, "type"));
  // Files from before the tag existed hold merges.
  if (type.value_or("BPE") != "BPE") return Unsupported(absl::StrCat("model type '", *type, "'"));
  RW_ASSIGN_OR_RETURN(BpeModel::Options options, ParseModelOptions(object));
  RW_RETURN_IF_ERROR(AddVocabulary(Member(object, "vocab"), spelling, model, pieces));
  RW_RETURN_IF_ERROR(AddMerges(Member(object, "merges"), model));
  RW_ASSIGN_OR_RETURN(const std::optional<std::string> unknown, OptionalString(object, "unk_token"));
  if (unknown) {
    options.unknown = model.Find(*unknown);
    if (!options.unknown) return absl::InvalidArgumentError(absl::StrCat("unk_token '", *unknown, "' has no id"));
  }
  model.set_options(options);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerJson(const std::string& path, const ModelSettings& settings) {
  RW_ASSIGN_OR_RETURN(const json root, ReadJsonFile(path));
  if (!root.is_object()) return absl::InvalidArgumentError("not a JSON object");
  if (Member(root, "decoder").is_null()) return Unsupported("a tokenizer without decoder");
  Decoder decoder;
  RW_RETURN_IF_ERROR(AddDecoder(Member(root, "decoder"), 0, decoder));

  TokenizerParts parts;
  parts.rules = decoder.rules;
  BpeComponents components;
  RW_RETURN_IF_ERROR(ParseModel(Member(root, "model"), decoder.spelling, components.model, parts.vocabulary));
  RW_ASSIGN_OR_RETURN(components.normalizer, Normalizer::FromJson(Member(root, "normalizer")));
  RW_ASSIGN_OR_RETURN(components.pre_tokenizer, PreTokenizer::FromJson(Member(root, "pre_tokenizer")));
  if (components.pre_tokenizer.is_byte_level() != decoder.spelling.is_byte_level)
    return absl::InvalidArgumentError("of pre_tokenizer and decoder only one is ByteLevel");
  RW_ASSIGN_OR_RETURN(components.added_tokens, ParseAddedTokens(Member(root, "added_tokens")));
  RW_RETURN_IF_ERROR(ParsePostProcessor(Member(root, "post_processor"), 0, parts));
  return MakeBpeTokenizer(std::move(parts), std::move(components), settings);
}

}  // namespace rankwise::text
