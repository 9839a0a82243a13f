// Barriers, shuffles, votes and reductions of a block or a warp.
#pragma once
#include "core.h"

namespace simt {

enum class WarpOp {
  kSync,
  kShuffleIndex,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kMatch,
  kAdd,
  kMinS,
  kMaxS,
  kMinU,
  kMaxU,
  kAnd,
  kOr
};

SIMT_API void block_barrier(Where where);
SIMT_API unsigned block_barrier_reduce(int predicate, int op, Where where);  // op: 0 count, 1 and, 2 or
SIMT_API void named_barrier(unsigned id, unsigned threads, bool wait, Where where);
SIMT_API std::uint64_t warp_collective(WarpOp op, unsigned mask, std::uint64_t value, int argument, int width,
                                       Where where);
SIMT_API void pause(Where where);  // gives way to other threads: a poll, a sleep
SIMT_API void fence();
SIMT_API std::uint64_t clock();

template <class T>
inline T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = warp_collective(op, mask, word, argument, width, where);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace simt

#define SIMT_WHERE ::simt::Where where = ::simt::Where::here()

inline void __syncthreads(SIMT_WHERE) {
  simt::block_barrier(where);
}
inline int __syncthreads_count(int p, SIMT_WHERE) {
  return static_cast<int>(simt::block_barrier_reduce(p, 0, where));
}
inline int __syncthreads_and(int p, SIMT_WHERE) {
  return static_cast<int>(simt::block_barrier_reduce(p, 1, where));
}
inline int __syncthreads_or(int p, SIMT_WHERE) {
  return static_cast<int>(simt::block_barrier_reduce(p, 2, where));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_WHERE) {
  simt::warp_collective(simt::WarpOp::kSync, mask, 0, 0, 32, where);
}
template <class T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::WarpOp::kShuffleIndex, mask, v, lane, width, where);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::WarpOp::kShuffleUp, mask, v, static_cast<int>(delta), width, where);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::WarpOp::kShuffleDown, mask, v, static_cast<int>(delta), width, where);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_WHERE) {
  return simt::shuffle(simt::WarpOp::kShuffleXor, mask, v, lanes, width, where);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_WHERE) {
  return static_cast<unsigned>(simt::warp_collective(simt::WarpOp::kBallot, mask, p != 0, 0, 32, where));
}
inline int __any_sync(unsigned mask, int p, SIMT_WHERE) {
  return __ballot_sync(mask, p, where) != 0;
}
inline int __all_sync(unsigned mask, int p, SIMT_WHERE) {
  return __ballot_sync(mask, p, where) == mask;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T v, SIMT_WHERE) {
  std::uint64_t word = 0;
  std::memcpy(&word, &v, sizeof v);
  return static_cast<unsigned>(simt::warp_collective(simt::WarpOp::kMatch, mask, word, 0, 32, where));
}

#define SIMT_REDUCE(name, op, T)                                                                     \
  inline T name(unsigned mask, T v, SIMT_WHERE) {                                                    \
    return static_cast<T>(                                                                           \
        simt::warp_collective(simt::WarpOp::op, mask, static_cast<std::uint64_t>(v), 0, 32, where)); \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd, unsigned)
SIMT_REDUCE(__reduce_add_sync, kAdd, int)
SIMT_REDUCE(__reduce_min_sync, kMinU, unsigned)
SIMT_REDUCE(__reduce_min_sync, kMinS, int)
SIMT_REDUCE(__reduce_max_sync, kMaxU, unsigned)
SIMT_REDUCE(__reduce_max_sync, kMaxS, int)
SIMT_REDUCE(__reduce_and_sync, kAnd, unsigned)
SIMT_REDUCE(__reduce_or_sync, kOr, unsigned)
#undef SIMT_REDUCE

inline void __nanosleep(unsigned, SIMT_WHERE) {
  simt::pause(where);
}
inline void __threadfence() {
  simt::fence();
}
inline void __threadfence_block() {
  simt::fence();
}
inline void __threadfence_system() {
  simt::fence();
}
inline long long clock64() {
  return static_cast<long long>(simt::clock());
}
