// The kernels of matrix products in float16.

#include "matmul_kernels.h"

template struct fastformer::Launches<fastformer::f16>;
