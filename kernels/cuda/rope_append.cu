#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/cuda/numbers.h"

namespace rankwise::kernels::cuda {
namespace {

// Rotates q and k and appends K and V to the paged cache, one warp to a head.
//   (a, b) -> (fma(a, cos, -(b sin)), fma(b, cos, a sin)), dimension i with i + rotary_dim / 2; then what
//   kernels/number_formats.h stores, to the bit
// Launch   grid (rows, heads / 4), 128 threads; shared memory for one head per warp
constexpr int kWarps = 4;
constexpr float kLargestHalf = 65504.0f;

// A stored value, and whether the original lay outside what the format holds.
struct Stored {
  uint32_t bits;
  bool is_saturated;
};

__device__ Stored QuantizeF16(float x) {
  if (fabsf(x) >= 65520.0f) return {x < 0 ? 0xfbffu : 0x7bffu, true};
  return {FloatToHalf(x), false};
}

__device__ Stored QuantizeInt8(float x, float scale, float zero) {
  const float q = rintf((x - zero) / scale);
  if (isnan(q)) return {0, true};
  if (q < -128.0f) return {static_cast<uint8_t>(-128), true};
  if (q > 127.0f) return {127, true};
  return {static_cast<uint8_t>(static_cast<int8_t>(q)), false};
}

struct Range {
  uint16_t scale, zero;
};

__device__ Stored QuantizeOnline(float x, Range range, float levels) {
  const bool is_outside = !(fabsf(x) <= kLargestHalf);
  const float scale = HalfToFloat(range.scale);
  const float q = rintf((x - HalfToFloat(range.zero)) / (scale > 0 ? scale : 1.0f));
  if (!(q > 0)) return {0, is_outside};
  return {static_cast<uint8_t>(q < levels ? q : levels), is_outside};
}

// The f16 next to `bits` (finite, not the last one) towards +infinity, or towards -infinity.
__device__ uint16_t NextHalf(uint16_t bits, bool is_up) {
  const bool is_negative = (bits & 0x8000) != 0;
  if ((bits & 0x7fff) == 0) return is_up ? 0x0001 : 0x8001;
  return static_cast<uint16_t>(bits + (is_negative == is_up ? -1 : 1));
}

__device__ Range OnlineRangeOf(float min, float max, float levels) {
  uint16_t zero = FloatToHalf(min + 0.0f);
  if (HalfToFloat(zero) > min) zero = NextHalf(zero, /*is_up=*/false);
  const float step = (max - HalfToFloat(zero)) / levels;
  uint16_t scale = FloatToHalf(step);
  if (HalfToFloat(scale) < step) scale = NextHalf(scale, /*is_up=*/true);
  return {scale, zero};
}

// One head's values in shared memory, of the calling warp.
struct Head {
  const Shared<float>& values;
  int64_t first;
  __device__ decltype(auto) operator[](int64_t i) const { return values[first + i]; }
};

// NaN and what f16 cannot hold do not widen the range.
template <KvElement kFormat>
__device__ Range RangeOf(const Head& x, int32_t head_dim) {
  constexpr float kLevels = kFormat == KvElement::kInt4Online ? 15.0f : 255.0f;
  float min = kLargestHalf, max = -kLargestHalf;
  for (int32_t d = threadIdx.x % 32; d < head_dim; d += 32) {
    const float value = x[d];
    if (isnan(value)) continue;
    const float clamped = fminf(kLargestHalf, fmaxf(-kLargestHalf, value));
    min = fminf(min, clamped);
    max = fmaxf(max, clamped);
  }
  max = WarpMax(max);
  min = -WarpMax(-min);
  return min <= max ? OnlineRangeOf(min, max, kLevels) : OnlineRangeOf(0, 0, kLevels);
}

// Where a vector goes: the tile of one KV head and block, and the place of each of its dims there.
template <KvElement kFormat, bool kIsV>
struct Place {
  unsigned char* tile;
  int32_t head_dim;
  int slot;

