#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/kv_fragments.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/cuda/numbers.h"

namespace rankwise::kernels::cuda {
namespace {

// Attention of sixteen vectors, (row, query head) of one KV head, over the paged cache, 256 positions ("a split") at a
// time, on tensor cores and as exact as in f32: q, K, the weights and V are sums of bf16 terms (matmul.cu).
//   s[t] = ((q * k_scale) · k[t]) * score_scale   (f32 and f16: scale 1, zero 0); k's zero would add the same to all
//   a split keeps m = max s, l = Σ exp(s - m), o = Σ exp(s - m) v[t]; splits merge in the order of positions
//   out = o / l * v_scale + v_zero
// Online formats have scales and zeros of each position:
//   s[t] = (q · k[t]) * (k_scale[t] * score_scale) + k_zero[t] * (Σq * score_scale)
//   z = Σ exp(s - m) v_zero[t], o = Σ (exp(s - m) v_scale[t]) v[t], out = (o + z) / l
// Order    q · k: 16 dims at a time in their order. l and z: a lane sums positions mod 32, then the lanes in a tree. o:
//          a block of 16 positions at a time. Splits start at multiples of 256 whatever the row, and what lies outside
//          a vector's window weighs 0, which adds nothing: a vector's bits depend on its row and context only, not on
//          the tile, nor on whether one block walks all splits or each has a block of its own.
// Rounding of the CPU kernel (kernels/cpu/attention_kernel.h) with splits of 256: a step of 16 rounds at most 16 times,
//          and expf errs by 2^-23 at most
// Launch   grid (tiles, KV heads, 1 or splits), 128 threads
// Garbage  positions outside a vector's window are never summed: their scores are replaced, and V that is not finite is
//          left out of the product and added by the vectors that attend it
constexpr int kWarps = 4;
constexpr int kSplitBlocks = kSplitTokens / kBlockTokens;
// Rows of weights begin 16 banks apart, so that eight lanes' four weights are one access.
constexpr int kScoreStride = kSplitTokens + 16;
// Rows of q's pairs begin two banks apart from a multiple of 32.
__host__ __device__ constexpr int QueryStride(int head_dim) {
  return static_cast<int>(RoundUp(RoundUp(head_dim, 64) / 2, 32)) + 2;
}
constexpr float kNothing = -INFINITY;

// The block's shared memory, in the order of the members.
struct Layout {
  int64_t q, scores, values, numbers, rings, bytes;
  __host__ __device__ Layout(int head_dim, bool keeps_values, int ring_words)
      : q(0),
        scores(q + int64_t{3} * kTileVectors * QueryStride(head_dim) * 4),
        values(scores + int64_t{kTileVectors} * kScoreStride * 4),
        numbers(values + (keeps_values ? int64_t{kTileVectors} * head_dim * 4 : 0)),
        rings(numbers + int64_t{kNumbers} * kTileVectors * 4),
        bytes(rings + int64_t{kWarps} * ring_words * 4) {}
  static constexpr int kNumbers = 6;
};

// Merging the state of a later split into that of the earlier ones.
struct Merge {
  float keep, gain;
};
struct State {
  float max, sum, zeros;
};
__device__ inline Merge MergeInto(State& state, const State& split) {
  if (split.sum == 0) return {1, 0};
  if (state.sum == 0) {
    state = split;
    return {0, 1};
  }
  const float max = fmaxf(state.max, split.max);
  const Merge merge{expf(state.max - max), expf(split.max - max)};
  state = {max, fmaf(split.sum, merge.gain, state.sum * merge.keep),
           fmaf(split.zeros, merge.gain, state.zeros * merge.keep)};
  return merge;
}
__device__ inline float MergeValue(float state, float split, const Merge& merge) {
  if (merge.gain == 0 && merge.keep == 1) return state;
  return merge.keep == 0 && merge.gain == 1 ? split : fmaf(split, merge.gain, state * merge.keep);
}

template <KvElement kFormat>
__device__ inline float Finish(float value, const State& state, const KvLayer& kv, int channel) {
  if constexpr (IsOnline(kFormat)) value += state.zeros;
  value /= state.sum;
  if constexpr (kFormat == KvElement::kInt8) value = fmaf(value, kv.scales[channel].v_scale, kv.scales[channel].v_zero);
  return value;
}

struct Window {
  int32_t begin, end;
};

// What one block of threads does.
template <KvElement kFormat>
class TileAttention {
  using F = KvFragments<kFormat>;

