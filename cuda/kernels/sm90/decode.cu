// `flash` for few queries with launches that overlap.
#include "../decode.cuh"
#include "decode.h"

namespace sage::cuda::sm90 {

void launch_decode(const AttentionOp& op, void* workspace, CUstream_st* stream) {
  decode::launch_all<true>(op, workspace, stream);
}

}  // namespace sage::cuda::sm90
