// The thread pool of the CPU device: one thread for every processor this process may use. The caller of run()
// works too, so that a job makes progress even while the others are busy with somebody else's.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu.h"

namespace sage::cpu {

namespace {

struct Job {
  const std::function<void(int64_t, int)>& body;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
  int helpers = 0;  // guarded by the pool's mutex

  void work(int worker) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, worker);
  }
};

int processors() {
  cpu_set_t allowed;
  const int count = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 0;
  return std::max(1, count > 0 ? count : int(std::thread::hardware_concurrency()));
}

}  // namespace

struct Pool::State {
  std::mutex mutex;
  std::condition_variable wake, finished;
  std::list<Job*> jobs;  // that may have tasks left
  int workers = 1;       // the caller of run() is worker 0

  void help(int worker) {
    std::unique_lock lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return !jobs.empty(); });
      Job& job = *jobs.front();
      ++job.helpers;
      lock.unlock();
      job.work(worker);
      lock.lock();
      jobs.remove(&job);
      if (--job.helpers == 0) finished.notify_all();
    }
  }
};

// Threads live as long as the process: they hold nothing that its exit could take away.
Pool& Pool::shared() {
  static Pool* pool = new Pool;
  return *pool;
}

Pool::Pool() : state_(new State) {
  const int wanted = processors();
  try {
    while (state_->workers < wanted) {
      std::thread([state = state_, worker = state_->workers] { state->help(worker); }).detach();
      ++state_->workers;
    }
  } catch (const std::system_error&) {  // fewer threads do the same work
  }
}

Pool::~Pool() = default;

int Pool::workers() const { return state_->workers; }

void Pool::run(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  Job job{body, tasks};
  const bool alone = tasks <= 1 || state_->workers == 1;
  if (!alone) {
    std::lock_guard lock(state_->mutex);
    state_->jobs.push_back(&job);
    const int64_t useful = std::min<int64_t>(tasks, state_->workers) - 1;
    for (int64_t i = 0; i < useful; ++i) state_->wake.notify_one();
  }
  job.work(0);
  if (alone) return;
  std::unique_lock lock(state_->mutex);
  state_->jobs.remove(&job);
  state_->finished.wait(lock, [&] { return job.helpers == 0; });
}

}  // namespace sage::cpu
