#include "worker/device/gpu_place.h"

#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace rankwise::device {
namespace {

std::optional<std::pair<int, int>> FirstSharing(std::span<const std::string> uuids) {
  std::map<std::string, int> owner;
  for (int rank = 0; rank < static_cast<int>(uuids.size()); ++rank) {
    const auto [found, is_new] = owner.emplace(uuids[rank], rank);
    if (!is_new) return std::pair(found->second, rank);
  }
  return std::nullopt;
}

}  // namespace

int HostRank(const std::function<const char*(const char* name)>& environment, int mpi_host_rank) {
  for (const char* name : {"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"}) {
    const char* text = environment(name);
    int rank = 0;
    if (text != nullptr && absl::SimpleAtoi(text, &rank) && rank >= 0) return rank;
  }
  return mpi_host_rank;
}

int GpuIndex(int host_rank, int visible_count) { return host_rank % visible_count; }

bool HasSharedGpu(std::span<const std::string> uuids) { return FirstSharing(uuids).has_value(); }

absl::Status CheckDistinctGpus(std::span<const std::string> uuids, bool is_sharing_allowed) {
  const auto sharing = FirstSharing(uuids);
  if (!sharing || is_sharing_allowed) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("ranks ", sharing->first, " and ", sharing->second, " would share ",
                                                 uuids[sharing->first],
                                                 ": start fewer ranks per host, or give --allow-shared-gpu"));
}

}  // namespace rankwise::device
