#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace rankwise::weights {

// Whether brackets outside strings nest deeper than `levels`. nlohmann's copies and dumps recurse, so hostile text is
// asked this first.
bool NestsDeeperThan(std::string_view text, int levels);

// Untrusted text to a JSON object; throws nothing. InvalidArgument, naming `source`, when it is no JSON, no object, or
// nests deeper than 16.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, const std::string& source);

struct Limits {
  double least;
  double most;
};

// Typed reads of one JSON object's members, checked; throws nothing. A member that is null counts as absent. The first
// error sticks, and what is read after it is not to be used: read all, then ask status(). Borrows the object.
class Members {
 public:
  // `prefix` stands before the keys in messages: "rope_scaling.".
  explicit Members(const nlohmann::json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  const absl::Status& status() const { return status_; }

  bool Has(const std::string& key) const { return !Get(key).is_null(); }
  bool HasKey(const std::string& key) const { return object_.contains(key); }
  const nlohmann::json& Get(const std::string& key) const;  // null when absent

  // InvalidArgument when the member is absent and there is no fallback. The fallback may lie outside the limits.
  int64_t Int(const std::string& key, const Limits& limits, std::optional<int64_t> fallback = std::nullopt);
  double Real(const std::string& key, const Limits& limits, std::optional<double> fallback = std::nullopt);
  std::string String(const std::string& key, std::optional<std::string> fallback = std::nullopt);
  bool Bool(const std::string& key, bool fallback);

 private:
  template <typename T>
  T Absent(const std::string& key, std::optional<T> fallback) {
    if (!fallback) Fail(absl::StrCat(prefix_, key, " is missing"));
    return std::move(fallback).value_or(T{});
  }
  void Refuse(const std::string& key, const std::string& complaint);
  void Fail(const std::string& message);

  const nlohmann::json& object_;
  const std::string prefix_;
  absl::Status status_;
};

}  // namespace rankwise::weights
