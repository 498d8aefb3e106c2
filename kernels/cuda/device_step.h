#pragma once

#include <cuda_runtime_api.h>

#include <compare>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/kernels.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {

// What the launches of a step depend on beside the numbers in device memory.
struct StepShape {
  int64_t row_count, tile_count, split_bound;
  auto operator<=>(const StepShape&) const = default;
};

// What a step needs beside weights and cache, in device memory: sent in one copy when the step begins. Where an op asks
// for others than the step said, these are sent alone. Pointers are valid until the step after.
class DeviceStep {
 public:
  explicit DeviceStep(cudaStream_t stream) : stream_(stream) {}

  absl::Status Begin(const StepRows& rows);

  const StepIndex& index() const { return index_; }
  int64_t row_count() const { return index_.row_count(); }

  const int32_t* position() const { return position_; }  // [rows]
  const int32_t* block() const { return block_; }        // [rows]
  const int32_t* tables() const { return tables_; }      // of all segments
  const int32_t* tokens() const { return tokens_; }      // [rows]
  // cos [rows, half], then sin.
  absl::StatusOr<const float*> Angles(const RopeTable& rope);
  absl::StatusOr<std::span<const cuda::AttentionTile>> Tiles(int group);
  // Requires rows of the step.
  absl::StatusOr<const int32_t*> Picked(std::span<const int32_t> picked);
  absl::StatusOr<const DrawRule*> Rules(std::span<const DrawRule> rules);

  // At least as many splits as any tile's windows reach into, and the same number for steps of one shape. Once Tiles
  // was asked for, or said.
  int64_t SplitBound(int32_t sliding_window) const;
  // Null where an op could ask for angles or tiles that were not sent with the step.
  std::optional<StepShape> shape() const;
  // Of the memory that is read.
  int64_t moves() const { return moves_; }

 private:
  void WriteAngles(const RopeTable& rope, float* to) const;
  void CheckAngles(const RopeTable& rope) const;
  void CheckPicked(std::span<const int32_t> picked) const;
  void BuildTiles(int group);
  template <typename T>
  absl::StatusOr<const T*> OnDevice(std::span<const T> values, std::span<const T> of_plan, const T* plan_on_device,
                                    Staging& alone) {
    if (values.data() >= of_plan.data() && values.data() + values.size() <= of_plan.data() + of_plan.size()) {
      return plan_on_device + (values.data() - of_plan.data());
    }
    const auto bytes = static_cast<int64_t>(values.size_bytes());
    RW_ASSIGN_OR_RETURN(std::byte * memory, alone.Reserve(bytes));
    std::memcpy(memory, values.data(), bytes);
    RW_RETURN_IF_ERROR(alone.Send(bytes, stream_));
    return reinterpret_cast<const T*>(alone.device());
  }

  const cudaStream_t stream_;
  StepIndex index_;

  // In one copy: tiles, angles, position, block, block tables, rules, tokens, picked rows.
  Staging plan_, other_tiles_, other_angles_, other_picked_, other_rules_;
  const cuda::AttentionTile* tiles_on_device_ = nullptr;
  const float* angles_ = nullptr;
  const int32_t *position_ = nullptr, *block_ = nullptr, *tables_ = nullptr, *tokens_ = nullptr, *picked_ = nullptr;
  const DrawRule* rules_ = nullptr;
  const RopeTable* angles_of_ = nullptr;  // whose angles are there
  int tiles_of_ = 0;                      // the group whose tiles are there
  std::vector<cuda::AttentionTile> tiles_;
  std::vector<int32_t> table_begin_;  // [segments], in the plan's tables
  int64_t split_bound_ = 0;
  int64_t moves_ = 0;
};

}  // namespace rankwise::kernels
