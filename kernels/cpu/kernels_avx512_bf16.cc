// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16; called only on a CPU that has them.
#define RW_ISA avx512_bf16
#include "kernels/cpu/simd_avx512.h"
// After the instruction set.
#include "kernels/cpu/simd.h"
// After the vector type.
#include "kernels/cpu/pairs_avx512_bf16.h"
// After the products.
#include "kernels/cpu/matmul_kernel.h"
// After the tiles.
#include "kernels/cpu/paired_matmul_kernel.h"

namespace rankwise::kernels {

constexpr BFloat16Kernels kAvx512Bf16BFloat16s = avx512_bf16::kBFloat16Table;

}  // namespace rankwise::kernels
