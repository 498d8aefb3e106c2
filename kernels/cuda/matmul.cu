#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/numbers.h"

namespace rankwise::kernels::cuda {
namespace {

// y = x Wᵀ + bias on tensor cores, as exact as in f32.
//   Every factor is a sum of terms in bf16 of eight bits each (x three; W as many as its format needs, Stored::kTerms),
//   so that products of terms are exact and only their sums are rounded. Of kBF16OfBF16 x is rounded to one term first.
//   Products of first terms and all others have sums of their own, for the small ones not to be cut off by the large
//   ones.
// Order    K is cut into slabs of 64; warp w of 4 adds up slabs w, w + 4, ... in their order, 16 at a time as the
//          tensor core does; then high + low, and ((w0 + w1) + (w2 + w3)) + bias. None of it depends on the other rows
//          or on the tile's shape, and W's format matters only by its values: terms that are zero add nothing.
// Rounding tensor cores cut off what is 2^-24 below the largest of the addends, so that a step of 16 errs by at most
//          16 roundings: |y - exact| <= (n_in + 8) 2^-24 (Σ_k |x w| + |bias|), as one fma chain does; a quarter of
//          that in fact, since chains are a quarter as long
// Shapes   x [row_count, n_in], y [row_count, n_out]; weights as MatMulTask says
// Loads    weights are read into registers a slab ahead; of few rows x where it is used, of many through shared memory,
//          copied a slab ahead, 64 columns of 32 rows for each warp (its own: no warp waits for another)
// Launch   grid (16 kTilesOut outputs, 8 kTilesRows rows), 128 threads, shared memory for 4 warps' WarpFloats
constexpr int kWarps = 4;
constexpr int kSlab = 64;

// What a lane holds of 16 outputs and one slab: 32 values in kLoads words of 16 bytes. Value e of step i is output
// g + 8 (e / 2 % 2) and column 16 t + 4 i + 2 (e / 4) + e % 2 of the slab, g = lane / 4, t = lane % 4: the fragments of
// MultiplyTerms with K reordered so that a lane's columns of x are consecutive.
__device__ inline uint32_t Word(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Scale and zero of a lane's two outputs, for one group of columns.
struct Group {
  float scale[2];
  float zero[2];
};

template <WeightFormat kFormat>
struct Stored;
template <>
struct Stored<WeightFormat::kF32> {
  static constexpr int kLoads = 8, kTerms = 3, kInputTerms = 3;
  static constexpr bool kIsGrouped = false;
  __device__ static void Terms(const uint4 (&words)[kLoads], int i, int pair, uint32_t (&terms)[kTerms]) {
    const uint4& w = words[2 * i + pair / 2];
    SplitPair(__uint_as_float(Word(w, pair % 2 * 2)), __uint_as_float(Word(w, pair % 2 * 2 + 1)), terms);
  }
};
template <>
struct Stored<WeightFormat::kF16> {
  static constexpr int kLoads = 4, kTerms = 2, kInputTerms = 3;
  static constexpr bool kIsGrouped = false;
  __device__ static void Terms(const uint4 (&words)[kLoads], int i, int pair, uint32_t (&terms)[kTerms]) {
    const uint32_t w = Word(words[i], pair);
    SplitPair(HalfToFloat(static_cast<uint16_t>(w)), HalfToFloat(static_cast<uint16_t>(w >> 16)), terms);
  }
};
template <>
struct Stored<WeightFormat::kBF16> {
  static constexpr int kLoads = 4, kTerms = 1, kInputTerms = 3;
  static constexpr bool kIsGrouped = false;
  __device__ static void Terms(const uint4 (&words)[kLoads], int i, int pair, uint32_t (&terms)[kTerms]) {
    terms[0] = Word(words[i], pair);
  }
};
template <>
struct Stored<WeightFormat::kBF16OfBF16> : Stored<WeightFormat::kBF16> {
  static constexpr int kInputTerms = 1;
};
// (q - zero) scale is exact in f32: 4 + 1 + 11 bits, or 8 + 1 + 11.
template <>
struct Stored<WeightFormat::kInt8> {
  static constexpr int kLoads = 2, kTerms = 3, kInputTerms = 3;
  static constexpr bool kIsGrouped = true;
  __device__ static uint32_t Value(const uint4 (&words)[kLoads], int i, int e) {
    return Word(words[i / 2], i % 2 * 2 + e / 4) >> (e % 4 * 8) & 0xff;
  }
};
template <>
struct Stored<WeightFormat::kInt4> {
  static constexpr int kLoads = 1, kTerms = 2, kInputTerms = 3;
  static constexpr bool kIsGrouped = true;
  __device__ static uint32_t Value(const uint4 (&words)[kLoads], int i, int e) {
    return Word(words[0], i) >> (e * 4) & 0xf;
  }
};

__device__ inline Group LoadGroup(const MatMulTask& task, int64_t column, int64_t out) {
  const int64_t at = (column + task.group_offset) / task.group_size * task.padded_out + out;
  return {{HalfToFloat(task.scales[at]), HalfToFloat(task.scales[at + 8])},
          {static_cast<float>(task.zeros[at]), static_cast<float>(task.zeros[at + 8])}};
}

// What each warp has of the block's shared memory, in floats: two slabs of x where x is copied, then its sums.
template <int kTilesOut, int kTilesRows>
struct WarpFloats {
  static constexpr bool kIsCopied = kTilesRows > 1;
  static constexpr int kSums = kTilesOut * 16 * kTilesRows * 8;
  static constexpr int kCopy = kIsCopied ? kTilesRows * 8 * kSlab : 0;
  static constexpr int kAll = 2 * kCopy > kSums ? 2 * kCopy : kSums;
};

template <WeightFormat kFormat, int kTilesOut, int kTilesRows>
class Tile {
  using W = Stored<kFormat>;
  using Floats = WarpFloats<kTilesOut, kTilesRows>;

 public:
  // `own` is where this warp's floats begin.
  __device__ Tile(const MatMulTask& task, const Shared<float>& shared, int own)
      : task_(task),
        shared_(shared),
        own_(own),
        lane_(threadIdx.x % 32),
        tile_(int64_t{blockIdx.x} * kTilesOut),
        row_(int64_t{blockIdx.y} * kTilesRows * 8) {}

  __device__ void SumSlabs(int warp) {
    const int64_t slabs = (task_.n_in + kSlab - 1) / kSlab;
    if (warp >= slabs) return;
    Load(warp, words_);
    CopyX(warp, own_);
    if constexpr (Floats::kIsCopied) CommitCopies();
    int current = own_, other = own_ + Floats::kCopy;
    for (int64_t slab = warp; slab < slabs; slab += kWarps) {
      uint4 next[kTilesOut][W::kLoads] = {};
      if (slab + kWarps < slabs) {
        Load(slab + kWarps, next);
        CopyX(slab + kWarps, other);
      }
      if constexpr (Floats::kIsCopied) {
        CommitCopies();
        WaitForCopies<1>();
        __syncwarp();
      }
      Multiply(slab, current);
      if constexpr (Floats::kIsCopied) __syncwarp();
      const int done = current;
      current = other;
      other = done;
#pragma unroll
      for (int o = 0; o < kTilesOut; ++o) {
#pragma unroll
        for (int j = 0; j < W::kLoads; ++j) words_[o][j] = next[o][j];
      }
    }
  }

  // This warp's sums into its own floats, [kTilesOut * 16, kTilesRows * 8].
  __device__ void Store() const {
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int o = 0; o < kTilesOut; ++o) {
#pragma unroll
      for (int r = 0; r < kTilesRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t at = (o * 16 + g + i / 2 * 8) * (kTilesRows * 8) + r * 8 + 2 * t + i % 2;
          shared_[own_ + at] = high_[o][r][i] + low_[o][r][i];
        }
      }
    }
  }

