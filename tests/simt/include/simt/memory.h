// Loads and stores with cache hints, and atomics. Each is one access of its type's width: counted, and
// checked for alignment to that width.
#pragma once
#include "core.h"
#include "warp.h"

namespace simt {

enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };

// A vector type is one access of its whole width, whatever its alignment as a C++ type.
template <class T>
constexpr std::size_t kWidth = (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16 ? sizeof(T) : alignof(T);

template <class T>
inline T read(const T* p, Where where) {
  T v;
  load(&v, p, sizeof(T), kWidth<T>, false, where);
  return v;
}
// ld.global.nc: through a cache that does not see this launch's stores.
template <class T>
inline T read_only(const T* p, Where where) {
  T v;
  load(&v, p, sizeof(T), kWidth<T>, true, where);
  return v;
}
template <class T>
inline void write(T* p, const T& v, Where where) {
  store(p, &v, sizeof(T), kWidth<T>, where);
}

// Checks the access, may let other threads run first, and takes or gives what `order` orders; the operation
// itself is then a plain one, since threads only change at such points.
SIMT_API void atomic_begin(void* address, std::size_t bytes, unsigned access, Order order, Where where);
SIMT_API void atomic_copy(void* to, const void* from, std::size_t bytes);

template <class T, class F>
inline T atomic_update(T* p, Order order, Where where, F&& f) {
  atomic_begin(p, sizeof(T), kRead | kWrite | kAtomic, order, where);
  T old;
  atomic_copy(&old, p, sizeof(T));
  const T now = f(old);
  atomic_copy(p, &now, sizeof(T));
  return old;
}
template <class T>
inline T atomic_load(const T* p, Order order, Where where) {
  atomic_begin(const_cast<T*>(p), sizeof(T), kRead | kAtomic, order, where);
  T v;
  atomic_copy(&v, p, sizeof(T));
  return v;
}
template <class T>
inline void atomic_store(T* p, T v, Order order, Where where) {
  atomic_begin(p, sizeof(T), kWrite | kAtomic, order, where);
  atomic_copy(p, &v, sizeof(T));
}

}  // namespace simt

template <class T>
inline T __ldg(const T* p, SIMT_WHERE) {
  return simt::read_only(p, where);
}
#define SIMT_LOAD(name)                   \
  template <class T>                      \
  inline T name(const T* p, SIMT_WHERE) { \
    return simt::read(p, where);          \
  }
#define SIMT_STORE(name)                                          \
  template <class T>                                              \
  inline void name(T* p, std::type_identity_t<T> v, SIMT_WHERE) { \
    simt::write(p, v, where);                                     \
  }
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
SIMT_STORE(__stwb)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE

#define SIMT_ATOMIC(name, expression)                                              \
  template <class T>                                                               \
  inline T name(T* p, std::type_identity_t<T> v, SIMT_WHERE) {                     \
    return simt::atomic_update(p, simt::Order::kRelaxed, where,                    \
                               [v](T old) { return static_cast<T>(expression); }); \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicSub, old - v)
SIMT_ATOMIC(atomicExch, (void(old), v))
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicAnd, old& v)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, SIMT_WHERE) {
  return simt::atomic_update(p, simt::Order::kRelaxed, where,
                             [=](T old) { return old == expected ? v : old; });
}
