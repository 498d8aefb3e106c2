#include <cuda_runtime.h>
#include <nccl.h>

#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <thread>
#include <vector>

#include "tests/nccl_emulation/nccl_emulation.h"

namespace rankwise::nccl_emulation {
namespace {

constexpr size_t kFloatBytes = sizeof(float);

// A call that waits for those of the other ranks.
struct Call {
  const char* name = nullptr;  // null: none waits
  const char* send = nullptr;
  char* receive = nullptr;
  size_t count = 0;  // floats that go to one rank
};

// One group. Whoever comes last does the work of all.
struct Group {
  std::vector<Call> calls;  // [ranks]
};

std::mutex mutex;  // Guards all there is.
std::map<uint64_t, std::weak_ptr<Group>> groups;
uint64_t last_id = 0;
int live_communicators = 0;
int calls_to_failure = 0;  // 0: none fails
ncclResult_t failure = ncclSuccess;

bool Differ(const Call& a, const Call& b) { return std::string_view(a.name) != b.name || a.count != b.count; }

void Work(Group& group) {
  const size_t ranks = group.calls.size();
  const size_t bytes = group.calls[0].count * kFloatBytes;
  if (group.calls[0].receive == nullptr) return;
  const std::string_view name = group.calls[0].name;
  if (name == "ncclBroadcast") {
    for (size_t to = 1; to < ranks; ++to) std::memcpy(group.calls[to].receive, group.calls[0].send, bytes);
    return;
  }
  const bool is_gather = name == "ncclAllGather";
  for (size_t from = 0; from < ranks; ++from) {
    for (size_t to = 0; to < ranks; ++to) {
      const char* part = group.calls[from].send + (is_gather ? 0 : to * bytes);
      char* place = group.calls[to].receive + from * bytes;
      if (place != part) std::memcpy(place, part, bytes);  // In place is allowed.
    }
  }
}

}  // namespace

void FailCall(int call, ncclResult_t error) {
  const std::lock_guard lock(mutex);
  calls_to_failure = call;
  failure = error;
}

int LiveCommunicators() {
  const std::lock_guard lock(mutex);
  return live_communicators;
}

}  // namespace rankwise::nccl_emulation

using namespace rankwise::nccl_emulation;

struct ncclComm {
  std::shared_ptr<Group> group;
  int rank = 0;
  ncclResult_t error = ncclSuccess;

  ncclResult_t Post(const Call& call) {
    if (calls_to_failure > 0 && --calls_to_failure == 0) {
      error = failure;
      return ncclInProgress;
    }
    if (error != ncclSuccess || group->calls[rank].name != nullptr) return ncclInvalidUsage;
    group->calls[rank] = call;
    for (const Call& other : group->calls) {
      if (other.name == nullptr || Differ(other, call)) return ncclInProgress;
    }
    Work(*group);
    for (Call& done : group->calls) done = {};
    return ncclInProgress;  // as seen from here: the caller asks before it goes on
  }
};

const char* ncclGetErrorString(ncclResult_t result) {
  constexpr const char* kNames[] = {
      "no error",         "unhandled cuda error", "unhandled system error", "internal error",
      "invalid argument", "invalid usage",        "remote process exited",  "NCCL operation in progress"};
  return kNames[result];
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclMemAlloc(void** memory, size_t bytes) {
  return cudaMalloc(memory, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
ncclResult_t ncclMemFree(void* memory) {
  return cudaFree(memory) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard lock(mutex);
  *id = {};
  ++last_id;
  std::memcpy(id->internal, &last_id, sizeof last_id);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int rank_count, ncclUniqueId id, int rank, ncclConfig_t* config) {
  if (config->blocking != 0 || rank < 0 || rank >= rank_count) return ncclInvalidArgument;
  uint64_t number = 0;
  std::memcpy(&number, id.internal, sizeof number);
  const std::lock_guard lock(mutex);
  std::shared_ptr<Group> group = groups[number].lock();
  if (group == nullptr) {
    group = std::make_shared<Group>();
    group->calls.resize(rank_count);
    groups[number] = group;
  }
  if (static_cast<int>(group->calls.size()) != rank_count) return ncclInvalidUsage;
  *comm = new ncclComm{.group = group, .rank = rank};
  ++live_communicators;
  return (*comm)->Post({.name = "ncclCommInitRankConfig"});
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  const std::lock_guard lock(mutex);
  const bool is_waiting = comm->error == ncclSuccess && comm->group->calls[comm->rank].name != nullptr;
  *error = is_waiting ? ncclInProgress : comm->error;
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const std::lock_guard lock(mutex);
  comm->group->calls[comm->rank] = {};
  --live_communicators;
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void*, size_t bytes, ncclWindow_t* window, int) {
  const std::lock_guard lock(mutex);
  *window = nullptr;
  return comm->Post({.name = "ncclCommWindowRegister", .count = bytes});
}

namespace {

// What a graph does when it is launched: waits for the other ranks' graphs.
std::string Replay(ncclComm_t comm, const Call& call) {
  constexpr std::chrono::seconds kPatience(20);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  {
    const std::lock_guard lock(mutex);
    if (comm->Post(call) != ncclInProgress) return std::string(call.name) + " cannot be done again";
  }
  for (; std::chrono::steady_clock::now() < deadline; std::this_thread::yield()) {
    const std::lock_guard lock(mutex);
    if (comm->group->calls[comm->rank].name == nullptr) return "";
  }
  return std::string(call.name) + " waits for a graph that is not launched";
}

ncclResult_t Exchange(const Call& call, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  if (type != ncclFloat) return ncclInvalidArgument;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) return ncclUnhandledCudaError;
  if (status == cudaStreamCaptureStatusActive) {
    rankwise::cuda_emulation::Issue(stream, [comm, call] { return Replay(comm, call); });
    return ncclInProgress;
  }
  const std::lock_guard lock(mutex);
  return comm->Post(call);
}

}  // namespace

ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return Exchange({"ncclAllGather", static_cast<const char*>(send), static_cast<char*>(receive), count}, type, comm,
                  stream);
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  if (root != 0) return ncclInvalidArgument;
  return Exchange({"ncclBroadcast", static_cast<const char*>(send), static_cast<char*>(receive), count}, type, comm,
                  stream);
}

ncclResult_t ncclAlltoAll(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t stream) {
  return Exchange({"ncclAlltoAll", static_cast<const char*>(send), static_cast<char*>(receive), count}, type, comm,
                  stream);
}
