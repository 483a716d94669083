// Barriers, bulk copies and what orders warpgroup products (sm_90a).
#pragma once

#include <cstdint>

namespace sage::cuda::ptx {

// ---- barriers in shared memory ----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait; }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the barrier wait for so many bytes of bulk copies too.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Contiguous bytes, a multiple of 16, from global to shared memory.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// ---- named barriers of a block ----------------------------------------------------------------------------------

template <int kThreads>
__device__ __forceinline__ void turn_wait(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void turn_pass(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Whether any thread of a warpgroup says so; `id` names a barrier that only this warpgroup uses.
__device__ __forceinline__ bool any_of_warpgroup(int id, bool mine) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.b32 mine, %2, 0; barrier.cta.red.or.pred any, %1, 128, mine; "
      "selp.b32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(id), "r"(static_cast<uint32_t>(mine))
      : "memory");
  return any != 0;
}

// ---- warpgroups -------------------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Ordinary stores to shared memory before this are seen by products and bulk copies after it.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups of products are under way.
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of registers that products use across this point.
template <int kCount>
__device__ __forceinline__ void pin(int (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// Upper half and swizzle of the descriptor of a K-major tile whose rows have kWidth bytes (32, 64 or 128), swizzled
// over as many: 8 rows further is 8 * kWidth bytes further.
template <int kWidth>
__device__ constexpr uint64_t tile_descriptor() {
  constexpr uint64_t kSwizzle = kWidth == 128 ? 1 : kWidth == 64 ? 2 : 3;
  return uint64_t{1} << 16 | uint64_t{8 * kWidth >> 4} << 32 | kSwizzle << 62;
}

// ---- one kernel after another -----------------------------------------------------------------------------------

// What the kernel before has written is there (programmatic dependent launch).
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace sage::cuda::ptx
