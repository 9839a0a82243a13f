// The module's .cu files of one dtype (CBAM_DTYPE), whole, on the host: what cuda_host.cpp launches.
#define CBAM_JOIN_(a, b) a##b
#define CBAM_JOIN(a, b) CBAM_JOIN_(a, b)
#define CBAM_TEXT_(...) #__VA_ARGS__
#define CBAM_TEXT(...) CBAM_TEXT_(__VA_ARGS__)

#include CBAM_TEXT(CBAM_JOIN(streamed_backward_, CBAM_DTYPE).cu)
#include CBAM_TEXT(CBAM_JOIN(streamed_forward_, CBAM_DTYPE).cu)
#if CBAM_HAS_RESIDENT
#include CBAM_TEXT(CBAM_JOIN(resident_backward_, CBAM_DTYPE).cu)
#include CBAM_TEXT(CBAM_JOIN(resident_forward_, CBAM_DTYPE).cu)
#endif

// `bytes`: the caller's size of the plan, which is compiled with other headers.
extern "C" SIMT_API int launch_streamed(int backward, const cbam::Streamed* k, const cbam::Variant* v,
                                        uint64_t bytes) {
  if (bytes != sizeof *k) return cudaErrorInvalidValue;
  return backward ? cbam::CBAM_JOIN(launch_streamed_backward_, CBAM_DTYPE)(*k, *v, nullptr)
                  : cbam::CBAM_JOIN(launch_streamed_forward_, CBAM_DTYPE)(*k, *v, nullptr);
}

#if CBAM_HAS_RESIDENT
extern "C" SIMT_API int launch_resident(int backward, const cbam::resident::Resident* k, uint64_t bytes) {
  if (bytes != sizeof *k) return cudaErrorInvalidValue;
  return backward ? cbam::resident::CBAM_JOIN(launch_backward_, CBAM_DTYPE)(*k, nullptr, nullptr)
                  : cbam::resident::CBAM_JOIN(launch_forward_, CBAM_DTYPE)(*k, nullptr, nullptr);
}
#endif
