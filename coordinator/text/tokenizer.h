#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/added_tokens.h"
#include "coordinator/text/vocabulary.h"

namespace rankwise::text {

struct EncodeOptions {
  // Absent: as the model's files say. A rendered chat template mostly begins with BOS already: pass false for it.
  std::optional<bool> add_bos;
  // False: special tokens spelt out in the text ("<|im_end|>") are ordinary text, for text that is not trusted.
  bool parse_special = true;
};

// What all kinds of tokenizers are made of.
struct TokenizerParts {
  Vocabulary vocabulary;
  DecodeRules rules;
  AddedTokenMatcher added;  // those looked for in the text as it came
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;  // sorted
  bool adds_bos = false;
};

// Text to token ids and back, for one model. Constant after Load: all methods may be called from several threads.
class Tokenizer {
 public:
  // From a Hugging Face model folder, or the triton_models/tokenizer of a TurboMind workspace: tokenizer.json, else
  // tokenizer.model (SentencePiece, or tiktoken ranks as Llama 3 ships them), else vocab.json with merges.txt. Special
  // tokens and defaults come from tokenizer_config.json, special_tokens_map.json, added_tokens.json,
  // generation_config.json and config.json, where present. The files are not trusted: InvalidArgument names the file
  // and the value; Unimplemented names a component that Rankwise cannot reproduce exactly; NotFound when the folder
  // holds no tokenizer.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_folder);

  virtual ~Tokenizer() = default;

  // InvalidArgument for text that is not UTF-8 (with the byte offset) and for BOS where the model has none.
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text, const EncodeOptions& options = {}) const;

  // Always UTF-8: bytes that are not become U+FFFD. Ids that name no token add nothing.
  std::string Decode(std::span<const int32_t> ids, bool skip_special = true) const;

  // One more than the largest id.
  int32_t vocab_size() const { return parts_.vocabulary.size(); }
  std::optional<int32_t> bos_id() const { return parts_.bos_id; }
  bool adds_bos() const { return parts_.adds_bos; }
  // Every id that ends a generation: the tokenizer's own and those of the generation config. Sorted, may be empty.
  const std::vector<int32_t>& eos_ids() const { return parts_.eos_ids; }
  bool IsSpecial(int32_t id) const { return piece(id).kind == PieceKind::kSpecial; }

  // A token by itself, for log-probabilities: special tokens by name. The bytes may end within a character.
  const std::string& TokenBytes(int32_t id) const { return piece(id).bytes; }
  std::string TokenText(int32_t id) const;

  const Piece& piece(int32_t id) const { return parts_.vocabulary.at(id); }
  const DecodeRules& decode_rules() const { return parts_.rules; }

 protected:
  explicit Tokenizer(TokenizerParts parts) : parts_(std::move(parts)) {}

  struct Segment {
    std::string_view text;  // UTF-8, not empty
    bool begins_text;       // false behind an added token
    bool parse_special;
  };

 private:
  // Appends the ids of text between added tokens.
  virtual absl::Status EncodeSegment(const Segment& segment, std::vector<int32_t>& ids) const = 0;

  TokenizerParts parts_;
};

}  // namespace rankwise::text
