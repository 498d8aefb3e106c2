#include "kernels/cuda/cuda_kv_pool.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {

static_assert(sizeof(KvChannelScales) == sizeof(cuda::KvScales));
static_assert(cuda::kBlockTokens == kKvBlockTokens);

CudaKvPool::CudaKvPool(const KvShape& shape, int32_t block_count, cudaStream_t stream)
    : shape_(shape),
      block_count_(block_count),
      block_bytes_(cuda::KvBlockBytes(static_cast<cuda::KvElement>(shape.format), shape.head_dim)),
      stream_(stream) {}

absl::StatusOr<std::unique_ptr<CudaKvPool>> CudaKvPool::Create(const KvShape& shape, int32_t block_count,
                                                               cudaStream_t stream) {
  RW_RETURN_IF_ERROR(CheckKvShape(shape, block_count));
  if (shape.head_dim > cuda::kHeadDimLimit) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim=", shape.head_dim, " is beyond the CUDA backend's ", cuda::kHeadDimLimit));
  }
  std::unique_ptr<CudaKvPool> pool(new CudaKvPool(shape, block_count, stream));
  RW_ASSIGN_OR_RETURN(pool->memory_, AllocateZeroed(pool->bytes(), stream));
  RW_ASSIGN_OR_RETURN(pool->saturated_, AllocateZeroed(shape.n_layers * sizeof(unsigned long long), stream));
  const std::vector<KvChannelScales> scales(int64_t{shape.n_layers} * shape.n_kv_heads_local * shape.head_dim);
  RW_RETURN_IF_ERROR(pool->SetScales(scales));
  return pool;
}

absl::Status CudaKvPool::SetScales(std::span<const KvChannelScales> scales) {
  RW_ASSIGN_OR_RETURN(scales_, UploadToDevice(scales.data(), static_cast<int64_t>(scales.size_bytes()), stream_));
  return absl::OkStatus();
}

cuda::KvLayer CudaKvPool::Layer(int layer) const {
  const int64_t first = int64_t{layer} * shape_.n_kv_heads_local;
  return {.data = reinterpret_cast<unsigned char*>(memory_.get()) + first * head_bytes(),
          .head_bytes = head_bytes(),
          .block_bytes = block_bytes_,
          .scales = reinterpret_cast<const cuda::KvScales*>(scales_.get()) + first * shape_.head_dim,
          .saturated = reinterpret_cast<unsigned long long*>(saturated_.get()) + layer};
}

void CudaKvPool::CopyToHost(const std::byte* device, void* host, int64_t bytes) const {
  absl::Status status =
      CudaStatus(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
  if (status.ok()) status = CudaStatus(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  RW_CHECK(status.ok(), std::string(status.message()));
}

std::vector<int64_t> CudaKvPool::SaturatedCounts() const {
  std::vector<int64_t> counts(shape_.n_layers);
  CopyToHost(saturated_.get(), counts.data(), static_cast<int64_t>(counts.size() * sizeof(int64_t)));
  return counts;
}

std::vector<std::byte> CudaKvPool::BlockBytes(int layer, int32_t block) const {
  const cuda::KvElement format = this->format();
  const int bits = cuda::BitsOf(format), dims = shape_.head_dim, heads = shape_.n_kv_heads_local;
  const int64_t value_bytes = bits < 8 ? 1 : bits / 8, v_begin = cuda::KTileBytes(format, dims);
  std::vector<std::byte> tile(block_bytes_);
  std::vector<std::byte> values(int64_t{2} * heads * kKvBlockTokens * dims * value_bytes);
  std::vector<OnlineRange> ranges(IsOnline(shape_.format) ? 2 * heads * kKvBlockTokens : 0);
  for (int head = 0; head < heads; ++head) {
    CopyToHost(memory_.get() + (int64_t{layer} * heads + head) * head_bytes() + block * block_bytes_, tile.data(),
               block_bytes_);
    for (int is_v = 0; is_v < 2; ++is_v) {
      for (int token = 0; token < kKvBlockTokens; ++token) {
        const int64_t vector = (int64_t{is_v} * heads + head) * kKvBlockTokens + token;
        for (int dim = 0; dim < dims; ++dim) {
          const int64_t bit =
              is_v ? v_begin * 8 + cuda::VBit(format, token, dim) : cuda::KBit(format, dims, token, dim);
          std::byte* to = values.data() + (vector * dims + dim) * value_bytes;
          std::memcpy(to, tile.data() + bit / 8, value_bytes);
          if (bits == 4) *to = *to >> bit % 8 & std::byte{15};
        }
        if (ranges.empty()) continue;
        cuda::OnlineParameters online;
        std::memcpy(&online, tile.data() + block_bytes_ - sizeof(online), sizeof(online));
        ranges[vector] = is_v ? OnlineRange{online.v_scale[token], online.v_zero[token]}
                              : OnlineRange{online.k_scale[token], online.k_zero[token]};
      }
    }
  }
  const auto* range_bytes = reinterpret_cast<const std::byte*>(ranges.data());
  values.insert(values.end(), range_bytes, range_bytes + ranges.size() * sizeof(OnlineRange));
  return values;
}

}  // namespace rankwise::kernels
