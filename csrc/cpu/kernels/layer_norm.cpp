// layer_norm and add_layer_norm, forward and backward: one pass over memory, the row stays in L1.

#include "moments.h"
#include "philox.h"

namespace fastformer::FASTFORMER_ISA {

template <class T, class R> static void forward(const LayerNormArgs& a, int64_t row_begin, int64_t row_end) {
  using S = compute_t<R>;
  const S *weight = (const S*)a.weight, *bias = (const S*)a.bias;
  const int64_t n = a.columns;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const R* x = (const R*)a.input + row * a.input_stride;
    R* y = (R*)a.output + row * n;
    if (a.residual) {
      const T* input = (const T*)a.input + row * a.input_stride;
      const R* residual = (const R*)a.residual + row * a.residual_stride;
      R* s = (R*)a.sum + row * n;
      RowDropout dropout(a.dropout, uint64_t(row));
      for_columns<S>(n, [&](int64_t c, int lanes) {
        Vec<S> v = load_lanes(input + c, lanes);
        if (a.dropout.threshold) v = dropout.apply<S>(v, c);
        store_lanes(s + c, v + load_lanes(residual + c, lanes), lanes);
      });
      x = s;  // as stored: what the backward will see
    }
    const Moments<S> m = moments_of(x, n, a.eps);
    for_columns<S>(n, [&](int64_t c, int lanes) {
      Vec<S> v = (load_lanes(x + c, lanes) - m.mean) * m.rstd;
      if (weight) v *= load_lanes(weight + c, lanes);
      if (bias) v += load_lanes(bias + c, lanes);
      store_lanes(y + c, v, lanes);
    });
    ((S*)a.mean)[row] = m.mean;
    ((S*)a.rstd)[row] = m.rstd;
  }
}

// With x_hat = (x - mean) rstd and h = grad_output * weight:
// grad_x = rstd (h - mean(h) - x_hat mean(h x_hat)), grad_weight = sum(grad_output x_hat), grad_bias = sum(grad_output)
template <class T, class R>
static void backward(const LayerNormBackwardArgs& a, int64_t row_begin, int64_t row_end, void* grad_weight_,
                     void* grad_bias_) {
  using S = compute_t<R>;
  const S* weight = (const S*)a.weight;
  S *grad_weight = (S*)grad_weight_, *grad_bias = (S*)grad_bias_;
  const int64_t n = a.columns;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const R *g = (const R*)a.grad_output + row * a.grad_output_stride, *x = (const R*)a.input + row * a.input_stride;
    const R* grad_sum = a.grad_sum ? (const R*)a.grad_sum + row * a.grad_sum_stride : nullptr;
    const S mean = ((const S*)a.mean)[row], rstd = ((const S*)a.rstd)[row];
    Vec<S> sum_h[4] = {}, sum_hx[4] = {};
    for_columns_in_turn<S>(n, [&](int64_t c, int lanes, int i) {
      const Vec<S> go = load_lanes(g + c, lanes), x_hat = (load_lanes(x + c, lanes) - mean) * rstd;
      const Vec<S> h = weight ? go * load_lanes(weight + c, lanes) : go;
      sum_h[i] += h;
      sum_hx[i] += h * x_hat;
      store_lanes(grad_weight + c, load_lanes(grad_weight + c, lanes) + go * x_hat, lanes);
      store_lanes(grad_bias + c, load_lanes(grad_bias + c, lanes) + go, lanes);
    });
    const S mean_h = sum_in_turn<S>(sum_h) / S(n), mean_hx = sum_in_turn<S>(sum_hx) / S(n);
    RowDropout dropout(a.dropout, uint64_t(row));
    for_columns<S>(n, [&](int64_t c, int lanes) {
      const Vec<S> go = load_lanes(g + c, lanes), x_hat = (load_lanes(x + c, lanes) - mean) * rstd;
      const Vec<S> h = weight ? go * load_lanes(weight + c, lanes) : go;
      Vec<S> grad = (h - mean_h - x_hat * mean_hx) * rstd;
      if (grad_sum) grad += load_lanes(grad_sum + c, lanes);
      if (a.grad_residual) store_lanes((R*)a.grad_residual + row * n + c, grad, lanes);
      if (a.dropout.threshold) grad = dropout.apply<S>(grad, c);
      store_lanes((T*)a.grad_input + row * n + c, grad, lanes);
    });
  }
}

// f.operator()<T, R>() for the pairs of (input, residual) types that there are kernels for.
template <class F> FF_INLINE void dispatch_pair(DType input, DType residual, F f) {
  if (input == residual) {
    switch (input) {
      case DType::f32: return f.template operator()<float, float>();
      case DType::f64: return f.template operator()<double, double>();
      case DType::bf16: return f.template operator()<bf16, bf16>();
      case DType::f16: return f.template operator()<f16, f16>();
    }
  }
  input == DType::bf16 ? f.template operator()<bf16, float>() : f.template operator()<f16, float>();
}

void layer_norm(const LayerNormArgs& a, int64_t row_begin, int64_t row_end) {
  dispatch_pair(a.dtype, a.residual_dtype, [&]<class T, class R>() { forward<T, R>(a, row_begin, row_end); });
}

void layer_norm_backward(const LayerNormBackwardArgs& a, int64_t row_begin, int64_t row_end, void* grad_weight,
                         void* grad_bias) {
  dispatch_pair(a.grad_input_dtype, a.dtype,
           [&]<class T, class R>() { backward<T, R>(a, row_begin, row_end, grad_weight, grad_bias); });
}

}  // namespace fastformer::FASTFORMER_ISA
