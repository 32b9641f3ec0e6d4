// Mean and reciprocal standard deviation of a row.
#pragma once

#include <math.h>

#include "lanes.h"

namespace fastformer::FASTFORMER_ISA {

FF_INLINE float square_root(float x) { return sqrtf(x); }
FF_INLINE double square_root(double x) { return sqrt(x); }

template <class S> struct Moments { S mean, rstd; };

template <class T> FF_INLINE Moments<compute_t<T>> moments_of(const T* x, int64_t n, double eps) {
  using S = compute_t<T>;
  Vec<S> total[4] = {};
  for_columns_in_turn<S>(n, [&](int64_t c, int lanes, int i) { total[i] += load_lanes(x + c, lanes); });
  // The deviations from a first mean correct it: exact also where the mean is large beside the variance.
  const S first_mean = sum_in_turn<S>(total) / S(n);
  Vec<S> deviations[4] = {}, squares[4] = {};
  for_columns_in_turn<S>(n, [&](int64_t c, int lanes, int i) {
    const Vec<S> d = (lanes == kLanes<S> ? load(x + c) : load_n(x + c, lanes, first_mean)) - first_mean;
    deviations[i] += d;
    squares[i] += d * d;
  });
  const S shift = sum_in_turn<S>(deviations) / S(n);
  const S variance = sum_in_turn<S>(squares) / S(n) - shift * shift;
  return {first_mean + shift, 1 / square_root(variance + S(eps))};
}

}  // namespace fastformer::FASTFORMER_ISA
