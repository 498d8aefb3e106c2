#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace rankwise::text {

// JSON of untrusted model files. Nothing here throws, and nothing converts a number silently.

// A file of at most 256 MiB. InvalidArgument when it is not JSON.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& path);

// JSON null when there is no such file.
absl::StatusOr<nlohmann::json> ReadJsonFileIfPresent(const std::string& path);

// The member of an object; JSON null when `object` has no such member or is no object.
const nlohmann::json& Member(const nlohmann::json& object, const char* name);

// Token ids stay below this: a file cannot make the tables of a few tokens huge.
inline constexpr int32_t kTokenIdLimit = 1 << 22;

// A member that must be an array; never null.
absl::StatusOr<const nlohmann::json*> ArrayMember(const nlohmann::json& object, const char* name);

// `what` names the value in the error.
absl::StatusOr<int32_t> ToTokenId(const nlohmann::json& value, const std::string& what);
absl::StatusOr<std::string> StringMember(const nlohmann::json& object, const char* name);

// A member that may be absent or null. Another type than the asked one is InvalidArgument.
absl::StatusOr<std::optional<std::string>> OptionalString(const nlohmann::json& object, const char* name);
absl::StatusOr<std::optional<bool>> OptionalBool(const nlohmann::json& object, const char* name);
absl::StatusOr<bool> BoolOr(const nlohmann::json& object, const char* name, bool fallback);

}  // namespace rankwise::text
