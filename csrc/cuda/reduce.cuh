// Reductions in a fixed order: sums and maxima over lanes, with the first index or the number of equals.
#pragma once

#include "memory.cuh"

namespace cbam {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNoIndex = 0x7fffffff;

template <class A>
__device__ __forceinline__ A negative_infinity() {
  if constexpr (sizeof(A) == 8)
    return ptx::bits_to_double(0xfff0000000000000ull);
  else
    return ptx::bits_to_float(0xff800000u);
}

// A running maximum. `mark` is the first index of it or, with ties shared, how many elements equal it.
// As torch.max and torch.amax have it, a NaN wins; the first NaN keeps its index and equals nothing.
template <class A>
struct Peak {
  A value;
  int mark;
};

// Before any element: the first element that the same thread adds must have the index `first`.
template <bool kSplit, class A>
__device__ __forceinline__ Peak<A> empty_peak(int first) {
  return {negative_infinity<A>(), kSplit ? 0 : first};
}

// Adds element v of a higher index than all before it.
template <bool kSplit, class A>
__device__ __forceinline__ void add_to_peak(Peak<A>& peak, A v, int index) {
  if constexpr (kSplit) {
    if (v == peak.value)
      ++peak.mark;
    else if (!(v < peak.value) && peak.value == peak.value) {
      peak.value = v;
      peak.mark = v == v;
    }
  } else if (!(v <= peak.value) && peak.value == peak.value) {
    peak.value = v;
    peak.mark = index;
  }
}

// The same where the caller looks for the first NaN itself, if the sum of the elements is one: a comparison
// less.
template <bool kSplit, class A>
__device__ __forceinline__ void add_number_to_peak(Peak<A>& peak, A v, int index) {
  if constexpr (kSplit)
    add_to_peak<true>(peak, v, index);
  else if (v > peak.value)
    peak = {v, index};
}

// The union of two peaks over disjoint sets, in any order of their indices.
template <bool kSplit, class A>
__device__ __forceinline__ void merge_peak(Peak<A>& peak, Peak<A> other) {
  const bool nan = peak.value != peak.value, other_nan = other.value != other.value;
  const bool above = other.value > peak.value || (other_nan && !nan);
  const bool equal = other.value == peak.value || (other_nan && nan);
  if constexpr (kSplit) {
    if (above)
      peak = other;
    else if (equal)
      peak.mark += other.mark;
  } else if (above || (equal && other.mark < peak.mark)) {
    peak = other;
  }
}

// Sums over the lanes whose numbers differ in the bits [kFrom, kTo); every lane gets the result.
template <int kFrom, int kTo, class A>
__device__ __forceinline__ A lane_sum(A v) {
#pragma unroll
  for (int bit = kTo / 2; bit >= kFrom; bit /= 2) v += __shfl_xor_sync(kAllLanes, v, bit);
  return v;
}
template <class A>
__device__ __forceinline__ A warp_sum(A v) {
  return lane_sum<1, 32>(v);
}

__device__ __forceinline__ float exponential(float v) {
  return expf(v);
}
__device__ __forceinline__ double exponential(double v) {
  return exp(v);
}
__device__ __forceinline__ float logarithm(float v) {
  return logf(v);
}
__device__ __forceinline__ double logarithm(double v) {
  return log(v);
}
__device__ __forceinline__ float square_root(float v) {
  return sqrtf(v);
}
__device__ __forceinline__ double square_root(double v) {
  return sqrt(v);
}

// A sum of many parts. What an addition rounds off comes back with the next part (Kahan), so that the error
// does not grow with how many there are. Infinities and NaN leave nothing to come back.
template <class A>
struct LongSum {
  A sum = A(0), lost = A(0);
  __device__ __forceinline__ void add(A part) {
    const A v = part + lost, total = sum + v;
    lost = v - (total - sum);
    keep(lost);
    sum = total;
  }
  __device__ __forceinline__ void scale(A factor) {
    sum *= factor;
    keep(lost * factor);
  }
  __device__ __forceinline__ void keep(A rounded_off) {
    lost = rounded_off - rounded_off == A(0) ? rounded_off : A(0);
  }
};

// v[0] becomes the sum of all, added by halves.
template <class A, int V>
__device__ __forceinline__ A sum_by_halves(A (&v)[V]) {
#pragma unroll
  for (int half = V / 2; half; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  return v[0];
}

// 1 / (1 + exp(-v)) would round twice near one, where the gradient's 1 - sigmoid magnifies it.
template <class A>
__device__ __forceinline__ A sigmoid(A v) {
  const A e = exponential(v > A(0) ? -v : v), small = e / (A(1) + e);
  return v > A(0) ? A(1) - small : small;
}
// Lets NaN through, as torch.relu does.
template <class A>
__device__ __forceinline__ A relu(A v) {
  return v < A(0) ? A(0) : v;
}

// log(sum(exp(v))) in one pass: sum = sum(exp(v - shift)), the shift being the maximum so far, or 0
// where that is infinite, which lets infinities and NaN through as torch.logsumexp does.
template <class A>
struct LogSum {
  A peak;
  A sum;
};
template <class A>
__device__ __forceinline__ A log_shift(A peak) {
  return peak - peak == A(0) ? peak : A(0);
}
template <class A>
__device__ __forceinline__ LogSum<A> empty_log_sum() {
  return {negative_infinity<A>(), A(0)};
}
template <class A>
__device__ __forceinline__ void merge_log_sum(LogSum<A>& s, LogSum<A> other) {
  const A peak = s.peak > other.peak ? s.peak : other.peak;
  const A shift = log_shift(peak);
  // A zero sum stays zero whatever its shift; exp(shift difference) might overflow to 0 * inf.
  const A mine = s.sum == A(0) ? A(0) : s.sum * exponential(log_shift(s.peak) - shift);
  const A theirs = other.sum == A(0) ? A(0) : other.sum * exponential(log_shift(other.peak) - shift);
  s = {peak, mine + theirs};
}
template <class A>
__device__ __forceinline__ void add_to_log_sum(LogSum<A>& s, A v) {
  if (v > s.peak)
    merge_log_sum(s, LogSum<A>{v, exponential(v - log_shift(v))});
  else
    s.sum += exponential(v - log_shift(s.peak));
}
// log_sum with this maximum, if it is higher than its own.
template <class A>
__device__ __forceinline__ void raise_log_sum(LogSum<A>& s, A peak) {
  if (peak > s.peak) merge_log_sum(s, LogSum<A>{peak, A(0)});
}
template <class A>
__device__ __forceinline__ A log_sum_value(LogSum<A> s) {
  return logarithm(s.sum) + log_shift(s.peak);
}

}  // namespace cbam
