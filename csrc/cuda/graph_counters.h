// Counters for the launches of CUDA graphs: pieces of memory that stay a graph's own while it lives.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace cbam {

// Pieces come zeroed and come back as zeros, since every launch that ends leaves zeros: the next graph takes
// them as they are.
class GraphCounters {
 public:
  struct Piece {
    GraphCounters* pool;
    int32_t device;
    int64_t words;
    uint32_t* data;
    Piece* next = nullptr;  // that is free
  };

  // At least `words` counters. `make(words)` returns zeroed memory, which is never freed. No lock is held
  // meanwhile: CUDA may be about to give a piece back, and hold locks of its own.
  template <class Make>
  Piece* take(int32_t device, int64_t words, Make make) {
    int64_t room = kLeast;
    while (room < words) room *= 2;
    if (Piece* piece = take_free(device, room)) return piece;
    const int64_t count = std::max<int64_t>(1, kTogether / room);
    uint32_t* data = make(room * count);
    for (int64_t i = 1; i < count; ++i) give_back(new Piece{this, device, room, data + i * room});
    return new Piece{this, device, room, data};
  }
  // Once the graph, its instances and their launches are gone. Allocates nothing: CUDA calls it, which
  // catches no exception.
  static void give_back(Piece* piece) {
    const std::lock_guard<std::mutex> lock(piece->pool->mutex_);
    // `take` has made the list.
    Piece*& free = piece->pool->free_.find({piece->device, piece->words})->second;
    piece->next = free;
    free = piece;
  }

 private:
  static constexpr int64_t kLeast = 64, kTogether = 16384;

  Piece* take_free(int32_t device, int64_t words) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Piece*& free = free_[{device, words}];
    Piece* piece = free;
    if (piece) free = piece->next;
    return piece;
  }

  std::mutex mutex_;
  std::map<std::pair<int32_t, int64_t>, Piece*> free_;
};

}  // namespace cbam
