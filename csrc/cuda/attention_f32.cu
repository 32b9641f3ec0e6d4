// The kernels of attention in float32.

#include "attention_backward.h"
#include "attention_forward.h"

namespace fastformer::attention {

template void forward<float>(const OnDeviceOf&, ForwardArgs);
template void combine<float>(const OnDeviceOf&, const CombineArgs&);
template void backward<float>(const OnDeviceOf&, const DeltaArgs&, BackwardArgs);

}  // namespace fastformer::attention
