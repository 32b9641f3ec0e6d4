// Loops over a row: whole vectors, then the rest.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastformer::FASTFORMER_ISA {

// f(column, lanes) for every vector of a row; lanes < kLanes<S> only in the last.
template <class S, class F> FF_INLINE void for_columns(int64_t columns, F f) {
  int64_t c = 0;
  for (; c + kLanes<S> <= columns; c += kLanes<S>) f(c, kLanes<S>);
  if (c < columns) f(c, int(columns - c));
}
// f(column, lanes, i) with i = 0 to 3 in turn: four sums that do not wait for one another.
template <class S, class F> FF_INLINE void for_columns_in_turn(int64_t columns, F f) {
  int64_t c = 0;
  for (; c + 4 * kLanes<S> <= columns; c += 4 * kLanes<S>)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) f(c + i * kLanes<S>, kLanes<S>, i);
  for_columns<S>(columns - c, [&](int64_t rest, int lanes) { f(c + rest, lanes, 0); });
}
template <class S> FF_INLINE S sum_in_turn(const Vec<S> (&sums)[4]) {
  return sum<S>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
template <class T> FF_INLINE Vec<compute_t<T>> load_lanes(const T* p, int lanes) {
  return lanes == kLanes<compute_t<T>> ? load(p) : load_n(p, lanes);
}
template <class T> FF_INLINE void store_lanes(T* p, Vec<compute_t<T>> x, int lanes) {
  lanes == kLanes<compute_t<T>> ? store(p, x) : store_n(p, x, lanes);
}
template <class T> FF_INLINE void stream_lanes(T* p, Vec<compute_t<T>> x, int lanes) {
  if constexpr (__is_same(T, compute_t<T>))
    if (lanes == kLanes<T>) return stream(p, bit_cast<Vec<int32_t>>(x));
  store_lanes(p, x, lanes);
}

// f.operator()<T>() for the storage type.
template <class F> FF_INLINE void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::f64: return f.template operator()<double>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
  }
}

}  // namespace fastformer::FASTFORMER_ISA
