#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/draw_weights.h"

namespace rankwise::kernels {

// Draws tokens from rows of logits, on the host. Keeps scratch of vocabulary size, so one per thread. The result
// depends on the arguments alone: the same bits on every platform that rounds IEEE. So exp and log are ours, because
// those of libm differ by version and instruction set, and probabilities are integers, whose sums have no order. That
// is why every backend's Draw can give the same tokens, in whatever order it adds.
class TokenDraw {
 public:
  explicit TokenDraw(int32_t vocab_size);
  int32_t vocab_size() const { return vocab_size_; }

  // One draw from the softmax of what temperature, then top-k, top-p and min-p leave, by rising id. Ties go to the
  // lowest id. Logits that are NaN count as -inf; -1 when none is left. Tokens 2^41 times less likely than the first
  // one are never drawn.
  int32_t Draw(std::span<const float> logits, const DrawRule& rule);

  // log Σ exp(logits), -inf where none is a number.
  double LogSumExp(std::span<const float> logits);
  // The likeliest `count` ids, all when there are fewer, by falling logit, then rising id.
  std::vector<int32_t> Best(std::span<const float> logits, int32_t count);

 private:
  uint64_t KeepNucleus(uint64_t enough);

  int32_t vocab_size_;
  std::vector<uint64_t> weight_;  // of each id
  std::vector<uint64_t> keys_;    // of candidates
};

}  // namespace rankwise::kernels
