// The kernels of matrix products in bfloat16 for sm_90a.

#include "matmul_hopper.h"

template struct fastformer::HopperLaunches<fastformer::bf16>;
