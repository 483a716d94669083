// `flash` for few queries on every GPU.
#include "decode.cuh"

namespace sage::cuda {

void launch_decode(const AttentionOp& op, void* workspace, cudaStream_t stream) {
  decode::launch_all<false>(op, workspace, stream);
}

}  // namespace sage::cuda
