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

  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, str? activation, float dropout_p, Tensor? seed, "
      "Tensor? residual, bool save_pre_activation) -> (Tensor output, Tensor pre_activation)");
  m.def(
      "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor pre_activation, str? activation, "
      "float dropout_p, Tensor? seed, bool need_input, bool need_weight, bool need_bias) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "feed_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str? activation, "
      "float hidden_dropout_p, Tensor? hidden_seed, float dropout_p, Tensor? seed, Tensor? residual, "
      "bool save_pre_activation) -> (Tensor output, Tensor pre_activation)");
  m.def(
      "feed_forward_backward(Tensor grad_output, Tensor input, Tensor weight1, Tensor weight2, Tensor pre_activation, "
      "str? activation, float hidden_dropout_p, Tensor? hidden_seed, float dropout_p, Tensor? seed, bool need_input, "
      "bool need_weight1, bool need_bias1, bool need_weight2, bool need_bias2) -> "
      "(Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2)");

  m.def(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
      "Tensor? seed, bool is_causal, float scale, int window_left, int window_right) -> (Tensor output, Tensor lse)");
  m.def(
      "scaled_dot_product_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor? attn_mask, Tensor output, Tensor lse, float dropout_p, Tensor? seed, bool is_causal, float scale, "
      "int window_left, int window_right) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "varlen_attn(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, int max_q, int max_k, "
      "float dropout_p, Tensor? seed, float scale, int window_left, int window_right) -> (Tensor output, Tensor lse)");
  m.def(
      "varlen_attn_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
      "Tensor cu_seq_q, Tensor cu_seq_k, int max_q, int max_k, float dropout_p, Tensor? seed, float scale, "
      "int window_left, int window_right) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");

  m.def("device_type() -> str");  // of the tensors that the ops take: "cuda", or "cpu" in the simulator's build
}

static std::string device_type() { return DEVICE_TYPE; }

STABLE_TORCH_LIBRARY_IMPL(fastformer_cuda, CompositeExplicitAutograd, m) {
  m.impl("device_type", TORCH_BOX(&device_type));
}
