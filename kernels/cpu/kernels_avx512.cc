// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq; called only on a CPU that has them.
#include "kernels/cpu/simd_avx512.h"
// After the instruction set.
#include "kernels/cpu/isa_table.h"

namespace rankwise::kernels {

constexpr IsaKernels kAvx512Kernels = avx512::kTable;

}  // namespace rankwise::kernels
