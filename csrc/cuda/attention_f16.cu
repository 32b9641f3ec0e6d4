// The kernels of attention in float16.

#include "attention_backward.h"
#include "attention_forward.h"

namespace fastformer::attention {

template void forward<f16>(const OnDeviceOf&, ForwardArgs);
template void combine<f16>(const OnDeviceOf&, const CombineArgs&);
template void backward<f16>(const OnDeviceOf&, const DeltaArgs&, BackwardArgs);

}  // namespace fastformer::attention
