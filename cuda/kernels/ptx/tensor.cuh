// Copies of boxes of strided tensors into shared memory (sm_90), and how products see tiles of rows of tokens.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sage::cuda::ptx {

// A tensor map of [batch][heads][tokens][channels]; what lies outside of the tensor is written as zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int channel, int token, int head,
                                         int batch, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(channel), "r"(token), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// The same into every block of the cluster that `blocks` has a bit for, at the same addresses and barriers of each.
__device__ __forceinline__ void copy_box_to_cluster(uint32_t to, const CUtensorMap& map, int channel, int token,
                                                    int head, int batch, uint32_t barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(&map), "r"(channel), "r"(token), "r"(head), "r"(batch), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- clusters ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ int block_in_cluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Arrives at the same barrier of another block. Relaxed, as it follows reads that are done.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int block) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory");
}

// ---- products ---------------------------------------------------------------------------------------------------

// The address of a tile in its descriptor; in clusters, addresses hold the number of the block too.
__device__ __forceinline__ uint32_t descriptor_address(uint32_t address) { return (address & 0x3ffff) >> 4; }

// Upper half and swizzle of the descriptor of an MN-major tile: panels of 64 16-bit channels (128-byte rows, swizzled
// over as many), kTokens rows each. 16 tokens further is 2048 bytes further.
template <int kTokens>
__device__ constexpr uint64_t panel_descriptor() {
  return uint64_t{kTokens * 128 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

}  // namespace sage::cuda::ptx
