// The streamed tier's plan of a call, played through: which block has which item when; see cuda_timeline.py.
#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <vector>

#include "cuda_streamed_problem.h"

using namespace cbam;

namespace {

// Microseconds, bytes and cycles a microsecond.
struct Gpu {
  double memory_latency, l2_latency, item_overhead, bytes_in_flight, clock;
};

class Timeline {
 public:
  Timeline(const Streamed& k, Variant variant, const Gpu& gpu)
      : k_(k), s_(k.s), p_(k.p), gpu_(gpu), element_(element_bytes(k.p.dtype)) {
    // An access is a vector or an element, and a thread has the same number of either in flight.
    in_flight_ = gpu.bytes_in_flight * variant.vector * element_ / 16;
    units_.resize(s_.units);
    for (int i = 0; i < k.grid; ++i) free_.push(0);
  }

  // Tickets are drawn in order, each by the block that is free first; an item waits for lower tickets alone,
  // whose ends are known by then.
  void run() {
    const uint32_t tickets = s_.main_items + s_.weight_items + s_.join_items;
    for (uint32_t ticket = 0; ticket < tickets; ++ticket) {
      const double at = free_.top();
      free_.pop();
      const double done =
          ticket < s_.main_items ? main_item(ticket, at) : weight_item(ticket - s_.main_items, at);
      free_.push(done);
      end = std::max(end, done);
    }
  }

  double end = 0, waited = 0, main_end = 0;

 private:
  struct Unit {
    double done[kCounters] = {};
    int items[kCounters] = {};
  };

  double main_item(uint32_t ticket, double at) {
    const uint32_t step = ticket / s_.step_items, rest = ticket % s_.step_items;
    int plan = s_.plans - 1;
    while (s_.plan[plan].first > rest) --plan;
    const StagePlan& d = s_.plan[plan];
    const int64_t index = int64_t{step} - d.lag, first = index * s_.unit_samples;
    const int64_t sample = first + (d.per_sample ? (rest - d.first) / d.items : 0);
    if (index < 0 || index >= s_.units || sample >= p_.samples) return at + gpu_.item_overhead / 4;
    const int64_t samples = std::min<int64_t>(s_.unit_samples, p_.samples - first);
    Unit& unit = units_[index];
    double ready = 0;
    if (d.wait_counter >= 0)
      ready = unit.done[d.wait_counter];
    else if (s_.ring && !s_.chained && index >= s_.ring)
      ready = units_[index - s_.ring].done[s_.ring_counter];
    const double begin = std::max(at, ready);
    waited += begin - at;
    double done = begin + gpu_.item_overhead + work(d.stage, samples, false);
    unit.done[d.stage] = std::max(unit.done[d.stage], done);
    if (++unit.items[d.stage] == d.total.per_sample * samples + d.total.per_unit) {
      double last = unit.done[d.stage];
      for (int i = 0; i < kTails && d.tail[i] >= 0; ++i) last += work(d.tail[i], samples, true);
      unit.done[kTailDone] = done = std::max(done, last);
    }
    main_end = std::max(main_end, done);
    if (d.feeds_weights) weights_ready_ = std::max(weights_ready_, done);
    return done;
  }

  double weight_item(uint32_t index, double at) {
    if (index >= s_.weight_items) {
      const double rounds = std::ceil(s_.weight_splits / 8.0) * (kJoinEntries / kThreads);
      return std::max(at, parts_ready_) + gpu_.item_overhead + rounds * gpu_.l2_latency;
    }
    int64_t tile = index % (s_.weight_items / s_.weight_splits);
    const double share = std::ceil(double(p_.samples) / s_.weight_splits);
    const auto matrix = [&](MatrixTile t, double rows) {
      const double loads = kWeightStage * (t.rows + t.columns) / double(kThreads) / 4;
      const double products = double(kWeightStage) * t.rows * t.columns / kThreads * kWarpTurns;
      return std::ceil(rows / kWeightStage) * (loads * gpu_.l2_latency + products / gpu_.clock);
    };
    const auto tiles = [](MatrixTile t, int64_t rows, int64_t columns) {
      return policy::ceil_div(rows, t.rows) * policy::ceil_div(columns, t.columns);
    };
    double time = 0;
    if (p_.pools && tile < tiles(kTileW2, p_.channels, p_.hidden)) {
      time = matrix(kTileW2, share);
    } else if (p_.pools && p_.w1.data &&
               tile - tiles(kTileW2, p_.channels, p_.hidden) < tiles(kTileW1, p_.hidden, p_.channels)) {
      time = matrix(kTileW1, share * s_.pool_vectors);
    } else {
      time = std::ceil(share * s_.conv_items / (kThreads / kConvColumns) / 8) * gpu_.l2_latency;
    }
    const double done = std::max(at, weights_ready_) + gpu_.item_overhead + time;
    parts_ready_ = std::max(parts_ready_, done);
    return done;
  }

