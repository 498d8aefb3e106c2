#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/numbers.h"
#include "kernels/draw_weights.h"

// Drawing a token from each row of logits, to the bit of kernels/token_draw.h: its weights are integers, so that their
// sums have no order, and each of its choices is the least key at which a sum reaches something.
namespace rankwise::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPivots = 3;  // two bits of a key for one pass over the row
constexpr int64_t kSharedBytes = kWarps * kPivots * 2 * sizeof(uint32_t);

// Each x[i] of all threads of the block, joined by `join`, in every thread.
template <int kCount, typename Join>
__device__ inline void BlockReduce(uint64_t (&x)[kCount], const Shared<uint32_t>& words, const Join& join) {
  static_assert(kCount <= kPivots && kWarps <= 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) x[i] = join(x[i], __shfl_xor_sync(kAllLanes, x[i], distance));
    if (lane == 0) {
      words[(warp * kCount + i) * 2] = static_cast<uint32_t>(x[i]);
      words[(warp * kCount + i) * 2 + 1] = static_cast<uint32_t>(x[i] >> 32);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int first = (lane % kWarps * kCount + i) * 2;
    x[i] = uint64_t{words[first + 1]} << 32 | words[first];
    for (int distance = kWarps / 2; distance > 0; distance /= 2) {
      x[i] = join(x[i], __shfl_xor_sync(kAllLanes, x[i], distance));
    }
  }
  __syncthreads();
}

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Least {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a < b ? a : b; }
};

// One row, by all threads of a block: thread i has the ids i, i + kThreads, ...
class RowDraw {
 public:
  __device__ explicit RowDraw(const DrawTask& task)
      : rule_(task.rules[blockIdx.x]),
        logits_(task.logits + int64_t{blockIdx.x} * task.vocab_size),
        weights_(task.weights + int64_t{blockIdx.x} * task.vocab_size),
        vocab_size_(task.vocab_size),
        words_(0, kSharedBytes / 4) {
    while (((vocab_size_ - 1) >> id_bits_) > 0) ++id_bits_;
  }

  // The token, in every thread; -1 where no logit is a number.
  __device__ int32_t Token() {
    uint64_t best[1] = {~uint64_t{0}};
    ForIds([&](int32_t id) { best[0] = Least()(best[0], LogitKey(id)); });
    BlockReduce(best, words_, Least());
    const auto id = static_cast<int32_t>(best[0] & ((uint64_t{1} << id_bits_) - 1));
    const float highest = logits_[id];
    if (!(highest > -INFINITY)) return -1;
    if (rule_.temperature == 0 || highest == INFINITY) return id;
    uint64_t total = WeighTopK(highest);
    if (rule_.top_p < 1 || rule_.min_p > 0) total = KeepTopPMinP(total);
    uint64_t left = static_cast<uint64_t>(rule_.uniform * static_cast<double>(total));
    if (left > total - 1) left = total - 1;
    return static_cast<int32_t>(FirstKey(
        id_bits_, left + 1, [&](int32_t i) { return uint64_t(i); }, [&](int32_t i) { return weights_[i]; }));
  }

 private:
  template <typename Body>
  __device__ void ForIds(const Body& body) const {
    for (int32_t id = threadIdx.x; id < vocab_size_; id += kThreads) body(id);
  }

  // By falling logit, then rising id.
  __device__ uint64_t LogitKey(int32_t id) const { return uint64_t{Fall(logits_[id])} << id_bits_ | uint64_t(id); }
  // By falling weight, then rising id.
  __device__ uint64_t WeightKey(int32_t id) const {
    return (static_cast<uint64_t>(kWeightOne) - weights_[id]) << id_bits_ | uint64_t(id);
  }

  // The least t below 2^bits such that the amounts of all ids whose key is at most t are at least `enough` together.
  template <typename Key, typename Amount>
  __device__ uint64_t FirstKey(int bits, uint64_t enough, const Key& key_of, const Amount& amount_of) const {
    uint64_t first = 0;
    for (int shift = (bits + 1) / 2 * 2 - 2; shift >= 0; shift -= 2) {
      uint64_t sums[kPivots] = {};
      ForIds([&](int32_t id) {
        const uint64_t key = key_of(id), amount = amount_of(id);
#pragma unroll
        for (int i = 0; i < kPivots; ++i) sums[i] += key < first + (uint64_t(i + 1) << shift) ? amount : 0;
      });
      BlockReduce(sums, words_, Sum());
      uint64_t digit = 0;
#pragma unroll
      for (int i = 0; i < kPivots; ++i) digit += sums[i] < enough;
      first += digit << shift;
    }
    return first;
  }

  // Gives the top k their weights and others none; the sum.
  __device__ uint64_t WeighTopK(double highest) {
    uint64_t last = ~uint64_t{0};
    if (rule_.top_k > 0 && rule_.top_k < vocab_size_) {
      last = FirstKey(
          32 + id_bits_, rule_.top_k, [&](int32_t i) { return LogitKey(i); }, [](int32_t) { return uint64_t{1}; });
    }
    const double inverse = 1.0 / rule_.temperature;
    uint64_t total[1] = {0};
    ForIds([&](int32_t id) {
      double x = (logits_[id] - highest) * inverse;
      uint64_t weight;
      Weigh(x, weight);
      total[0] += weights_[id] = LogitKey(id) <= last ? weight : 0;
    });
    BlockReduce(total, words_, Sum());
    return total[0];
  }

  // Takes the weights of what top-p, then min-p leave out; the new sum.
  __device__ uint64_t KeepTopPMinP(uint64_t total) {
    uint64_t last = ~uint64_t{0};
    if (rule_.top_p < 1) {
      uint64_t enough = static_cast<uint64_t>(rule_.top_p * static_cast<double>(total));
      if (enough < 1) enough = 1;
      constexpr int kWeightBits = 41;
      last = FirstKey(
          kWeightBits + id_bits_, enough, [&](int32_t i) { return WeightKey(i); },
          [&](int32_t i) { return weights_[i]; });
    }
    const auto least = static_cast<uint64_t>(rule_.min_p * kWeightOne);
    uint64_t kept[1] = {0};
    ForIds([&](int32_t id) {
      if (WeightKey(id) > last || weights_[id] < least) weights_[id] = 0;
      kept[0] += weights_[id];
    });
    BlockReduce(kept, words_, Sum());
    return kept[0];
  }

  const DrawRule& rule_;
  const float* logits_;
  uint64_t* weights_;
  const int32_t vocab_size_;
  int id_bits_ = 1;
  const Shared<uint32_t> words_;
};

__global__ void __launch_bounds__(kThreads) DrawKernel(const __grid_constant__ DrawTask task) {
  const int32_t token = RowDraw(task).Token();
  if (threadIdx.x == 0) task.ids[blockIdx.x] = token;
}

}  // namespace

cudaError_t Draw(const DrawTask& task, cudaStream_t stream) {
  return Launch(DrawKernel, dim3(task.row_count), kThreads, kSharedBytes, stream, task);
}

}  // namespace rankwise::kernels::cuda
