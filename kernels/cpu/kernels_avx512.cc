// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq; called only on a CPU that has them.
#include "kernels/cpu/simd_avx512.h"
// After the instruction set.
#include "kernels/cpu/isa_table.h"
// After its matrices and bursts.
#include "kernels/cpu/rounded_matmul_kernel.h"

namespace rankwise::kernels {

constexpr IsaKernels kAvx512Kernels = avx512::kTable;
constexpr BFloat16Kernels kAvx512BFloat16s = avx512::kBFloat16Table;

}  // namespace rankwise::kernels