  __device__ int64_t Bit(int64_t dim) const {
    return kIsV ? VBit(kFormat, slot, dim) : KBit(kFormat, head_dim, slot, dim);
  }
  // The dim that shares a byte with `dim`, which is the lower of the two.
  __device__ static int64_t Partner(int64_t dim) { return dim + (kIsV ? 8 : 1); }
  __device__ static bool IsLower(int64_t dim) { return kIsV ? dim % 16 < 8 : dim % 2 == 0; }
};

template <KvElement kFormat, bool kIsV>
__device__ void Append(const RopeAppendTask& task, const Head& x, const Place<kFormat, kIsV>& place,
                       const KvScales* scales, OnlineParameters* online) {
  const int lane = threadIdx.x % 32;
  Range range = {};
  if constexpr (IsOnline(kFormat)) {
    range = RangeOf<kFormat>(x, task.head_dim);
    if (lane == 0) {
      (kIsV ? online->v_scale : online->k_scale)[place.slot] = range.scale;
      (kIsV ? online->v_zero : online->k_zero)[place.slot] = range.zero;
    }
  }
  unsigned int saturated = 0;
  for (int32_t d = lane; d < task.head_dim; d += 32) {
    const float value = x[d];
    unsigned char* to = place.tile + place.Bit(d) / 8;
    if constexpr (kFormat == KvElement::kF32) {
      *reinterpret_cast<float*>(to) = value;
    } else if constexpr (kFormat == KvElement::kF16) {
      const Stored stored = QuantizeF16(value);
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(stored.bits);
      saturated += stored.is_saturated;
    } else if constexpr (kFormat == KvElement::kInt8) {
      const Stored stored =
          QuantizeInt8(value, kIsV ? scales[d].v_scale : scales[d].k_scale, kIsV ? scales[d].v_zero : scales[d].k_zero);
      *to = static_cast<unsigned char>(stored.bits);
      saturated += stored.is_saturated;
    } else if constexpr (kFormat == KvElement::kInt8Online) {
      const Stored stored = QuantizeOnline(value, range, 255.0f);
      *to = static_cast<unsigned char>(stored.bits);
      saturated += stored.is_saturated;
    } else {
      const Stored stored = QuantizeOnline(value, range, 15.0f);
      saturated += stored.is_saturated;
      if (!place.IsLower(d)) continue;
      const int64_t partner = place.Partner(d);
      const uint32_t high = partner < task.head_dim ? QuantizeOnline(x[partner], range, 15.0f).bits : 0;
      *to = static_cast<unsigned char>(stored.bits | high << 4);
    }
  }
  if constexpr (kFormat != KvElement::kF32) {
    for (int distance = 16; distance > 0; distance /= 2) saturated += __shfl_xor_sync(kAllLanes, saturated, distance);
    if (lane == 0 && saturated > 0) atomicAdd(task.kv.saturated, static_cast<unsigned long long>(saturated));
  }
}

// x = x / sqrt(mean(x²) + eps) * weight, where weight is not null.
// Rounding |out - exact| <= (head_dim / 64 + 9) 2^-24 |exact|
__device__ void Normalise(const Head& x, const float* weight, int32_t head_dim, float eps) {
  if (!weight) return;
  float sum = 0;
  for (int32_t d = threadIdx.x % 32; d < head_dim; d += 32) sum = fmaf(x[d], x[d], sum);
  const float factor = 1.0f / sqrtf(WarpSum(sum) / static_cast<float>(head_dim) + eps);
  for (int32_t d = threadIdx.x % 32; d < head_dim; d += 32) x[d] = x[d] * factor * weight[d];
  __syncwarp();
}

__device__ void Rotate(const Head& x, const RopeAppendTask& task, int64_t row) {
  const int32_t half = task.rotary_dim / 2;
  for (int32_t i = threadIdx.x % 32; i < half; i += 32) {
    const float a = x[i], b = x[i + half], cos = task.cos[row * half + i], sin = task.sin[row * half + i];
    x[i] = fmaf(a, cos, -(b * sin));
    x[i + half] = fmaf(b, cos, a * sin);
  }
  __syncwarp();
}

template <KvElement kFormat>
__global__ void __launch_bounds__(kWarps * 32) RopeAppendKernel(const __grid_constant__ RopeAppendTask task) {
  const Shared<float> values(0, int64_t{kWarps} * task.head_dim);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, item = blockIdx.y * kWarps + warp;
  if (item >= task.n_heads + task.n_kv_heads) return;
  const bool is_q = item < task.n_heads;
  const Head x{values, int64_t{warp} * task.head_dim};
  float* from = task.qkv + (row * (task.n_heads + 2 * task.n_kv_heads) + item) * task.head_dim;
  for (int32_t d = lane; d < task.head_dim; d += 32) x[d] = from[d];
  __syncwarp();
  Normalise(x, is_q ? task.q_norm : task.k_norm, task.head_dim, task.norm_eps);
  Rotate(x, task, row);
  for (int32_t d = lane; d < task.head_dim; d += 32) from[d] = x[d];
  if (is_q) return;
  const int64_t head = item - task.n_heads;
  const int slot = task.position[row] % kBlockTokens;
  unsigned char* block = task.kv.data + head * task.kv.head_bytes + task.block[row] * task.kv.block_bytes;
  unsigned char* v_tile = block + KTileBytes(kFormat, task.head_dim);
  auto* online = reinterpret_cast<OnlineParameters*>(v_tile + VTileBytes(kFormat, task.head_dim));
  const KvScales* scales = nullptr;
  if constexpr (kFormat == KvElement::kInt8) scales = task.kv.scales + head * task.head_dim;
  Append(task, x, Place<kFormat, false>{block, task.head_dim, slot}, scales, online);
  __syncwarp();
  const float* v = from + int64_t{task.n_kv_heads} * task.head_dim;
  for (int32_t d = lane; d < task.head_dim; d += 32) x[d] = v[d];
  __syncwarp();
  Append(task, x, Place<kFormat, true>{v_tile, task.head_dim, slot}, scales, online);
}

template <KvElement kFormat>
cudaError_t LaunchFormat(const RopeAppendTask& task, cudaStream_t stream) {
  const dim3 grid(task.row_count, (task.n_heads + task.n_kv_heads + kWarps - 1) / kWarps);
  return Launch(RopeAppendKernel<kFormat>, grid, kWarps * 32, int64_t{kWarps} * task.head_dim * sizeof(float), stream,
                task);
}

}  // namespace

cudaError_t RopeAppend(const RopeAppendTask& task, KvElement format, cudaStream_t stream) {
  return WithFormat(format, [&](auto constant) { return LaunchFormat<constant()>(task, stream); });
}

}  // namespace rankwise::kernels::cuda
