// embeddings: the sum of a row of each table, its layer-norm and dropout in one pass; and the gradients of the tables.

#include "moments.h"
#include "philox.h"

namespace fastformer::FASTFORMER_ISA {

template <class T> static void sum_of_rows(const EmbeddingsArgs& a, int64_t row, compute_t<T>* sum) {
  using S = compute_t<T>;
  const T* rows[3];
  for (int i = 0; i < a.tables; ++i) rows[i] = (const T*)a.table[i] + a.ids[i][row] * a.table_stride[i];
  for_columns<S>(a.columns, [&](int64_t c, int lanes) {
    Vec<S> v = load_lanes(rows[0] + c, lanes);
    for (int i = 1; i < a.tables; ++i) v += load_lanes(rows[i] + c, lanes);
    store_lanes(sum + c, v, lanes);
  });
}

template <class T>
static void forward(const EmbeddingsArgs& a, int64_t row_begin, int64_t row_end, compute_t<T>* sum) {
  using S = compute_t<T>;
  const S *weight = (const S*)a.weight, *bias = (const S*)a.bias;
  for (int64_t row = row_begin; row < row_end; ++row) {
    sum_of_rows<T>(a, row, sum);
    const Moments<S> m = moments_of(sum, a.columns, a.eps);
    T* y = (T*)a.output + row * a.columns;
    RowDropout dropout(a.dropout, uint64_t(row));
    for_columns<S>(a.columns, [&](int64_t c, int lanes) {
      Vec<S> v = (load_lanes(sum + c, lanes) - m.mean) * m.rstd;
      if (weight) v *= load_lanes(weight + c, lanes);
      if (bias) v += load_lanes(bias + c, lanes);
      if (a.dropout.threshold) v = dropout.apply<S>(v, c);
      store_lanes(y + c, v, lanes);
    });
    ((S*)a.mean)[row] = m.mean;
    ((S*)a.rstd)[row] = m.rstd;
  }
}

template <class T>
static void backward(const EmbeddingsArgs& a, int64_t row_begin, int64_t row_end, compute_t<T>* sums,
                     compute_t<T>* grads) {
  using S = compute_t<T>;
  for (int64_t row = row_begin; row < row_end; ++row, sums += a.columns, grads += a.columns) {
    sum_of_rows<T>(a, row, sums);
    const T* g = (const T*)a.grad_output + row * a.grad_output_stride;
    RowDropout dropout(a.dropout, uint64_t(row));
    for_columns<S>(a.columns, [&](int64_t c, int lanes) {
      Vec<S> v = load_lanes(g + c, lanes);
      if (a.dropout.threshold) v = dropout.apply<S>(v, c);
      store_lanes(grads + c, v, lanes);
    });
  }
}

template <class T>
static void gradient(const EmbeddingGradientArgs& a, int64_t row_begin, int64_t row_end, int64_t column_begin,
                     int64_t column_end, compute_t<T>* total) {
  using S = compute_t<T>;
  constexpr int64_t kShort = 64;  // rows of a sum: longer ones are sums of sums
  const int64_t n = column_end - column_begin;
  S* part = total + n;
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* output = (T*)a.grad_table + row * a.columns + column_begin;
    const int64_t begin = a.first[row], end = a.first[row + 1];
    const auto grad = [&](int64_t i) { return (const S*)a.grad_rows + a.order[i] * a.columns + column_begin; };
    if (begin == end || row == a.padding_idx) {
      memset((void*)output, 0, size_t(n) * sizeof(T));
    } else if (begin + 1 == end) {
      const S* g = grad(begin);
      for_columns<S>(n, [&](int64_t c, int lanes) { store_lanes(output + c, load_lanes(g + c, lanes), lanes); });
    } else {
      memset(total, 0, size_t(n) * sizeof(S));
      for (int64_t i = begin; i < end; i += kShort) {
        memset(part, 0, size_t(n) * sizeof(S));
        for (int64_t j = i; j < min(i + kShort, end); ++j) {
          const S* g = grad(j);
          for_columns<S>(n, [&](int64_t c, int lanes) {
            store_lanes(part + c, load_lanes(part + c, lanes) + load_lanes(g + c, lanes), lanes);
          });
        }
        for_columns<S>(n, [&](int64_t c, int lanes) {
          store_lanes(total + c, load_lanes(total + c, lanes) + load_lanes(part + c, lanes), lanes);
        });
      }
      for_columns<S>(n, [&](int64_t c, int lanes) { store_lanes(output + c, load_lanes(total + c, lanes), lanes); });
    }
  }
}

void embeddings(const EmbeddingsArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
  dispatch(a.dtype, [&]<class T>() { forward<T>(a, row_begin, row_end, (compute_t<T>*)scratch); });
}

void embeddings_backward(const EmbeddingsArgs& a, int64_t row_begin, int64_t row_end, void* sums, void* grads) {
  dispatch(a.dtype, [&]<class T>() {
    backward<T>(a, row_begin, row_end, (compute_t<T>*)sums, (compute_t<T>*)grads);
  });
}

void embedding_gradient(const EmbeddingGradientArgs& a, int64_t row_begin, int64_t row_end, int64_t column_begin,
                        int64_t column_end, void* scratch) {
  dispatch(a.dtype, [&]<class T>() {
    gradient<T>(a, row_begin, row_end, column_begin, column_end, (compute_t<T>*)scratch);
  });
}

}  // namespace fastformer::FASTFORMER_ISA
