// Blocks of a cluster: waiting for each other, and reading each other's shared memory (sm_90 and later).
#pragma once

#include <cstdint>

namespace sage::cuda::ptx {

// What this block wrote before it arrived, the others of its cluster read after they have waited.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Four words at an address of this block's shared memory, from that of block `rank`.
__device__ __forceinline__ float4 load_cluster(uint32_t address, uint32_t rank) {
  float4 value;
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5; "
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

__device__ __forceinline__ float load_cluster_number(uint32_t address, uint32_t rank) {
  float value;
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.f32 %0, [there]; }"
               : "=f"(value)
               : "r"(address), "r"(rank)
               : "memory");
  return value;
}

}  // namespace sage::cuda::ptx
