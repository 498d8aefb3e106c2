#pragma once

#include <functional>
#include <vector>

#include "kernels/backend.h"
#include "kernels/test_support.h"

// What suites of products share, whatever inputs are multiplied as.
namespace rankwise::kernels {

inline constexpr double kUnit = 0x1p-24;  // relative error of one f32 rounding

// `chunks` pieces of uneven length, some perhaps empty.
SumTree Chunks(int64_t n_in, int chunks);

// x [rows, view.cols] · Wᵀ + bias, between guard bands.
std::vector<float> Multiply(Backend& backend, const MatrixView& view, const SumTree& tree, const std::vector<float>& x,
                            const float* bias);

// Sums of chunks, added pairwise in a balanced tree.
float TreeSum(std::vector<float> sums);

// One output by the words of a contract, in scalar code, and what bounds its rounding.
struct Output {
  float value;
  double exact, size;
};
using OutputOf =
    std::function<Output(const MatrixView& view, const SumTree& tree, const float* x, float bias, int64_t out)>;

// `==` for every output of small batches and every 13th of large ones.
void ExpectContract(Backend& backend, const MatrixView& view, const SumTree& tree,
                    const std::vector<int64_t>& row_counts, Random& random, const OutputOf& output_of);
// Rows on both sides of where tiles and shares of threads may end, in a batch of 499.
void ExpectRowsAreAsAlone(Backend& backend, const MatrixView& view, Random& random);
// What tensor parallelism rests on: each rank sums its half of the tree, the all-reduce adds the halves.
void ExpectHalvesAddUp(Backend& backend, const MatrixView& view, const SumTree& tree, const std::vector<float>& x);

}  // namespace rankwise::kernels
