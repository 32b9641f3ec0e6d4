// Activations and their gradients over whole tensors, and sums over rows: what the backward of linear needs besides
// matrix products.

#include "lanes.h"
#include "philox.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

void activation(const ActivationArgs& a, int64_t row_begin, int64_t row_end) {
  dispatch(a.dtype, [&]<class T>() {
    using S = compute_t<T>;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const T* grad = a.grad ? (const T*)a.grad + row * a.grad_stride : nullptr;
      const T* pre = a.pre_activation ? (const T*)a.pre_activation + row * a.columns : nullptr;
      RowDropout dropout(a.dropout, uint64_t(row));
      for_columns<S>(a.columns, [&](int64_t c, int lanes) {
        Vec<S> v;
        if (grad) {
          v = load_lanes(grad + c, lanes);
          if (a.dropout.threshold) v = dropout.apply<S>(v, c);
          if (pre) v *= activation_gradient<S>(a.activation, load_lanes(pre + c, lanes));
        } else {
          v = activate<S>(a.activation, load_lanes(pre + c, lanes));
          if (a.dropout.threshold) v = dropout.apply<S>(v, c);
        }
        store_lanes((T*)a.output + row * a.columns + c, v, lanes);
      });
    }
  });
}

// In two levels, blocks of rows first: the error grows with the square root of the number of rows at most.
void column_sums(const ColumnSumsArgs& a, int64_t column_begin, int64_t column_end) {
  constexpr int64_t kBlock = 32;
  dispatch(a.dtype, [&]<class T>() {
    using S = compute_t<T>;
    S* sums = (S*)a.sums + column_begin;
    for (int64_t row0 = 0; row0 == 0 || row0 < a.rows; row0 += kBlock)
      for_columns<S>(column_end - column_begin, [&](int64_t c, int lanes) {
        Vec<S> block = zero<S>();
        for (int64_t row = row0; row < min(row0 + kBlock, a.rows); ++row)
          block += load_lanes((const T*)a.input + row * a.stride + column_begin + c, lanes);
        store_lanes(sums + c, row0 ? load_lanes(sums + c, lanes) + block : block, lanes);
      });
  });
}

}  // namespace fastformer::FASTFORMER_ISA
