// The kernels of attention in bfloat16.

#include "attention_backward.h"
#include "attention_forward.h"

namespace fastformer::attention {

template void forward<bf16>(const OnDeviceOf&, ForwardArgs);
template void combine<bf16>(const OnDeviceOf&, const CombineArgs&);
template void backward<bf16>(const OnDeviceOf&, const DeltaArgs&, BackwardArgs);

}  // namespace fastformer::attention
