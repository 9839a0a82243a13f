// What the compiler calls: the loads and stores of code built with -fsanitize=thread, and the alignment and
// array-bound checks of UBSan. ThreadSanitizer's own runtime is not linked; these are ours.
#include "state.h"

using simt::check_access;

#define SIMT_HOOK extern "C" SIMT_API

namespace {

constexpr simt::u64 kEndless = simt::u64{1} << 25;  // accesses of one thread with no synchronisation between

inline void access(void* p, std::size_t bytes, std::size_t alignment, unsigned kind, const void* pc) {
  // Reading threadIdx goes through memory here, which is no access of the kernel's.
  const auto a = reinterpret_cast<std::uintptr_t>(p);
  if (!simt::self || a == reinterpret_cast<std::uintptr_t>(&simt::self) ||
      a - reinterpret_cast<std::uintptr_t>(simt::self) < sizeof(simt::View))
    return;
  if (++simt::device.accesses > kEndless)
    simt::fail(simt::place_of(pc), "livelock: the thread reads and writes without end");
  check_access(p, bytes, alignment, kind, {{"", 0}, pc});
}

// A poll must let the thread that it waits for run.
inline void volatile_read(void* p, std::size_t bytes, const void* pc) {
  access(p, bytes, bytes, simt::kRead, pc);
  if (!simt::self || simt::in_own_stack(p)) return;
  simt::device.thread->poll = pc;
  simt::pause({"", 0});
  simt::device.thread->poll = nullptr;
}

}  // namespace

#define SIMT_HOOK_OF(name, bytes, alignment, kind)                        \
  SIMT_HOOK void name##bytes(void* p) {                                   \
    access(p, bytes, alignment, simt::kind, __builtin_return_address(0)); \
  }
#define SIMT_HOOKS(bytes, alignment)                            \
  SIMT_HOOK_OF(__tsan_read, bytes, alignment, kRead)            \
  SIMT_HOOK_OF(__tsan_write, bytes, alignment, kWrite)          \
  SIMT_HOOK_OF(__tsan_unaligned_read, bytes, 1, kRead)          \
  SIMT_HOOK_OF(__tsan_unaligned_write, bytes, 1, kWrite)        \
  SIMT_HOOK_OF(__tsan_volatile_write, bytes, alignment, kWrite) \
  SIMT_HOOK void __tsan_volatile_read##bytes(void* p) {         \
    volatile_read(p, bytes, __builtin_return_address(0));       \
  }
SIMT_HOOKS(1, 1)
SIMT_HOOKS(2, 2)
SIMT_HOOKS(4, 4)
SIMT_HOOKS(8, 8)
// A pair of 8-byte values may be copied as 16 bytes; typed vectors are checked by the UBSan hook.
SIMT_HOOKS(16, 8)

SIMT_HOOK void __tsan_init() {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
SIMT_HOOK void __tsan_vptr_update(void**, void*) {}
SIMT_HOOK void __tsan_vptr_read(void**) {}
SIMT_HOOK void __tsan_read_range(void* p, std::size_t n) {
  access(p, n, 1, simt::kRead, __builtin_return_address(0));
}
SIMT_HOOK void __tsan_write_range(void* p, std::size_t n) {
  access(p, n, 1, simt::kWrite, __builtin_return_address(0));
}

namespace {
struct UbsanLocation {
  const char* file;
  simt::u32 line, column;
};
struct UbsanType {
  simt::u16 kind, info;
  char name[1];
};
struct UbsanMismatch {
  UbsanLocation location;
  const UbsanType* type;
  unsigned char log_alignment, check;
};
struct UbsanBounds {
  UbsanLocation location;
  const UbsanType *array, *index;
};
}  // namespace

SIMT_HOOK void __ubsan_handle_type_mismatch_v1(UbsanMismatch* data, std::uintptr_t p) {
  if (!simt::self) return;
  const simt::Where where{data->location.file, static_cast<int>(data->location.line)};
  simt::fail(where, "misaligned access to %p as %s, which needs a multiple of %u", reinterpret_cast<void*>(p),
             data->type->name, 1u << data->log_alignment);
}
SIMT_HOOK void __ubsan_handle_out_of_bounds(UbsanBounds* data, std::uintptr_t index) {
  if (!simt::self) return;
  const simt::Where where{data->location.file, static_cast<int>(data->location.line)};
  simt::fail(where, "index %lld is out of the bounds of a local array of type %s",
             static_cast<long long>(index), data->array->name);
}
