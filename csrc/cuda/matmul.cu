// Matrix products: operands, how the work is divided, the gradients of a linear layer.

#include "matmul_launch.h"

namespace fastformer {
namespace {

// f.operator()<T>()
template <class F> void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
  }
}

bool is_aligned(const void* data, int64_t stride, int64_t elements, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % (elements * element_size) == 0 && stride % elements == 0;
}

OperandArg operand_arg(const Operand& operand) {
  const Tensor& tensor = operand.tensor;
  const int64_t size = tensor.element_size();
  const void* data = tensor.const_data_ptr();
  return {data, operand.count, operand.stride, is_aligned(data, operand.stride, 16 / size, size)};
}

// Can TMA read it? It wants rows 16 bytes apart or multiples of it, and 32-bit places. The depth is not 0.
bool tma_takes(const OperandArg& operand, int64_t depth, bool depth_adjacent) {
  return operand.aligned && operand.stride >= (depth_adjacent ? depth : operand.count) && depth > 0 &&
         depth <= INT32_MAX && operand.count <= INT32_MAX;
}

// May 4 neighbours of everything that the epilogue touches move as one?
bool is_aligned(const Epilogue& e, int64_t columns, int64_t element_size) {
  bool aligned = columns % 4 == 0 && (!e.residual || e.residual_stride % 4 == 0);
  for (const void* data : {e.bias, static_cast<const void*>(e.pre_activation), static_cast<const void*>(e.hidden),
                           e.residual, static_cast<const void*>(e.output)})
    aligned = aligned && is_aligned(data, 0, 4, element_size);
  return aligned;
}

// Small tiles, of up to `wanted` parts of the depth, each at least 1024 of it.
Split split_depth(int64_t depth, int64_t wanted) {
  const int64_t count = std::clamp<int64_t>(std::min(wanted, depth / 1024), 1, 64);
  const int64_t part = ((depth + count - 1) / count + 63) / 64 * 64;  // whole steps
  return {false, std::max<int64_t>((depth + part - 1) / std::max<int64_t>(part, 1), 1), part};
}

// Large tiles where there are enough of them for the GPU, else small ones; where these are too few, too, the depth is
// split.
Split split_of(int64_t rows, int64_t columns, int64_t depth, int64_t processors, bool float32) {
  const auto tiles = [&](int64_t size) { return (rows + size - 1) / size * ((columns + size - 1) / size); };
  if (!float32 && tiles(128) >= processors) return {true, 1, depth};
  return split_depth(depth, processors / tiles(64));
}

// On Hopper: tiles of 128 x 256 where they don't leave more processors without work than those of 128 x 128. Where these
// are too few, too, the depth is split. None: not even half of the processors would have work.
std::optional<Split> hopper_split_of(int64_t rows, int64_t columns, int64_t depth, int64_t processors) {
  const auto rounds = [&](int64_t width) {
    return ((rows + 127) / 128 * ((columns + width - 1) / width) + processors - 1) / processors;
  };
  const int64_t tiles = (rows + 127) / 128 * ((columns + 127) / 128);
  if (tiles >= processors) return Split{2 * rounds(256) <= rounds(128), 1, depth};
  const Split split = split_depth(depth, processors / tiles);
  return 2 * tiles * split.count >= processors ? std::optional(split) : std::nullopt;
}

FinishArgs finish_args(int64_t rows, int64_t columns, const Epilogue& epilogue) {
  return {.rows = rows, .columns = columns, .column_units = (columns + 63) / 64, .partial = nullptr, .splits = 0,
          .values = nullptr, .stride = 0, .epilogue = epilogue};
}

}  // namespace

Operand operand_of(const Rows& rows) { return {rows.tensor, rows.count, rows.columns, rows.stride, true}; }

Operand operand_of(const Tensor& matrix) {
  const int64_t count = matrix.size(0), depth = matrix.size(1);
  if (depth == 1 || matrix.stride(1) == 1) return {matrix, count, depth, matrix.stride(0), true};
  if (count == 1 || matrix.stride(0) == 1) return {matrix, count, depth, matrix.stride(1), false};
  // Without neighbours each element would be fetched by itself, again for every tile: one copy is cheaper.
  return {torch::stable::contiguous(matrix), count, depth, depth, true};
}

Operand transposed(const Operand& operand) {
  return {operand.tensor, operand.depth, operand.count, operand.stride, !operand.depth_adjacent};
}

