// The table of this instruction set.
#include "microkernel.h"
#include "kernels.h"

namespace fastformer::FASTFORMER_ISA {

#define FF_NAME_(isa) #isa
#define FF_NAME(isa) FF_NAME_(isa)

LayerNormKernel layer_norm;
LayerNormBackwardKernel layer_norm_backward;
PackKernel pack;
GemmKernel gemm;
GemmScratchKernel gemm_scratch_bytes;
ActivationKernel activation;
ColumnSumsKernel column_sums;
AttentionKernel attention;
AttentionScratchKernel attention_scratch_bytes;
AttentionBackwardKernel attention_backward;
AttentionBackwardScratchKernel attention_backward_scratch_bytes;

extern const Kernels kernels;
const Kernels kernels = {
    FF_NAME(FASTFORMER_ISA), kTileVecs * kVecBytes, layer_norm, layer_norm_backward, pack, gemm, gemm_scratch_bytes,
    activation, column_sums,
    attention, attention_scratch_bytes, attention_backward, attention_backward_scratch_bytes,
};

}  // namespace fastformer::FASTFORMER_ISA
