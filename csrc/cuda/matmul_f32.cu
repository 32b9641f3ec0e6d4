// The kernels of matrix products in float32.

#include "matmul_kernels.h"

template struct fastformer::Launches<float>;
