#include "launch/preflight.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace rankwise::launch {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kReport[] = R"(shared memory, 2 ranks
all-reduce sum [us]    shared memory, 2 ranks p99           mpi, 2 ranks p99          MPI_Allreduce p99
                  8 B         0.9        1.1          1.0        1.2          1.0        1.2
               4096 B         5.0        9.0          6.0        9.0          6.0        9.0
            1048576 B       500.0      600.0        700.0      800.0        700.0      800.0
shared memory, 2 ranks, waiting:
)";

TEST(CommReport, IsReadAlsoInPieces) {
  const CommReport report = ParseCommReport(kReport);
  EXPECT_THAT(report.group_sizes, ElementsAre(2));
  EXPECT_EQ(report.p50_us.at(8), 0.9);
  EXPECT_EQ(report.p50_us.at(1 << 20), 500);
  for (size_t size = 0; size < sizeof kReport; ++size) ParseCommReport(std::string(kReport, size));
  EXPECT_TRUE(ParseCommReport("noise\nmpi, x ranks\n").group_sizes.empty());
}

TEST(Launch, GoodSaysBandwidthAndWhatATokenPays) {
  weights::ModelConfig config;
  config.hidden_size = 1024;  // a row of 4096 bytes
  config.n_layers = 10;
  const auto findings = JudgeLaunch(ParseCommReport(kReport), 2, "mpirun", "", 0, &config);
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0].kind, Finding::kGood);
  EXPECT_EQ(findings[1].kind, Finding::kGood);
  EXPECT_THAT(findings[1].detail, HasSubstr("2.10 GB/s for 1 MiB"));
  EXPECT_THAT(findings[1].detail, HasSubstr("0.10 ms in all-reduces"));
  const auto slow = JudgeLaunch(ParseCommReport(kReport), 2, "mpirun", "", 3, nullptr);
  EXPECT_EQ(slow[1].kind, Finding::kBad);
  EXPECT_THAT(slow[1].detail, HasSubstr("asks for 3.00 GB/s"));
}

TEST(Launch, BadSaysWhy) {
  const auto nothing = JudgeLaunch({}, 2, "srun", "srun: error: no pmix", 0, nullptr);
  EXPECT_EQ(nothing[0].kind, Finding::kBad);
  EXPECT_THAT(nothing[0].detail, HasSubstr("no pmix"));
  // Ranks that do not meet are as many groups of one: what a wrong PMI gives.
  const auto alone = JudgeLaunch(ParseCommReport("mpi, 1 rank\nmpi, 1 rank\n"), 2, "srun", "", 0, nullptr);
  EXPECT_EQ(alone[0].kind, Finding::kBad);
  EXPECT_THAT(alone[0].detail, HasSubstr("2 groups of 1 instead of one of 2"));
  const auto late = JudgeLaunch(ParseCommReport("mpi, 2 ranks\n"), 2, "mpirun", "", 0, nullptr);
  EXPECT_EQ(late[1].kind, Finding::kDoubtful);
}

std::string Model() { return RANKWISE_SOURCE_DIR "/launch/demo_model"; }

TEST(Model, IsOpenedWhole) {
  std::optional<PlannedModel> model;
  const Finding good = CheckModel(Model(), 2, model);
  EXPECT_EQ(good.kind, Finding::kGood) << good.detail;
  ASSERT_TRUE(model);
  EXPECT_THAT(good.detail, HasSubstr("fingerprint"));
  EXPECT_THAT(CheckModel(Model(), 7, model).detail, HasSubstr("7"));
  EXPECT_EQ(CheckModel(Model(), 7, model).kind, Finding::kBad);
  EXPECT_EQ(CheckModel("/no/such", 1, model).kind, Finding::kBad);
  const std::string folder = ::testing::TempDir() + "/preflight-model";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(Model(), folder);
  std::filesystem::remove(folder + "/tokenizer.json");
  std::filesystem::remove(folder + "/tokenizer.model");
  EXPECT_THAT(CheckModel(folder, 2, model).fix, HasSubstr("tokenizer"));
  std::filesystem::resize_file(folder + "/model.safetensors", 1000);
  EXPECT_THAT(CheckModel(folder, 2, model).detail, HasSubstr("model.safetensors"));
}

TEST(Memory, CountsASharedEmbeddingOnce) {
  RankMemory memory;
  memory.weights = int64_t{3} << 30;
  memory.embedding = int64_t{1} << 30;
  const std::vector<RankGroup> ranks = {{0, 1, memory}};
  EXPECT_EQ(JudgeMemory(ranks, 2, int64_t{7} << 30).kind, Finding::kGood);
  const Finding bad = JudgeMemory(ranks, 2, (int64_t{7} << 30) - 1);
  EXPECT_EQ(bad.kind, Finding::kBad);
  EXPECT_THAT(bad.detail, HasSubstr("2 ranks need 7.00 GiB"));
  EXPECT_EQ(JudgeMemory(ranks, 2, 0).kind, Finding::kDoubtful);
  EXPECT_GT(AvailableMemory(), 0);
}

TEST(Cpus, MustBeEnough) {
  EXPECT_EQ(JudgeCpus(2, 2, 4).kind, Finding::kGood);
  EXPECT_EQ(JudgeCpus(2, 3, 4).kind, Finding::kDoubtful);
  EXPECT_EQ(JudgeCpus(5, 1, 4).kind, Finding::kBad);
}

TEST(Listen, FindsFreeAndTakenPorts) {
  EXPECT_EQ(CheckListen("127.0.0.1:0").kind, Finding::kGood);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t size = sizeof address;
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const Finding taken = CheckListen(absl::StrCat("127.0.0.1:", ntohs(address.sin_port)));
  close(fd);
  EXPECT_EQ(taken.kind, Finding::kBad);
  EXPECT_THAT(taken.fix, HasSubstr("another port"));
  EXPECT_EQ(CheckListen("192.0.2.1:0").kind, Finding::kBad);  // of the documentation, nobody's
  EXPECT_EQ(CheckListen("nonsense").kind, Finding::kBad);
}

TEST(SharedMemory, MustBeThere) {
  EXPECT_NE(CheckSharedMemory("/no/such").kind, Finding::kGood);
  EXPECT_THAT(CheckSharedMemory(::testing::TempDir()).detail, HasSubstr("MiB free"));
}

TEST(Device, IsLookedFor) {
  const std::string dev = ::testing::TempDir() + "/preflight-dev";
  std::filesystem::remove_all(dev);
  std::filesystem::create_directories(dev);
  std::ofstream(dev + "/nvidiactl");
  EXPECT_EQ(JudgeDevice("cuda", dev).kind, Finding::kBad);
  EXPECT_EQ(JudgeDevice("auto", dev).kind, Finding::kGood);
  std::ofstream(dev + "/nvidia0");
  EXPECT_THAT(JudgeDevice("cuda", dev).detail, HasSubstr("nvidia0"));
  EXPECT_EQ(JudgeDevice("cuda", dev).kind, Finding::kGood);
  EXPECT_EQ(JudgeDevice("cpu", dev).kind, Finding::kDoubtful);
}

TEST(Finding, IsTextWithAFix) {
  EXPECT_EQ(ToText({Finding::kBad, "port", "taken", "another"}),
            "BAD   port      taken\n                fix: another\n");
}

}  // namespace
}  // namespace rankwise::launch
