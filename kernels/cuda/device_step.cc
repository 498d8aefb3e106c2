#include "kernels/cuda/device_step.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/cuda/kv_layout.h"

namespace rankwise::kernels {
namespace {

int64_t RoundUpTo8(int64_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

// What recorded ops read comes first and tables behind that, so that it lies in one place in steps of one shape.
absl::Status DeviceStep::Begin(const StepRows& rows) {
  index_.Build(rows);
  angles_of_ = rows.rope;
  tiles_of_ = rows.query_group;
  const int64_t count = row_count();
  int64_t table_blocks = 0;
  table_begin_.clear();
  for (const auto& table : rows.block_table) {
    table_begin_.push_back(static_cast<int32_t>(table_blocks));
    table_blocks += static_cast<int64_t>(table.size());
  }
  tiles_.clear();
  if (tiles_of_ > 0) BuildTiles(tiles_of_);
  const int64_t angles_at = static_cast<int64_t>(tiles_.size() * sizeof(cuda::AttentionTile));
  const int64_t angle_count = angles_of_ == nullptr ? 0 : count * (angles_of_->rotary_dim / 2 * 2);
  const int64_t rows_at = angles_at + angle_count * static_cast<int64_t>(sizeof(float));
  const int64_t rules_at = RoundUpTo8(rows_at + (2 * count + table_blocks) * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t tokens_at = rules_at + static_cast<int64_t>(rows.rules.size_bytes());
  const int64_t picked_at = tokens_at + static_cast<int64_t>(rows.tokens.size_bytes());
  const int64_t bytes = picked_at + static_cast<int64_t>(rows.picked.size_bytes());

  const std::byte* before = plan_.device();
  RW_ASSIGN_OR_RETURN(std::byte * memory, plan_.Reserve(bytes));
  if (plan_.device() != before) ++moves_;
  std::ranges::copy(tiles_, reinterpret_cast<cuda::AttentionTile*>(memory));
  if (angles_of_ != nullptr) {
    CheckAngles(*angles_of_);
    WriteAngles(*angles_of_, reinterpret_cast<float*>(memory + angles_at));
  }
  auto* to = reinterpret_cast<int32_t*>(memory + rows_at);
  for (int64_t row = 0; row < count; ++row) {
    to[row] = index_.position(row);
    to[count + row] = index_.block(row);
  }
  to += 2 * count;
  for (const auto& table : rows.block_table) to = std::copy(table.begin(), table.end(), to);
  std::ranges::copy(rows.rules, reinterpret_cast<DrawRule*>(memory + rules_at));
  std::ranges::copy(rows.tokens, reinterpret_cast<int32_t*>(memory + tokens_at));
  CheckPicked(rows.picked);
  std::ranges::copy(rows.picked, reinterpret_cast<int32_t*>(memory + picked_at));
  tiles_on_device_ = reinterpret_cast<const cuda::AttentionTile*>(plan_.device());
  angles_ = reinterpret_cast<const float*>(plan_.device() + angles_at);
  position_ = reinterpret_cast<const int32_t*>(plan_.device() + rows_at);
  block_ = position_ + count;
  tables_ = block_ + count;
  rules_ = reinterpret_cast<const DrawRule*>(plan_.device() + rules_at);
  tokens_ = reinterpret_cast<const int32_t*>(plan_.device() + tokens_at);
  picked_ = reinterpret_cast<const int32_t*>(plan_.device() + picked_at);
  return plan_.Send(bytes, stream_);
}

void DeviceStep::WriteAngles(const RopeTable& rope, float* to) const {
  const int64_t half = rope.rotary_dim / 2;
  for (const auto* table : {&rope.cos, &rope.sin}) {
    for (int64_t row = 0; row < row_count(); ++row) {
      to = std::copy_n(table->data() + index_.position(row) * half, half, to);
    }
  }
}

void DeviceStep::CheckAngles(const RopeTable& rope) const {
  RW_CHECK(rope.rotary_dim == 0 || index_.position_end() <= rope.position_count,
           absl::StrCat("position ", index_.position_end() - 1, " of ", rope.position_count));
}

absl::StatusOr<const float*> DeviceStep::Angles(const RopeTable& rope) {
  if (angles_of_ == &rope) return angles_;
  CheckAngles(rope);
  const int64_t bytes = row_count() * (rope.rotary_dim / 2 * 2) * static_cast<int64_t>(sizeof(float));
  RW_ASSIGN_OR_RETURN(std::byte * memory, other_angles_.Reserve(bytes));
  WriteAngles(rope, reinterpret_cast<float*>(memory));
  RW_RETURN_IF_ERROR(other_angles_.Send(bytes, stream_));
  angles_of_ = &rope;
  return angles_ = reinterpret_cast<const float*>(other_angles_.device());
}

void DeviceStep::BuildTiles(int group) {
  tiles_.clear();
  const StepRows& rows = index_.rows();
  int32_t last = 0;
  for (int32_t s = 0; s < rows.segment_count(); ++s) {
    const int32_t count = rows.row_begin[s + 1] - rows.row_begin[s], vectors = count * group;
    last = std::max(last, rows.first_position[s] + count - 1);
    for (int32_t v = 0; v < vectors; v += cuda::kTileVectors) {
      tiles_.push_back({.row_begin = rows.row_begin[s],
                        .first_position = rows.first_position[s],
                        .table_begin = table_begin_[s],
                        .vector_begin = v,
                        .vector_count = std::min(cuda::kTileVectors, vectors - v)});
    }
  }
  split_bound_ = static_cast<int64_t>(std::bit_ceil(static_cast<uint32_t>(last / cuda::kSplitTokens + 1)));
}

absl::StatusOr<std::span<const cuda::AttentionTile>> DeviceStep::Tiles(int group) {
  if (tiles_of_ != group) {
    BuildTiles(group);
    const auto bytes = static_cast<int64_t>(tiles_.size() * sizeof(cuda::AttentionTile));
    RW_ASSIGN_OR_RETURN(std::byte * memory, other_tiles_.Reserve(bytes));
    std::ranges::copy(tiles_, reinterpret_cast<cuda::AttentionTile*>(memory));
    RW_RETURN_IF_ERROR(other_tiles_.Send(bytes, stream_));
    tiles_of_ = group;
    tiles_on_device_ = reinterpret_cast<const cuda::AttentionTile*>(other_tiles_.device());
  }
  return std::span(tiles_on_device_, tiles_.size());
}

int64_t DeviceStep::SplitBound(int32_t sliding_window) const {
  if (sliding_window <= 0) return split_bound_;
  // A tile's rows are consecutive positions; the first sees furthest back.
  return std::min<int64_t>(split_bound_, (sliding_window + cuda::kTileVectors) / cuda::kSplitTokens + 2);
}

std::optional<StepShape> DeviceStep::shape() const {
  if (tiles_of_ == 0 || angles_of_ == nullptr) return std::nullopt;
  return StepShape{.row_count = row_count(), .tile_count = std::ssize(tiles_), .split_bound = split_bound_};
}

void DeviceStep::CheckPicked(std::span<const int32_t> picked) const {
  for (const int32_t row : picked) RW_CHECK(row >= 0 && row < row_count(), absl::StrCat("picked row ", row));
}

absl::StatusOr<const int32_t*> DeviceStep::Picked(std::span<const int32_t> picked) {
  CheckPicked(picked);
  return OnDevice(picked, index_.rows().picked, picked_, other_picked_);
}

absl::StatusOr<const DrawRule*> DeviceStep::Rules(std::span<const DrawRule> rules) {
  return OnDevice(rules, index_.rows().rules, rules_, other_rules_);
}

}  // namespace rankwise::kernels
