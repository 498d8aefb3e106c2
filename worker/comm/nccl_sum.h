#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rankwise::comm {

// sum[i] = parts[0][i] + parts[1][i] + ... in the order of Communicator::AllReduceSum, i < count. `parts` is
// [part_count, stride], part_count in [1, 1024], and `sum` lies outside of it. Device memory.
cudaError_t SumParts(float* sum, const float* parts, int part_count, int64_t stride, int64_t count,
                     cudaStream_t stream);

}  // namespace rankwise::comm
