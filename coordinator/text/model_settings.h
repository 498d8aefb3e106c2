#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/added_tokens.h"
#include "coordinator/text/tokenizer.h"

namespace rankwise::text {

// What the small JSON files of a model folder say about its tokens. All are optional.
struct ModelSettings {
  std::string tokenizer_class;  // tokenizer_config.json
  std::optional<bool> add_bos;
  bool add_prefix_space = false;
  bool legacy = true;                               // SentencePiece: text behind an added token gets a dummy prefix too
  std::optional<std::string> bos_token, eos_token;  // tokenizer_config.json, else special_tokens_map.json
  std::vector<std::string> other_special_tokens;    // unk, pad, sep, cls, mask, additional_special_tokens
  std::vector<AddedToken> added_tokens;             // added_tokens_decoder, else added_tokens.json
  std::optional<int32_t> bos_id;                    // generation_config.json, else config.json
  std::vector<int32_t> eos_ids;                     // of both
};

absl::StatusOr<ModelSettings> ReadModelSettings(const std::string& model_dir);

// The id of a token of the vocabulary proper, by its spelling there.
using TokenLookup = std::function<std::optional<int32_t>(const std::string&)>;

struct VocabularyBase {
  TokenLookup lookup;
  std::vector<AddedToken> added_tokens;  // of the tokenizer file itself
  // An added token may take an id that the vocabulary proper spells otherwise: InternLM2 keeps [UNUSED_TOKEN_145] in
  // the SentencePiece model for <|im_end|>.
  bool may_rename = false;
};

// Adds the added and special tokens to `parts`, which holds the vocabulary proper and the tokenizer file's own BOS and
// EOS, and lets the settings decide on those. Does not fill parts.added. Returns all added tokens, each id once.
absl::StatusOr<std::vector<AddedToken>> ApplySettings(const ModelSettings& settings, const VocabularyBase& base,
                                                      TokenizerParts& parts);

}  // namespace rankwise::text
