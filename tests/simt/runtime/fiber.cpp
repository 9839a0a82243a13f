// Stack switching: by hand on x86-64, through ucontext elsewhere.
#include "fiber.h"

#include <cstring>

#if SIMT_HAND_SWITCH
// Only callee-saved registers need saving: the switch is an ordinary call to the code around it.
asm(R"(
.text
.p2align 4
.type simt_switch_stacks, @function
simt_switch_stacks:
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
.size simt_switch_stacks, .-simt_switch_stacks
)");
extern "C" void simt_switch_stacks(void** save, void* load);
#endif

namespace simt {
namespace {
constexpr std::uint64_t kCanary = 0x5afe57acc0ffee00;
constexpr int kCanaryWords = 64;
}  // namespace

void fiber_create(Fiber& f, unsigned char* stack, void (*entry)()) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);  // an abandoned fiber leaves its redzones behind
#endif
  f.stack = stack;
  f.fake_stack = nullptr;
  f.bottom = stack;
  f.size = kStackBytes;
  auto* words = reinterpret_cast<std::uint64_t*>(stack);
  for (int i = 0; i < kCanaryWords; ++i) words[i] = kCanary;
#if SIMT_HAND_SWITCH
  // At entry the stack is as after a call: a return address on top, and above it 16-byte aligned.
  auto* top = reinterpret_cast<void**>(stack + kStackBytes) - 3;
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
#endif
}

void fiber_switch(Fiber& from, Fiber& to, bool from_is_over) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(from_is_over ? nullptr : &from.fake_stack, to.bottom, to.size);
#else
  (void)from_is_over;
#endif
#if SIMT_HAND_SWITCH
  simt_switch_stacks(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_entered(Fiber& scheduler) {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#else
  (void)scheduler;
#endif
}

bool fiber_overflowed(const Fiber& f) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(f.stack);
  for (int i = 0; i < kCanaryWords; ++i)
    if (words[i] != kCanary) return true;
  return false;
}

}  // namespace simt
