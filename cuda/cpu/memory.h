// Host memory for the CPU device: aligned, and refused rather than promised where the machine has too little.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sage::cpu {

struct HostMemory {
  uint64_t total, available;  // bytes that this process may use; 0 where unknown
};
HostMemory host_memory();

constexpr size_t kAlignment = 64;
void* allocate_aligned(size_t bytes);  // throws SAGE_OUT_OF_MEMORY
void release_aligned(void* address) noexcept;

struct Release {
  void operator()(void* address) const noexcept { release_aligned(address); }
};
using Buffer = std::unique_ptr<void, Release>;
inline Buffer allocate_buffer(size_t bytes) { return Buffer(allocate_aligned(bytes)); }

}  // namespace sage::cpu