 public:
  __device__ TileAttention(const AttentionTask& task, const AttentionTile& tile)
      : task_(task),
        tile_(tile),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        head_(blockIdx.y),
        layout_(task.head_dim, task.split_count == 0, F::kRingWords),
        q_(layout_.q, int64_t{3} * kTileVectors * QueryStride(task.head_dim)),
        scores_(layout_.scores, int64_t{kTileVectors} * kScoreStride),
        values_(layout_.values, task.split_count == 0 ? int64_t{kTileVectors} * task.head_dim : 0),
        numbers_(layout_.numbers, int64_t{Layout::kNumbers} * kTileVectors),
        ring_(layout_.rings + int64_t{warp_} * F::kRingWords * 4, F::kRingWords) {
    reach_ = {WindowOf(0).begin, WindowOf(tile_.vector_count - 1).end};
  }

  __device__ int32_t split_begin() const { return reach_.begin / kSplitTokens; }
  __device__ int32_t split_end() const { return (reach_.end - 1) / kSplitTokens + 1; }

  // q as terms, and Σq. A warp takes four vectors.
  __device__ void LoadQueries() {
    const int32_t padded = RoundUp(task_.head_dim, 64);
    for (int v = warp_; v < kTileVectors; v += kWarps) {
      float sum = 0;
      for (int32_t pair = lane_; pair < padded / 2; pair += 32) {
        const float x = Query(v, 2 * pair), y = Query(v, 2 * pair + 1);
        sum += x + y;
        uint32_t terms[3];
        SplitPair(x, y, terms);
#pragma unroll
        for (int i = 0; i < 3; ++i) q_[QueryAt(i, v) + pair] = terms[i];
      }
      sum = WarpSum(sum);
      if (lane_ == 0) Number(kQuerySum, v) = sum;
    }
    if (threadIdx.x < kTileVectors) {
      const int v = threadIdx.x;
      for (const NumberOf which : {kMax, kSum, kZeros}) Number(which, v) = 0.0f;
    }
    __syncthreads();
  }

  // The split's state into this block's own, or into the task's partials.
  __device__ void AttendSplit(int32_t split) {
    const int32_t origin = split * kSplitTokens;
    const Window part{Larger(reach_.begin, origin), Smaller(reach_.end, origin + kSplitTokens)};
    Score(split, part);
    __syncthreads();
    Weigh(split, part);
    __syncthreads();
    SumValues(split, part);
    __syncthreads();
  }

  __device__ void WriteOut() const {
    for (int v = warp_; v < tile_.vector_count; v += kWarps) {
      const State state{Number(kMax, v), Number(kSum, v), Number(kZeros, v)};
      float* out = task_.out + OutAt(v) * task_.head_dim;
      for (int32_t d = lane_; d < task_.head_dim; d += 32) {
        out[d] = Finish<kFormat>(values_[v * task_.head_dim + d], state, task_.kv, head_ * task_.head_dim + d);
      }
    }
  }

 private:
  enum NumberOf { kMax, kSum, kZeros, kQuerySum, kKeep, kGain };

  __device__ static int32_t Larger(int32_t a, int32_t b) { return a > b ? a : b; }
  __device__ static int32_t Smaller(int32_t a, int32_t b) { return a < b ? a : b; }
  __device__ decltype(auto) Number(NumberOf which, int v) const { return numbers_[which * kTileVectors + v]; }
  __device__ int64_t QueryAt(int term, int v) const {
    return int64_t{term * kTileVectors + v} * QueryStride(task_.head_dim);
  }

