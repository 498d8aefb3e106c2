#include "coordinator/text/json_file.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::text {
namespace {

using nlohmann::json;

absl::Status WrongType(const std::string& what, const char* wanted, const json& value) {
  return absl::InvalidArgumentError(absl::StrCat(what, " is ", value.type_name(), ", expected ", wanted));
}

}  // namespace

absl::StatusOr<json> ReadJsonFile(const std::string& path) {
  RW_ASSIGN_OR_RETURN(const std::string contents, ReadTextFile(path, size_t{256} << 20));
  json value = json::parse(contents, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(path, " is not valid JSON"));
  return value;
}

absl::StatusOr<json> ReadJsonFileIfPresent(const std::string& path) {
  absl::StatusOr<json> value = ReadJsonFile(path);
  if (absl::IsNotFound(value.status())) return json();
  return value;
}

const json& Member(const json& object, const char* name) {
  static const json kNull;
  if (!object.is_object()) return kNull;
  const auto found = object.find(name);
  return found == object.end() ? kNull : *found;
}

absl::StatusOr<const json*> ArrayMember(const json& object, const char* name) {
  const json& value = Member(object, name);
  if (!value.is_array()) return WrongType(name, "an array", value);
  return &value;
}

absl::StatusOr<int32_t> ToTokenId(const json& value, const std::string& what) {
  if (!value.is_number_integer()) return WrongType(what, "a token id", value);
  const bool fits = value.is_number_unsigned() && value.get<uint64_t>() < static_cast<uint64_t>(kTokenIdLimit);
  if (!fits)
    return absl::InvalidArgumentError(absl::StrCat(what, "=", value.dump(), " is outside [0, ", kTokenIdLimit, ")"));
  return static_cast<int32_t>(value.get<uint64_t>());
}

absl::StatusOr<std::string> StringMember(const json& object, const char* name) {
  RW_ASSIGN_OR_RETURN(std::optional<std::string> text, OptionalString(object, name));
  if (!text) return absl::InvalidArgumentError(absl::StrCat(name, " is missing"));
  return *std::move(text);
}

absl::StatusOr<std::optional<std::string>> OptionalString(const json& object, const char* name) {
  const json& value = Member(object, name);
  if (value.is_null()) return std::nullopt;
  if (!value.is_string()) return WrongType(name, "a string", value);
  return value.get_ref<const std::string&>();
}

absl::StatusOr<std::optional<bool>> OptionalBool(const json& object, const char* name) {
  const json& value = Member(object, name);
  if (value.is_null()) return std::nullopt;
  if (!value.is_boolean()) return WrongType(name, "true or false", value);
  return value.get<bool>();
}

absl::StatusOr<bool> BoolOr(const json& object, const char* name, bool fallback) {
  RW_ASSIGN_OR_RETURN(const std::optional<bool> value, OptionalBool(object, name));
  return value.value_or(fallback);
}

}  // namespace rankwise::text
