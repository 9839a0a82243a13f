// Drives csrc/cpu/team.h with threads that come early, late and one after the other; exits 1 at the first
// fault.
#include "../csrc/cpu/team.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using cbam_fused::Member;

namespace {

constexpr int kPhases = 24, kItems = 64;

// What all members do: phase p reads, unguarded, what any part of the phase before wrote, and doubles it.
struct Work {
  int members;
  std::vector<uint32_t> state;
  std::vector<std::vector<int>> rows;  // of items, as each phase leaves them

  explicit Work(int count)
      : members(count), state(Member::words(count, kPhases)), rows(kPhases + 1, std::vector<int>(kItems)) {
    rows[0].assign(kItems, 1);
  }

  void run(int index, int delay) {
    std::minstd_rand random(index * 7919 + delay);
    auto pause = [&] {
      if (delay && random() % 4 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(random() % delay));
    };
    pause();
    Member m(state.data(), members, index);
    for (int p = 0; p < kPhases; ++p) {
      auto step = [&](int64_t i) { rows[p + 1][i] += rows[p][i] + rows[p][kItems - 1 - i]; };
      auto steps = [&](int64_t begin, int64_t end) {
        pause();
        for (int64_t i = begin; i < end; ++i) step(i);
      };
      if (p % 4 == 0) m.in_parts(kItems, steps);
      if (p % 4 == 1) m.draw(kItems, step);
      if (p % 4 == 2) m.in_parts(kItems, steps, 24);  // three units, the last one short
      if (p % 4 == 3) m.alone([&] { steps(0, kItems); });
    }
  }

  void check() const {
    for (int p = 0; p <= kPhases; ++p) {
      for (int v : rows[p]) {
        if (v == 1 << p) continue;
        std::fprintf(stderr, "phase %d of %d members: %d instead of %d\n", p, members, v, 1 << p);
        std::exit(1);
      }
    }
  }
};

}  // namespace

int main() {
  for (int members = 1; members <= 5; ++members) {
    for (int delay : {0, 50, 500}) {
      Work together(members);
      std::vector<std::thread> threads;
      for (int i = 0; i < members; ++i) threads.emplace_back([&, i] { together.run(i, delay); });
      for (std::thread& t : threads) t.join();
      together.check();
    }
    Work in_turn(members);
    for (int i = members - 1; i >= 0; --i) in_turn.run(i, 0);
    in_turn.check();
  }
  std::puts("ok");
}
