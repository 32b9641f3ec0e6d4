// The kernels of the best instruction set that this machine runs, or of the one that FASTFORMER_ISA names.
#pragma once

#include "kernels/kernels.h"

namespace fastformer {

const Kernels& kernels();

}  // namespace fastformer
