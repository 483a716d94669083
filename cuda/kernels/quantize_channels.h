// Quantization with one scale a channel.
#pragma once

#include "kernels.h"

namespace sage::cuda {

// `amax` is scratch for one number a channel.
void launch_quantize_channels(const QuantizeOp& op, uint32_t* amax, cudaStream_t stream);

}  // namespace sage::cuda
