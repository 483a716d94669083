// Maps of strided tensors, by which hardware copies boxes of them.
#pragma once

#include <cuda.h>

#include "../../ops.h"

namespace sage::cuda::sm90 {

// Of boxes of `rows` tokens, `width` bytes of channels wide and swizzled over as many.
CUtensorMap make_tensor_map(const View& view, int rows, int width);

}  // namespace sage::cuda::sm90
