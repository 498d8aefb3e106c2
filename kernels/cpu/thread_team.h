#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace rankwise::kernels {

// A fixed set of threads that runs one loop at a time; the caller is thread 0. Between loops the others spin for some
// microseconds, then sleep in the kernel: an idle team costs nothing and an oversubscribed one gives its core away. A
// thread that gets no CPU in time misses the loop, whose items others take: it holds up nobody.
//
// Only one thread may call. A loop body must not start another loop.
class ThreadTeam {
 public:
  // `threads` >= 1. Threads other than the caller are pinned when the team fills the CPUs this process may run on, and
  // the caller is moved to the CPU left when it is found on another, as loops start.
  ThreadTeam(int threads, bool pin_threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(item, thread) once for each item in [0, count), thread in [0, size()). Each thread starts with its own
  // contiguous share, so that repeated loops touch the same memory from the same core, and then takes from the others'.
  template <typename Body>
  void For(int64_t count, const Body& body) {
    if (count <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    Run(count, &body, [](const void* b, int64_t item, int thread) { (*static_cast<const Body*>(b))(item, thread); });
  }

  // The CPUs this process may run on.
  static int AllowedCpuCount();

 private:
  using Call = void (*)(const void* body, int64_t item, int thread);
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void Run(int64_t count, const void* body, Call call);
  bool Enter();
  void Work(int thread);
  void WorkerMain(int thread);

  int callers_cpu_ = -1;  // -1: nobody is pinned

  // Written by the caller before the epoch moves, read by the workers after.
  const void* body_ = nullptr;
  Call call_ = nullptr;
  std::unique_ptr<Share[]> shares_;

  alignas(64) std::atomic<int32_t> epoch_{0};  // counts loops; -1 ends the team
  // Of the current loop: the workers inside, and whether more may enter.
  static constexpr int32_t kOpen = 1 << 30;
  alignas(64) std::atomic<int32_t> door_{0};
  std::vector<std::thread> workers_;
};

}  // namespace rankwise::kernels
