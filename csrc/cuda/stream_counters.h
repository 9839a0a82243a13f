// Which counters a launch of the streamed tier uses: one set for each device and stream.
#pragma once

#include <stdint.h>

#include <map>
#include <mutex>
#include <utility>

namespace cbam {

// Memory is a handle that is copied. A launch needs zeros, and leaves zeros when it ends; launches on one
// stream follow each other, so that one set serves them all.
template <class Memory>
class StreamCounters {
 public:
  // At least `words` counters. `make(words)` returns zeroed memory, zeroed in the order of the stream.
  //
  // `stream` has to be an id that no later stream takes over, as a destroyed stream's handle may be: its last
  // launch can still be running when the next stream launches.
  template <class Make>
  Memory of(int32_t device, uint64_t stream, int64_t words, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Kept& kept = kept_[{device, stream}];
    if (kept.words < words) {
      int64_t room = kLeast;
      while (room < words) room *= 2;
      // What it has outgrown is left alone, as launches may still use it: in all, less than it has now.
      kept.memory = make(room);
      kept.words = room;
    }
    return kept.memory;
  }

 private:
  static constexpr int64_t kLeast = 1024;
  struct Kept {
    Memory memory;
    int64_t words = 0;
  };
  std::mutex mutex_;
  std::map<std::pair<int32_t, uint64_t>, Kept> kept_;
};

}  // namespace cbam
