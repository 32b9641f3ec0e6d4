// The table of this instruction set.
#include "microkernel.h"
#include "kernels.h"

namespace fastformer::FASTFORMER_ISA {

#define FF_NAME_(isa) #isa
#define FF_NAME(isa) FF_NAME_(isa)

LayerNormKernel layer_norm;
LayerNormBackwardKernel layer_norm_backward;
EmbeddingsKernel embeddings;
EmbeddingsBackwardKernel embeddings_backward;
EmbeddingGradientKernel embedding_gradient;
PackKernel pack;
GemmKernel gemm;
GemmScratchKernel gemm_scratch_bytes;
EpilogueKernel epilogue;
QuantizeKernel quantize;
PackKernel pack_quantized;
GemmKernel quantized_gemm, quantized_gemm_vnni, quantized_gemm_amx;
extern const int64_t kQuantizedScratchBytes;
ActivationKernel activation;
ColumnSumsKernel column_sums;
GatherRowsKernel gather_rows;
CrossEntropyKernel cross_entropy_statistics, cross_entropy_gradient;
CrfKernel crf_log_likelihood;
CrfBackwardKernel crf_backward;
CrfDecodeKernel crf_decode;
AttentionKernel attention;
AttentionScratchKernel attention_scratch_bytes;
AttentionMergeKernel attention_merge;
AttentionBackwardKernel attention_backward;
AttentionBackwardScratchKernel attention_backward_scratch_bytes;

static constexpr Kernels table(const char* isa, GemmKernel* quantized_product) {
  return {
      isa, kTileVecs * kVecBytes, layer_norm, layer_norm_backward, embeddings, embeddings_backward,
      embedding_gradient, pack, gemm, gemm_scratch_bytes, epilogue,
      quantize, pack_quantized, quantized_product, kQuantizedScratchBytes, activation, column_sums,
      gather_rows, cross_entropy_statistics, cross_entropy_gradient,
      crf_log_likelihood, crf_backward, crf_decode, attention, attention_scratch_bytes, attention_merge,
      attention_backward, attention_backward_scratch_bytes,
  };
}

extern const Kernels kernels;
const Kernels kernels = table(FF_NAME(FASTFORMER_ISA), quantized_gemm);
#if defined(__AVX512F__)
extern const Kernels kernels_vnni, kernels_amx;
const Kernels kernels_vnni = table("avx512_vnni", quantized_gemm_vnni);
const Kernels kernels_amx = table("avx512_amx", quantized_gemm_amx);
#endif

}  // namespace fastformer::FASTFORMER_ISA
