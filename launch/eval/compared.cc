#include "launch/eval/compared.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "worker/kv/kv_choice.h"

namespace rankwise::eval {
namespace {

absl::Status Refuse(const std::string& entry, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("--compare \"", entry, "\": ", what));
}

bool IsName(const std::string& name) {
  return !name.empty() && name[0] != '.' && name.size() <= 64 && std::ranges::all_of(name, [](unsigned char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
  });
}

absl::StatusOr<Compared> ParseStarted(const std::string& entry, std::string name, const std::string& value,
                                      const std::string& scales) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(value, absl::MaxSplits(':', 1));
  Compared compared{.name = std::move(name), .kv = parts.first};
  if (compared.name.empty() || compared.name == "kv") compared.name = compared.kv;
  const auto choice = kv::ParseKvChoice(compared.kv);
  if (!choice.ok()) return Refuse(entry, std::string(choice.status().message()));
  if (!choice->granularity.has_value()) {
    if (!parts.second.empty()) return Refuse(entry, absl::StrCat(compared.kv, " has no scales"));
    return compared;
  }
  compared.kv_scales = parts.second.empty() ? scales : parts.second;
  if (compared.kv_scales.empty()) {
    return Refuse(entry, absl::StrCat("needs scales: give ", compared.kv,
                                      ":DIR or --kv-scales DIR; `rankwise calibrate` and `rankwise kv-qparams` write "
                                      "such a folder"));
  }
  return compared;
}

}  // namespace

absl::StatusOr<std::vector<Compared>> ParseCompared(const std::string& list, bool has_model,
                                                    const std::string& scales) {
  std::vector<Compared> all;
  for (const absl::string_view part : absl::StrSplit(list, ',')) {
    const std::string entry(part);
    const size_t equals = entry.find('=');
    std::string name = equals == std::string::npos ? "" : entry.substr(0, equals);
    const std::string value = equals == std::string::npos ? entry : entry.substr(equals + 1);
    Compared compared;
    if (has_model) {
      RW_ASSIGN_OR_RETURN(compared, ParseStarted(entry, std::move(name), value, scales));
    } else {
      if (name.empty() || !absl::StrContains(value, ':'))
        return Refuse(entry, "is no NAME=HOST:PORT (to start clusters, give MODEL too)");
      compared = {.name = std::move(name), .endpoint = value};
    }
    if (!IsName(compared.name))
      return Refuse(entry, "a name is at most 64 letters, digits, \".\", \"_\" and \"-\", and begins with no dot");
    if (std::ranges::find(all, compared.name, &Compared::name) != all.end())
      return Refuse(entry, absl::StrCat("\"", compared.name, "\" comes twice"));
    all.push_back(std::move(compared));
  }
  return all;
}

}  // namespace rankwise::eval
