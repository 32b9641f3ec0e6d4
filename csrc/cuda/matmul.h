// Matrix products of the ops: the host side.
#pragma once

#include "common.h"

#include "activations.h"

namespace fastformer {

// A matrix (count, depth) of which the elements of a row, or those of a column, are neighbours in memory.
struct Operand {
  Tensor tensor;
  int64_t count, depth, stride;  // stride: between rows in memory, in elements
  bool depth_adjacent;
};
Operand operand_of(const Rows& rows);
Operand operand_of(const Tensor& matrix);  // 2-dimensional; copied where no elements are neighbours
Operand transposed(const Operand& operand);

// What becomes of a product p (rows, columns). Pointers may be null but for output; matrices are contiguous.
//   forward:   output = dropout(activation(p + bias)) + residual, pre_activation = p + bias
//   gradient:  output = dropout(p) * activation'(pre_activation), hidden = dropout(activation(pre_activation))
struct Epilogue {
  const void* bias = nullptr;  // (columns), contiguous
  Activation activation = Activation::none;
  bool gradient = false;
  void* pre_activation = nullptr;  // written, or read for the gradient
  void* hidden = nullptr;
  Dropout dropout;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* output = nullptr;
  bool aligned = false;  // set by the functions below: may 4 neighbours of every operand move as one?
};

// The epilogue of a (M, K) b (N, K)^T. Both, and what the epilogue points to, are of the one type.
void matmul(const OnDeviceOf& device, const char* name, const Operand& a, const Operand& b, const Epilogue& epilogue);

// The gradient epilogue of given rows. Without an output: hidden alone.
void activation_backward(const OnDeviceOf& device, const Rows& grad, const Epilogue& epilogue);

// Gradients of a linear layer's operands, from grad (M, N) in front of the activation.
Tensor input_gradient(const OnDeviceOf& device, const Rows& grad, const Tensor& weight, const Tensor& input);
Tensor weight_gradient(const OnDeviceOf& device, const Rows& grad, const Rows& input);
Tensor bias_gradient(const OnDeviceOf& device, const Rows& grad);

}  // namespace fastformer
