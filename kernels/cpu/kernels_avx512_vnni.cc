// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni; called only on a CPU that has them.
#define RW_ISA avx512_vnni
#include "kernels/cpu/simd_avx512.h"
// After the instruction set.
#include "kernels/cpu/simd.h"
// After the vector type.
#include "kernels/cpu/dot_avx512_vnni.h"
// After the vector type.
#include "kernels/cpu/row_kernels.h"
// After the products and the rows.
#include "kernels/cpu/integer_attention.h"
// After its products.
#include "kernels/cpu/attention_kernel.h"
// After attention.
#include "kernels/cpu/integer_matmul_kernel.h"

namespace rankwise::kernels {

constexpr IntegerKernels kAvx512VnniIntegers = avx512_vnni::kIntegerTable;
constexpr IntegerAttention kAvx512VnniIntegerAttention = {{avx512_vnni::AttendSplit<int8_t>,
                                                           avx512_vnni::AttendSplit<avx512_vnni::U8>,
                                                           avx512_vnni::AttendSplit<avx512_vnni::U4>}};

}  // namespace rankwise::kernels
