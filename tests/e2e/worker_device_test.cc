// What a worker says of a device it cannot have.

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "base/program_folder.h"
#include "launch/child_process.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using testing::HasSubstr;
using testing::Not;

struct Ended {
  int code = -1;
  std::string log;
};

Ended RunWorkers(int ranks, const std::string& device) {
  const std::string log = absl::StrCat(ScratchFolder(), "/worker-", device, "-", ranks, ".log");
  launch::ChildOptions options;
  options.command = {"mpirun",
                     "-n",
                     absl::StrCat(ranks),
                     "--oversubscribe",
                     "--bind-to",
                     "none",
                     absl::StrCat(ProgramFolder(), "/rankwise-worker"),
                     "--model",
                     DemoModel(),
                     "--device",
                     device};
  options.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"};
  options.log_path = log;
  Ended ended;
  const auto child = launch::ChildProcess::Start(options);
  if (!child.ok()) return {.log = child.status().ToString()};
  if (const auto state = (*child)->Wait(absl::Now() + kPatience)) ended.code = state->code;
  std::ifstream file(log);
  ended.log.assign(std::istreambuf_iterator<char>(file), {});
  return ended;
}

bool HasDriver() { return dlopen("libcuda.so.1", RTLD_LAZY) != nullptr; }

TEST(WorkerDeviceTest, CudaThatIsNotThereIsRefusedOnceAndWithExitCode2) {
  if (HasDriver()) GTEST_SKIP() << "this machine has an NVIDIA driver";
  for (const int ranks : {1, 2}) {
    const Ended ended = RunWorkers(ranks, "cuda");
    EXPECT_EQ(ended.code, 2) << ended.log;
    // The second with the plug-in built, the first without.
    EXPECT_THAT(ended.log, testing::AnyOf(HasSubstr("--device cuda: this build has no CUDA backend"),
                                          HasSubstr("--device cuda: this machine has no NVIDIA driver: libcuda.so.1")));
    EXPECT_EQ(ended.log.find("--device cuda:"), ended.log.rfind("--device cuda:")) << ended.log;
  }
}

TEST(WorkerDeviceTest, AutoGoesOnOnTheCpu) {
  if (HasDriver()) GTEST_SKIP() << "this machine has an NVIDIA driver";
  const Ended ended = RunWorkers(2, "auto");
  EXPECT_EQ(ended.code, 2) << ended.log;  // for the coordinator that it was not given
  EXPECT_THAT(ended.log, HasSubstr("--device auto takes the CPU: this "));
  EXPECT_THAT(ended.log, HasSubstr("give --coordinator HOST:PORT"));
  EXPECT_THAT(ended.log, Not(HasSubstr("--device cuda")));
}

TEST(WorkerDeviceTest, AnUnknownDeviceIsRefused) {
  const Ended ended = RunWorkers(1, "gpu");
  EXPECT_EQ(ended.code, 2);
  EXPECT_THAT(ended.log, HasSubstr("--device gpu is not one of auto, cpu, cuda"));
}

}  // namespace
}  // namespace rankwise::e2e
