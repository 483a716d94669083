// The CPU device's operations. They run to completion on the calling thread and the pool; cpu/stream.cpp queues
// them. `workspace` is plan.workspace_bytes of 64-byte-aligned memory with unspecified contents.
#pragma once

#include <functional>

#include "../ops.h"

namespace sage::cpu {

// Worker threads shared by every CPU stream of the process.
class Pool {
 public:
  static Pool& shared();
  int workers() const;
  // Calls body(task, worker) for every task in [0, tasks), 0 <= worker < workers(); returns when all are done.
  // Which worker runs a task does not change any result. Bodies must not throw.
  void run(int64_t tasks, const std::function<void(int64_t task, int worker)>& body);

 private:
  struct State;
  Pool();
  ~Pool();
  State* state_;
};

// Told the name of each stage of attention as it begins.
using OnStage = std::function<void(const char* name)>;

void smooth(const SmoothOp& op, Pool& pool);
void quantize(const QuantizeOp& op, Pool& pool);
void dequantize(const QuantizeOp& op, Pool& pool);
void attention(const AttentionOp& op, void* workspace, Pool& pool, const OnStage& begin);
void attention_quantized(const QuantizedAttentionOp& op, void* workspace, Pool& pool, const OnStage& begin);

size_t attention_workspace(const AttentionShape& shape, const Plan& plan);
size_t attention_quantized_workspace(const AttentionShape& shape, const Plan& plan);

const char* instruction_set();  // "avx512 vnni", "avx2", "generic": chosen at run time

}  // namespace sage::cpu