  __device__ Window WindowOf(int v) const {
    const int32_t end = tile_.first_position + (tile_.vector_begin + v) / task_.group + 1;
    return {task_.sliding_window > 0 ? Larger(0, end - task_.sliding_window) : 0, end};
  }
  __device__ int64_t RowOf(int v) const { return tile_.row_begin + (tile_.vector_begin + v) / task_.group; }
  __device__ int32_t QueryHead(int v) const { return head_ * task_.group + (tile_.vector_begin + v) % task_.group; }
  // [rows, n_heads].
  __device__ int64_t OutAt(int v) const { return RowOf(v) * task_.group * task_.n_kv_heads + QueryHead(v); }
  __device__ float Query(int v, int32_t dim) const {
    if (v >= tile_.vector_count || dim >= task_.head_dim) return 0;
    const int64_t heads = (task_.group + 2) * int64_t{task_.n_kv_heads};
    const float q = task_.qkv[(RowOf(v) * heads + QueryHead(v)) * task_.head_dim + dim];
    return kFormat == KvElement::kInt8 ? q * task_.kv.scales[head_ * task_.head_dim + dim].k_scale : q;
  }
  __device__ const unsigned char* Block(int32_t index) const {
    return task_.kv.data + head_ * task_.kv.head_bytes + task_.tables[tile_.table_begin + index] * task_.kv.block_bytes;
  }
  __device__ const unsigned char* VTile(const unsigned char* block) const {
    return block + KTileBytes(kFormat, task_.head_dim);
  }
  __device__ const OnlineParameters& Online(const unsigned char* block) const {
    return *reinterpret_cast<const OnlineParameters*>(VTile(block) + VTileBytes(kFormat, task_.head_dim));
  }

  // Scores of the split's blocks, warp w those with index w mod 4; outside of a vector's window kNothing.
  __device__ void Score(int32_t split, const Window& part) {
    const int32_t first = part.begin / kBlockTokens, last = (part.end - 1) / kBlockTokens;
    int32_t index = split * kSplitBlocks + warp_;
    while (index < first) index += kWarps;
    KPiece ahead{2 * index, 0};
    int place = 0;
    for (int i = 0; i + 1 < F::kStages; ++i) CopyNext(i * F::kPieceWords, ahead, last);
    for (; index <= last; index += kWarps) {
      const unsigned char* block = Block(index);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high[4] = {}, low[4] = {};
        for (int32_t slab = 0; slab < task_.head_dim; slab += 64) {
          CopyNext(Before(place), ahead, last);
          WaitForPiece();
          __syncwarp();
          typename F::KWords words;
          F::LoadK(ring_, place, lane_, words);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t q[3][4], k[F::kTerms][2];
#pragma unroll
            for (int term = 0; term < 3; ++term) LoadQuery(term, slab / 2 + lane_ % 4 * 8 + 2 * i, q[term]);
            F::KTerms(words, i, k);
            MultiplyTerms(high, low, q, k);
          }
          __syncwarp();  // before its place is copied to again
          place = Behind(place);
        }
        StoreScores(index, half, block, high, low);
      }
    }
  }

  // What is copied next: of K in Score's order, of V in SumValues'.
  struct KPiece {
    int32_t half, slab;  // half h of block b is 2 b + h
  };
  struct VPiece {
    int32_t slab, index;
  };
  // Where the piece behind that at `place` lies, and that before it, in the warp's ring.
  __device__ static int Behind(int place) { return (place + F::kPieceWords) % F::kRingWords; }
  __device__ static int Before(int place) { return (place + F::kRingWords - F::kPieceWords) % F::kRingWords; }
  // A group of copies, empty past the last piece.
  __device__ void CopyNext(int place, KPiece& next, int32_t last) const {
    if (next.half / 2 <= last) {
      const unsigned char* tile = Block(next.half / 2) + next.half % 2 * (KTileBytes(kFormat, task_.head_dim) / 2);
      F::CopyK(ring_, place, tile, task_.head_dim, next.slab, lane_);
      next.slab += 64;
      if (next.slab >= task_.head_dim) {
        next.slab = 0;
        next.half += next.half % 2 == 0 ? 1 : 2 * kWarps - 1;
      }
    }
    CommitCopies();
  }
  __device__ void CopyNext(int place, VPiece& next, int32_t first, int32_t last) const {
    if (next.slab * 32 < task_.head_dim) {
      F::CopyV(ring_, place, VTile(Block(next.index)), next.slab, lane_);
      if (++next.index > last) {
        next.index = first;
        next.slab += kWarps;
      }
    }
    CommitCopies();
  }
  // For all groups but the last kStages - 1.
  __device__ static void WaitForPiece() { WaitForCopies<F::kStages - 1>(); }

