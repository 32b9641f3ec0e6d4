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

// Blocks of rows, blocks of blocks, and those: three short sums in place of a long one, which would lose digits.
void column_sums(const ColumnSumsArgs& a, int64_t column_begin, int64_t column_end) {
  constexpr int64_t kBlock = 32, kColumns = 256;
  dispatch(a.dtype, [&]<class T>() {
    using S = compute_t<T>;
    for (int64_t c0 = column_begin; c0 < column_end; c0 += kColumns) {
      const int64_t columns = min(kColumns, column_end - c0);
      S blocks[kColumns] = {};  // the sum of up to kBlock blocks
      S* sums = (S*)a.sums + c0;
      for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
      for (int64_t row0 = 0; row0 < a.rows; row0 += kBlock) {
        const int64_t row1 = min(row0 + kBlock, a.rows);
        const bool last = row1 == a.rows || row1 % (kBlock * kBlock) == 0;
        for_columns<S>(columns, [&](int64_t c, int lanes) {
          Vec<S> block = zero<S>();
          for (int64_t row = row0; row < row1; ++row)
            block += load_lanes((const T*)a.input + row * a.stride + c0 + c, lanes);
          block += load(blocks + c);
          store(blocks + c, last ? zero<S>() : block);
          if (last) store_lanes(sums + c, load_lanes(sums + c, lanes) + block, lanes);
        });
      }
    }
  });
}

}  // namespace fastformer::FASTFORMER_ISA
