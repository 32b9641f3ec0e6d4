// Every C++ op: the schemas, one line each. The CPU implementations are in cpu/<op>.cpp, the meaning of each op is in
// fastformer/reference.py. Raw ops check nothing that Python has checked: call fastformer.ops.* instead.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastformer_cpu, m) {
  // Attention: attn_mask is (B, H, Sq, Sk), stride 0 where it broadcasts, bool or the compute dtype; lse is natural.
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

  // Rows of the last dimension; mean, rstd and the gradients of weight and bias in the compute dtype.
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

  // ids int64 of one shape, any strides; a table that is None has none; padding_idx -1: none. The gradients of the tables
  // have their dtype, and are empty where they were not asked for.
  m.def(
      "embeddings(Tensor input_ids, Tensor word_embeddings, Tensor? position_ids, Tensor? position_embeddings, "
      "Tensor? token_type_ids, Tensor? token_type_embeddings, Tensor? weight, Tensor? bias, float eps, "
      "int padding_idx, float dropout_p, Tensor? seed) -> (Tensor output, Tensor mean, Tensor rstd)");
  m.def(
      "embeddings_backward(Tensor grad_output, Tensor input_ids, Tensor word_embeddings, Tensor? position_ids, "
      "Tensor? position_embeddings, Tensor? token_type_ids, Tensor? token_type_embeddings, Tensor? weight, "
      "Tensor mean, Tensor rstd, int padding_idx, float dropout_p, Tensor? seed, bool need_word, bool need_position, "
      "bool need_token_type) -> (Tensor grad_word, Tensor grad_position, Tensor grad_token_type, Tensor grad_weight, "
      "Tensor grad_bias)");

  // pre_activation is empty where it was not asked for or there is no activation.
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

  // loss, lse and gradients in the compute dtype. lse is (2, rows): the largest logit, and what the log-sum-exp is above
  // it; 0 where the target is ignore_index. The gradients of a loss that is one number come with it; those that were not
  // asked for are empty. reduction: mean, sum or none.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
      "str reduction, int ignore_index, float label_smoothing, bool need_input, bool need_weight, bool need_bias) -> "
      "(Tensor loss, Tensor lse, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  m.def(  // of reduction none
      "linear_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, Tensor lse, int ignore_index, float label_smoothing, bool need_input, "
      "bool need_weight, bool need_bias) -> "
      "(Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");

  // Linear-chain CRF; log_likelihood (one for each sequence), arrived and the gradients in the compute dtype. arrived: what
  // the backward starts from, empty where it was not asked for.
  m.def(
      "crf_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, Tensor start, Tensor end, Tensor? mask, "
      "bool save_arrived) -> (Tensor log_likelihood, Tensor arrived)");
  m.def(
      "crf_log_likelihood_backward(Tensor grad_output, Tensor emissions, Tensor tags, Tensor transitions, Tensor start, "
      "Tensor end, Tensor? mask, Tensor arrived) -> "
      "(Tensor grad_emissions, Tensor grad_transitions, Tensor grad_start, Tensor grad_end)");
  m.def(
      "crf_decode(Tensor emissions, Tensor transitions, Tensor start, Tensor end, Tensor? mask) -> Tensor tags");

  // Inference on weights that were packed before: (panels, in_features, panel width) in the compute dtype or in 16 bits,
  // or quantized, (panels, bytes of a panel) in int8.
  m.def("pack_weight(Tensor weight, ScalarType? dtype=None) -> Tensor");  // dtype: of panels in 16 bits
  m.def("quantize_weight(Tensor weight) -> Tensor");
  m.def("use_huge_pages(Tensor(a!) memory) -> ()");  // new memory, not written to; where the system has them

  // By samples: do the weights still agree with what was packed of them? The next counts[i] weights are, in a row, packed[i].
  m.def("is_packed(Tensor[] weights, int[] counts, Tensor[] packed) -> bool");
  m.def(
      "packed_linear(Tensor input, Tensor packed, int out_features, Tensor? bias, str? activation, Tensor? residual) "
      "-> Tensor");
  m.def(
      "packed_feed_forward(Tensor input, Tensor packed1, int hidden_features, Tensor? bias1, Tensor packed2, "
      "int out_features, Tensor? bias2, str? activation, Tensor? residual) -> Tensor");

  // The layers of BERT (a layer-norm after each residual sum) or, pre_norm, of GPT-2 (before it, and one at the end).
  // input (batch, length, width); of each layer four packed weights and ten vectors, of no elements where there is none:
  // norm1 weight, bias; query, key, value bias (or one for all); projection bias; norm2 weight, bias; the two biases of
  // the feed-forward network. attn_mask (batch, 1 or heads, 1 or length, keys), bool or the compute dtype. With cu_seq
  // the batch is one row of sequences. With a cache, per layer (batch, heads, capacity, head_dim), every query sees
  // `past` keys and those up to its own; the new ones are written behind them. With a head, the packed weight
  // (vocabulary, width) of a product after the last layer-norm, come its (batch, keep, vocabulary) for the last positions.
  m.def(
      "packed_layers(Tensor input, Tensor[] packed, Tensor[] vectors, Tensor? final_weight, Tensor? final_bias, "
      "Tensor? head, Tensor? head_bias, int vocabulary, int keep, bool pre_norm, bool is_causal, int heads, "
      "int hidden_features, str? activation, float scale, float eps, Tensor? attn_mask, Tensor? cu_seq, int longest, "
      "Tensor(a!)[] key_cache, Tensor(b!)[] value_cache, int past) "
      "-> Tensor");

  // The instruction set in use, those that this machine can run (comma separated), and a switch for tests.
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("set_isa(str isa) -> ()");
  m.def("multiplies_bfloat16() -> bool");  // has the machine instructions for it?

  // The machine's ceilings, on every thread: `rounds` of multiplications and additions in registers (int8: of 8 bits), and
  // the reading of a share of the memory. What comes back is how many operations, or bytes, that was.
  m.def("multiply_adds(int rounds, bool int8) -> int");
  m.def("read_memory(Tensor memory, int times) -> int");
}
