#include "coordinator/text/model_settings.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "coordinator/text/json_file.h"

namespace rankwise::text {
namespace {

using nlohmann::json;

// The error with the file's name before it.
absl::Status InFile(const std::string& file, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(file, ": ", status.message()));
}

// A special token is a string, or an object with "content".
absl::StatusOr<std::optional<std::string>> SpecialTokenName(const json& object, const char* name) {
  const json& value = Member(object, name);
  if (value.is_object()) return OptionalString(value, "content");
  return OptionalString(object, name);
}

absl::Status ReadSpecialNames(const json& object, ModelSettings& settings) {
  RW_ASSIGN_OR_RETURN(auto bos, SpecialTokenName(object, "bos_token"));
  RW_ASSIGN_OR_RETURN(auto eos, SpecialTokenName(object, "eos_token"));
  if (!settings.bos_token) settings.bos_token = std::move(bos);
  if (!settings.eos_token) settings.eos_token = std::move(eos);
  for (const char* name : {"unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}) {
    RW_ASSIGN_OR_RETURN(auto other, SpecialTokenName(object, name));
    if (other) settings.other_special_tokens.push_back(*other);
  }
  const json& additional = Member(object, "additional_special_tokens");
  if (!additional.is_array()) return absl::OkStatus();
  for (const json& token : additional) {
    const json& content = token.is_object() ? Member(token, "content") : token;
    if (!content.is_string())
      return absl::InvalidArgumentError("additional_special_tokens holds something that is no token");
    settings.other_special_tokens.push_back(content.get_ref<const std::string&>());
  }
  return absl::OkStatus();
}

absl::Status ReadTokenizerConfig(const json& config, ModelSettings& settings) {
  RW_ASSIGN_OR_RETURN(auto tokenizer_class, OptionalString(config, "tokenizer_class"));
  settings.tokenizer_class = tokenizer_class.value_or("");
  RW_ASSIGN_OR_RETURN(settings.add_bos, OptionalBool(config, "add_bos_token"));
  RW_ASSIGN_OR_RETURN(settings.add_prefix_space, BoolOr(config, "add_prefix_space", false));
  RW_ASSIGN_OR_RETURN(settings.legacy, BoolOr(config, "legacy", true));
  RW_RETURN_IF_ERROR(ReadSpecialNames(config, settings));
  const json& decoder = Member(config, "added_tokens_decoder");
  if (decoder.is_null()) return absl::OkStatus();
  if (!decoder.is_object()) return absl::InvalidArgumentError("added_tokens_decoder is not an object");
  for (const auto& [key, value] : decoder.items()) {
    int32_t id = -1;
    if (!absl::SimpleAtoi(key, &id) || id < 0 || id >= kTokenIdLimit)
      return absl::InvalidArgumentError(absl::StrCat("added_tokens_decoder: '", key, "' is no token id"));
    RW_ASSIGN_OR_RETURN(AddedToken token, ParseAddedToken(id, value));
    settings.added_tokens.push_back(std::move(token));
  }
  return absl::OkStatus();
}

absl::Status ReadAddedTokens(const json& object, ModelSettings& settings) {
  if (object.is_null() || !settings.added_tokens.empty()) return absl::OkStatus();
  if (!object.is_object()) return absl::InvalidArgumentError("not an object");
  for (const auto& [content, value] : object.items()) {
    RW_ASSIGN_OR_RETURN(const int32_t id, ToTokenId(value, content));
    settings.added_tokens.push_back({.id = id, .content = content});
  }
  return absl::OkStatus();
}

absl::Status ReadModelIds(const json& config, ModelSettings& settings) {
  const json& bos = Member(config, "bos_token_id");
  if (!bos.is_null() && !settings.bos_id) {
    RW_ASSIGN_OR_RETURN(settings.bos_id, ToTokenId(bos, "bos_token_id"));
  }
  const json& eos = Member(config, "eos_token_id");
  if (eos.is_null()) return absl::OkStatus();
  for (const json& value : eos.is_array() ? eos : json::array({eos})) {
    RW_ASSIGN_OR_RETURN(const int32_t id, ToTokenId(value, "eos_token_id"));
    settings.eos_ids.push_back(id);
  }
  return absl::OkStatus();
}

// All added tokens, each id and each content once.
absl::StatusOr<std::vector<AddedToken>> MergeAddedTokens(const ModelSettings& settings, const VocabularyBase& base) {
  std::vector<AddedToken> merged;
  absl::flat_hash_map<int32_t, size_t> by_id;
  absl::flat_hash_map<std::string, size_t> by_content;
  const auto add = [&](const AddedToken& token) -> absl::Status {
    const auto same_id = by_id.find(token.id);
    const auto same_content = by_content.find(token.content);
    if (same_id != by_id.end() && same_content != by_content.end() && same_id->second == same_content->second)
      return absl::OkStatus();
    if (same_id != by_id.end())
      return absl::InvalidArgumentError(absl::StrCat("token id ", token.id, " is both '",
                                                     merged[same_id->second].content, "' and '", token.content, "'"));
    if (same_content != by_content.end())
      return absl::InvalidArgumentError(absl::StrCat("added token '", token.content, "' has ids ",
                                                     merged[same_content->second].id, " and ", token.id));
    by_id[token.id] = by_content[token.content] = merged.size();
    merged.push_back(token);
    return absl::OkStatus();
  };
  for (const AddedToken& token : base.added_tokens) RW_RETURN_IF_ERROR(add(token));
  for (const AddedToken& token : settings.added_tokens) RW_RETURN_IF_ERROR(add(token));

  std::vector<std::string> special_names = settings.other_special_tokens;
  for (const auto& name : {settings.bos_token, settings.eos_token})
    if (name) special_names.push_back(*name);
  for (const std::string& name : special_names) {
    const auto known = by_content.find(name);
    if (known != by_content.end()) {
      merged[known->second].special = true;
    } else if (const std::optional<int32_t> id = base.lookup(name)) {
      RW_RETURN_IF_ERROR(add({.id = *id, .content = name, .special = true}));
    }
  }
  return merged;
}

absl::Status AddToVocabulary(const AddedToken& token, const VocabularyBase& base, Vocabulary& vocabulary) {
  Piece piece{token.special ? PieceKind::kSpecial : PieceKind::kLiteral, token.content};
  const std::optional<int32_t> known = base.lookup(token.content);
  if (known && *known != token.id)
    return absl::InvalidArgumentError(
        absl::StrCat("added token '", token.content, "' has id ", token.id, ", but ", *known, " in the vocabulary"));
  if (!known && !base.may_rename) return vocabulary.Add(token.id, std::move(piece));
  vocabulary.Replace(token.id, std::move(piece));
  return absl::OkStatus();
}

absl::StatusOr<int32_t> FindToken(const std::string& name, const char* role, const std::vector<AddedToken>& added) {
  for (const AddedToken& token : added)
    if (token.content == name) return token.id;
  return absl::InvalidArgumentError(absl::StrCat(role, " '", name, "' is not in the vocabulary"));
}

}  // namespace

absl::StatusOr<ModelSettings> ReadModelSettings(const std::string& model_dir) {
  ModelSettings settings;
  const std::pair<const char*, absl::Status (*)(const json&, ModelSettings&)> readers[] = {
      {"tokenizer_config.json", ReadTokenizerConfig},
      {"special_tokens_map.json", ReadSpecialNames},
      {"added_tokens.json", ReadAddedTokens},
      {"generation_config.json", ReadModelIds},
      {"config.json", ReadModelIds},
  };
  for (const auto& [name, read] : readers) {
    const std::string path = absl::StrCat(model_dir, "/", name);
    RW_ASSIGN_OR_RETURN(const json contents, ReadJsonFileIfPresent(path));
    RW_RETURN_IF_ERROR(InFile(path, read(contents, settings)));
  }
  return settings;
}

absl::StatusOr<std::vector<AddedToken>> ApplySettings(const ModelSettings& settings, const VocabularyBase& base,
                                                      TokenizerParts& parts) {
  RW_ASSIGN_OR_RETURN(std::vector<AddedToken> added, MergeAddedTokens(settings, base));
  for (const AddedToken& token : added) RW_RETURN_IF_ERROR(AddToVocabulary(token, base, parts.vocabulary));

  if (settings.bos_token) {
    RW_ASSIGN_OR_RETURN(parts.bos_id, FindToken(*settings.bos_token, "bos_token", added));
  } else if (settings.bos_id) {
    parts.bos_id = settings.bos_id;
  }
  parts.adds_bos = settings.add_bos.value_or(parts.adds_bos);
  if (parts.adds_bos && !parts.bos_id)
    return absl::InvalidArgumentError("add_bos_token is true, but no file names a BOS token");

  std::vector<int32_t> eos_ids = settings.eos_ids;
  if (settings.eos_token) {
    RW_ASSIGN_OR_RETURN(const int32_t id, FindToken(*settings.eos_token, "eos_token", added));
    eos_ids.push_back(id);
  }
  if (!eos_ids.empty()) parts.eos_ids = std::move(eos_ids);
  std::sort(parts.eos_ids.begin(), parts.eos_ids.end());
  parts.eos_ids.erase(std::unique(parts.eos_ids.begin(), parts.eos_ids.end()), parts.eos_ids.end());

  std::vector<int32_t> named = parts.eos_ids;
  if (parts.bos_id) named.push_back(*parts.bos_id);
  for (const int32_t id : named)
    if (parts.vocabulary.at(id).kind == PieceKind::kAbsent)
      return absl::InvalidArgumentError(absl::StrCat("BOS or EOS id ", id, " names no token of the vocabulary"));
  return added;
}

}  // namespace rankwise::text
