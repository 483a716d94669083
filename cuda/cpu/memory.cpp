// Host memory for the CPU device: see memory.h.
#include "memory.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <string>

#include "../ops.h"

namespace sage::cpu {

// The limit of a container, or 0 where there is none.
static uint64_t container_limit() {
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    uint64_t limit = 0;
    if (std::ifstream(path) >> limit && limit > 0) return limit;
  }
  return 0;
}

HostMemory host_memory() {
  const uint64_t page = uint64_t(std::max(0L, sysconf(_SC_PAGESIZE)));
  HostMemory memory{uint64_t(std::max(0L, sysconf(_SC_PHYS_PAGES))) * page,
                    uint64_t(std::max(0L, sysconf(_SC_AVPHYS_PAGES))) * page};
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  uint64_t kilobytes;
  while (file >> key >> kilobytes && std::getline(file, unit)) {
    if (key == "MemAvailable:") memory.available = kilobytes * 1024;
  }
  if (const uint64_t limit = container_limit()) memory.total = std::min(memory.total, limit);
  memory.available = std::min(memory.available, memory.total);
  return memory;
}

// The system promises more than it has and kills whoever uses it. So one request may not exceed what is free now,
// and all together not what the machine has.
static std::atomic<uint64_t> live_bytes{0};
constexpr size_t kSmall = size_t(1) << 24;  // not worth asking the system

static bool fits(size_t bytes) {
  static const uint64_t total = host_memory().total;
  if (total == 0) return true;
  if (bytes > total || live_bytes > total - bytes) return false;
  return bytes <= kSmall || bytes <= host_memory().available;
}

void* allocate_aligned(size_t bytes) {
  void* address = nullptr;
  if (bytes <= SIZE_MAX - kAlignment && fits(bytes)) {
    address = std::aligned_alloc(kAlignment, std::max<size_t>(1, (bytes + kAlignment - 1) / kAlignment) * kAlignment);
  }
  if (!address) {
    SAGE_FAIL(SAGE_OUT_OF_MEMORY, "Cannot allocate on the CPU device as bytes must be at most what is available (" +
                                      std::to_string(host_memory().available) + "): current value is " +
                                      std::to_string(bytes) + ".");
  }
  live_bytes += malloc_usable_size(address);
  return address;
}

void release_aligned(void* address) noexcept {
  if (!address) return;
  live_bytes -= malloc_usable_size(address);
  std::free(address);
}

}  // namespace sage::cpu
