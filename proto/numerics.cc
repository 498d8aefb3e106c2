#include "proto/numerics.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace rankwise::wire {

std::vector<std::pair<std::string, std::string>> Numerics(const rankwise::v1::GetModelInfoResponse& model) {
  const std::pair<std::string, std::string> device = absl::StrSplit(model.backend(), absl::MaxSplits(' ', 1));
  const bool is_power_of_two = (model.tp() & (model.tp() - 1)) == 0;
  return {{"fingerprint", model.fingerprint()},
          {"kv_format", model.kv_format()},
          {"kv_scales_id", model.kv_scales_id()},
          {"activations", model.activations()},
          {"device", device.first},
          {"tp", is_power_of_two && device.first == "cpu" ? "a power of two" : absl::StrCat(model.tp())}};
}

std::string NumericsLine(const rankwise::v1::GetModelInfoResponse& model) {
  return absl::StrJoin(Numerics(model), ", ", absl::PairFormatter(" "));
}

}  // namespace rankwise::wire
