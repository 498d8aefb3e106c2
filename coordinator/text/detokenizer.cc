#include "coordinator/text/detokenizer.h"

#include <algorithm>

#include "coordinator/text/utf8.h"

namespace rankwise::text {

IncrementalDetokenizer::IncrementalDetokenizer(const Tokenizer* tokenizer, const Options& options)
    : tokenizer_(tokenizer),
      skip_special_(options.skip_special),
      leading_space_(options.continues_text ? LeadingSpace::kKeep : tokenizer->decode_rules().leading_space) {}

std::string IncrementalDetokenizer::Append(int32_t id) {
  const Piece& piece = tokenizer_->piece(id);
  if (piece.kind == PieceKind::kAbsent) return "";
  if (piece.kind == PieceKind::kSpecial && skip_special_)
    return tokenizer_->decode_rules().special_ends_character ? Flush() : "";

  std::string text;
  if (piece.kind == PieceKind::kByte) {
    pending_ += piece.bytes;
    TakeCharacters(text);
    leading_space_ = LeadingSpace::kKeep;
    return text;
  }
  text = Flush();
  if (piece.kind == PieceKind::kText) {
    text += WithoutLeadingSpace(piece.bytes);
  } else {
    text += piece.bytes;
    if (!piece.bytes.empty()) leading_space_ = LeadingSpace::kKeep;
  }
  return text;
}

std::string IncrementalDetokenizer::Flush() {
  std::string text;
  if (pending_.empty()) return text;
  const size_t count = tokenizer_->decode_rules().replaces_each_byte ? pending_.size() : 1;
  for (size_t i = 0; i < count; ++i) text += kReplacementCharacter;
  pending_.clear();
  return text;
}

void IncrementalDetokenizer::TakeCharacters(std::string& text) {
  const bool each_byte = tokenizer_->decode_rules().replaces_each_byte;
  size_t at = 0;
  while (at < pending_.size()) {
    const std::string_view rest = std::string_view(pending_).substr(at);
    const Utf8Step step = ReadUtf8(rest);
    if (step.state == Utf8Step::State::kIncomplete) break;
    if (step.state == Utf8Step::State::kCharacter) {
      text += rest.substr(0, static_cast<size_t>(step.length));
      at += static_cast<size_t>(step.length);
    } else {
      text += kReplacementCharacter;
      at += each_byte ? 1 : static_cast<size_t>(step.length);
    }
  }
  pending_.erase(0, at);
}

std::string_view IncrementalDetokenizer::WithoutLeadingSpace(std::string_view bytes) {
  const bool has_space = !bytes.empty() && bytes[0] == ' ';
  switch (leading_space_) {
    case LeadingSpace::kKeep:
      return bytes;
    case LeadingSpace::kDropOne:
      if (!bytes.empty()) leading_space_ = LeadingSpace::kKeep;
      return has_space ? bytes.substr(1) : bytes;
    case LeadingSpace::kDropOneOfEachPiece:
      if (has_space) bytes.remove_prefix(1);
      if (!bytes.empty()) leading_space_ = LeadingSpace::kKeep;
      return bytes;
    case LeadingSpace::kDropAllOfFirst:
      leading_space_ = LeadingSpace::kKeep;
      bytes.remove_prefix(std::min(bytes.find_first_not_of(' '), bytes.size()));
      return bytes;
  }
  return bytes;
}

}  // namespace rankwise::text
