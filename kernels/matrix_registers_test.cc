#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/amx_emulation/amx_emulator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/matmul_contract.h"
#include "kernels/test_support.h"

// That integer products are made in matrix registers at all: integer_matmul_test.cc sees only their bits.
namespace rankwise::kernels {
namespace {

TEST(MatrixRegistersTest, AreUsedForManyRowsAndGivenBack) {
  if (!testing::Value(IntegerProducts(), testing::Contains("avx512_amx"))) GTEST_SKIP() << "no AVX512-VNNI";
  if (&FindCpuKernels("")->integers == &kAvx512AmxIntegers) GTEST_SKIP() << "this CPU has them, and does not count";
  const auto backend = MakeBackend("avx512_amx", 1, Activations::kInt8);
  Random random(TestSeed());
  const Quantised whole(64, 256, 4, 128, random);
  const auto products_of = [&](int64_t rows) {
    const int64_t before = amx_emulation::ProductCount();
    Multiply(*backend, whole.view(), Chunks(256, 1), random.Floats(rows * 256), nullptr);
    EXPECT_FALSE(amx_emulation::IsInUse()) << rows;
    return amx_emulation::ProductCount() - before;
  };
  EXPECT_EQ(products_of(8), 0);
  // 2 panels of 2 registers, 256 columns of 64 at once, for each 16 rows of a tile; 33 are tiles of 16 and of 17.
  EXPECT_EQ(products_of(9), 16);
  EXPECT_EQ(products_of(32), 32);
  EXPECT_EQ(products_of(33), 48);
}

}  // namespace
}  // namespace rankwise::kernels
