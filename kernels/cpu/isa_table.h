// Included last by kernels_avx2.cc and kernels_avx512.cc: the table of one instruction set.
#pragma once

#include "kernels/cpu/simd.h"
// After the vector type.
#include "kernels/cpu/matmul_kernel.h"
#include "kernels/cpu/row_kernels.h"
// After the rows.
#include "kernels/cpu/float_attention.h"
// After its products.
#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/rope_kernel.h"

namespace rankwise::kernels::RW_ISA {

// As many independent chains as hide the latency of fma, kept in registers.
inline float FmaBurst(int64_t iterations) {
  constexpr int kInFlight = kAccumulators >= 24 ? kFmaChains : kFmaChains / 2;
  const Vec a = Set(0.999f), b = Set(0.001f);
  // No two lanes alike: of equal halves of a pair the compiler would multiply one.
  float start[16 + kInFlight];
  for (int i = 0; i < 16 + kInFlight; ++i) start[i] = static_cast<float>(i);
  Vec acc[kInFlight];
#pragma GCC unroll 12
  for (int i = 0; i < kInFlight; ++i) acc[i] = Load(start + i);
  for (int64_t n = 0; n < iterations * (kFmaChains / kInFlight); ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kInFlight; ++i) acc[i] = Fma(acc[i], a, b);
  }
  Vec sum = Zero();
#pragma GCC unroll 12
  for (int i = 0; i < kInFlight; ++i) sum = Add(sum, acc[i]);
  return SumLanes(sum);
}

inline uint64_t ReadBurst(const void* data, int64_t bytes) {
  const auto* p = static_cast<const __m256i*>(data);
  __m256i sum[4] = {};
  for (int64_t i = 0; i + 4 <= bytes / 32; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(p + i + j));
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^
                               _mm256_extract_epi64(all, 2) ^ _mm256_extract_epi64(all, 3));
}

inline constexpr IsaKernels kTable = {
    .name = kName,
    .matmul_tile_rows = kTileRows,
    .matmul_panel = {MatMulPanel<PlainPanel<float>>, MatMulPanel<PlainPanel<F16>>, MatMulPanel<PlainPanel<BF16>>,
                     MatMulPanel<GroupedPanel<FourBits>>, MatMulPanel<GroupedPanel<U8>>},
    .tile_rows = TileRows,
    .widen = {Widen<float>, Widen<F16>, Widen<BF16>},
    .add = AddRow,
    .rms_norm = RmsNormRow,
    .silu_mul = SiluMulRow,
    .rope_append = {RopeAppendHead<float>, RopeAppendHead<F16>, RopeAppendHead<int8_t>, RopeAppendHead<U8>,
                    RopeAppendHead<U4>},
    .attend_split = {AttendSplit<float>, AttendSplit<F16>},
    .merge_split = MergeSplit,
    .finish_attention = {FinishAttention<float>, FinishAttention<F16>, FinishAttention<int8_t>, FinishAttention<U8>,
                         FinishAttention<U4>},
    .fma_burst = FmaBurst,
    .read_burst = ReadBurst,
};

}  // namespace rankwise::kernels::RW_ISA
