// A launch's counters: zero when it starts, and zero again when it has ended.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace cbam {

// At least `words` zeroed 32-bit counters on `device`, the current one, for a launch on `stream`.
//
// They are zeroed once, by no launch and no node of a graph: every launch leaves zeros behind. They are
// memory of CUDA's and not of torch's allocator, which may be filling a pool of the caller's
// (torch.cuda.MemPool, the private pool of torch.compile's CUDA graphs), where nothing may outlive what the
// caller knows of.
//
// Outside a CUDA graph each stream has its own, which launches on it share. A launch that is being captured
// gets its own, which the graph holds as a user object, and every instance of it too: they come free once all
// are gone and what they had launched has ended. Two graphs share nothing, and replays of one follow each
// other on whatever streams, as CUDA orders them; instances of one capture and copies of it share their
// counters as they share their outputs, and may not run at the same time.
//
// No call can find what a broken one left: a launch that fails has not touched its counters, and a kernel
// that is stopped by a fault ends its context, in which every later call fails with that fault.
uint32_t* counters_for(int32_t device, int64_t words, cudaStream_t stream);

}  // namespace cbam
