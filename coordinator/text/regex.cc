#include "coordinator/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cctype>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {
namespace {

constexpr uint32_t kMatchLimit = 50'000'000;     // steps of one match; a megabyte of blanks needs a few million
constexpr uint32_t kHeapLimitKibibytes = 65536;  // of one match in the interpreter

struct FreeCompileContext {
  void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
};
struct FreeMatchData {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

// Oniguruma's shorthands (Unicode White_Space and Word) as PCRE2 writes the contents of a class. PCRE2's own \s has
// U+180E too, and its \w lacks marks and connectors.
constexpr std::string_view kSpaces = R"(\t-\r\x{85}\p{Z})";
constexpr std::string_view kWordCharacters = R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24B6}-\x{24E9})";
constexpr std::string_view kNoSpaces =
    R"(\x{00}-\x{08}\x{0E}-\x{1F}\x{21}-\x{84}\x{86}-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF}\x{200B}-\x{2027})"
    R"(\x{202A}-\x{202E}\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{10FFFF})";

std::string Shorthand(char letter, bool in_class) {
  switch (letter) {
    case 's':
      return in_class ? std::string(kSpaces) : absl::StrCat("[", std::string(kSpaces), "]");
    case 'S':
      return in_class ? std::string(kNoSpaces) : absl::StrCat("[^", std::string(kSpaces), "]");
    case 'w':
      return in_class ? std::string(kWordCharacters) : absl::StrCat("[", std::string(kWordCharacters), "]");
    case 'W':
      return in_class ? "" : absl::StrCat("[^", std::string(kWordCharacters), "]");
    default:
      return std::string{'\\', letter};
  }
}

absl::Status UnsupportedPattern(const std::string& pattern, const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("pattern '", pattern, "' has ", what, ", which is unsupported"));
}

// `pattern` with those shorthands spelt out. Refuses what the two languages read differently: intersections with && and
// classes within classes.
absl::StatusOr<std::string> SpellOutShorthands(const std::string& pattern) {
  std::string spelt;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '\\' && i + 1 < pattern.size()) {
      const std::string meant = Shorthand(pattern[++i], in_class);
      if (meant.empty()) return UnsupportedPattern(pattern, "\\W in a class");
      spelt += meant;
      continue;
    }
    if (in_class && pattern[i] == '[') return UnsupportedPattern(pattern, "a class in a class");
    if (in_class && pattern.compare(i, 2, "&&") == 0) return UnsupportedPattern(pattern, "&& in a class");
    in_class = in_class ? pattern[i] != ']' : pattern[i] == '[';
    spelt += pattern[i];
  }
  return spelt;
}

std::string ErrorText(int code) {
  PCRE2_UCHAR message[256] = {};
  pcre2_get_error_message(code, message, sizeof message);
  return reinterpret_cast<const char*>(message);
}

}  // namespace

void Regex::FreeCode::operator()(pcre2_code* code) const { pcre2_code_free(code); }
void Regex::FreeContext::operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }

absl::StatusOr<Regex> Regex::Compile(const std::string& pattern) {
  std::unique_ptr<pcre2_compile_context, FreeCompileContext> context(pcre2_compile_context_create(nullptr));
  RW_CHECK(context != nullptr);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  RW_ASSIGN_OR_RETURN(const std::string spelt, SpellOutShorthands(pattern));
  int error = 0;
  size_t error_at = 0;
  Regex regex;
  regex.code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelt.data()), spelt.size(),
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &error_at,
                                  context.get()));
  if (!regex.code_)
    return absl::InvalidArgumentError(absl::StrCat("pattern '", pattern, "' at ", error_at, ": ", ErrorText(error)));
  // Without JIT support matching falls back to the interpreter.
  pcre2_jit_compile(regex.code_.get(), PCRE2_JIT_COMPLETE);
  regex.limits_.reset(pcre2_match_context_create(nullptr));
  RW_CHECK(regex.limits_ != nullptr);
  pcre2_set_match_limit(regex.limits_.get(), kMatchLimit);
  pcre2_set_heap_limit(regex.limits_.get(), kHeapLimitKibibytes);
  return regex;
}

absl::StatusOr<Regex> Regex::CompileLiteral(std::string_view text) {
  std::string pattern;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c))) pattern += '\\';
    pattern += c;
  }
  return Compile(pattern);
}

absl::StatusOr<std::vector<ByteRange>> Regex::FindAll(std::string_view text) const {
  std::vector<ByteRange> matches;
  std::unique_ptr<pcre2_match_data, FreeMatchData> data(pcre2_match_data_create(1, nullptr));
  RW_CHECK(data != nullptr);
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  for (size_t at = 0; at < text.size();) {
    // The caller has validated the text: checking all of it again at each match would be quadratic.
    int count = pcre2_match(code_.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, data.get(), limits_.get());
    if (count == PCRE2_ERROR_JIT_STACKLIMIT)
      count = pcre2_match(code_.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(),
                          limits_.get());
    if (count == PCRE2_ERROR_NOMATCH) break;
    if (count < 0)
      return absl::ResourceExhaustedError(absl::StrCat("splitting text at byte ", at, ": ", ErrorText(count)));
    const size_t* range = pcre2_get_ovector_pointer(data.get());
    if (range[1] > range[0]) matches.push_back({range[0], range[1]});
    // \K in a lookahead can move a match's begin before `at`, or behind its end.
    if (range[0] < at || range[1] < range[0]) return absl::InvalidArgumentError("pattern moves a match's begin");
    at = range[1] > range[0] ? range[1]
                             : range[1] + (range[1] < text.size() ? ReadUtf8(text.substr(range[1])).length : 1);
  }
  return matches;
}

}  // namespace rankwise::text
