// Compiled with -mavx2 -mfma -mf16c; called only on a CPU that has them.
#include "kernels/cpu/simd_avx2.h"
// After the instruction set.
#include "kernels/cpu/isa_table.h"
// After its matrices and bursts.
#include "kernels/cpu/rounded_matmul_kernel.h"
// After the vector type.
#include "kernels/cpu/dot_avx2.h"
// After the products and the rows.
#include "kernels/cpu/integer_attention.h"
// After attention.
#include "kernels/cpu/integer_matmul_kernel.h"

namespace rankwise::kernels {

constexpr IsaKernels kAvx2Kernels = avx2::kTable;
constexpr BFloat16Kernels kAvx2BFloat16s = avx2::kBFloat16Table;
constexpr IntegerKernels kAvx2Integers = avx2::kIntegerTable;
constexpr IntegerAttention kAvx2IntegerAttention = {
    {avx2::AttendSplit<int8_t>, avx2::AttendSplit<avx2::U8>, avx2::AttendSplit<avx2::U4>}};

}  // namespace rankwise::kernels
