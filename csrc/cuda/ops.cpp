// The schemas of the CUDA ops: those of csrc/ops.cpp, where what they mean is said.

#include <torch/csrc/stable/library.h>

#include <string>

#ifdef FASTFORMER_SIM  // the simulator's build, for tests
#define DEVICE_TYPE "cpu"
#else
#define DEVICE_TYPE "cuda"
#endif

STABLE_TORCH_LIBRARY(fastformer_cuda, m) {
  m.def(
      "layer_norm(Tensor input, Tensor? weight, Tensor? bias, float eps) -> (Tensor output, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor rstd) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, "
      "Tensor? seed) -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, "
      "Tensor rstd, float dropout_p, Tensor? seed, ScalarType input_dtype) -> "
      "(Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");

  m.def("device_type() -> str");  // of the tensors that the ops take: "cuda", or "cpu" in the simulator's build
}

static std::string device_type() { return DEVICE_TYPE; }

STABLE_TORCH_LIBRARY_IMPL(fastformer_cuda, CompositeExplicitAutograd, m) {
  m.impl("device_type", TORCH_BOX(&device_type));
}
