#pragma once

#include <cstdint>
#include <string>

#include "coordinator/text/tokenizer.h"

namespace rankwise::text {

// Turns the tokens of one stream into text as they come. The pieces joined are Tokenizer::Decode of all ids. One thread
// at a time.
class IncrementalDetokenizer {
 public:
  struct Options {
    bool skip_special = true;
    // The text goes on from a prompt, so the space that separates the two is kept.
    bool continues_text = false;
  };

  // `tokenizer` must outlive this.
  IncrementalDetokenizer(const Tokenizer* tokenizer, const Options& options);
  explicit IncrementalDetokenizer(const Tokenizer* tokenizer) : IncrementalDetokenizer(tokenizer, Options()) {}

  // The text that `id` completes: UTF-8, and empty while the last character is incomplete.
  std::string Append(int32_t id);

  // Ends the text: U+FFFD for what stayed incomplete. Idempotent.
  std::string Flush();

 private:
  // Moves whole characters, and U+FFFD for bytes that can begin none, from pending_ to `text`.
  void TakeCharacters(std::string& text);
  std::string_view WithoutLeadingSpace(std::string_view bytes);

  const Tokenizer* tokenizer_;
  bool skip_special_;
  LeadingSpace leading_space_;  // what still applies; kKeep once the text has begun
  std::string pending_;         // the begin of a character, at most 3 bytes between calls
};

}  // namespace rankwise::text
