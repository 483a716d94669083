// Points in time on a CUDA stream, and how long the stages of calls took between them.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device.h"

namespace sage::cuda {

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(Device& device) : device_(device) {
    enter(device_);
    SAGE_CUDA(cudaEventCreate(&event_));
  }
  ~CudaEvent() override {
    cudaSetDevice(device_.ordinal);
    cudaEventDestroy(event_);
    cudaGetLastError();
  }
  cudaEvent_t get() const { return event_; }

 private:
  Device& device_;
  cudaEvent_t event_;
};

inline float elapsed_ms(const CudaEvent& begin, const CudaEvent& end) {
  SAGE_CUDA(cudaEventSynchronize(begin.get()));
  SAGE_CUDA(cudaEventSynchronize(end.get()));
  float milliseconds = 0.0f;
  SAGE_CUDA(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
  return milliseconds;
}

// The stages of the calls of one stream, while it is traced.
class Trace {
 public:
  Trace(Device& device, cudaStream_t stream) : device_(device), stream_(stream) {}

  // A stage lasts to the next mark; no name: to nobody.
  void mark(const char* name) {
    auto event = std::make_unique<CudaEvent>(device_);
    std::lock_guard lock(mutex_);
    SAGE_CUDA(cudaEventRecord(event->get(), stream_));
    marks_.emplace_back(name, std::move(event));
  }

  std::vector<Stage> read() {
    std::lock_guard lock(mutex_);
    std::vector<Stage> stages;
    for (size_t i = 0; i + 1 < marks_.size(); i++) {
      const auto& [name, begin] = marks_[i];
      if (name != nullptr) stages.push_back({name, elapsed_ms(*begin, *marks_[i + 1].second)});
    }
    return stages;
  }

 private:
  Device& device_;
  cudaStream_t stream_;
  std::mutex mutex_;
  std::vector<std::pair<const char*, std::unique_ptr<CudaEvent>>> marks_;
};

// Names the stages of one call as they begin, if there is a trace to tell; the last ends with this.
class Stages {
 public:
  explicit Stages(std::shared_ptr<Trace> trace) : trace_(std::move(trace)) {}
  ~Stages() {
    try {
      begin(nullptr);
    } catch (const Error&) {  // the device says so again
    }
  }
  Stages(const Stages&) = delete;
  Stages& operator=(const Stages&) = delete;

  void begin(const char* name) {
    if (trace_) trace_->mark(name);
  }

 private:
  std::shared_ptr<Trace> trace_;
};

}  // namespace sage::cuda
