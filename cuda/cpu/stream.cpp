// The CPU device's streams: a queue that one thread works off in order, so that calls return at once as on CUDA.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <mutex>
#include <new>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "cpu.h"
#include "memory.h"

namespace sage {

namespace {

using Clock = std::chrono::steady_clock;

class CpuEvent final : public Event {
 public:
  // Queued work keeps this alive where the event itself is gone.
  struct State {
    std::mutex mutex;
    std::condition_variable reached;
    uint64_t wanted = 0, seen = 0;  // recordings
    Clock::time_point time;
  };
  const std::shared_ptr<State> state = std::make_shared<State>();

  Clock::time_point wait() const {
    std::unique_lock lock(state->mutex);
    state->reached.wait(lock, [&, wanted = state->wanted] { return state->seen >= wanted; });
    return state->time;
  }
};

// The stages of what ran while tracing was on.
class Trace {
 public:
  void begin(const char* name) {
    std::lock_guard lock(mutex_);
    stages_.push_back({name, 0.0f});
  }

  void end(Clock::duration time) noexcept {
    std::lock_guard lock(mutex_);
    stages_.back().ms = std::chrono::duration<float, std::milli>(time).count();
  }

  std::vector<Stage> stages() {
    std::lock_guard lock(mutex_);
    return stages_;
  }

 private:
  std::mutex mutex_;
  std::vector<Stage> stages_;
};

// Times the stages of one call, if there is a trace to tell: each ends where the next begins, the last with this.
class StageClock {
 public:
  explicit StageClock(Trace* trace) : trace_(trace) {}
  ~StageClock() { end(); }

  void begin(const char* name) {
    if (!trace_) return;
    end();
    trace_->begin(name);
    begun_ = true;
    begin_ = Clock::now();
  }

 private:
  void end() {
    if (begun_) trace_->end(Clock::now() - begin_);
  }

  Trace* trace_;
  bool begun_ = false;
  Clock::time_point begin_;
};

class CpuStream final : public Stream {
 public:
  CpuStream() : thread_([this] { work(); }) {}

  ~CpuStream() override {
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  // ---- memory ---------------------------------------------------------------------------------------------

  void* allocate(size_t bytes) override {
    std::lock_guard lock(mutex_);
    check();
    return cpu::allocate_aligned(bytes);
  }

  void release(void* address) noexcept override {
    cpu::Buffer buffer(address);
    try {
      auto shared = std::make_shared<cpu::Buffer>(std::move(buffer));
      std::lock_guard lock(mutex_);
      if (!is_idle()) push([shared] {});  // freed with the task
    } catch (const std::bad_alloc&) {
      wait_for_all();
      cpu::release_aligned(buffer.release());
    }
  }

  void write(void* to, const void* from, size_t bytes) override {
    {
      std::lock_guard lock(mutex_);
      check();
      if (is_idle()) {
        std::memcpy(to, from, bytes);
        return;
      }
    }
    auto staged = std::make_shared<cpu::Buffer>(cpu::allocate_buffer(bytes));
    std::memcpy(staged->get(), from, bytes);
    enqueue([=] { std::memcpy(to, staged->get(), bytes); });
  }

  void read(void* to, const void* from, size_t bytes) override {
    std::unique_lock lock(mutex_);
    check();
    if (is_idle()) {
      std::memcpy(to, from, bytes);
      return;
    }
    push([=] { std::memcpy(to, from, bytes); });
    wait(lock);
    check();
  }

  void copy(void* to, const void* from, size_t bytes) override {
    enqueue([=] { std::memcpy(to, from, bytes); });
  }

  void fill(void* to, uint8_t value, size_t bytes) override {
    enqueue([=] { std::memset(to, value, bytes); });
  }

  // ---- waiting --------------------------------------------------------------------------------------------

  void synchronize() override {
    std::unique_lock lock(mutex_);
    wait(lock);
    check();
  }

  bool idle() override {
    std::lock_guard lock(mutex_);
    check();
    return is_idle();
  }

  std::unique_ptr<Event> create_event() override { return std::make_unique<CpuEvent>(); }

  void record(Event& event) override {
    const auto state = static_cast<CpuEvent&>(event).state;
    std::lock_guard lock(state->mutex);
    enqueue([state, number = state->wanted + 1] {
      {
        std::lock_guard lock(state->mutex);
        state->time = Clock::now();
        state->seen = std::max(state->seen, number);
      }
      state->reached.notify_all();
    });
    ++state->wanted;
  }

  float elapsed_ms(Event& begin, Event& end) override {
    const auto last = static_cast<CpuEvent&>(end).wait(), first = static_cast<CpuEvent&>(begin).wait();
    std::lock_guard lock(mutex_);
    check();
    return std::chrono::duration<float, std::milli>(last - first).count();
  }

  // ---- stage timings --------------------------------------------------------------------------------------

  void trace(bool on) override {
    std::lock_guard lock(mutex_);
    check();
    trace_ = on ? std::make_shared<Trace>() : nullptr;
  }

  std::vector<Stage> read_trace() override {
    std::unique_lock lock(mutex_);
    const auto trace = trace_;
    wait(lock);
    check();
    return trace ? trace->stages() : std::vector<Stage>();
  }

  // ---- operations -----------------------------------------------------------------------------------------

  void smooth(const SmoothOp& op) override {
    enqueue_stages([op](StageClock& clock) {
      clock.begin("smooth");
      cpu::smooth(op, cpu::Pool::shared());
    });
  }

  void quantize(const QuantizeOp& op) override {
    enqueue_stages([op](StageClock& clock) {
      clock.begin("quantize");
      if (op.takes_mean) cpu::smooth({op.x, op.mean, {}, op.mean_rows}, cpu::Pool::shared());
      cpu::quantize(op, cpu::Pool::shared());
    });
  }

  void dequantize(const QuantizeOp& op) override {
    enqueue_stages([op](StageClock& clock) {
      clock.begin("dequantize");
      cpu::dequantize(op, cpu::Pool::shared());
    });
  }

  void attention(const AttentionOp& op) override {
    enqueue_stages([op, space = workspace(op.plan.workspace_bytes)](StageClock& clock) {
      cpu::attention(op, space->memory.get(), cpu::Pool::shared(), [&](const char* name) { clock.begin(name); });
    });
  }

  void attention_varlen(const std::vector<AttentionOp>& ops) override {
    size_t bytes = 0;
    for (const AttentionOp& op : ops) bytes = std::max(bytes, op.plan.workspace_bytes);
    enqueue_stages([ops, space = workspace(bytes)](StageClock& clock) {
      for (const AttentionOp& op : ops) {
        cpu::attention(op, space->memory.get(), cpu::Pool::shared(), [&](const char* name) { clock.begin(name); });
      }
    });
  }

  void attention_quantized(const QuantizedAttentionOp& op) override {
    enqueue_stages([op, space = workspace(op.plan.workspace_bytes)](StageClock& clock) {
      cpu::attention_quantized(op, space->memory.get(), cpu::Pool::shared(),
                               [&](const char* name) { clock.begin(name); });
    });
  }

 private:
  struct Workspace {
    cpu::Buffer memory;
    size_t bytes;
  };

  // Calls that are in the queue together share one, as they run one after another; it is gone when they are.
  std::shared_ptr<Workspace> workspace(size_t bytes) {
    std::lock_guard lock(mutex_);
    check();
    auto space = workspace_.lock();
    if (!space || space->bytes < bytes) {
      space = std::make_shared<Workspace>(Workspace{cpu::allocate_buffer(bytes), bytes});
      workspace_ = space;
    }
    return space;
  }

  void enqueue(std::function<void()> task) {
    std::lock_guard lock(mutex_);
    check();
    push(std::move(task));
  }

  template <typename Work>
  void enqueue_stages(Work work) {
    std::lock_guard lock(mutex_);
    check();
    push([work = std::move(work), trace = trace_] {
      StageClock clock(trace.get());
      work(clock);
    });
  }

  // The rest needs the lock.

  void push(std::function<void()> task) {
    tasks_.push_back(std::move(task));
    ++enqueued_;
    wake_.notify_one();
  }

  void check() const {
    if (failure_) throw *failure_;
  }

  bool is_idle() const { return completed_ == enqueued_; }

  void wait(std::unique_lock<std::mutex>& lock) {
    done_.wait(lock, [&, ticket = enqueued_] { return completed_ >= ticket; });
  }

  void wait_for_all() {
    std::unique_lock lock(mutex_);
    wait(lock);
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      auto failure = attempt(task);
      task = nullptr;  // gives back what it held before it counts as done
      lock.lock();
      if (failure && !failure_) failure_ = std::move(failure);
      ++completed_;
      done_.notify_all();
    }
  }

