#include "launch/batch/fields.h"

#include "absl/strings/str_cat.h"

namespace rankwise::batch {

using nlohmann::json;

std::string Shown(const json& value) {
  constexpr size_t kLongest = 80;
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "…";
  return text;
}

const json* Fields::Take(const std::string& name) {
  taken_.insert(name);
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

absl::StatusOr<std::optional<int64_t>> Fields::Integer(const std::string& name, int64_t least, int64_t most) {
  const json* value = Take(name);
  if (value == nullptr) return std::nullopt;
  const auto refuse = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", Shown(*value), ", not a whole number from ", least, " to ", most));
  };
  // A number above 2^63 is unsigned in the parser's eyes.
  if (!value->is_number_integer()) return refuse();
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) return refuse();
  const auto number = value->get<int64_t>();
  if (number < least || number > most) return refuse();
  return number;
}

absl::StatusOr<std::optional<float>> Fields::Number(const std::string& name, double least, double most) {
  const json* value = Take(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number() || !(value->get<double>() >= least && value->get<double>() <= most))
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", Shown(*value), ", not a number from ", least, " to ", most));
  return static_cast<float>(value->get<double>());
}

absl::StatusOr<bool> Fields::Bool(const std::string& name) {
  const json* value = Take(name);
  if (value == nullptr) return false;
  if (!value->is_boolean())
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", Shown(*value), ", neither true nor false"));
  return value->get<bool>();
}

absl::Status Fields::CheckAllTaken() const {
  for (const auto& [name, value] : object_.items())
    if (!taken_.contains(name) && !value.is_null())
      return absl::InvalidArgumentError(absl::StrCat(name, " is not supported"));
  return absl::OkStatus();
}

}  // namespace rankwise::batch
