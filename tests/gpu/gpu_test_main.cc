#include <gtest/gtest.h>

#include <string>

#include "kernels/cuda/cuda_backend.h"

namespace {

// Where there is no GPU, the one test that runs.
TEST(GpuTest, IsThere) {
  const auto backend = rankwise::kernels::CreateCudaBackend({});
  if (absl::IsUnavailable(backend.status())) GTEST_SKIP() << backend.status();
  EXPECT_TRUE(backend.ok()) << backend.status();
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (!rankwise::kernels::CreateCudaBackend({}).ok()) testing::GTEST_FLAG(filter) = "GpuTest.*";
  return RUN_ALL_TESTS();
}
