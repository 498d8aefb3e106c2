// What a worker, and the programs that start one, say of a device that is not there.

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/program_folder.h"
#include "launch/child_process.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using testing::HasSubstr;
using testing::Not;

// With the plug-in built, and without.
MATCHER(SaysOnceThatThereIsNoCuda, "") {
  *result_listener << arg;
  const size_t place = arg.find("--device cuda: ");
  const absl::string_view words = absl::string_view(arg).substr(std::min(place, arg.size()));
  return arg.rfind("--device cuda:") == place &&
         (absl::StartsWith(words, "--device cuda: this machine has no NVIDIA driver: libcuda.so.1") ||
          absl::StartsWith(words, "--device cuda: this build has no CUDA backend"));
}

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
    EXPECT_THAT(ended.log, SaysOnceThatThereIsNoCuda());
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

class ProgramDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (HasDriver()) GTEST_SKIP() << "this machine has an NVIDIA driver";
    std::filesystem::remove(answer_);
    std::ofstream(question_) << R"({"custom_id": "a", "method": "POST", "url": "/v1/completions", )"
                             << R"("body": {"prompt": "Once", "max_tokens": 4, "temperature": 0}})"
                             << "\n";
  }

  std::vector<std::string> Batch(const std::string& device) const {
    return {"batch",   DemoModel(), "--device", device,  "--threads",   "1",
            "--input", question_,   "--output", answer_, "--log-level", "info"};
  }
  std::string Answer() const {
    std::ifstream file(answer_);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  const std::string question_ = ScratchFolder() + "/question.jsonl", answer_ = ScratchFolder() + "/answer.jsonl";
};

TEST_F(ProgramDeviceTest, CudaThatIsNotThereEndsEveryProgramInWords) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"serve", DemoModel(), "--listen", "127.0.0.1:0", "--device", "cuda"},
        {"serve", DemoModel(), "--listen", "127.0.0.1:0", "--device", "cuda", "--tp", "2"},
        {"bench", "engine", "--model", DemoModel(), "--device", "cuda"},
        {"bench", "kernels", "--device", "cuda"},
        Batch("cuda")}) {
    SCOPED_TRACE(absl::StrJoin(arguments, " "));
    const auto ended = RunProgram("rankwise", arguments);
    ASSERT_TRUE(ended.ok()) << ended.status();
    EXPECT_EQ(ended->state.code, 2) << ended->log;
    EXPECT_THAT(ended->log, SaysOnceThatThereIsNoCuda());
  }
  EXPECT_EQ(Answer(), "");
}

TEST_F(ProgramDeviceTest, AutoAnswersOnTheCpu) {
  const auto batch = RunProgram("rankwise", Batch("auto"));
  ASSERT_TRUE(batch.ok()) << batch.status();
  EXPECT_TRUE(batch->state.is_success()) << batch->log;
  EXPECT_THAT(batch->log, HasSubstr("--device auto takes the CPU: this "));
  EXPECT_THAT(Answer(), HasSubstr("\"completion_tokens\":4"));
  const auto bench = RunProgram("rankwise", {"bench", "engine", "--model", DemoModel(), "--device", "auto", "--threads",
                                             "1", "--prompt", "4", "--depth", "4", "--steps", "2", "--repeats", "1"});
  ASSERT_TRUE(bench.ok()) << bench.status();
  EXPECT_TRUE(bench->state.is_success()) << bench->log;
  EXPECT_THAT(bench->log, HasSubstr("demo_model, cpu avx"));
}

}  // namespace
}  // namespace rankwise::e2e
