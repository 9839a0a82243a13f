// The CPU kernels compiled for the instruction set that every machine of this architecture has.
#include "kernels.h"

#define CBAM_VECTOR_BYTES 16
namespace cbam_fused {
namespace baseline {
namespace {
#include "stages.h"
}  // namespace
}  // namespace baseline
const Kernels* kernels_baseline() {
  return &baseline::kKernels;
}
}  // namespace cbam_fused
