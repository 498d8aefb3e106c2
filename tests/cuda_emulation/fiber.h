#pragma once

#include <cstddef>
#include <memory>

namespace rankwise::cuda_emulation {

// A call that can be left and entered again. One OS thread starts, resumes and owns it.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next Resume calls `entry(argument)` from its beginning; what ran before is forgotten, not unwound. `entry`
  // never returns: its last act is Leave.
  void Start(void (*entry)(void*), void* argument);
  // Runs the fiber until it calls Leave.
  void Resume();
  // Called in the fiber: back to Resume.
  void Leave();
  // The same for the last time, until Start.
  [[noreturn]] void Finish();

 private:
  static void Enter();

  unsigned char* memory_;  // a guard page, then the stack
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // What AddressSanitizer wants to know of both stacks.
  void *fake_stack_ = nullptr, *caller_fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
};

}  // namespace rankwise::cuda_emulation
