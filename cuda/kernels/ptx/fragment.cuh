// Fragments of 16-bit numbers to rows in shared memory, and pieces of those rows (sm_90).
#pragma once

#include <cstdint>

namespace sage::cuda::ptx {

// To four 8 x 16-byte matrices; lane l gives the row address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t row_address, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from)
               : "memory");
  return value;
}

}  // namespace sage::cuda::ptx
