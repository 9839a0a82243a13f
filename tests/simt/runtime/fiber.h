// A stack and the switch between two of them; AddressSanitizer is told of each switch.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_HAND_SWITCH 1
#else
#define SIMT_HAND_SWITCH 0
#include <ucontext.h>
#endif

namespace simt {

constexpr std::size_t kStackBytes = SIMT_ASAN ? 256 << 10 : 64 << 10;

struct Fiber {
  unsigned char* stack = nullptr;  // kStackBytes; null for the scheduler's own
#if SIMT_HAND_SWITCH
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  const void* bottom = nullptr;  // what ASan is told of the destination's stack
  std::size_t size = 0;
};

void fiber_create(Fiber& fiber, unsigned char* stack, void (*entry)());
void fiber_switch(Fiber& from, Fiber& to, bool from_is_over = false);
void fiber_entered(Fiber& scheduler);  // first act of an entry function
bool fiber_overflowed(const Fiber& fiber);

}  // namespace simt
