#include "coordinator/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/text/json_file.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {
namespace {

using CodePoints = std::vector<utf8proc_int32_t>;

// Full decomposition of each character, marks not yet in order. `compatibility`: NFKD rather than NFD.
absl::StatusOr<CodePoints> Decompose(std::string_view text, bool compatibility) {
  constexpr int kMaxDecomposed = 32;  // U+FDFA has 18, the most in Unicode
  const int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatibility ? UTF8PROC_COMPAT : 0);
  CodePoints decomposed;
  decomposed.reserve(text.size());
  int boundary = 0;
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = ReadUtf8(text.substr(at));
    at += static_cast<size_t>(step.length);
    utf8proc_int32_t parts[kMaxDecomposed];
    const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(step.code_point), parts, kMaxDecomposed,
                                               static_cast<utf8proc_option_t>(options), &boundary);
    if (count < 0 || count > kMaxDecomposed)
      return absl::InternalError(absl::StrCat("decomposing U+", absl::Hex(step.code_point), ": ", count));
    decomposed.insert(decomposed.end(), parts, parts + count);
  }
  return decomposed;
}

// Canonical ordering (Unicode 15, D109). utf8proc's own is quadratic in a run of marks, and users write the text.
void OrderMarks(CodePoints& text) {
  const auto mark_class = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  const auto is_starter = [&](utf8proc_int32_t c) { return mark_class(c) == 0; };
  for (auto at = text.begin(); at != text.end();) {
    const auto begin = std::find_if_not(at, text.end(), is_starter);
    const auto end = std::find_if(begin, text.end(), is_starter);
    std::stable_sort(begin, end, [&](auto left, auto right) { return mark_class(left) < mark_class(right); });
    at = end;
  }
}

}  // namespace

absl::StatusOr<Regex> ParsePattern(const nlohmann::json& object) {
  const nlohmann::json& pattern = Member(object, "pattern");
  RW_ASSIGN_OR_RETURN(const std::optional<std::string> literal, OptionalString(pattern, "String"));
  if (literal && literal->empty()) return absl::InvalidArgumentError("pattern String is empty");
  if (literal) return Regex::CompileLiteral(*literal);
  RW_ASSIGN_OR_RETURN(const std::string regex, StringMember(pattern, "Regex"));
  return Regex::Compile(regex);
}

absl::StatusOr<Normalizer> Normalizer::FromJson(const nlohmann::json& object) {
  Normalizer normalizer;
  if (!object.is_null()) RW_RETURN_IF_ERROR(normalizer.AddStages(object, 0));
  return normalizer;
}

Normalizer Normalizer::Nfc() {
  Normalizer normalizer;
  normalizer.stages_.emplace_back(UnicodeForm::kNfc);
  return normalizer;
}

absl::Status Normalizer::AddStages(const nlohmann::json& object, int depth) {
  if (depth > kMaxSequenceDepth) return absl::InvalidArgumentError("normalizer Sequences are nested too deep");
  RW_ASSIGN_OR_RETURN(const std::string type, StringMember(object, "type"));
  if (type == "Sequence") {
    RW_ASSIGN_OR_RETURN(const nlohmann::json* parts, ArrayMember(object, "normalizers"));
    for (const auto& part : *parts) RW_RETURN_IF_ERROR(AddStages(part, depth + 1));
  } else if (type == "Prepend") {
    RW_ASSIGN_OR_RETURN(std::string prefix, StringMember(object, "prepend"));
    stages_.emplace_back(Prepend{std::move(prefix)});
  } else if (type == "Replace") {
    RW_ASSIGN_OR_RETURN(Regex pattern, ParsePattern(object));
    RW_ASSIGN_OR_RETURN(std::string content, StringMember(object, "content"));
    stages_.emplace_back(Replace{std::move(pattern), std::move(content)});
  } else if (type == "NFC") {
    stages_.emplace_back(UnicodeForm::kNfc);
  } else if (type == "NFD") {
    stages_.emplace_back(UnicodeForm::kNfd);
  } else if (type == "NFKC") {
    stages_.emplace_back(UnicodeForm::kNfkc);
  } else if (type == "NFKD") {
    stages_.emplace_back(UnicodeForm::kNfkd);
  } else {
    return absl::UnimplementedError(absl::StrCat("normalizer type '", type, "' is not supported"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Normalizer::Apply(std::string_view text) const {
  std::string normalized(text);
  for (const Stage& stage : stages_)
    RW_RETURN_IF_ERROR(std::visit([&](const auto& kind) { return ApplyStage(kind, normalized); }, stage));
  return normalized;
}

absl::Status Normalizer::ApplyStage(UnicodeForm form, std::string& text) {
  const bool is_ascii = std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x80; });
  if (is_ascii) return absl::OkStatus();
  const bool compatibility = form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd;
  RW_ASSIGN_OR_RETURN(CodePoints characters, Decompose(text, compatibility));
  OrderMarks(characters);
  if (form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc) {
    const auto length = utf8proc_normalize_utf32(characters.data(), static_cast<utf8proc_ssize_t>(characters.size()),
                                                 static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    RW_CHECK(length >= 0);
    characters.resize(static_cast<size_t>(length));
  }
  text.clear();
  for (const utf8proc_int32_t c : characters) AppendUtf8(static_cast<uint32_t>(c), text);
  return absl::OkStatus();
}

absl::Status Normalizer::ApplyStage(const Prepend& stage, std::string& text) {
  if (!text.empty()) text.insert(0, stage.prefix);
  return absl::OkStatus();
}

absl::Status Normalizer::ApplyStage(const Replace& stage, std::string& text) {
  RW_ASSIGN_OR_RETURN(const std::vector<ByteRange> matches, stage.pattern.FindAll(text));
  std::string replaced;
  size_t done = 0;
  for (const ByteRange& match : matches) {
    replaced.append(text, done, match.begin - done).append(stage.content);
    done = match.end;
  }
  replaced.append(text, done);
  text = std::move(replaced);
  return absl::OkStatus();
}

}  // namespace rankwise::text