  __device__ void LoadQuery(int term, int32_t pair, uint32_t (&q)[4]) const {
    const uint2 upper = q_.Load2(QueryAt(term, lane_ / 4) + pair);
    const uint2 lower = q_.Load2(QueryAt(term, lane_ / 4 + 8) + pair);
    q[0] = upper.x;
    q[1] = lower.x;
    q[2] = upper.y;
    q[3] = lower.y;
  }

  __device__ void StoreScores(int32_t index, int half, const unsigned char* block, const float (&high)[4],
                              const float (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int v = lane_ / 4 + i / 2 * 8, token = half * 8 + lane_ % 4 * 2 + i % 2;
      const int32_t position = index * kBlockTokens + token;
      const Window window = WindowOf(v);
      float s = kNothing;
      if (v < tile_.vector_count && position >= window.begin && position < window.end) {
        const float dot = high[i] + low[i];
        if constexpr (IsOnline(kFormat)) {
          const float offset = Number(kQuerySum, v) * task_.score_scale;
          const OnlineParameters& online = Online(block);
          s = fmaf(dot, HalfToFloat(online.k_scale[token]) * task_.score_scale,
                   HalfToFloat(online.k_zero[token]) * offset);
        } else {
          s = dot * task_.score_scale;
        }
      }
      scores_[v * kScoreStride + position % kSplitTokens] = s;
    }
  }

  // Turns scores into the weights of the values, 0 outside of the window; a warp takes four vectors.
  __device__ void Weigh(int32_t split, const Window& part) {
    const int32_t origin = split * kSplitTokens;
    const int32_t begin = part.begin / kBlockTokens * kBlockTokens - origin;
    const int32_t end = ((part.end - 1) / kBlockTokens + 1) * kBlockTokens - origin;
    for (int v = warp_; v < kTileVectors; v += kWarps) {
      const Window window = WindowOf(v);
      const bool is_real = v < tile_.vector_count;
      float max = kNothing;
      // A lane owns positions mod 32 of the split, wherever `begin` is.
      for (int32_t i = lane_; i < end; i += 32) {
        if (i >= begin) max = fmaxf(max, scores_[v * kScoreStride + i]);
      }
      max = WarpMax(max);
      float sum = 0, zeros = 0;
      for (int32_t i = lane_; i < end; i += 32) {
        if (i < begin) continue;
        const int32_t position = origin + i;
        float p = 0;
        if (is_real && position >= window.begin && position < window.end) {
          p = expf(scores_[v * kScoreStride + i] - max);
          sum += p;
          if constexpr (IsOnline(kFormat)) {
            const OnlineParameters& online = Online(Block(position / kBlockTokens));
            zeros = fmaf(p, HalfToFloat(online.v_zero[i % kBlockTokens]), zeros);
            p *= HalfToFloat(online.v_scale[i % kBlockTokens]);
          }
        }
        scores_[v * kScoreStride + i] = p;
      }
      sum = WarpSum(sum);
      zeros = WarpSum(zeros);
      if (lane_ == 0) Keep(v, split, {max, sum, zeros});
    }
  }

  __device__ float* Partial(int v, int32_t split) const {
    const int64_t at = OutAt(v) * task_.split_count + split - split_begin();
    return task_.partials + at * (4 + task_.head_dim);
  }

