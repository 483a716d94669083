// CUDA devices: what they are, their memory pool, and whether they still work.
#pragma once

#include <atomic>
#include <string>

#include "kernels.h"

namespace sage::cuda {

struct Device {
  int ordinal;
  int compute_capability;  // 90 for sm_90
  int multiprocessors;
  size_t total_bytes;
  cudaMemPool_t pool;           // keeps what is freed until the last stream closes
  std::atomic<int> streams{0};  // open
  std::atomic<int> failure{0};  // the cudaError_t after which the device does nothing more for this process
};

// The device of an ordinal, opened on first use. Throws SAGE_NO_DEVICE or SAGE_UNSUPPORTED.
Device& open_device(int ordinal);

// Makes the device current on this thread; throws SAGE_DEVICE_ERROR once it has failed. Calls may come from any thread.
void enter(const Device& device);

std::string name_of(const Device& device);

}  // namespace sage::cuda
