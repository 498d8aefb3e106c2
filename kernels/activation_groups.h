#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/preconditions.h"

// Activations::kInt8: every row of inputs of a quantised matrix is itself quantised, in groups of input columns.
//   scale = max |x| / 127, q = round_half_even(x / scale) in [-127, 127], x ≈ q * scale
//   y = Σ_groups (Σ_k (w_q - zero) * q) * (w_scale * scale)
// The inner sum is of integers and exact, its value below 2^24; so is its conversion to f32. Each group then adds one
// fma to its chunk's chain: w_scale * scale is rounded once and multiplies that sum.
namespace rankwise::kernels {

// Columns of one group at most: its integers stay exact in f32, and the sum of its q in sixteen bits.
inline constexpr int32_t kActivationGroup = 128;

// Input columns [begin, end) of one chunk of the sum and one group of the weights.
struct ActivationGroup {
  int32_t begin, end;
  int32_t weight_group;
};

// In rising order; `chunk_begin` [chunks + 1] gets the first group of each chunk. A weight group is cut every
// kActivationGroup columns from where it begins and at the chunks' boundaries, so that the ranks of a group cut the
// same columns alike. Requires a grouped dtype.
std::vector<ActivationGroup> CutActivations(const PackedShape& shape, const SumTree& tree,
                                            std::vector<int32_t>& chunk_begin);

// One group of a row: q [x.size()]; returns its scale, which is NaN or infinite where x is.
float QuantizeActivations(std::span<const float> x, std::span<int8_t> q);

}  // namespace rankwise::kernels
