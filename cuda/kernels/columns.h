// The largest finite magnitude of every channel: scales of values are made from it.
#pragma once

#include "kernels.h"

namespace sage::cuda {

// amax [B, H, D], as float bits: over all tokens, of x less the mean that every mean_rows rows share (if there is one).
void launch_column_amax(const View& x, const View& mean, int64_t mean_rows, uint32_t* amax, cudaStream_t stream);

}  // namespace sage::cuda
