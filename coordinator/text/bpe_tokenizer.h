#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/bpe.h"
#include "coordinator/text/model_settings.h"
#include "coordinator/text/normalizer.h"
#include "coordinator/text/pre_tokenizer.h"
#include "coordinator/text/tokenizer.h"
#include "nlohmann/json.hpp"

namespace rankwise::text {

// The tokenizers that merge pairs, from three kinds of files. Errors name the value, not the file.

// A Hugging Face tokenizer.json with a BPE model: byte-level (GPT-2, Llama 3, Qwen) or SentencePiece style with byte
// fallback (Llama 1 and 2).
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerJson(const std::string& path, const ModelSettings& settings);

// Whether a tokenizer.model holds tiktoken ranks: lines of a base64 token and its rank.
bool IsRankFile(const std::string& contents);
// From the contents of such a file as Llama 3 ships it: its pattern, and its 256 special tokens behind the ranks.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadRankFile(const std::string& contents, const ModelSettings& settings);

struct BpeFilePaths {
  std::string vocabulary;
  std::string merges;
};
// vocab.json and merges.txt of GPT-2 or, by tokenizer_class, Qwen2.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadVocabularyAndMerges(const BpeFilePaths& paths,
                                                                   const ModelSettings& settings);

// How spellings of the vocabulary become text.
struct SpellingRules {
  bool is_byte_level = false;                                     // byte symbols
  bool has_byte_fallback = false;                                 // "<0x0A>" is a byte
  std::vector<std::pair<std::string, std::string>> replacements;  // in this order
};
Piece PieceOfSpelling(const std::string& spelling, const SpellingRules& rules);

// Adds a JSON object of spellings and ids to the model and to the pieces. InvalidArgument for ids that are out of range
// or used twice.
absl::Status AddVocabulary(const nlohmann::json& object, const SpellingRules& rules, BpeModel& model,
                           Vocabulary& vocabulary);

struct BpeComponents {
  BpeModel model;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::vector<AddedToken> added_tokens;  // of the tokenizer file itself
};
// `parts` holds the vocabulary proper and the file's own BOS and EOS.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(TokenizerParts parts, BpeComponents components,
                                                            const ModelSettings& settings);

}  // namespace rankwise::text
