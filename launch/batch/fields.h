#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace rankwise::batch {

// A value as an error may show it: JSON, cut to a readable length.
std::string Shown(const nlohmann::json& value);

// The fields of an object from outside, each taken once. A field that is null counts as absent. Borrows the object.
// All InvalidArgument names the field and its value.
class Fields {
 public:
  explicit Fields(const nlohmann::json& object) : object_(object) {}

  // null pointer: absent.
  const nlohmann::json* Take(const std::string& name);
  // [least, most], both included.
  absl::StatusOr<std::optional<int64_t>> Integer(const std::string& name, int64_t least, int64_t most);
  absl::StatusOr<std::optional<float>> Number(const std::string& name, double least, double most);
  absl::StatusOr<bool> Bool(const std::string& name);  // absent: false
  // That nobody meant a field which was not taken.
  absl::Status CheckAllTaken() const;

 private:
  const nlohmann::json& object_;
  std::set<std::string> taken_;
};

}  // namespace rankwise::batch
