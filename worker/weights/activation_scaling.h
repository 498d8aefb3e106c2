#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/input_statistics.h"
#include "worker/weights/quantize.h"

// Activation-aware weight scaling (Lin et al. 2024, AWQ, arXiv:2306.00978): input channels that carry much are widened
// before weights are rounded, and what made them is narrowed by as much, so that the model of floats stays the same.
namespace rankwise::weights {

// What is multiplied into a tensor before it is rounded; empty: 1. Powers of two, so that folding one into a norm, a
// bias or a matrix changes no bit of what the floats compute (but for f16 that leave the normal range).
struct TensorScaling {
  std::vector<float> rows, cols;   // [view.rows], [view.cols]
  std::vector<float> mean_square;  // [view.cols] of the input as it was, before `cols`: what an error there costs
};
using Scalings = std::map<std::string, TensorScaling>;  // by tensor name

// For each input of a decoder layer scales s = 2^round(log2(rms^a / sqrt(largest * least rms^a))) with the a of 0, 0.1,
// ... 1 that makes sum over outputs and inputs of mean_square * (w - rounded w)^2 least, over a sample of the outputs.
// What was before the input takes 1/s: a norm's weight, the rows of up, and those of v (query heads of one KV head then
// share scales; not where q, k and v are one tensor).
Scalings ScaleByActivations(const TensorListing& listing, const InputStatistics& statistics,
                            const QuantizeOptions& options, const QuantizeProgress& progress);

}  // namespace rankwise::weights
