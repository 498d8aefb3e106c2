#include "kernels/cpu/cpu_kv_pool.h"

#include <cstring>

#include "base/status_macros.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {
namespace {

int64_t RoundUp(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

int32_t ElementBytes(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return 4;
    case KvFormat::kF16:
      return 2;
    case KvFormat::kInt8:
      return 1;
  }
  return 0;
}

}  // namespace

CpuKvPool::CpuKvPool(const KvShape& shape, int32_t block_count)
    : shape_(shape),
      block_count_(block_count),
      element_bytes_(ElementBytes(shape.format)),
      padded_dim_(static_cast<int32_t>(RoundUp(shape.head_dim, 16))),
      v_offset_(RoundUp(int64_t{shape.head_dim} * kKvBlockTokens * element_bytes_, 64)),
      block_bytes_(v_offset_ + RoundUp(int64_t{padded_dim_} * kKvBlockTokens * element_bytes_, 64)),
      scales_(static_cast<size_t>(shape.n_layers) * shape.n_kv_heads_local),
      saturated_(new std::atomic<int64_t>[shape.n_layers]()) {}

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

std::vector<int64_t> CpuKvPool::SaturatedCounts() const {
  std::vector<int64_t> counts;
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    counts.push_back(saturated_[layer].load(std::memory_order_relaxed));
  }
  return counts;
}

std::vector<std::byte> CpuKvPool::BlockBytes(int layer, int32_t block) const {
  std::vector<std::byte> bytes;
  const auto append = [&](const std::byte* tile, int64_t element) {
    bytes.insert(bytes.end(), tile + element * element_bytes_, tile + (element + 1) * element_bytes_);
  };
  for (bool is_v : {false, true}) {
    for (int head = 0; head < shape_.n_kv_heads_local; ++head) {
      const std::byte* tile = Head(layer, head) + block * block_bytes_ + (is_v ? v_offset_ : 0);
      for (int64_t token = 0; token < kKvBlockTokens; ++token) {
        for (int64_t dim = 0; dim < shape_.head_dim; ++dim) {
          append(tile, is_v ? token * padded_dim_ + dim : dim * kKvBlockTokens + token);
        }
      }
    }
  }
  return bytes;
}

}  // namespace rankwise::kernels
