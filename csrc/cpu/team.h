// Threads that go through the same phases of work together, each phase cut into parts.
#pragma once

#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cbam_fused {

// A place in a team. A member does its own part of a phase, whose data its caches hold from the phase before,
// then whatever parts nobody has begun, and goes on when all are done. So one that comes late, because it
// slept or its processor is busy, holds nobody up but by a part that it has begun; and the phases end even
// where the pool of threads runs all members one after the other.
class Member {
 public:
  // `state`: words() zeros, shared by the team.
  Member(uint32_t* state, int members, int64_t index) : index(index), next_(state), members_(members) {}

  static int64_t words(int members, int64_t phases) { return phases * (members + 1); }

  const int64_t index;

  // f(part) for every part of [0, parts), parts being at most the number of members.
  template <class F>
  void phase(int64_t parts, F f) {
    uint32_t *done = advance(), *taken = done + 1;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t part = (index + i) % parts;
      if (__atomic_exchange_n(taken + part, 1u, __ATOMIC_RELAXED)) continue;
      f(part);
      __atomic_add_fetch(done, 1u, __ATOMIC_RELEASE);
    }
    wait(done, parts);
  }

  // f(item) for every item of [0, count), each by the member that comes for it.
  template <class F>
  void draw(int64_t count, F f) {
    uint32_t *done = advance(), *next = done + 1;
    for (int64_t i; (i = __atomic_fetch_add(next, 1u, __ATOMIC_RELAXED)) < count;) {
      f(i);
      __atomic_add_fetch(done, 1u, __ATOMIC_RELEASE);
    }
    wait(done, count);
  }

  // f(begin, end) for at most one part a member of [0, count), cut at multiples of `step`.
  template <class F>
  void in_parts(int64_t count, F f, int64_t step = 1) {
    const int64_t units = (count + step - 1) / step, parts = units < members_ ? units : members_;
    phase(parts, [&](int64_t i) {
      const int64_t begin = units * i / parts * step, end = units * (i + 1) / parts * step;
      f(begin, end < count ? end : count);
    });
  }

  template <class F>
  void alone(F f) {
    phase(1, [&](int64_t) { f(); });
  }

 private:
  uint32_t* advance() {
    uint32_t* at = next_;
    next_ += members_ + 1;
    return at;
  }

  static void wait(const uint32_t* done, int64_t count) {
    for (int turns = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < uint32_t(count); ++turns) {
      if (turns < kTurns) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();  // perhaps to the member that is waited for
      }
    }
  }

  static constexpr int kTurns = 4096;
  uint32_t* next_;
  const int members_;
};

}  // namespace cbam_fused
