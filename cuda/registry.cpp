// Handles and memory: see registry.h.
#include "registry.h"

#include <algorithm>
#include <exception>
#include <mutex>

namespace sage {

std::string device_name(int device) {
  return device == SAGE_CPU ? "the CPU device" : "CUDA device " + std::to_string(device);
}

Allocation::~Allocation() {
  if (!freed_by) return;
  if (shared || freed_by->id != stream) {
    try {
      for (const auto& other : Registry::shared().streams(freed_by->device)) {
        if (other != freed_by) other->queue->synchronize();
      }
    } catch (...) {  // a failed device does no more work
    }
  }
  freed_by->queue->release(reinterpret_cast<void*>(address));
}

// Never destroyed: threads may still run while the process exits.
Registry& Registry::shared() {
  static Registry* registry = new Registry;
  return *registry;
}

// ---- streams --------------------------------------------------------------------------------------------

std::shared_ptr<OpenStream> Registry::open_stream(int device, int architecture) {
  auto stream = std::make_shared<OpenStream>();
  stream->device = device;
  stream->queue = device == SAGE_CPU ? open_cpu_stream() : open_cuda_stream(device);
  stream->traits = device == SAGE_CPU ? cpu_traits() : cuda_traits(device);
  stream->traits.architecture = choose_architecture(stream->traits, architecture);
  std::lock_guard lock(mutex_);
  stream->id = next_id_++;
  streams_.emplace(stream->id, stream);
  return stream;
}

static std::string no_such(const char* kind, uint64_t id) {
  return "Cannot use this " + std::string(kind) + " as it must be one that is alive: current value is " +
         std::to_string(id) + ".";
}

std::shared_ptr<OpenStream> Registry::stream(uint64_t id) {
  std::shared_lock lock(mutex_);
  const auto found = streams_.find(id);
  if (found == streams_.end()) SAGE_FAIL(SAGE_INVALID_ARGUMENT, no_such("stream", id));
  return found->second;
}

// Listed until its work is done, so that freeing memory elsewhere meanwhile waits for it.
void Registry::close_stream(uint64_t id) {
  const auto closing = stream(id);
  {
    std::lock_guard gate(closing->gate);
    if (closing->closed) SAGE_FAIL(SAGE_INVALID_ARGUMENT, no_such("stream", id));
    closing->closed = true;
  }
  std::exception_ptr failure;
  try {
    closing->queue->synchronize();
  } catch (...) {
    failure = std::current_exception();
  }
  {
    std::lock_guard lock(mutex_);
    streams_.erase(id);
  }
  if (failure) std::rethrow_exception(failure);
}

OpenGate::OpenGate(uint64_t id) : stream_(Registry::shared().stream(id)), lock_(stream_->gate) {
  if (stream_->closed) SAGE_FAIL(SAGE_INVALID_ARGUMENT, no_such("stream", id));
}

std::vector<std::shared_ptr<OpenStream>> Registry::streams(int device) {
  std::shared_lock lock(mutex_);
  std::vector<std::shared_ptr<OpenStream>> found;
  for (const auto& [id, stream] : streams_) {
    if (stream->device == device) found.push_back(stream);
  }
  return found;
}

// ---- events ---------------------------------------------------------------------------------------------

uint64_t Registry::add_event(std::shared_ptr<OpenEvent> event) {
  std::lock_guard lock(mutex_);
  events_.emplace(next_id_, std::move(event));
  return next_id_++;
}

std::shared_ptr<OpenEvent> Registry::event(uint64_t id) {
  std::shared_lock lock(mutex_);
  const auto found = events_.find(id);
  if (found == events_.end()) SAGE_FAIL(SAGE_INVALID_ARGUMENT, no_such("event", id));
  return found->second;
}

std::shared_ptr<OpenEvent> Registry::close_event(uint64_t id) {
  std::lock_guard lock(mutex_);
  const auto found = events_.find(id);
  if (found == events_.end()) SAGE_FAIL(SAGE_INVALID_ARGUMENT, no_such("event", id));
  auto event = std::move(found->second);
  events_.erase(found);
  return event;
}

// ---- memory ---------------------------------------------------------------------------------------------

uint64_t Registry::allocate(const std::shared_ptr<OpenStream>& stream, uint64_t bytes) {
  auto allocation = std::make_shared<Allocation>(0, bytes, stream->id);
  const auto address = reinterpret_cast<uint64_t>(stream->queue->allocate(bytes));
  allocation->address = address;
  try {
    std::lock_guard lock(mutex_);
    Memory& memory = memory_[stream->device];
    memory.allocations.emplace(address, allocation);
    memory.bytes += bytes;
    memory.peak_bytes = std::max(memory.peak_bytes, memory.bytes);
  } catch (...) {
    stream->queue->release(reinterpret_cast<void*>(address));
    throw;
  }
  return address;
}

void Registry::free(const std::shared_ptr<OpenStream>& stream, uint64_t address) {
  std::shared_ptr<Allocation> allocation;  // destroyed without the lock
  std::lock_guard lock(mutex_);
  Memory& memory = memory_[stream->device];
  const auto found = memory.allocations.find(address);
  if (found == memory.allocations.end()) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, "Cannot free memory as the address must be the start of a live allocation of " +
                                         device_name(stream->device) + ": current value is " + std::to_string(address) +
                                         ".");
  }
  allocation = std::move(found->second);
  allocation->freed_by = stream;
  memory.allocations.erase(found);
  memory.bytes -= allocation->bytes;
}

std::shared_ptr<Allocation> Registry::use(const OpenStream& stream, uint64_t address) {
  std::shared_lock lock(mutex_);
  const auto memory = memory_.find(stream.device);
  if (memory == memory_.end()) return nullptr;
  auto found = memory->second.allocations.upper_bound(address);
  if (found == memory->second.allocations.begin()) return nullptr;
  --found;
  if (address - found->first >= found->second->bytes) return nullptr;
  if (found->second->stream != stream.id) found->second->shared = true;
  return found->second;
}

void Registry::describe(int device, sage_memory_stats& stats) {
  std::shared_lock lock(mutex_);
  for (const auto& [id, stream] : streams_) stats.streams += stream->device == device;
  const auto memory = memory_.find(device);
  if (memory == memory_.end()) return;
  stats.allocations = memory->second.allocations.size();
  stats.bytes = memory->second.bytes;
  stats.peak_bytes = memory->second.peak_bytes;
}

}  // namespace sage
