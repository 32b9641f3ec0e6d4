// The kernels of attention forward in bfloat16 for sm_90a.

#include "attention_hopper.h"

namespace fastformer::attention {

template void forward_hopper<bf16>(const OnDeviceOf&, ForwardArgs);

}  // namespace fastformer::attention