 private:
  __device__ void Load(int64_t slab, uint4 (&words)[kTilesOut][W::kLoads]) const {
    const int64_t slabs = (task_.n_in + kSlab - 1) / kSlab;
#pragma unroll
    for (int o = 0; o < kTilesOut; ++o) {
      const int64_t tile = tile_ + o < task_.padded_out / 16 ? tile_ + o : tile_;
      const unsigned char* from = task_.weights + ((tile * slabs + slab) * W::kLoads * 32 + lane_) * 16;
#pragma unroll
      for (int j = 0; j < W::kLoads; ++j) words[o][j] = Load16(from + j * 512);
    }
  }

  // Where four columns of a copied row lie: eight lanes' accesses meet eight different groups of four banks, both
  // consecutive ones of one row, as they are copied, and those of every 16 columns of two rows, as they are read.
  __device__ static int CopyAt(int row, int quad) { return row * kSlab + (quad ^ quad / 8 ^ row % 2 * 2) * 4; }

  __device__ void CopyX(int64_t slab, int to) const {
    if constexpr (Floats::kIsCopied) {
#pragma unroll
      for (int j = 0; j < kTilesRows * 4; ++j) {
        const int row = j * 2 + lane_ / 16, quad = lane_ % 16;
        const int64_t k = slab * kSlab + quad * 4;
        const float* x = task_.x + (row_ + row) * task_.n_in + k;
        const int64_t left = row_ + row < task_.row_count ? task_.n_in - k : 0;
        const int at = to + CopyAt(row, quad);
        if (task_.is_aligned) {
          shared_.CopyAsync<4>(at, left > 0 ? x : task_.x, left > 0);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) shared_[at + e] = left > e ? x[e] : 0.0f;
        }
      }
    }
  }

