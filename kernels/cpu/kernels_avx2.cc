// Compiled with -mavx2 -mfma -mf16c; called only on a CPU that has them.
#include "kernels/cpu/simd_avx2.h"
// After the instruction set.
#include "kernels/cpu/isa_table.h"

namespace rankwise::kernels {

constexpr IsaKernels kAvx2Kernels = avx2::kTable;

}  // namespace rankwise::kernels
