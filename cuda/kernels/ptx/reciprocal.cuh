// 1 / x as one instruction has it, to an error of one unit; 0 of what is below the normal numbers counts as infinity.
#pragma once

namespace sage::cuda::ptx {

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace sage::cuda::ptx
