#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

// What a deployment leaves or has in /proc and /dev/shm.
namespace rankwise::chaos {

// Marks this process and, by inheritance, all that it starts from now on.
void MarkDescendants();
// Marked processes but this one, zombies left out.
std::vector<pid_t> MarkedProcesses();

// A file of /proc/PID; empty when the process is gone.
std::string ReadProc(pid_t pid, const std::string& file);
pid_t ParentOf(pid_t pid);                 // 0 when it is gone
std::vector<pid_t> ChildrenOf(pid_t pid);  // zombies left out
// The ranks, without their guards, that `launcher` has started.
std::vector<pid_t> RanksOf(pid_t launcher);

// It has met the others: from now on they watch each other.
bool HasHeartbeat(pid_t rank);

// Segments of ranks in /dev/shm, of which nobody lives any more.
std::vector<std::string> OrphanedSegments();

}  // namespace rankwise::chaos
