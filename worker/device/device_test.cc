#include "worker/device/device.h"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/program_folder.h"
#include "worker/device/nccl_plugin.h"

// The plug-ins here are small ones of the tests' own, and so is the driver: once a library of the name libcuda.so.1 is
// open, no other is looked for.
// Of the plug-ins, which export the same name, as they must.
extern "C" const char* __asan_default_options() { return "detect_odr_violation=0"; }

namespace rankwise::device {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// A folder with the given plug-ins under the names that programs look for.
class PluginFolder {
 public:
  explicit PluginFolder(const std::string& name) : path_(testing::TempDir() + "/device_test_" + name) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~PluginFolder() { std::filesystem::remove_all(path_); }

  PluginFolder& With(const std::string& source, const std::string& name) {
    std::filesystem::copy_file(ProgramFolder() + "/" + source, path_ + "/" + name);
    return *this;
  }
  PluginFolder& WithText(const std::string& name) {
    std::ofstream(path_ + "/" + name) << "not a library";
    return *this;
  }
  PluginFolder(const PluginFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

constexpr char kFakeCuda[] = "device_test_cuda.so";
constexpr char kFakeNccl[] = "device_test_nccl.so";
constexpr char kOtherCuda[] = "device_test_cuda_of_another_build.so";

struct TestDriver : testing::Environment {
  void SetUp() override {
    ASSERT_NE(dlopen((ProgramFolder() + "/device_test_driver.so").c_str(), RTLD_NOW), nullptr) << dlerror();
  }
};
const auto* const test_driver = testing::AddGlobalTestEnvironment(new TestDriver);

// What is logged while it lives.
class LoggedText {
 public:
  LoggedText() : before_(spdlog::default_logger()) {
    spdlog::set_default_logger(
        std::make_shared<spdlog::logger>("test", std::make_shared<spdlog::sinks::ostream_sink_mt>(text_)));
  }
  ~LoggedText() { spdlog::set_default_logger(before_); }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
  std::shared_ptr<spdlog::logger> before_;
};

struct RankResult {
  absl::Status status = absl::UnknownError("not called");
  std::string backend, communicator;
  kernels::Activations of_bf16 = {}, of_int8 = {};  // a matrix of one element, and one of eight by eight
};

kernels::Activations ActivationsOf(kernels::Backend& backend, const kernels::MatrixView& matrix) {
  const auto packed = backend.Pack(std::span(&matrix, 1), {{0, matrix.cols}});
  return packed.ok() ? (*packed)->activations() : kernels::Activations::kFloat;
}
kernels::Activations ActivationsOfQuantised(kernels::Backend& backend) {
  const std::vector<uint32_t> words(16);
  const auto* bytes = reinterpret_cast<const std::byte*>(words.data());
  const kernels::GroupedMatrix matrix{
      .qweight = bytes, .qzeros = bytes, .scales = bytes, .n_out = 8, .n_in = 8, .bits = 8, .group_size = 8};
  return ActivationsOf(backend, {.dtype = kernels::DType::kInt8, .rows = 8, .cols = 8, .grouped = &matrix});
}

// OpenDevice on `size` ranks of one host, with GPUs of these names to be seen.
std::vector<RankResult> Open(int size, const std::string& gpus, const DeviceOptions& options) {
  setenv("RANKWISE_TEST_GPUS", gpus.c_str(), 1);
  const auto hosts = comm::CreateThreadCommunicators(size);
  std::vector<RankResult> results(size);
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        DeviceOptions own = options;
        own.mpi_host_rank = rank;
        own.cpu.threads = 1;
        own.cpu.pin_threads = false;
        const absl::StatusOr<Device> device = OpenDevice(own, *hosts[rank]);
        results[rank].status = device.status();
        if (!device.ok()) return;
        results[rank].communicator = device->communicator(*hosts[rank]).Description();
        constexpr uint16_t kOne = 0x3f80;
        const kernels::MatrixView one{reinterpret_cast<const std::byte*>(&kOne), kernels::DType::kBF16, 1, 1, 1};
        results[rank].of_bf16 = ActivationsOf(*device->backend, one);
        results[rank].of_int8 = ActivationsOfQuantised(*device->backend);
        results[rank].backend = device->backend->Description();
      });
    }
  }
  return results;
}

std::string MessageOf(const RankResult& result) { return std::string(result.status.message()); }

