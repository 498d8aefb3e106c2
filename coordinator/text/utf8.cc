#include "coordinator/text/utf8.h"

#include <utf8proc.h>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace rankwise::text {
namespace {

bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool IsWord(uint32_t c) {
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NO) || category == UTF8PROC_CATEGORY_PC;
}

// The last character's bytes.
std::string_view LastCharacter(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
  return text.substr(begin);
}

}  // namespace

Utf8Step ReadUtf8(std::string_view bytes) {
  RW_CHECK(!bytes.empty());
  const auto lead = static_cast<uint8_t>(bytes[0]);
  if (lead < 0x80) return {Utf8Step::State::kCharacter, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Step::State::kInvalid, 1, 0};
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what lies above U+10FFFF (Unicode 15, table 3-7).
  uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  uint32_t code_point = lead & (0x7F >> length);
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == bytes.size()) return {Utf8Step::State::kIncomplete, i, 0};
    const auto byte = static_cast<uint8_t>(bytes[i]);
    if (byte < low || byte > high) return {Utf8Step::State::kInvalid, i, 0};
    code_point = code_point << 6 | (byte & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Step::State::kCharacter, length, code_point};
}

absl::Status ValidateUtf8(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Step step = ReadUtf8(bytes.substr(at));
    if (step.state != Utf8Step::State::kCharacter)
      return absl::InvalidArgumentError(absl::StrCat("text is not UTF-8 at byte ", at));
    at += step.length;
  }
  return absl::OkStatus();
}

void AppendUtf8(uint32_t code_point, std::string& text) {
  utf8proc_uint8_t bytes[4];
  const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code_point), bytes);
  RW_CHECK(length > 0);
  text.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(length));
}

std::string ToValidUtf8(std::string_view bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Step step = ReadUtf8(bytes.substr(at));
    text += step.state == Utf8Step::State::kCharacter ? bytes.substr(at, step.length) : kReplacementCharacter;
    at += step.length;
  }
  return text;
}

size_t LeadingSpaceBytes(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Step step = ReadUtf8(text.substr(at));
    if (!IsSpace(step.code_point)) break;
    at += step.length;
  }
  return at;
}

size_t TrailingSpaceBytes(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    const std::string_view last = LastCharacter(text.substr(0, end));
    if (!IsSpace(ReadUtf8(last).code_point)) break;
    end -= last.size();
  }
  return text.size() - end;
}

bool BeginsWithWord(std::string_view text) { return !text.empty() && IsWord(ReadUtf8(text).code_point); }

bool EndsWithWord(std::string_view text) { return !text.empty() && IsWord(ReadUtf8(LastCharacter(text)).code_point); }

}  // namespace rankwise::text
