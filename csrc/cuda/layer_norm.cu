// layer_norm and add_layer_norm: the host side.

#include "layer_norm.h"

namespace fastformer {
namespace {

// The pairs of types that the kernels take: equal ones, and 16 bits added to a float32 residual (autocast).
bool has_kernel(DType input, DType residual) { return input == residual || residual == DType::f32; }

// f.operator()<T, R, kAligned>()
template <class F> void dispatch(DType input, DType residual, bool aligned, F f) {
  const auto typed = [&]<class T, class R>() {
    aligned ? f.template operator()<T, R, true>() : f.template operator()<T, R, false>();
  };
  if (residual == DType::bf16) return typed.template operator()<bf16, bf16>();
  if (residual == DType::f16) return typed.template operator()<f16, f16>();
  switch (input) {
    case DType::f32: return typed.template operator()<float, float>();
    case DType::bf16: return typed.template operator()<bf16, float>();
    case DType::f16: return typed.template operator()<f16, float>();
  }
}

// Threads of a row (x) and rows of a block (y).
template <class R> dim3 block_of(int64_t columns) {
  constexpr int64_t kColumnsOfWarp = 32 * kVectors * kVectorSize<R>;
  const int64_t warps = std::max<int64_t>((columns + kColumnsOfWarp - 1) / kColumnsOfWarp, 1);
  return dim3(static_cast<unsigned>(32 * warps), static_cast<unsigned>(std::max<int64_t>(4 / warps, 1)));
}

// May the vectors of the rows move as one? `width`: bytes of an element of the wider type, 16 of which are a vector.
bool is_aligned(const Rows& rows, int64_t width) {
  const int64_t size = 16 / width, bytes = size * rows.tensor.element_size();
  return rows.columns % size == 0 && reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 &&
         (rows.stride % size == 0 || rows.count <= 1);
}
bool is_aligned(const std::optional<Tensor>& vector) {
  return !vector || reinterpret_cast<uintptr_t>(vector->const_data_ptr()) % 16 == 0;
}

VectorArg vector_arg(const std::optional<Tensor>& vector) {
  return vector ? VectorArg{vector->const_data_ptr(), dtype_of(*vector)} : VectorArg{};
}
RowsArg rows_arg(const Rows& rows) { return {rows.data, rows.stride}; }

void check_columns(int64_t columns) {
  STD_TORCH_CHECK(columns <= kMaxColumns, "fastformer_cuda takes rows of up to ", kMaxColumns, " columns, got ",
                  columns);
}

void forward(const OnDeviceOf& device, const char* name, DType input, DType residual, bool aligned,
             const ForwardArgs& args) {
  if (args.rows == 0) return;
  dispatch(input, residual, aligned, [&]<class T, class R, bool kAligned>() {
    const dim3 threads = block_of<R>(args.columns);
    const int64_t blocks = (args.rows + threads.y - 1) / threads.y;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "fastformer_cuda takes up to 2^31 - 1 blocks of rows, got ", blocks);
    launch(device,
           {name, {{"rows", args.rows}, {"columns", args.columns}}, dim3(static_cast<unsigned>(blocks)), threads},
           forward_kernel<T, R, kAligned>, args);
  });
}

// Returns (grad_weight, grad_bias) in float32.
std::pair<Tensor, Tensor> backward(const OnDeviceOf& device, const char* name, DType input, DType residual,
                                   bool aligned, BackwardArgs args, const Tensor& like) {
  Tensor grad_weight = empty(like, {args.columns}, ScalarType::Float);
  Tensor grad_bias = empty(like, {args.columns}, ScalarType::Float);
  if (args.columns == 0) return {grad_weight, grad_bias};
  dispatch(input, residual, aligned, [&]<class T, class R, bool kAligned>() {
    const dim3 threads = block_of<R>(args.columns);
    constexpr bool kCanBeNarrow = kAligned || kVectorSize<R> == 4;
    const bool narrow = kCanBeNarrow && threads.x * threads.y <= kNarrowThreads;
    const int64_t rows = args.rows, columns = args.columns;
    const int64_t blocks = std::clamp<int64_t>(rows / (4 * threads.y), 1, kMaxGroups / threads.y);
    const int64_t groups = narrow ? blocks * threads.y : std::clamp<int64_t>(rows / 16, 1, 64);
    const Tensor partial = empty(like, {groups, 2, columns}, ScalarType::Float);
    args.partial = static_cast<float*>(partial.mutable_data_ptr());
    const auto kernel = narrow ? backward_kernel<T, R, kAligned, kCanBeNarrow> : backward_kernel<T, R, kAligned, false>;
    launch(device, {name, {{"rows", rows}, {"columns", columns}}, dim3(static_cast<unsigned>(blocks)), threads}, kernel,
           args);
    if (!narrow)
      launch(device,
             {"layer_norm weights", {{"rows", rows}, {"columns", columns}},
              dim3(static_cast<unsigned>((columns + 255) / 256), static_cast<unsigned>(groups)), dim3(256)},
             weights_kernel<R>, args);
    launch(device,
           {"sum_groups", {{"groups", groups}, {"columns", columns}},
            dim3(static_cast<unsigned>((columns + 31) / 32), 2), dim3(32, kSumRows)},
           sum_groups_kernel, static_cast<const float*>(args.partial), static_cast<int>(groups), args.columns,
           static_cast<float*>(grad_weight.mutable_data_ptr()), static_cast<float*>(grad_bias.mutable_data_ptr()));
  });
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              double eps) {
  const OnDeviceOf device(input);
  const Rows x = rows_of(input);
  check_columns(x.columns);
  const DType dtype = dtype_of(input);
  const auto w = contiguous(weight), b = contiguous(bias);
  Tensor output = empty(input, shape_of(input), input.scalar_type());
  Tensor mean = empty(input, {x.count}, ScalarType::Float), rstd = empty(input, {x.count}, ScalarType::Float);
  const int64_t width = input.element_size();
  const bool aligned = is_aligned(x, width) && is_aligned(w) && is_aligned(b);
  forward(device, "layer_norm", dtype, dtype, aligned,
          {.rows = x.count, .columns = static_cast<int>(x.columns), .eps = static_cast<float>(eps),
           .dropout = {}, .input = rows_arg(x), .residual = {}, .weight = vector_arg(w), .bias = vector_arg(b),
           .output = output.mutable_data_ptr(), .sum = nullptr,
           .mean = static_cast<float*>(mean.mutable_data_ptr()), .rstd = static_cast<float*>(rstd.mutable_data_ptr())});
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(Tensor input, Tensor residual, std::optional<Tensor> weight,
                                                          std::optional<Tensor> bias, double eps, double dropout_p,
                                                          std::optional<Tensor> seed) {
  const OnDeviceOf device(input);
  if (!has_kernel(dtype_of(input), dtype_of(residual))) {
    input = to_type(input, ScalarType::Float);
    residual = to_type(residual, ScalarType::Float);
  }
  const Rows x = rows_of(input), r = rows_of(residual);
  check_columns(x.columns);
  const auto w = contiguous(weight), b = contiguous(bias);
  Tensor output = empty(input, shape_of(input), residual.scalar_type());
  Tensor sum = empty(input, shape_of(input), residual.scalar_type());
  Tensor mean = empty(input, {x.count}, ScalarType::Float), rstd = empty(input, {x.count}, ScalarType::Float);
  const int64_t width = residual.element_size();
  const bool aligned = is_aligned(x, width) && is_aligned(r, width) && is_aligned(w) && is_aligned(b);
  forward(device, "add_layer_norm", dtype_of(input), dtype_of(residual), aligned,
          {.rows = x.count, .columns = static_cast<int>(x.columns), .eps = static_cast<float>(eps),
           .dropout = make_dropout(dropout_p, seed), .input = rows_arg(x), .residual = rows_arg(r),
           .weight = vector_arg(w), .bias = vector_arg(b),
           .output = output.mutable_data_ptr(), .sum = sum.mutable_data_ptr(),
           .mean = static_cast<float*>(mean.mutable_data_ptr()), .rstd = static_cast<float*>(rstd.mutable_data_ptr())});
  return {output, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_output, Tensor input, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor rstd) {
  const OnDeviceOf device(input);
  const Rows x = rows_of(input), g = rows_of(grad_output);
  check_columns(x.columns);
  const DType dtype = dtype_of(input);
  const auto w = contiguous(weight);
  Tensor grad_input = empty(input, shape_of(input), input.scalar_type());
  const int64_t width = input.element_size();
  const bool aligned = is_aligned(x, width) && is_aligned(g, width) && is_aligned(w);
  const auto [grad_weight, grad_bias] =
      backward(device, "layer_norm_backward", dtype, dtype, aligned,
               {.rows = x.count, .columns = static_cast<int>(x.columns), .dropout = {},
                .grad_output = rows_arg(g), .grad_sum = {}, .input = rows_arg(x), .weight = vector_arg(w),
                .mean = static_cast<const float*>(mean.const_data_ptr()),
                .rstd = static_cast<const float*>(rstd.const_data_ptr()),
                .grad_input = grad_input.mutable_data_ptr(), .grad_residual = nullptr, .partial = nullptr},
               input);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_output, std::optional<Tensor> grad_sum,
                                                                   Tensor sum, std::optional<Tensor> weight,
                                                                   Tensor mean, Tensor rstd, double dropout_p,
                                                                   std::optional<Tensor> seed, ScalarType input_dtype) {
  const OnDeviceOf device(sum);
  const Rows s = rows_of(sum), g = rows_of(grad_output);
  check_columns(s.columns);
  std::optional<Rows> gs;
  if (grad_sum) gs = rows_of(*grad_sum);
  const DType dtype = dtype_of(sum);
  const bool direct = has_kernel(dtype_of(input_dtype), dtype);
  const auto w = contiguous(weight);
  Tensor grad_input = empty(sum, shape_of(sum), direct ? input_dtype : sum.scalar_type());
  Tensor grad_residual = empty(sum, shape_of(sum), sum.scalar_type());
  const int64_t width = sum.element_size();
  const bool aligned =
      is_aligned(s, width) && is_aligned(g, width) && (!gs || is_aligned(*gs, width)) && is_aligned(w);
  const auto [grad_weight, grad_bias] =
      backward(device, "add_layer_norm_backward", dtype_of(grad_input), dtype, aligned,
               {.rows = s.count, .columns = static_cast<int>(s.columns),
                .dropout = make_dropout(dropout_p, seed), .grad_output = rows_arg(g),
                .grad_sum = gs ? rows_arg(*gs) : RowsArg{}, .input = rows_arg(s), .weight = vector_arg(w),
                .mean = static_cast<const float*>(mean.const_data_ptr()),
                .rstd = static_cast<const float*>(rstd.const_data_ptr()),
                .grad_input = grad_input.mutable_data_ptr(), .grad_residual = grad_residual.mutable_data_ptr(),
                .partial = nullptr},
               sum);
  return {to_type(grad_input, input_dtype), grad_residual, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cuda, FASTFORMER_DEVICE, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace fastformer
