// linear_cross_entropy: what happens to the logits of a slice of the classes between the matrix products.

#include "lanes.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

void gather_rows(const GatherRowsArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>() {
    using S = compute_t<T>;
    for (int64_t i = begin; i < end; ++i) {
      const T* input = (const T*)a.input + a.rows[i] * a.stride;
      S* output = (S*)a.output + i * a.columns;
      for_columns<S>(a.columns, [&](int64_t c, int lanes) { store_lanes(output + c, load_lanes(input + c, lanes), lanes); });
    }
  });
}

template <class S> FF_INLINE Vec<S> class_weights(const CrossEntropyArgs& a, int64_t c, int lanes) {
  return a.class_weight ? load_lanes((const S*)a.class_weight + c, lanes) : splat<S>(1);
}

template <class S> static void statistics(const CrossEntropyArgs& a) {
  constexpr S kLowest = sizeof(S) == 8 ? S(-__DBL_MAX__) : S(-__FLT_MAX__);  // a class of logit -inf has exp 0
  for (int64_t row = 0; row < a.rows; ++row) {
    const S* logits = (const S*)a.logits + row * a.stride;
    Vec<S> largest_lanes = splat<S>(kLowest);
    for_columns<S>(a.columns, [&](int64_t c, int lanes) {
      const Vec<S> z = lanes == kLanes<S> ? load(logits + c) : load_n(logits + c, lanes, kLowest);
      largest_lanes = z > largest_lanes ? z : largest_lanes;  // NaN is left to the sums
    });
    const S m = largest<S>(largest_lanes);
    Vec<S> sums[4] = {}, distances[4] = {};
    for_columns_in_turn<S>(a.columns, [&](int64_t c, int lanes, int i) {
      const Vec<S> z = lanes == kLanes<S> ? load(logits + c) : load_n(logits + c, lanes, -__builtin_inff());
      sums[i] += exp_score(z - m);
      if (a.distance) {
        const Vec<S> distance = m - (lanes == kLanes<S> ? z : load_n(logits + c, lanes, m));
        distances[i] += class_weights<S>(a, c, lanes) * distance;
      }
    });
    ((S*)a.largest)[row] = m;
    ((S*)a.sum_exp)[row] = sum_in_turn<S>(sums);
    if (a.distance) ((S*)a.distance)[row] = sum_in_turn<S>(distances);
  }
}

template <class S> static void gradient(const CrossEntropyArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    S* logits = (S*)a.logits + row * a.stride;
    const S largest = ((const S*)a.largest)[row], log_sum = ((const S*)a.log_sum)[row];
    const S scale = ((const S*)a.scale)[row], uniform = ((const S*)a.uniform)[row];
    for_columns<S>(a.columns, [&](int64_t c, int lanes) {
      Vec<S> g = exp(load_lanes(logits + c, lanes) - largest - log_sum) * scale;
      if (uniform != 0) g -= class_weights<S>(a, c, lanes) * uniform;
      store_lanes(logits + c, g, lanes);
    });
    const int64_t target = a.target[row];
    if (target >= 0 && target < a.columns) logits[target] -= ((const S*)a.hot)[row];
  }
}

void cross_entropy_statistics(const CrossEntropyArgs& a) {
  a.dtype == DType::f64 ? statistics<double>(a) : statistics<float>(a);
}
void cross_entropy_gradient(const CrossEntropyArgs& a) {
  a.dtype == DType::f64 ? gradient<double>(a) : gradient<float>(a);
}

}  // namespace fastformer::FASTFORMER_ISA
