#include "worker/weights/json.h"

#include "absl/strings/str_cat.h"

namespace rankwise::weights {
namespace {

using nlohmann::json;

constexpr int kDeepest = 16;

}  // namespace

bool NestsDeeperThan(std::string_view text, int levels) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string && (c == '{' || c == '[')) {
      if (++depth > levels) return true;
    } else if (!in_string && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return false;
}

absl::StatusOr<json> ParseJsonObject(std::string_view text, const std::string& source) {
  if (NestsDeeperThan(text, kDeepest)) {
    return absl::InvalidArgumentError(absl::StrCat(source, " nests deeper than ", kDeepest, " levels"));
  }
  json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(source, " is not valid JSON"));
  if (!parsed.is_object()) return absl::InvalidArgumentError(absl::StrCat(source, " is not a JSON object"));
  return parsed;
}

const json& Members::Get(const std::string& key) const {
  static const json kNull;
  const auto found = object_.find(key);
  return found == object_.end() ? kNull : *found;
}

int64_t Members::Int(const std::string& key, const Limits& limits, std::optional<int64_t> fallback) {
  const json& member = Get(key);
  if (member.is_null()) return Absent(key, fallback);
  if (!member.is_number_integer()) {
    Refuse(key, "is not an integer");
    return 0;
  }
  const bool is_huge = member.is_number_unsigned() && member.get<uint64_t>() > uint64_t{INT64_MAX};
  const int64_t value = is_huge ? INT64_MAX : member.get<int64_t>();
  if (static_cast<double>(value) < limits.least || static_cast<double>(value) > limits.most) {
    Refuse(key, absl::StrCat("is not in [", limits.least, ", ", limits.most, "]"));
  }
  return value;
}

double Members::Real(const std::string& key, const Limits& limits, std::optional<double> fallback) {
  const json& member = Get(key);
  if (member.is_null()) return Absent(key, fallback);
  if (!member.is_number()) {
    Refuse(key, "is not a number");
    return 0;
  }
  const auto value = member.get<double>();
  if (!(value >= limits.least && value <= limits.most)) {
    Refuse(key, absl::StrCat("is not in [", limits.least, ", ", limits.most, "]"));
  }
  return value;
}

std::string Members::String(const std::string& key, std::optional<std::string> fallback) {
  const json& member = Get(key);
  if (member.is_null()) return Absent(key, std::move(fallback));
  if (member.is_string()) return member.get<std::string>();
  Refuse(key, "is not a string");
  return "";
}

bool Members::Bool(const std::string& key, bool fallback) {
  const json& member = Get(key);
  if (member.is_null()) return fallback;
  if (member.is_boolean()) return member.get<bool>();
  Refuse(key, "is not true or false");
  return fallback;
}

void Members::Refuse(const std::string& key, const std::string& complaint) {
  const std::string shown = Get(key).dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  Fail(absl::StrCat(prefix_, key, "=", shown.substr(0, 80), " ", complaint));
}

void Members::Fail(const std::string& message) {
  if (status_.ok()) status_ = absl::InvalidArgumentError(message);
}

}  // namespace rankwise::weights
