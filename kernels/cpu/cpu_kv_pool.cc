#include "kernels/cpu/cpu_kv_pool.h"

#include <cstring>

#include "base/status_macros.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {
namespace {

int64_t RoundUp(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

bool IsInteger(KvFormat format) { return format == KvFormat::kInt8 || IsOnline(format); }

int64_t ElementsBytes(KvFormat format, int64_t count) {
  switch (format) {
    case KvFormat::kF32:
      return count * 4;
    case KvFormat::kF16:
      return count * 2;
    case KvFormat::kInt8:
    case KvFormat::kInt8Online:
      return count;
    case KvFormat::kInt4Online:
      return count / 2;
  }
  return 0;
}

}  // namespace

CpuKvBlock::CpuKvBlock(const KvShape& shape)
    : padded_dim(static_cast<int32_t>(RoundUp(shape.head_dim, 16))),
      v_offset(RoundUp(
          ElementsBytes(shape.format, RoundUp(shape.head_dim, IsInteger(shape.format) ? 4 : 1) * kKvBlockTokens), 64)),
      online_offset(v_offset + RoundUp(ElementsBytes(shape.format, int64_t{padded_dim} * kKvBlockTokens), 64)),
      bytes(online_offset + (IsOnline(shape.format) ? int64_t{sizeof(OnlineBlock)} : 0)) {}

int64_t CpuKvBlockBytes(const KvShape& shape) {
  return int64_t{shape.n_layers} * shape.n_kv_heads_local * CpuKvBlock(shape).bytes;
}

CpuKvPool::CpuKvPool(const KvShape& shape, int32_t block_count)
    : shape_(shape),
      block_count_(block_count),
      block_(shape),
      scales_(shape.format == KvFormat::kInt8
                  ? static_cast<size_t>(shape.n_layers) * shape.n_kv_heads_local * 4 * block_.padded_dim
                  : 0),
      saturated_(new std::atomic<int64_t>[shape.n_layers]()) {
  for (size_t i = 0; i < scales_.size(); ++i) scales_[i] = i / block_.padded_dim % 2 == 0 ? 1.0f : 0.0f;
}

absl::StatusOr<std::unique_ptr<CpuKvPool>> CpuKvPool::Create(const KvShape& shape, int32_t block_count,
                                                             ThreadTeam& team) {
  RW_RETURN_IF_ERROR(CheckKvShape(shape, block_count));
  std::unique_ptr<CpuKvPool> pool(new CpuKvPool(shape, block_count));
  RW_ASSIGN_OR_RETURN(pool->memory_, AllocateMemory(pool->bytes()));
  constexpr int64_t kPiece = int64_t{4} << 20;
  team.For((pool->bytes() + kPiece - 1) / kPiece, [&](int64_t piece, int) {
    const int64_t begin = piece * kPiece;
    std::memset(pool->memory_.get() + begin, 0, static_cast<size_t>(std::min(kPiece, pool->bytes() - begin)));
  });
  return pool;
}

HeadScales CpuKvPool::scales(int layer, int head) const {
  if (scales_.empty()) return {};
  const float* first = scales_.data() + (int64_t{layer} * shape_.n_kv_heads_local + head) * 4 * block_.padded_dim;
  return {first, first + block_.padded_dim, first + 2 * block_.padded_dim, first + 3 * block_.padded_dim};
}

void CpuKvPool::set_scales(std::span<const KvChannelScales> scales) {
  const int64_t heads = int64_t{shape_.n_layers} * shape_.n_kv_heads_local;
  for (int64_t i = 0; i < heads * shape_.head_dim; ++i) {
    float* channel = scales_.data() + i / shape_.head_dim * 4 * block_.padded_dim + i % shape_.head_dim;
    channel[0] = scales[i].k_scale;
    channel[block_.padded_dim] = scales[i].k_zero_point;
    channel[2 * block_.padded_dim] = scales[i].v_scale;
    channel[3 * block_.padded_dim] = scales[i].v_zero_point;
  }
}

std::vector<int64_t> CpuKvPool::SaturatedCounts() const {
  std::vector<int64_t> counts;
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    counts.push_back(saturated_[layer].load(std::memory_order_relaxed));
  }
  return counts;
}

std::vector<std::byte> CpuKvPool::BlockBytes(int layer, int32_t block) const {
  std::vector<std::byte> bytes;
  const auto append = [&](const std::byte* tile, int64_t major, int64_t minor, int64_t width) {
    if (shape_.format == KvFormat::kInt4Online) {
      const auto pair = static_cast<uint8_t>(tile[PairedNibbleOffset(major, minor, width)]);
      bytes.push_back(static_cast<std::byte>(IsUpperNibble(major) ? pair >> 4 : pair & 15));
      return;
    }
    const int64_t size = ElementsBytes(shape_.format, 1);
    const int64_t element = IsInteger(shape_.format) ? PairedOffset(major, minor, width) : major * width + minor;
    bytes.insert(bytes.end(), tile + element * size, tile + (element + 1) * size);
  };
  const auto append_half = [&](uint16_t half) {
    const auto* from = reinterpret_cast<const std::byte*>(&half);
    bytes.insert(bytes.end(), from, from + sizeof(half));
  };
  for (bool is_v : {false, true}) {
    for (int head = 0; head < shape_.n_kv_heads_local; ++head) {
      const std::byte* tile = Head(layer, head) + block * block_.bytes + (is_v ? block_.v_offset : 0);
      for (int64_t token = 0; token < kKvBlockTokens; ++token) {
        for (int64_t dim = 0; dim < shape_.head_dim; ++dim) {
          if (is_v) {
            append(tile, token, dim, block_.padded_dim);
          } else {
            append(tile, dim, token, kKvBlockTokens);
          }
        }
      }
    }
  }
  if (!IsOnline(shape_.format)) return bytes;
  for (bool is_v : {false, true}) {
    for (int head = 0; head < shape_.n_kv_heads_local; ++head) {
      const OnlineBlock& online = Online(layer, head, block);
      for (int token = 0; token < kKvBlockTokens; ++token) {
        append_half(is_v ? online.v_scale[token] : online.k_scale[token]);
        append_half(is_v ? online.v_zero[token] : online.k_zero[token]);
      }
    }
  }
  return bytes;
}

}  // namespace rankwise::kernels
