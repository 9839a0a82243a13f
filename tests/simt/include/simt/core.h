// Execution model: what a thread can see of itself, where an error is reported, and how a grid is launched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "types.h"

#define SIMT_API __attribute__((visibility("default")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace simt {

// The place in the source that a message names. As a default argument it is the caller's line, which stays
// the same when the compiler duplicates a call, so two threads at one barrier can be told from two at two
// barriers.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The part of a thread's state that kernels read; the scheduler points `self` at the running thread's.
struct View {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
  unsigned lane, cluster_rank, cluster_size;
};
SIMT_API extern View* self;

struct LaunchConfig {
  dim3 grid, block;
  std::size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks a cluster, along x
};

// Runs a grid to its end, or to its first fault, which is kept for `simt_error()`; later launches then do
// nothing. `parameters` is memory that a kernel may read besides its registered buffers; `instrumented`: its
// plain loads and stores are seen through the compiler's hooks.
SIMT_API void launch_grid(const LaunchConfig& config, const char* kernel, void (*body)(const void*),
                          const void* parameters, std::size_t parameter_bytes, bool instrumented);
#if defined(__SANITIZE_THREAD__)
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif

template <class... P, class... A>
void launch(const LaunchConfig& config, const char* name, void (*kernel)(P...), A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "a launch passes every parameter of its kernel");
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::remove_cv_t<P>...> arguments;
  };
  const Call call{kernel, {static_cast<P>(arguments)...}};
  launch_grid(
      config, name,
      [](const void* p) {
        const Call& c = *static_cast<const Call*>(p);
        std::apply(c.kernel, c.arguments);
      },
      &call, sizeof call, kInstrumented);
}

[[noreturn]] SIMT_API void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Shared memory. A static variable gets one address in each block: `key` tells the variables apart.
SIMT_API void* dynamic_shared();
SIMT_API void* static_shared(const void* key, std::size_t bytes, std::size_t alignment, Where where);

// Checked accesses to global, shared or local memory. In the instrumented build plain dereferences are
// checked too, through the compiler's hooks; these are for helpers that stand for one instruction of a fixed
// width.
enum Access : unsigned { kRead = 1, kWrite = 2, kAtomic = 4, kReadOnlyPath = 8 };
SIMT_API void load(void* out, const void* address, std::size_t bytes, std::size_t alignment,
                   bool read_only_path, Where where);
SIMT_API void store(void* address, const void* value, std::size_t bytes, std::size_t alignment, Where where);

}  // namespace simt

#define threadIdx (::simt::self->thread_index)
#define blockIdx (::simt::self->block_index)
constexpr int warpSize = 32;

namespace simt {
template <dim3 View::* Of, unsigned dim3::* Axis>
struct Extent {
  operator unsigned() const { return (self->*Of).*Axis; }
};
template <dim3 View::* Of>
struct Extents {
  Extent<Of, &dim3::x> x;
  Extent<Of, &dim3::y> y;
  Extent<Of, &dim3::z> z;
};
}  // namespace simt
// No macros as the two above: launch configurations have members of these names.
constexpr simt::Extents<&simt::View::block_dim> blockDim{};
constexpr simt::Extents<&simt::View::grid_dim> gridDim{};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __constant__ static
// A plain variable would be shared by every resident block, so the qualifier must not compile.
#define __shared__ static_assert(false, "declare shared memory with CBAM_SHARED or CBAM_DYNAMIC_SHARED");

#define CBAM_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::simt::dynamic_shared())
#define CBAM_SHARED(name, ...)                          \
  static const char name##_key = 0;                     \
  using name##_type = std::remove_const_t<__VA_ARGS__>; \
  name##_type& name = *static_cast<name##_type*>(       \
      ::simt::static_shared(&name##_key, sizeof(name##_type), alignof(name##_type), ::simt::Where::here()))