  __device__ void Keep(int v, int32_t split, const State& part) {
    if (task_.split_count > 0) {
      if (v >= tile_.vector_count) return;
      float* partial = Partial(v, split);
      partial[0] = part.max;
      partial[1] = part.sum;
      partial[2] = part.zeros;
      return;
    }
    State state{Number(kMax, v), Number(kSum, v), Number(kZeros, v)};
    const Merge merge = MergeInto(state, part);
    Number(kMax, v) = state.max;
    Number(kSum, v) = state.sum;
    Number(kZeros, v) = state.zeros;
    Number(kKeep, v) = merge.keep;
    Number(kGain, v) = merge.gain;
  }

  // Σ p v, a warp 32 dims at a time.
  __device__ void SumValues(int32_t split, const Window& part) {
    const int32_t first = part.begin / kBlockTokens, last = (part.end - 1) / kBlockTokens;
    VPiece ahead{warp_, first};
    int place = 0;
    for (int i = 0; i + 1 < F::kStages; ++i) CopyNext(i * F::kPieceWords, ahead, first, last);
    for (int32_t slab = warp_; slab * 32 < task_.head_dim; slab += kWarps) {
      float high[4][4] = {}, low[4][4] = {};
      bool is_finite = true;
      for (int32_t index = first; index <= last; ++index) {
        CopyNext(Before(place), ahead, first, last);
        WaitForPiece();  // of which a lane reads what it copied itself
        typename F::VWords words;
        F::LoadV(ring_, place, lane_, words);
        uint32_t p[3][4];
        LoadWeights(index % kSplitBlocks * kBlockTokens, p);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t v[F::kTerms][2];
          is_finite &= F::VTerms(words, n, v);
          MultiplyTerms(high[n], low[n], p, v);
        }
        place = Behind(place);
      }
      const bool adds_rest = F::kHasInfinities && __any_sync(kAllLanes, !is_finite);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int v = lane_ / 4 + i / 2 * 8;
          const int32_t dim = slab * 32 + n * 8 + lane_ % 4 * 2 + i % 2;
          if (v >= tile_.vector_count || dim >= task_.head_dim) continue;
          float value = high[n][i] + low[n][i];
          if (adds_rest) value += SumOfTheRest(v, dim, split, part);
          KeepValue(v, dim, split, value);
        }
      }
    }
  }

  __device__ void LoadWeights(int32_t first, uint32_t (&p)[3][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 weights = scores_.Load4((lane_ / 4 + half * 8) * kScoreStride + first + lane_ % 4 * 4);
      uint32_t left[3], right[3];
      SplitPair(weights.x, weights.y, left);
      SplitPair(weights.z, weights.w, right);
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        p[term][half] = left[term];
        p[term][half + 2] = right[term];
      }
    }
  }

  // What VTerms left out.
  __device__ float SumOfTheRest(int v, int32_t dim, int32_t split, const Window& part) const {
    const Window window = WindowOf(v);
    float sum = 0;
    for (int32_t t = Larger(part.begin, window.begin); t < Smaller(part.end, window.end); ++t) {
      const float value = F::Value(VTile(Block(t / kBlockTokens)), t % kBlockTokens, dim);
      if (!(fabsf(value) < INFINITY)) sum = fmaf(scores_[v * kScoreStride + t - split * kSplitTokens], value, sum);
    }
    return sum;
  }

  __device__ void KeepValue(int v, int32_t dim, int32_t split, float value) {
    if (task_.split_count > 0) {
      Partial(v, split)[4 + dim] = value;
      return;
    }
    const int64_t at = int64_t{v} * task_.head_dim + dim;
    const float state = split == split_begin() ? 0.0f : static_cast<float>(values_[at]);
    values_[at] = MergeValue(state, value, {Number(kKeep, v), Number(kGain, v)});
  }

  const AttentionTask& task_;
  const AttentionTile& tile_;
  const int warp_, lane_, head_;
  const Layout layout_;
  const Shared<uint32_t> q_;     // [3, kTileVectors, QueryStride]: pairs of dims
  const Shared<float> scores_;   // [kTileVectors, kScoreStride]
  const Shared<float> values_;   // [kTileVectors, head_dim]: where one block walks all splits
  const Shared<float> numbers_;  // [NumberOf, kTileVectors]
  const Shared<uint32_t> ring_;  // of this warp: kStages pieces of K or V
  Window reach_;                 // positions that any vector attends
};