  // Columns 16 t + 4 i + {0 .. 3} of the slab, of row g of row tile r.
  __device__ float4 LoadX(int64_t slab, int copy, int i, int r) const {
    if constexpr (Floats::kIsCopied) return shared_.Load4(copy + CopyAt(r * 8 + lane_ / 4, lane_ % 4 * 4 + i));
    const int64_t row = row_ + r * 8 + lane_ / 4, k = slab * kSlab + lane_ % 4 * 16 + i * 4;
    if (row >= task_.row_count || k >= task_.n_in) return {0, 0, 0, 0};
    const float* x = task_.x + row * task_.n_in + k;
    if (task_.is_aligned) {
      const uint4 words = Load16(x);
      return {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z), __uint_as_float(words.w)};
    }
    const int64_t left = task_.n_in - k;
    return {x[0], left > 1 ? x[1] : 0, left > 2 ? x[2] : 0, left > 3 ? x[3] : 0};
  }

  __device__ void Multiply(int64_t slab, int copy) {
    Group groups[kTilesOut];
    if constexpr (W::kIsGrouped) {
      if (task_.has_group_per_slab) LoadGroups(slab * kSlab, groups);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t x[kTilesRows][W::kInputTerms][2];
#pragma unroll
      for (int r = 0; r < kTilesRows; ++r) {
        const float4 values = LoadX(slab, copy, i, r);
        if constexpr (W::kInputTerms == 1) {
          x[r][0][0] = RoundPair(values.x, values.y);
          x[r][0][1] = RoundPair(values.z, values.w);
        } else {
          QuadToPairs(values, x[r]);
        }
      }
#pragma unroll
      for (int o = 0; o < kTilesOut; ++o) {
        uint32_t w[W::kTerms][4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          uint32_t terms[W::kTerms];
          if constexpr (W::kIsGrouped) {
            GroupedTerms(slab, i, o, pair, groups[o], terms);
          } else {
            W::Terms(words_[o], i, pair, terms);
          }
#pragma unroll
          for (int term = 0; term < W::kTerms; ++term) w[term][pair] = terms[term];
        }
#pragma unroll
        for (int r = 0; r < kTilesRows; ++r) MultiplyTerms(high_[o][r], low_[o][r], w, x[r]);
      }
    }
  }

  __device__ void LoadGroups(int64_t column, Group (&groups)[kTilesOut]) const {
#pragma unroll
    for (int o = 0; o < kTilesOut; ++o) {
      const int64_t tile = tile_ + o < task_.padded_out / 16 ? tile_ + o : tile_;
      groups[o] = LoadGroup(task_, column, tile * 16 + lane_ / 4);
    }
  }

  __device__ void GroupedTerms(int64_t slab, int i, int o, int pair, const Group& group,
                               uint32_t (&terms)[W::kTerms]) const {
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t q = W::Value(words_[o], i, pair * 2 + e);
      // 2^23 + q without a conversion.
      const float biased = __uint_as_float(0x4b000000 | q);
      const int second = pair % 2;
      if (task_.has_group_per_slab) {
        values[e] = (biased - (8388608.0f + group.zero[second])) * group.scale[second];
      } else {
        // Groups that begin anywhere: a slice of a matrix whose groups do not divide it.
        const int64_t column = slab * kSlab + lane_ % 4 * 16 + i * 4 + pair / 2 * 2 + e;
        const int64_t tile = tile_ + o < task_.padded_out / 16 ? tile_ + o : tile_;
        const Group own = LoadGroup(task_, column < task_.n_in ? column : task_.n_in - 1, tile * 16 + lane_ / 4);
        values[e] = (biased - (8388608.0f + own.zero[second])) * own.scale[second];
      }
    }
    SplitPair(values[0], values[1], terms);
  }

  const MatMulTask& task_;
  const Shared<float>& shared_;
  const int own_, lane_;
  const int64_t tile_, row_;
  uint4 words_[kTilesOut][W::kLoads];
  float high_[kTilesOut][kTilesRows][4] = {}, low_[kTilesOut][kTilesRows][4] = {};
};

