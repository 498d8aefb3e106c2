#include "worker/kv/kv_choice.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace rankwise::kv {
namespace {

using kernels::KvFormat;

struct Named {
  const char* name;
  KvChoice choice;
};
constexpr Named kChoices[] = {{"f32", {KvFormat::kF32, {}}},
                              {"f16", {KvFormat::kF16, {}}},
                              {"int8", {KvFormat::kInt8, Granularity::kRank}},
                              {"int8-head", {KvFormat::kInt8, Granularity::kHead}},
                              {"int8-channel", {KvFormat::kInt8, Granularity::kChannel}},
                              {"int8-online", {KvFormat::kInt8Online, {}}},
                              {"int4-online", {KvFormat::kInt4Online, {}}}};

}  // namespace

std::vector<std::string> KvNames() {
  std::vector<std::string> names;
  for (const Named& named : kChoices) names.emplace_back(named.name);
  return names;
}

absl::StatusOr<KvChoice> ParseKvChoice(const std::string& name) {
  for (const Named& named : kChoices) {
    if (name == named.name) return named.choice;
  }
  return absl::InvalidArgumentError(absl::StrCat("kv=", name, " is not one of ", absl::StrJoin(KvNames(), ", ")));
}

bool NeedsScales(const std::string& name) {
  const absl::StatusOr<KvChoice> choice = ParseKvChoice(name);
  return choice.ok() && choice->granularity.has_value();
}

}  // namespace rankwise::kv