// For so many blocks of a multiprocessor registers are shared out, and none spills.
template <KvElement kFormat>
constexpr int kBlocks = BitsOf(kFormat) == 32  ? 3
                        : BitsOf(kFormat) == 8 ? 5
                                               : 4;

template <KvElement kFormat>
__global__ void __launch_bounds__(kWarps * 32, kBlocks<kFormat>)
    AttentionKernel(const __grid_constant__ AttentionTask task) {
  TileAttention<kFormat> attention(task, task.tiles[blockIdx.x]);
  if (task.split_count > 0) {
    const int32_t split = attention.split_begin() + static_cast<int32_t>(blockIdx.z);
    if (split >= attention.split_end()) return;
    attention.LoadQueries();
    attention.AttendSplit(split);
    return;
  }
  attention.LoadQueries();
  for (int32_t split = attention.split_begin(); split < attention.split_end(); ++split) attention.AttendSplit(split);
  attention.WriteOut();
}

// Merges the splits of one vector, in the order of positions. Launch grid (tiles, KV heads, kTileVectors), 128 threads.
template <KvElement kFormat>
__global__ void __launch_bounds__(kWarps * 32) MergeKernel(const __grid_constant__ AttentionTask task) {
  const AttentionTile& tile = task.tiles[blockIdx.x];
  const int v = blockIdx.z, head = blockIdx.y;
  if (v >= tile.vector_count) return;
  const int32_t first_row = tile.vector_begin / task.group, row = (tile.vector_begin + v) / task.group;
  const int32_t end = tile.first_position + (tile.vector_begin + tile.vector_count - 1) / task.group + 1;
  int32_t begin = 0;
  if (task.sliding_window > 0) begin = tile.first_position + first_row + 1 - task.sliding_window;
  if (begin < 0) begin = 0;
  const int32_t splits = (end - 1) / kSplitTokens + 1 - begin / kSplitTokens;
  const int64_t out = int64_t{tile.row_begin + row} * task.group * task.n_kv_heads + head * task.group +
                      (tile.vector_begin + v) % task.group;
  const int64_t stride = 4 + task.head_dim;
  const float* partials = task.partials + out * task.split_count * stride;
  for (int32_t d = threadIdx.x; d < task.head_dim; d += kWarps * 32) {
    State state{0, 0, 0};
    float value = 0;
    for (int32_t s = 0; s < splits; ++s) {
      const float* part = partials + s * stride;
      const Merge merge = MergeInto(state, {part[0], part[1], part[2]});
      value = MergeValue(value, part[4 + d], merge);
    }
    task.out[out * task.head_dim + d] = Finish<kFormat>(value, state, task.kv, head * task.head_dim + d);
  }
}

template <KvElement kFormat>
cudaError_t LaunchFormat(const AttentionTask& task, cudaStream_t stream) {
  const Layout layout(task.head_dim, task.split_count == 0, KvFragments<kFormat>::kRingWords);
  const int splits = task.split_count > 0 ? task.split_count : 1;
  const cudaError_t error = Launch(AttentionKernel<kFormat>, dim3(task.tile_count, task.n_kv_heads, splits),
                                   kWarps * 32, layout.bytes, stream, task);
  if (error != cudaSuccess || task.split_count == 0) return error;
  return Launch(MergeKernel<kFormat>, dim3(task.tile_count, task.n_kv_heads, kTileVectors), kWarps * 32, 0, stream,
                task);
}

}  // namespace

cudaError_t Attention(const AttentionTask& task, KvElement format, cudaStream_t stream) {
  return WithFormat(format, [&](auto constant) { return LaunchFormat<constant()>(task, stream); });
}

}  // namespace rankwise::kernels::cuda
