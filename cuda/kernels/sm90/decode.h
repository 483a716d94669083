// `flash` for few queries with launches that overlap. plan_cuda.cpp decides when it runs.
#pragma once

#include "../../ops.h"

struct CUstream_st;

namespace sage::cuda::sm90 {

// Takes decode_workspace_bytes().
void launch_decode(const AttentionOp& op, void* workspace, CUstream_st* stream);

}  // namespace sage::cuda::sm90
