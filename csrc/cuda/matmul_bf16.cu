// The kernels of matrix products in bfloat16.

#include "matmul_kernels.h"

template struct fastformer::Launches<fastformer::bf16>;
