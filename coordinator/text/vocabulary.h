#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace rankwise::text {

enum class PieceKind : uint8_t {
  kAbsent,   // no token has this id: decodes to nothing
  kText,     // whole characters; a leading space may fall to the rule for the text's begin
  kLiteral,  // whole characters, taken as they are (added tokens, SentencePiece's unknown)
  kByte,     // bytes that may end within a character
  kSpecial,  // control: decodes to nothing unless asked for
};

// What one token adds to a text.
struct Piece {
  PieceKind kind = PieceKind::kAbsent;
  std::string bytes;
};

// What happens to spaces at the begin of a decoded text.
enum class LeadingSpace : uint8_t {
  kKeep,
  kDropOne,             // the dummy prefix of SentencePiece
  kDropOneOfEachPiece,  // SentencePiece with remove_extra_whitespaces, until the text has begun
  kDropAllOfFirst,      // the Metaspace decoder: every space of the first token
};

struct DecodeRules {
  LeadingSpace leading_space = LeadingSpace::kKeep;
  // Bytes that are no UTF-8 become one U+FFFD each (SentencePiece), not one for each maximal subpart.
  bool replaces_each_byte = false;
  // A special token between two byte tokens ends the character (SentencePiece), even when it is skipped.
  bool special_ends_character = false;
};

// The pieces of all ids below size(). Constant once its tokenizer is loaded.
class Vocabulary {
 public:
  // Requires: 0 <= id < kTokenIdLimit. InvalidArgument when the id is taken.
  absl::Status Add(int32_t id, Piece piece);
  // As Add, whatever the id meant before.
  void Replace(int32_t id, Piece piece);

  // Absent for ids outside [0, size()): a model's logits may be padded beyond its vocabulary.
  const Piece& at(int32_t id) const;
  int32_t size() const { return static_cast<int32_t>(pieces_.size()); }

 private:
  std::vector<Piece> pieces_;
};

}  // namespace rankwise::text
