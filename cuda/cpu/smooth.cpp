// Smoothing on the CPU: the means, then what is left of the tensor without them.
#include "cpu.h"
#include "kernels.h"

namespace sage::cpu {

int64_t mean_tasks(const SmoothOp& op) {
  return op.x.batch() * op.x.heads() * op.mean.tokens() * ceil_div(op.x.channels(), kSliceChannels);
}

int64_t subtract_mean_tasks(const SmoothOp& op) {
  return op.x.batch() * op.x.heads() * ceil_div(op.x.tokens(), kSpanRows);
}

void smooth(const SmoothOp& op, Pool& pool) {
  pool.run(mean_tasks(op), [&op](int64_t task, int) { kernels().mean(op, task); });
  if (op.smoothed) {
    pool.run(subtract_mean_tasks(op), [&op](int64_t task, int) { kernels().subtract_mean(op, task); });
  }
}

}  // namespace sage::cpu