TEST(DeviceTest, WithoutThePluginCudaIsRefusedInWords) {
  const PluginFolder folder("none");
  for (const RankResult& rank : Open(2, "", {.device = "cuda", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.status.code(), absl::StatusCode::kUnimplemented);
    EXPECT_EQ(MessageOf(rank), absl::StrCat("--device cuda: this build has no CUDA backend: there is no ",
                                            folder.path(), "/librankwise_cuda.so"));
  }
}

TEST(DeviceTest, WithoutThePluginAutoTakesTheCpuAndSaysSoOnce) {
  const PluginFolder folder("none");
  const LoggedText log;
  for (const RankResult& rank : Open(2, "", {.device = "auto", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.status, absl::OkStatus());
    EXPECT_THAT(rank.backend, StartsWith("cpu"));
    EXPECT_EQ(rank.communicator, "threads, 2 ranks");
  }
  EXPECT_THAT(log.text(), HasSubstr("--device auto takes the CPU: this build has no CUDA backend"));
  EXPECT_EQ(log.text().find("takes the CPU"), log.text().rfind("takes the CPU")) << log.text();
}

TEST(DeviceTest, CpuLooksForNoPlugin) {
  const PluginFolder folder("none");
  const LoggedText log;
  const RankResult rank = Open(1, "", {.device = "cpu", .plugin_folder = folder.path()})[0];
  EXPECT_THAT(rank.backend, StartsWith("cpu"));
  EXPECT_EQ(log.text(), "");
}

TEST(DeviceTest, Int8ActivationsAreOfTheCpu) {
  PluginFolder folder("int8");
  folder.With(kFakeCuda, kernels::kCudaPluginFile).With(kFakeNccl, kNcclPluginFile);
  DeviceOptions options{.device = "cuda", .plugin_folder = folder.path()};
  options.activations = kernels::Activations::kInt8;
  for (const RankResult& rank : Open(2, "a,b", options)) {
    EXPECT_EQ(rank.status, absl::InvalidArgumentError("--device cuda: --activations int8 is of the CPU backend"));
  }
  const LoggedText log;
  options.device = "auto";
  for (const RankResult& rank : Open(2, "a,b", options)) {
    EXPECT_EQ(rank.status, absl::OkStatus());
    EXPECT_THAT(rank.backend, HasSubstr("integers by "));
  }
  EXPECT_THAT(log.text(), HasSubstr("--device auto takes the CPU: --activations int8 is of the CPU backend"));
}

TEST(DeviceTest, ByThemselvesQuantisedWeightsMeetInt8OnTheCpuAlone) {
  PluginFolder folder("auto");
  folder.With(kFakeCuda, kernels::kCudaPluginFile).With(kFakeNccl, kNcclPluginFile);
  for (const RankResult& rank : Open(1, "a", {.device = "cpu", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.of_bf16, kernels::Activations::kFloat);
    EXPECT_EQ(rank.of_int8, kernels::Activations::kInt8);
    EXPECT_THAT(rank.backend, HasSubstr("integers by "));
  }
  for (const RankResult& rank : Open(1, "a", {.device = "auto", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.of_bf16, kernels::Activations::kFloat);
    EXPECT_EQ(rank.of_int8, kernels::Activations::kFloat);
    EXPECT_THAT(rank.backend, StartsWith("reference"));
  }
}

TEST(DeviceTest, BFloat16ActivationsAreOfBothKinds) {
  PluginFolder folder("bf16");
  folder.With(kFakeCuda, kernels::kCudaPluginFile).With(kFakeNccl, kNcclPluginFile);
  for (const char* name : {"cpu", "cuda"}) {
    DeviceOptions options{.device = name, .plugin_folder = folder.path()};
    for (const auto activations : {kernels::Activations::kFloat, kernels::Activations::kBF16}) {
      options.activations = activations;
      for (const RankResult& rank : Open(2, "a,b", options)) {
        EXPECT_EQ(rank.status, absl::OkStatus());
        EXPECT_EQ(rank.of_bf16, activations) << name;
      }
    }
  }
}

TEST(DeviceTest, AnUnknownDeviceIsRefused) {
  EXPECT_EQ(Open(1, "", {.device = "gpu"})[0].status,
            absl::InvalidArgumentError("--device gpu is not one of auto, cpu, cuda"));
}

TEST(DeviceTest, AFileThatIsNoLibraryIsRefusedByName) {
  PluginFolder folder("text");
  folder.WithText(kernels::kCudaPluginFile);
  const RankResult rank = Open(1, "", {.device = "cuda", .plugin_folder = folder.path()})[0];
  EXPECT_EQ(rank.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(MessageOf(rank), StartsWith(absl::StrCat("--device cuda: cannot open ", folder.path())));
}

TEST(DeviceTest, ThePluginOfAnotherBuildIsRefused) {
  PluginFolder folder("other");
  folder.With(kOtherCuda, kernels::kCudaPluginFile);
  const RankResult rank = Open(1, "a", {.device = "cuda", .plugin_folder = folder.path()})[0];
  EXPECT_EQ(rank.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(MessageOf(rank), HasSubstr("is of build another, this program of build "));
}

TEST(DeviceTest, AMachineWithoutAGpuIsRefused) {
  PluginFolder folder("no_gpu");
  folder.With(kFakeCuda, kernels::kCudaPluginFile);
  const RankResult rank = Open(1, "", {.device = "cuda", .plugin_folder = folder.path()})[0];
  EXPECT_EQ(rank.status, absl::UnavailableError("--device cuda: no GPU"));
}

TEST(DeviceTest, OneRankNeedsNoNccl) {
  PluginFolder folder("one");
  folder.With(kFakeCuda, kernels::kCudaPluginFile);
  const LoggedText log;
  const RankResult rank = Open(1, "a,b", {.device = "auto", .plugin_folder = folder.path()})[0];
  EXPECT_EQ(rank.status, absl::OkStatus());
  EXPECT_EQ(rank.backend, "reference");
  EXPECT_EQ(rank.communicator, "threads, 1 rank");
  EXPECT_THAT(log.text(), HasSubstr("rank 0: GPU 0, Test GPU a, sm_90, 132 SMs, 80.0 GiB, peer access to GPU 1"));
}

TEST(DeviceTest, RanksWithAGpuEachGetNccl) {
  PluginFolder folder("two");
  folder.With(kFakeCuda, kernels::kCudaPluginFile).With(kFakeNccl, kNcclPluginFile);
  const LoggedText log;
  for (const RankResult& rank : Open(2, "a,b", {.device = "cuda", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.status, absl::OkStatus());
    EXPECT_EQ(rank.backend, "reference");
    EXPECT_EQ(rank.communicator, "threads, 1 rank");
  }
  EXPECT_THAT(log.text(), HasSubstr("rank 0: GPU 0, Test GPU a"));
  EXPECT_THAT(log.text(), HasSubstr("rank 1: GPU 1, Test GPU b"));
}

TEST(DeviceTest, WithoutNcclSeveralRanksAreRefused) {
  PluginFolder folder("no_nccl");
  folder.With(kFakeCuda, kernels::kCudaPluginFile);
  for (const RankResult& rank : Open(2, "a,b", {.device = "cuda", .plugin_folder = folder.path()})) {
    EXPECT_THAT(MessageOf(rank), StartsWith("--device cuda: this build has no NCCL: there is no "));
  }
}

TEST(DeviceTest, TwoRanksOnOneGpuAreRefusedUnlessAskedFor) {
  PluginFolder folder("shared");
  folder.With(kFakeCuda, kernels::kCudaPluginFile).With(kFakeNccl, kNcclPluginFile);
  DeviceOptions options{.device = "cuda", .plugin_folder = folder.path()};
  for (const RankResult& rank : Open(3, "a,b", options)) {
    EXPECT_EQ(rank.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(MessageOf(rank), StartsWith("--device cuda: ranks 0 and 2 would share GPU-a"));
  }
  options.is_gpu_sharing_allowed = true;
  for (const RankResult& rank : Open(3, "a,b", options)) {
    EXPECT_EQ(rank.status, absl::OkStatus());
    EXPECT_EQ(rank.communicator, "staged over threads, 3 ranks");
  }
}

// GPU "broken" can be seen but not used.
TEST(DeviceTest, WhatOneRankCannotNoRankDoes) {
  PluginFolder folder("broken");
  folder.With(kFakeCuda, kernels::kCudaPluginFile).With(kFakeNccl, kNcclPluginFile);
  const LoggedText log;
  for (const RankResult& rank : Open(2, "a,broken", {.device = "cuda", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.status, absl::InternalError("--device cuda: rank 1: out of order"));
  }
  for (const RankResult& rank : Open(2, "a,broken", {.device = "auto", .plugin_folder = folder.path()})) {
    EXPECT_EQ(rank.status, absl::OkStatus());
    EXPECT_THAT(rank.backend, StartsWith("cpu"));
  }
  EXPECT_THAT(log.text(), HasSubstr("--device auto takes the CPU: rank 1: out of order"));
}

}  // namespace
}  // namespace rankwise::device
