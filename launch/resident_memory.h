#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace rankwise::launch {

// What a process of this host has in memory now, in bytes.
struct ResidentMemory {
  int64_t anonymous = 0;  // heap and stacks, whole pages as counted by the kernel's page tables
  int64_t file = 0;       // mapped files (weights, code): shared with others, given up under pressure
  int64_t shared = 0;     // shared memory (MPI's)
};

// NotFound when there is no such process, PermissionDenied when it is somebody else's.
absl::StatusOr<ResidentMemory> ReadResidentMemory(pid_t pid);

// The bytes of "KEY: N kB" at the begin of a line of `text`. DataLoss, naming the key, when there is none.
absl::StatusOr<int64_t> KilobyteField(const std::string& text, const std::string& key);

}  // namespace rankwise::launch