  static std::optional<Error> attempt(const std::function<void()>& task) {
    try {
      task();
      return std::nullopt;
    } catch (const Error& error) {
      return error;
    } catch (const std::exception& error) {
      const std::string what = error.what();
      return Error{SAGE_DEVICE_ERROR, "Cannot go on as work on this stream failed: " + what + ".", __FILE__, __LINE__};
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<std::function<void()>> tasks_;
  uint64_t enqueued_ = 0, completed_ = 0;
  bool closing_ = false;
  std::optional<Error> failure_;  // the first; every later call says it again
  std::weak_ptr<Workspace> workspace_;
  std::shared_ptr<Trace> trace_;
  std::thread thread_;  // last: it uses all of the above
};

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t start = line.find_first_not_of(" \t", line.find(':') + 1);
    return start == std::string::npos ? "" : line.substr(start);
  }
  return "CPU";
}

int32_t highest_clock_khz() {
  int32_t khz = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq") >> khz;
  return khz;
}

}  // namespace

std::unique_ptr<Stream> open_cpu_stream() {
  try {
    return std::make_unique<CpuStream>();
  } catch (const std::system_error& error) {
    SAGE_FAIL(SAGE_OUT_OF_MEMORY,
              "Cannot create a stream as the system gives no more threads: " + std::string(error.what()) + ".");
  }
}

sage_device_info describe_cpu() {
  const cpu::HostMemory memory = cpu::host_memory();
  sage_device_info info{};
  info.device = SAGE_CPU;
  info.multiprocessors = cpu::Pool::shared().workers();
  info.clock_khz = highest_clock_khz();
  info.memory_bytes = memory.total;
  info.free_bytes = memory.available;
  processor_name().copy(info.name, sizeof info.name - 1);
  std::string(cpu::instruction_set()).copy(info.features, sizeof info.features - 1);
  return info;
}

DeviceTraits cpu_traits() {
  DeviceTraits traits;
  traits.cpu = true;
  traits.multiprocessors = cpu::Pool::shared().workers();
  traits.implementation = std::string("cpu ") + cpu::instruction_set();
  return traits;
}

}  // namespace sage