template <WeightFormat kFormat, int kTilesOut, int kTilesRows>
__global__ void __launch_bounds__(kWarps * 32) MatMulKernel(const __grid_constant__ MatMulTask task) {
  constexpr int kRows = kTilesRows * 8, kOutputs = kTilesOut * 16;
  constexpr int kFloats = WarpFloats<kTilesOut, kTilesRows>::kAll;
  const Shared<float> shared(0, kWarps * kFloats);
  const int warp = threadIdx.x / 32;
  Tile<kFormat, kTilesOut, kTilesRows> tile(task, shared, warp * kFloats);
  tile.SumSlabs(warp);
  tile.Store();
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kOutputs; i += kWarps * 32) {
    const int64_t out = int64_t{blockIdx.x} * kOutputs + i % kOutputs;
    const int64_t row = int64_t{blockIdx.y} * kRows + i / kOutputs;
    if (out >= task.n_out || row >= task.row_count) continue;
    const int at = i % kOutputs * kRows + i / kOutputs;
    const float sum = (shared[at] + shared[kFloats + at]) + (shared[2 * kFloats + at] + shared[3 * kFloats + at]);
    task.y[row * task.n_out + out] = task.bias ? sum + task.bias[out] : sum;
  }
}

template <WeightFormat kFormat, int kTilesOut, int kTilesRows>
cudaError_t LaunchTiles(const MatMulTask& task, cudaStream_t stream) {
  constexpr int kRows = kTilesRows * 8, kOutputs = kTilesOut * 16;
  const dim3 grid((task.n_out + kOutputs - 1) / kOutputs, (task.row_count + kRows - 1) / kRows);
  return Launch(MatMulKernel<kFormat, kTilesOut, kTilesRows>, grid, kWarps * 32,
                int64_t{kWarps} * WarpFloats<kTilesOut, kTilesRows>::kAll * sizeof(float), stream, task);
}

// Few rows: as many blocks as there are outputs for, each weight read once. Many: tiles that use a weight 32 times.
template <WeightFormat kFormat>
cudaError_t LaunchFormat(const MatMulTask& task, cudaStream_t stream) {
  // Two tiles of f32 do not fit into the registers.
  constexpr int kTilesOut = kFormat == WeightFormat::kF32 ? 1 : 2;
  return task.row_count <= 8 ? LaunchTiles<kFormat, 1, 1>(task, stream)
                             : LaunchTiles<kFormat, kTilesOut, 4>(task, stream);
}

}  // namespace

cudaError_t MatMul(const MatMulTask& task, WeightFormat format, cudaStream_t stream) {
  switch (format) {
    case WeightFormat::kF32:
      return LaunchFormat<WeightFormat::kF32>(task, stream);
    case WeightFormat::kF16:
      return LaunchFormat<WeightFormat::kF16>(task, stream);
    case WeightFormat::kBF16:
      return LaunchFormat<WeightFormat::kBF16>(task, stream);
    case WeightFormat::kInt4:
      return LaunchFormat<WeightFormat::kInt4>(task, stream);
    case WeightFormat::kInt8:
      return LaunchFormat<WeightFormat::kInt8>(task, stream);
    case WeightFormat::kBF16OfBF16:
      return LaunchFormat<WeightFormat::kBF16OfBF16>(task, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace rankwise::kernels::cuda
