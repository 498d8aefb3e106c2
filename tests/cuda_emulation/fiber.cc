#include "tests/cuda_emulation/fiber.h"

#include <sys/mman.h>

#include <cstdlib>

#include "base/check.h"

#if !defined(__x86_64__)
#error "The switch of stacks is written for x86-64."
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
}
#else
namespace {
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
void __asan_unpoison_memory_region(const volatile void*, size_t) {}
}  // namespace
#endif

// Saves what a callee must keep on the stack at hand, and goes on where the other stack was left.
extern "C" void rankwise_switch_stack(void** from, void* to);
__asm__(R"(
.text
.globl rankwise_switch_stack
.type rankwise_switch_stack,@function
rankwise_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rankwise_switch_stack,.-rankwise_switch_stack
)");

namespace rankwise::cuda_emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
thread_local Fiber* entering = nullptr;

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  RW_CHECK(memory != MAP_FAILED && mprotect(memory, kGuardBytes, PROT_NONE) == 0);
  memory_ = static_cast<unsigned char*>(memory);
}

Fiber::~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }

void Fiber::Start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  __asan_unpoison_memory_region(memory_ + kGuardBytes, kStackBytes);
  // As if Enter had been called: a return address of its own, and six registers to restore.
  void** top = reinterpret_cast<void**>(memory_ + kGuardBytes + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::Enter() {
  Fiber* self = entering;
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_stack_bytes_);
  self->entry_(self->argument_);
  std::abort();
}

void Fiber::Resume() {
  entering = this;
  __sanitizer_start_switch_fiber(&caller_fake_stack_, memory_ + kGuardBytes, kStackBytes);
  rankwise_switch_stack(&caller_stack_pointer_, stack_pointer_);
  __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
}

void Fiber::Leave() {
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_stack_bytes_);
  rankwise_switch_stack(&stack_pointer_, caller_stack_pointer_);
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
}

void Fiber::Finish() {
  // Without a place to save it AddressSanitizer gives the fiber's fake stack back.
  __sanitizer_start_switch_fiber(nullptr, caller_stack_, caller_stack_bytes_);
  rankwise_switch_stack(&stack_pointer_, caller_stack_pointer_);
  std::abort();
}

}  // namespace rankwise::cuda_emulation
