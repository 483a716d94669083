// 1 / x by one instruction: to one unit in the last place, with what is below the normal numbers as 0.
#pragma once

namespace sage::cuda::ptx {

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace sage::cuda::ptx
