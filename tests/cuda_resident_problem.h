// Builds a Resident from flat arguments: what the host driver and the PTX runner of the tests share.
#pragma once

#include "cuda_streamed_problem.h"
#include "resident.h"

namespace cbam {

// `cluster` 0 leaves the choice to the policy. Fills report: covered, fits, cluster, split, vector, threads,
// shared bytes, scratch bytes, counter words, whether weights are read in quads.
inline bool plan_resident(const int64_t* sizes, int64_t cluster, resident::Resident& k, int64_t* report) {
  k.operation = int32_t(sizes[kOperationAt]);
  const resident::Machine machine{90, int32_t(sizes[kMultiprocessorsAt]), int32_t(sizes[kSharedBytesAt])};
  const bool covered = resident::covers(k.p, Operation(k.operation), machine, sizes[kAlignedAt]);
  const bool fits = covered && resident::choose_cluster(k, machine, [&](const resident::Resident& plan) {
                      return !cluster || plan.cluster == cluster;
                    });
  if (report) {
    const int64_t values[] = {covered,
                              fits,
                              k.cluster,
                              k.split,
                              k.vector,
                              k.threads,
                              k.at.total,
                              fits ? resident::lay_out(k, nullptr) : 0,
                              resident::kCounterWords,
                              k.weight_quads};
    for (int i = 0; i < int(sizeof(values) / sizeof(values[0])); ++i) report[i] = values[i];
  }
  return fits;
}

inline void make_resident(const int64_t* sizes, double eps, void* const* pointers, uint32_t* counters,
                          char* scratch, int64_t cluster, resident::Resident& k) {
  Streamed call{};
  make_call(sizes, eps, pointers, nullptr, nullptr, call);
  k.p = call.p;
  plan_resident(sizes, cluster, k, nullptr);
  resident::lay_out(k, scratch);
  k.counters = counters;
}

}  // namespace cbam
