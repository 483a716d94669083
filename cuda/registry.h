// Handles and memory: which streams, events and allocations are alive. Handles are numbers that are never used
// twice; whoever works with one holds a reference, so that destroying it elsewhere at the same time is harmless.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "ops.h"

namespace sage {

std::string device_name(int device);  // "the CPU device", "CUDA device 0"

struct OpenStream {
  uint64_t id;
  int device;
  DeviceTraits traits;
  std::unique_ptr<Stream> queue;
  std::shared_mutex gate;  // shared while enqueueing; closing takes it alone
  bool closed = false;     // guarded by the gate
  std::atomic<bool> traced{false};
};

// A stream that will not be closed before this goes out of scope: work on it may be enqueued.
class OpenGate {
 public:
  explicit OpenGate(uint64_t id);
  OpenStream& operator*() const { return *stream_; }
  OpenStream* operator->() const { return stream_.get(); }
  const std::shared_ptr<OpenStream>& stream() const { return stream_; }

 private:
  std::shared_ptr<OpenStream> stream_;
  std::shared_lock<std::shared_mutex> lock_;
};

struct OpenEvent {
  std::shared_ptr<OpenStream> stream;  // outlives the event
  std::unique_ptr<Event> event;
  std::atomic<bool> recorded{false};
};

// Memory goes back to its device when the last call that uses it has been enqueued and it was freed. Freeing waits
// for the device's other streams where one of them may have used it.
struct Allocation {
  uint64_t address;
  uint64_t bytes;
  uint64_t stream;                  // that allocated it
  std::atomic<bool> shared{false};  // used by another stream too
  std::shared_ptr<OpenStream> freed_by;

  Allocation(uint64_t address, uint64_t bytes, uint64_t stream) : address(address), bytes(bytes), stream(stream) {}
  ~Allocation();
};

class Registry {
 public:
  static Registry& shared();

  std::shared_ptr<OpenStream> open_stream(int device, int architecture);  // 0: the device's own
  std::shared_ptr<OpenStream> stream(uint64_t id);                        // throws where it is not alive
  void close_stream(uint64_t id);                                         // refuses new work, then waits for the old
  std::vector<std::shared_ptr<OpenStream>> streams(int device);

  uint64_t add_event(std::shared_ptr<OpenEvent> event);
  std::shared_ptr<OpenEvent> event(uint64_t id);
  std::shared_ptr<OpenEvent> close_event(uint64_t id);

  uint64_t allocate(const std::shared_ptr<OpenStream>& stream, uint64_t bytes);
  void free(const std::shared_ptr<OpenStream>& stream, uint64_t address);

  // The live allocation that holds `address`, or null; noted as used by `stream`.
  std::shared_ptr<Allocation> use(const OpenStream& stream, uint64_t address);

  void describe(int device, sage_memory_stats& stats);

 private:
  struct Memory {
    std::map<uint64_t, std::shared_ptr<Allocation>> allocations;  // by address
    uint64_t bytes = 0, peak_bytes = 0;
  };

  Registry() = default;

  std::shared_mutex mutex_;
  uint64_t next_id_ = 1;
  std::unordered_map<uint64_t, std::shared_ptr<OpenStream>> streams_;
  std::unordered_map<uint64_t, std::shared_ptr<OpenEvent>> events_;
  std::map<int, Memory> memory_;  // by device
};

}  // namespace sage
