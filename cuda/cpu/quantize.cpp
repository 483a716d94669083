// Quantization on the CPU, and its inverse.
#include "cpu.h"
#include "kernels.h"

namespace sage::cpu {

int64_t quantize_tasks(const QuantizeOp& op) {
  const int64_t heads = op.x.batch() * op.x.heads();
  if (op.per_channel) return heads * ceil_div(op.x.channels(), kSliceChannels);
  return heads * ceil_div(op.x.tokens(), op.grouping == Grouping::kToken ? kSpanRows : op.group_rows);
}

int64_t dequantize_tasks(const QuantizeOp& op) {
  return op.x.batch() * op.x.heads() * ceil_div(op.x.tokens(), kSpanRows);
}

void quantize_task(const QuantizeOp& op, int64_t task) {
  if (op.per_channel) {
    kernels().quantize_channels(op, task);
  } else {
    kernels().quantize_rows(op, task);
  }
}

void quantize(const QuantizeOp& op, Pool& pool) {
  pool.run(quantize_tasks(op), [&op](int64_t task, int) { quantize_task(op, task); });
}

void dequantize(const QuantizeOp& op, Pool& pool) {
  pool.run(dequantize_tasks(op), [&op](int64_t task, int) { kernels().dequantize(op, task); });
}

}  // namespace sage::cpu
