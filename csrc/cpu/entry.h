// The entry points of an instruction set: its kernels for every dtype and layout.

// Calls f(Schedule&) for the dtype and layout of a problem.
template <class F>
void with_schedule(const Problem& p, DType dtype, bool backward, char* scratch, F f) {
  auto run = [&](auto element) {
    using T = decltype(element);
    Carver carver{scratch};
    if (p.channels_last) {
      Schedule<T, true> s(p, backward, carver);
      f(s, carver);
    } else {
      Schedule<T, false> s(p, backward, carver);
      f(s, carver);
    }
  };
  switch (dtype) {
    case DType::kBFloat16:
      return run(bf16{});
#if !defined(CBAM_BF16_ALONE)
    case DType::kFloat:
      return run(float{});
    case DType::kDouble:
      return run(double{});
    case DType::kHalf:
      return run(half{});
#else
    default:  // for the kernels of another file
      return;
#endif
  }
}

int64_t scratch_bytes(const Problem& p, DType dtype, bool backward) {
  int64_t bytes = 0;
  with_schedule(p, dtype, backward, nullptr, [&](auto&, Carver& c) { bytes = c.used + 64; });
  return bytes;
}
void forward(const Problem& p, DType dtype, Stage stage) {
  with_schedule(p, dtype, false, p.scratch, [&](auto& s, Carver&) { s.forward(stage); });
}
void backward(const Problem& p, DType dtype, Stage stage) {
  with_schedule(p, dtype, true, p.scratch, [&](auto& s, Carver&) { s.backward_pass(stage); });
}

const Kernels kKernels = {scratch_bytes, forward, backward};
