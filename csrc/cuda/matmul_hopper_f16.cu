// The kernels of matrix products in float16 for sm_90a.

#include "matmul_hopper.h"

template struct fastformer::HopperLaunches<fastformer::f16>;