void matmul(const OnDeviceOf& device, const char* name, const Operand& a, const Operand& b, const Epilogue& epilogue) {
  const int64_t rows = a.count, columns = b.count, depth = a.depth;
  if (rows == 0 || columns == 0) return;
  const DType dtype = dtype_of(a.tensor);
  MatmulArgs args = {.depth = depth, .a = operand_arg(a), .b = operand_arg(b), .split_depth = 0, .partial = nullptr,
                     .epilogue = epilogue};
  std::optional<Split> hopper;
  if (dtype != DType::f32 && is_hopper() && tma_takes(args.a, depth, a.depth_adjacent) &&
      tma_takes(args.b, depth, b.depth_adjacent))
    hopper = hopper_split_of(rows, columns, depth, multiprocessors());
  const Split split = hopper ? *hopper : split_of(rows, columns, depth, multiprocessors(), dtype == DType::f32);
  args.split_depth = split.depth;
  args.epilogue.aligned = is_aligned(epilogue, columns, a.tensor.element_size());
  std::optional<Tensor> partial;
  if (split.count > 1) {
    partial = empty(a.tensor, {split.count, rows, columns}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  dispatch(dtype, [&]<class T>() {
    if constexpr (!std::is_same_v<T, float>)
      if (hopper) HopperLaunches<T>::matmul(device, name, args, split, a.depth_adjacent, b.depth_adjacent);
    if (!hopper) Launches<T>::matmul(device, name, args, split, a.depth_adjacent, b.depth_adjacent);
    if (!partial) return;
    FinishArgs finish = finish_args(rows, columns, args.epilogue);
    finish.partial = args.partial;
    finish.splits = split.count;
    Launches<T>::finish(device, "add_splits", finish);
  });
}

void activation_backward(const OnDeviceOf& device, const Rows& grad, const Epilogue& epilogue) {
  if (grad.count == 0 || grad.columns == 0) return;
  const int64_t size = grad.tensor.element_size();
  FinishArgs args = finish_args(grad.count, grad.columns, epilogue);
  args.values = grad.data;
  args.stride = grad.stride;
  args.epilogue.aligned =
      is_aligned(epilogue, grad.columns, size) && is_aligned(grad.data, grad.stride, 4, size);
  dispatch(dtype_of(grad.tensor), [&]<class T>() { Launches<T>::finish(device, "activation_backward", args); });
}

Tensor input_gradient(const OnDeviceOf& device, const Rows& grad, const Tensor& weight, const Tensor& input) {
  Tensor output = empty(input, shape_of(input), input.scalar_type());
  matmul(device, "input_gradient", operand_of(grad), transposed(operand_of(weight)),
         {.output = output.mutable_data_ptr()});
  return output;
}

Tensor weight_gradient(const OnDeviceOf& device, const Rows& grad, const Rows& input) {
  Tensor output = empty(grad.tensor, {grad.columns, input.columns}, grad.tensor.scalar_type());
  matmul(device, "weight_gradient", transposed(operand_of(grad)), transposed(operand_of(input)),
         {.output = output.mutable_data_ptr()});
  return output;
}

Tensor bias_gradient(const OnDeviceOf& device, const Rows& grad) {
  Tensor output = empty(grad.tensor, {grad.columns}, grad.tensor.scalar_type());
  if (grad.columns == 0) return output;
  const int64_t groups = std::clamp<int64_t>(grad.count / 64, 1, 64), size = grad.tensor.element_size();
  const Tensor partial = empty(grad.tensor, {groups, grad.columns}, ScalarType::Float);
  const ColumnSumsArgs args = {
      .rows = grad.count, .columns = grad.columns, .group_rows = (grad.count + groups - 1) / groups,
      .values = grad.data, .stride = grad.stride,
      .aligned = grad.columns % 4 == 0 && is_aligned(grad.data, grad.stride, 4, size),
      .partial = static_cast<float*>(partial.mutable_data_ptr()),
  };
  FinishArgs finish = finish_args(1, grad.columns, {.output = output.mutable_data_ptr()});
  finish.partial = args.partial;
  finish.splits = groups;
  finish.epilogue.aligned = is_aligned(finish.epilogue, grad.columns, size);
  dispatch(dtype_of(grad.tensor), [&]<class T>() {
    Launches<T>::column_sums(device, static_cast<int>(groups), args);
    Launches<T>::finish(device, "bias_gradient", finish);
  });
  return output;
}

}  // namespace fastformer