  double rounds(double bytes, double latency) const { return std::ceil(bytes / in_flight_) * latency; }

  // A matrix of the MLP, read once for `vectors` by a block that has 16 bytes of four vectors a thread in
  // flight.
  double matrix(double elements, double vectors) const {
    const double bytes = elements * (p_.w1.wide ? 4.0 : element_);
    const double batches = std::ceil(vectors / kBatch);
    return batches * (std::ceil(bytes / gpu_.bytes_in_flight) + 1) * gpu_.l2_latency;
  }

  double convolution(double positions) const {
    return gpu_.l2_latency + 2.0 * taps(p_) * positions / kThreads * kWarpTurns / gpu_.clock;
  }

  // A stage's work for one item, or for a whole unit of `samples`.
  double work(int stage, int64_t samples, bool whole) const {
    const double sample = double(p_.channels) * p_.positions * element_;
    const double reduce = sample / (double(s_.reduce.tiles) * s_.reduce.chunks);
    const double map_items = s_.gather_tiles ? s_.conv_items : double(s_.map.tiles) * s_.map.chunks;
    const double conv = convolution(s_.conv_positions), vectors = s_.pool_vectors;
    const double some = whole ? samples : std::min<int64_t>(samples, kMlpSamples);
    const double hidden = whole ? p_.hidden : std::min<int64_t>(p_.hidden, s_.hidden_tile);
    const double channels = whole ? p_.channels : std::min<int64_t>(p_.channels, s_.gate_tile);
    switch (stage) {
      case kPool:
        return rounds(sample / s_.pool_items, gpu_.memory_latency);
      case kSpatialPool:
        return rounds(reduce, gpu_.l2_latency);
      case kCross:
        return rounds(2 * reduce, gpu_.memory_latency);
      case kGateGrad:
      case kInputGrad:
        return rounds(sample / map_items, gpu_.l2_latency) + (s_.gather_tiles ? conv : 0);
      case kOutput:
        return rounds(sample / map_items, gpu_.l2_latency);
      case kConv:
      case kConvGrad:
        return conv;
      case kHidden:
        return matrix(hidden * p_.channels, some * vectors);
      case kGate:
        return matrix(channels * p_.hidden, some);
      case kLogitGrad:
        return s_.hidden_blocks ? matrix(channels * p_.hidden, some) : gpu_.l2_latency;
      case kHiddenGrad:
        return s_.hidden_blocks ? gpu_.l2_latency : matrix(p_.channels * double(p_.hidden), some);
      case kPoolGrad:
        return matrix(channels * p_.hidden, some * vectors);
      default:
        return gpu_.l2_latency;
    }
  }

  // A block's warps share four schedulers.
  static constexpr double kWarpTurns = kThreads / 32 / 4;

  const Streamed& k_;
  const Schedule& s_;
  const Problem& p_;
  const Gpu gpu_;
  const double element_;
  double in_flight_, weights_ready_ = 0, parts_ready_ = 0;
  std::vector<Unit> units_;
  std::priority_queue<double, std::vector<double>, std::greater<double>> free_;
};

}  // namespace

// out: microseconds, the share of the blocks' time that they wait for an item's inputs, microseconds behind
// the last item of x's size; then samples a unit, steps of the deepest stage, blocks a multiprocessor and
// items a step.
extern "C" void timeline(const int64_t* sizes, const double* gpu, double* out) {
  Streamed k{};
  k.p = sizes_of(sizes);
  int64_t report[64];
  const Variant variant = plan_call(sizes, k, report);
  Timeline t(k, variant, {gpu[0], gpu[1], gpu[2], gpu[3], gpu[4]});
  t.run();
  const double values[] = {t.end,
                           t.waited / (t.end * k.grid),
                           t.end - t.main_end,
                           double(k.s.unit_samples),
                           double(k.s.plan[k.s.plans - 1].lag),
                           double(k.blocks_per_multiprocessor),
                           double(k.s.step_items)};
  std::copy(std::begin(values), std::end(values), out);
}
