// What Python calls: settings, buffers, the error and the counts.
#include <algorithm>

#include "state.h"

using namespace simt;
#define SIMT_C extern "C" SIMT_API

// Forgets buffers, counts and the error. At most `max_resident` blocks are resident together (a cluster
// always fits).
SIMT_C void simt_reset(u64 seed, unsigned max_resident) {
  device.seed = seed;
  device.max_resident = max_resident ? max_resident : 1;
  device.buffers.clear();
  device.error.clear();
  device.bytes_read = device.bytes_written = device.atomics = device.barriers = device.launches = 0;
}

// A global allocation. flags: 1 read-only, 2 starts without values (reading one before it is written is an
// error)
SIMT_C void simt_register(const void* address, u64 bytes, const char* name, unsigned flags) {
  Buffer b;
  b.begin = reinterpret_cast<std::uintptr_t>(address);
  b.end = b.begin + bytes;
  b.name = name;
  b.read_only = flags & 1;
  if (flags & 2) b.written.assign(bytes, 0);
  auto& all = device.buffers;
  all.insert(std::upper_bound(all.begin(), all.end(), b.begin,
                              [](std::uintptr_t v, const Buffer& o) { return v < o.begin; }),
             std::move(b));
}

SIMT_C const char* simt_error() {
  return device.error.empty() ? nullptr : device.error.c_str();
}

// out: bytes read, bytes written, atomics (all of global memory), barriers of blocks, launches
SIMT_C void simt_counts(u64* out) {
  const u64 counts[] = {device.bytes_read, device.bytes_written, device.atomics, device.barriers,
                        device.launches};
  std::copy(std::begin(counts), std::end(counts), out);
}

// out: bytes read from and written to the buffer that starts at `address`
SIMT_C void simt_buffer_counts(const void* address, u64* out) {
  out[0] = out[1] = 0;
  for (const Buffer& b : device.buffers)
    if (b.begin == reinterpret_cast<std::uintptr_t>(address))
      out[0] += b.bytes_read, out[1] += b.bytes_written;
}

// For AddressSanitizer's report: which CUDA thread was running.
SIMT_C void simt_describe(char* out, u64 size) {
  const Thread* t = device.thread;
  if (!t) {
    std::snprintf(out, size, "no kernel");
    return;
  }
  std::snprintf(out, size, "kernel '%s' block (%u,%u,%u) thread (%u,%u,%u)", device.kernel, t->block->index.x,
                t->block->index.y, t->block->index.z, t->view.thread_index.x, t->view.thread_index.y,
                t->view.thread_index.z);
}

#if SIMT_ASAN
namespace {
void print_thread() {
  char text[300];
  simt_describe(text, sizeof text);
  std::fprintf(stderr, "simt: %s\n", text);
}
__attribute__((constructor)) void install() {
  __sanitizer_set_death_callback(print_thread);
}
}  // namespace
#endif
