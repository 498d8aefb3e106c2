// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mamx-tile -mamx-int8; called only on a CPU
// that has them, by a process that may use its matrix registers.
#define RW_ISA avx512_amx
#include "kernels/cpu/simd_avx512.h"
// After the instruction set.
#include "kernels/cpu/simd.h"
// After the vector type.
#include "kernels/cpu/dot_avx512_vnni.h"
// After its products, which take tiles of few rows.
#include "kernels/cpu/dot_avx512_amx.h"
// After the products.
#include "kernels/cpu/integer_matmul_kernel.h"

namespace rankwise::kernels {

constexpr IntegerKernels kAvx512AmxIntegers = {
    .name = "avx512-amx",
    .tile_rows = avx512_amx::kMatrixRows,
    .quantize_rows = avx512_amx::QuantizeRows,
    .matmul_panel = {avx512_amx::IntegerMatMulPanel<avx512_amx::Nibbles>,
                     avx512_amx::IntegerMatMulPanel<avx512_amx::Bytes>},
    .dot_burst = avx512_amx::MatrixRegisters::Burst,
};

}  // namespace rankwise::kernels
