#include "worker/device/gpu_place.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <vector>

namespace rankwise::device {
namespace {

using testing::HasSubstr;

int HostRankIn(const std::map<std::string, const char*>& variables, int mpi_host_rank) {
  return HostRank(
      [&](const char* name) {
        const auto found = variables.find(name);
        return found == variables.end() ? nullptr : found->second;
      },
      mpi_host_rank);
}

TEST(GpuPlaceTest, TheLaunchersWordGoesBeforeThatOfMpi) {
  EXPECT_EQ(HostRankIn({}, 3), 3);
  EXPECT_EQ(HostRankIn({{"SLURM_LOCALID", "2"}}, 0), 2);
  EXPECT_EQ(HostRankIn({{"OMPI_COMM_WORLD_LOCAL_RANK", "5"}}, 0), 5);
  // mpirun in a batch script: every rank inherits the script's own SLURM_LOCALID=0.
  EXPECT_EQ(HostRankIn({{"OMPI_COMM_WORLD_LOCAL_RANK", "5"}, {"SLURM_LOCALID", "0"}}, 0), 5);
}

TEST(GpuPlaceTest, WhatIsNoRankIsNotBelieved) {
  for (const char* text : {"", "x", "-1", "1 2", "99999999999"}) {
    EXPECT_EQ(HostRankIn({{"OMPI_COMM_WORLD_LOCAL_RANK", text}}, 3), 3) << text;
    EXPECT_EQ(HostRankIn({{"OMPI_COMM_WORLD_LOCAL_RANK", text}, {"SLURM_LOCALID", "1"}}, 3), 1) << text;
  }
}

TEST(GpuPlaceTest, RanksTakeTheGpusOfTheirHostInTurn) {
  for (int rank = 0; rank < 8; ++rank) {
    EXPECT_EQ(GpuIndex(rank, 8), rank);
    EXPECT_EQ(GpuIndex(rank, 1), 0);  // a task of its own, with one GPU
    EXPECT_EQ(GpuIndex(rank, 4), rank % 4);
  }
}

TEST(GpuPlaceTest, TwoRanksOnOneGpuAreRefusedByName) {
  const std::vector<std::string> uuids = {"GPU-a", "GPU-b", "GPU-c", "GPU-b", "GPU-a"};
  const absl::Status status = CheckDistinctGpus(uuids, false);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("ranks 1 and 3 would share GPU-b"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("--allow-shared-gpu"));
  EXPECT_TRUE(HasSharedGpu(uuids));
  EXPECT_EQ(CheckDistinctGpus(uuids, true), absl::OkStatus());
}

TEST(GpuPlaceTest, AGpuForEachIsFine) {
  const std::vector<std::string> uuids = {"GPU-a", "GPU-b"};
  EXPECT_EQ(CheckDistinctGpus(uuids, false), absl::OkStatus());
  EXPECT_FALSE(HasSharedGpu(uuids));
}

}  // namespace
}  // namespace rankwise::device
