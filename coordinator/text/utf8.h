#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace rankwise::text {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

struct Utf8Step {
  enum class State : uint8_t {
    kCharacter,   // a whole character of `length` bytes
    kInvalid,     // `length` bytes that begin no character (a maximal subpart, Unicode 15 section 3.9)
    kIncomplete,  // all the bytes there are begin a character, and more bytes could end it
  };
  State state;
  int length;
  uint32_t code_point;  // of kCharacter
};

// Reads the first character of bytes that need not be UTF-8. Requires: `bytes` is not empty.
Utf8Step ReadUtf8(std::string_view bytes);

// InvalidArgument names the offset of the first byte that is not UTF-8 (surrogates and overlong forms are not).
absl::Status ValidateUtf8(std::string_view bytes);

void AppendUtf8(uint32_t code_point, std::string& text);

// `bytes` with each maximal invalid subpart replaced by U+FFFD.
std::string ToValidUtf8(std::string_view bytes);

// Bytes of `text` that are white space (Unicode White_Space) at its begin and at its end. Requires: `text` is UTF-8.
size_t LeadingSpaceBytes(std::string_view text);
size_t TrailingSpaceBytes(std::string_view text);

// Whether `text` begins or ends with a word character: letter, mark, number or connector punctuation.
bool BeginsWithWord(std::string_view text);
bool EndsWithWord(std::string_view text);

}  // namespace rankwise::text
