#include "kernels/cpu/thread_team.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

#include "base/check.h"

namespace rankwise::kernels {
namespace {

// About 40 µs: longer than the serial stretches between two ops of a step, far shorter than a scheduler's time slice.
constexpr int kSpins = 1500;

// Returns once `value` is no longer `old`.
int32_t WaitWhileEqual(const std::atomic<int32_t>& value, int32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    const int32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    __builtin_ia32_pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

std::vector<int> AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// A refusal leaves the thread where the kernel puts it, which is correct and only slower.
void Pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);
}

// Moves the calling thread to `cpu`, where it need not stay: threads that it starts are not bound to that CPU.
void MoveTo(int cpu) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  Pin(pthread_self(), cpu);
  pthread_setaffinity_np(pthread_self(), sizeof(allowed), &allowed);
}

}  // namespace

int ThreadTeam::AllowedCpuCount() {
  const int allowed = static_cast<int>(AllowedCpus().size());
  return allowed > 0 ? allowed : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadTeam::ThreadTeam(int threads, bool pin_threads) : shares_(new Share[threads]) {
  RW_CHECK(threads >= 1);
  const std::vector<int> cpus = AllowedCpus();
  // A team smaller than its CPU set may share the set with other teams, which would pile up on the first CPUs.
  pin_threads = pin_threads && threads > 1 && static_cast<int>(cpus.size()) == threads;
  if (pin_threads) callers_cpu_ = cpus[0];
  for (int t = 1; t < threads; ++t) {
    workers_.emplace_back([this, t] { WorkerMain(t); });
    if (pin_threads) Pin(workers_.back().native_handle(), cpus[t]);
  }
}

ThreadTeam::~ThreadTeam() {
  epoch_.store(-1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadTeam::Run(int64_t count, const void* body, Call call) {
  // A thread that wakes while its team sleeps may find itself on the CPU of one of its workers.
  if (callers_cpu_ >= 0 && sched_getcpu() != callers_cpu_) MoveTo(callers_cpu_);
  body_ = body;
  call_ = call;
  for (int t = 0; t < size(); ++t) {
    shares_[t].next.store(count * t / size(), std::memory_order_relaxed);
    shares_[t].end = count * (t + 1) / size();
  }
  door_.store(kOpen, std::memory_order_release);
  const int32_t epoch = epoch_.load(std::memory_order_relaxed);
  epoch_.store((epoch + 1) & 0x7fffffff, std::memory_order_release);
  epoch_.notify_all();
  Work(0);
  // A worker that is not inside by now has nothing to do there, nor does the caller have to wait until it gets a CPU.
  int32_t inside = door_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  while (inside != 0) inside = WaitWhileEqual(door_, inside);
}

bool ThreadTeam::Enter() {
  int32_t door = door_.load(std::memory_order_relaxed);
  while ((door & kOpen) != 0) {
    if (door_.compare_exchange_weak(door, door + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
  }
  return false;
}

void ThreadTeam::Work(int thread) {
  for (int i = 0; i < size(); ++i) {
    Share& share = shares_[(thread + i) % size()];
    // Reading before adding keeps finished shares' counters from growing without bound.
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
      if (item < share.end) call_(body_, item, thread);
    }
  }
}

void ThreadTeam::WorkerMain(int thread) {
  int32_t epoch = 0;
  while ((epoch = WaitWhileEqual(epoch_, epoch)) != -1) {
    if (!Enter()) continue;
    Work(thread);
    if (door_.fetch_sub(1, std::memory_order_acq_rel) == 1) door_.notify_one();
  }
}

}  // namespace rankwise::kernels
