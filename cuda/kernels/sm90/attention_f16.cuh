// Attention by wgmma with 16-bit P.V (sm_90a): `flash` and `sage1` are one kernel that differs in the type of Q.K and
// in where the factor of a score comes from.
//
// A block stays for many items (query blocks of a head). One warpgroup moves tiles; the others compute, 64 query rows
// each, from the last key tile to the first. Items follow one another without a break: while P.V of a tile is under
// way, so are the scores of the next one, be it the next item's first. Values that are not finite stay out of the
// loop: where a mask could turn them into 0 * NaN they are cleared in shared memory, and repair() puts in afterwards
// what they do to the rows that see them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "../kernels.h"
#include "../ptx/barrier.cuh"
#include "../ptx/fragment.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/reciprocal.cuh"
#include "../ptx/tensor.cuh"
#include "../ptx/wgmma.cuh"
#include "flash.h"
#include "slot.cuh"
#include "tensor_map.h"
#include "tile_mask.cuh"

namespace sage::cuda::sm90 {

// Division of numbers below 2^31 by one known to the host.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int by) : divisor(static_cast<uint32_t>(by)), multiplier(0), shift(0) {
    while (uint32_t{1} << shift < divisor) shift++;
    if (shift == 0) return;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
    shift--;
  }
  __device__ __forceinline__ int divide(int x) const {
    return divisor == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), multiplier) >> shift);
  }
  __device__ __forceinline__ int remainder(int x) const { return x - divide(x) * static_cast<int>(divisor); }
};

// Element strides and address of a tensor that repair() reads.
struct Raw {
  const char* data;
  int64_t stride[4];
};

constexpr int kGroupKeys = 64;  // that share the scale of K in sage1, or four of them

struct F16Params {
  CUtensorMap q, k, v;
  char* o;
  float* lse;
  int64_t o_stride[4], lse_stride[3];
  DType out_dtype;
  bool wide_o;  // rows of O take 16-byte stores
  int q_tokens, k_tokens, v_dim;
  int low, high;           // query i sees keys i + low to i + high
  Divisor q_heads, group;  // group: query heads that share one KV head
  int kv_heads;
  Divisor q_blocks;   // of one head; with clusters, groups of them
  int items, planes;  // planes: heads of all batches
  // Planes whose causal items are mixed, so that their K and V stay in the L2 cache; those of the last run.
  Divisor run_planes, last_planes;
  Divisor run_items;
  bool turn_around;  // see Walk
  float scale_log2;  // softmax scale times log2(e)
  float largest;     // that V can hold
  Raw raw_v;

  // sage1 only
  const float *q_scales, *k_scales;
  int q_groups, k_groups;  // of one head
  Grouping q_grouping;
  int q_group_rows;
  int k_lane_groups;  // of kGroupKeys keys: 4 where every lane of a quad has its own, else 1
  const uint32_t *q_not_finite, *k_not_finite;
  int q_words, k_words;  // of one head
  Raw raw_q, raw_k;      // what the codes were made of; data may be null
  DType raw_dtype;
  int head_dim;
  const float *v_scales, *v_mean;  // [B, Hkv, v_dim] or null
  const float* lse_shift;          // [B, Hq, q_tokens] or null

  WholeMask whole_mask;  // where two kernels are launched of which one runs
  // kMask only
  TileMask mask;
  bool longest_first;  // rows have a last key, but no first
};

// kBlockN: keys of a tile; kConsumers: warpgroups that compute; kStages: tiles of K and of V in shared memory;
// kTakeTurns: warpgroups issue products in turn; kCluster: blocks that share their tiles of K and V.
template <int kHeadDim_, ptx::Operand kQK_, F16Mask kMask_, int kBlockN_, int kConsumers_, int kStages_, int kQBuffers_,
          bool kTakeTurns_, int kCluster_ = 1>
struct F16Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr ptx::Half kPV = kQK_ == ptx::Operand::kBF16 ? ptx::Half::kBF16 : ptx::Half::kF16;
  static constexpr bool kQuantized = kQK_ == ptx::Operand::kS8;
  // Whether there is a mask, and whether rows have a last key of their own, and a first, as they may with a mask.
  static constexpr bool kMasks = kMask_ == F16Mask::kMask, kBegins = kMasks || kMask_ == F16Mask::kWindow;
  static constexpr bool kEnds = kMask_ != F16Mask::kNone;
  static constexpr int kBlockN = kBlockN_, kConsumers = kConsumers_, kBlockM = 64 * kConsumers;
  static constexpr int kStages = kStages_, kQBuffers = kQBuffers_;
  static constexpr bool kTakeTurns = kTakeTurns_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kThreads = 128 * (kConsumers + 1), kConsumerThreads = 128 * kConsumers;
  // O, S and P of a thread take so many; what the consumers can spare goes to the warps that move tiles. Together no
  // more than a block is launched with, or those that ask for more wait forever.
  static constexpr int kFragments = kHeadDim / 2 + kBlockN / 2 + kBlockN / 4;
  static constexpr bool kLittleToSpare = kFragments > 176 || (kFragments == 176 && !kQuantized);
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kLittleToSpare ? 240 : 232;
  static constexpr int kMoverRegisters = kConsumers == 3 ? 32 : kLittleToSpare ? 24 : 40;
  static_assert(kConsumers * kConsumerRegisters + kMoverRegisters <= 65536 / kThreads / 8 * 8 * (kConsumers + 1));

  // Channels of Q and K lie in panels whose rows have kWidth bytes, those of V in panels of 64.
  static constexpr int kElement = kQuantized ? 1 : 2;
  static constexpr int kWidth = kHeadDim * kElement < 128 ? kHeadDim * kElement : 128;
  static constexpr int kPanels = kHeadDim * kElement / kWidth, kVPanels = kHeadDim / 64;
  static constexpr int kQBytes = 64 * kHeadDim * kElement;  // of one warpgroup
  static constexpr int kKBytes = kBlockN * kHeadDim * kElement, kVBytes = kBlockN * kHeadDim * 2;
  static constexpr int kQAt = 1024, kKAt = kQAt + kQBuffers * kConsumers * kQBytes, kVAt = kKAt + kStages * kKBytes;
  static constexpr int kSharedBytes = kVAt + kStages * kVBytes;

  // Keys whose scale is known to be one.
  static constexpr int kScaleKeys = kBlockN % 64 == 0 ? 64 : 32, kScales = kQuantized ? kBlockN / kScaleKeys : 1;
  // Whether scales are fetched a tile ahead: three warpgroups bridge the wait without that.
  static constexpr bool kLooksAhead = kConsumers < 3;
  // The kept maximum moves only when a score exceeds it by this much (base 2): P stays below 2^kHeadroom, O is
  // rarely rescaled.
  static constexpr float kHeadroom = 8.0f;
  // P is also scaled by 2^-kShift, where its type has the range for it: bf16 V go up to 3e38, and their sums must not
  // overflow.
  static constexpr float kShift = kPV == ptx::Half::kBF16 ? 32.0f : 0.0f;

  static_assert(kSharedBytes <= 232448, "a block has 227 KiB of shared memory");
  static_assert(kBlockN % (kQuantized ? 32 : 16) == 0, "16 keys are one step of P.V, 32 are one word of flags");
  static_assert(!kMasks || kBlockN % kMaskTileKeys == 0, "tiles of keys are whole tiles of a mask");
  static_assert(!kMasks || kCluster == 1, "what is closed to a block may be open to its neighbour");
  static_assert(!kMasks || !kQuantized || kLooksAhead, "a tile is known when it is there, or one before");
  static_assert(kKBytes % 1024 == 0 && kQBytes % 1024 == 0, "swizzled tiles start at multiples of 1024 bytes");
};

// ---- shared memory ----------------------------------------------------------------------------------------------

// A tile of keys that an item takes, where a mask may close others.
struct TakenTile {
  uint32_t code = 0;

  TakenTile() = default;
  __device__ __forceinline__ TakenTile(int tile, bool masked, bool edge, bool last)
      : code(static_cast<uint32_t>(tile) << 3 | (last ? 4u : 0u) | (edge ? 2u : 0u) | (masked ? 1u : 0u)) {}
  __device__ __forceinline__ int tile() const { return static_cast<int>(code >> 3); }
  __device__ __forceinline__ bool masked() const { return code & 1u; }  // it hides keys from rows of the block
  __device__ __forceinline__ bool edge() const { return code & 2u; }    // some of these rows begin or end here
  __device__ __forceinline__ bool hides() const { return code & 3u; }
  __device__ __forceinline__ bool last() const { return code & 4u; }  // of its item
};

// Addresses of barriers and tiles; barriers come first.
template <class C>
struct Shared {
  uint32_t base;

  __device__ uint32_t k_full(uint32_t stage) const { return base + 8 * stage; }
  __device__ uint32_t k_empty(uint32_t stage) const { return base + 8 * (C::kStages + stage); }
  __device__ uint32_t v_full(uint32_t stage) const { return base + 8 * (2 * C::kStages + stage); }
  __device__ uint32_t v_empty(uint32_t stage) const { return base + 8 * (3 * C::kStages + stage); }
  __device__ uint32_t v_clean(uint32_t stage) const { return base + 8 * (4 * C::kStages + stage); }
  __device__ uint32_t q_full(uint32_t buffer, int group) const {
    return base + 8 * (5 * C::kStages + buffer * C::kConsumers + group);
  }
  __device__ uint32_t q_empty(uint32_t buffer, int group) const {
    return q_full(buffer, group) + 8 * C::kQBuffers * C::kConsumers;
  }
  __device__ uint32_t q(uint32_t buffer, int group) const {
    return base + C::kQAt + (buffer * C::kConsumers + group) * C::kQBytes;
  }
  __device__ uint32_t k(uint32_t stage) const { return base + C::kKAt + stage * C::kKBytes; }
  __device__ uint32_t v(uint32_t stage) const { return base + C::kVAt + stage * C::kVBytes; }

  // What lies in a stage of K, and which tile comes after it. Atomic for racecheck, which does not follow barriers.
  __device__ void describe(uint32_t stage, TakenTile tile, int next) const {
    asm volatile("{ .reg .b32 old; atom.shared.exch.b32 old, [%0], %1; atom.shared.exch.b32 old, [%0+4], %2; }" ::"r"(
                     base + kTilesAt + 8 * stage),
                 "r"(tile.code), "r"(next)
                 : "memory");
  }
  // A warp asks; sage1 alone wants the next tile.
  __device__ void description(uint32_t stage, TakenTile& tile, int& next) const {
    const uint32_t at = base + kTilesAt + 8 * stage;
    tile.code = number_of_warp(at);
    if constexpr (C::kQuantized) next = static_cast<int>(number_of_warp(at + 4));
  }

  // Raised where something is not finite and must be repaired.
  __device__ void set_flag(int value) const {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(base + kFlagAt), "r"(value) : "memory");
  }
  __device__ int flag() const {
    int value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(base + kFlagAt) : "memory");
    return value;
  }

 private:
  static constexpr int kFlagAt = 1020, kTilesAt = 896;

  // The reduction leaves it where the compiler keeps what a warp shares.
  static __device__ __forceinline__ uint32_t number_of_warp(uint32_t at) {
    uint32_t number = 0;
    if (threadIdx.x % 32 == 0) {
      asm volatile("atom.shared.or.b32 %0, [%1], 0;" : "=r"(number) : "r"(at) : "memory");
    }
    return __reduce_or_sync(~0u, number);
  }

  static_assert(8 * (5 * C::kStages + 2 * C::kQBuffers * C::kConsumers) <= kTilesAt);
  static_assert(kTilesAt + 8 * C::kStages <= kFlagAt);
};

// ---- items ------------------------------------------------------------------------------------------------------

// A block's items (a cluster's): one of every round of as many as there are blocks. As causal items get shorter, the
// order of the blocks may turn around with every round, so that all get the same work.
template <class C>
struct Walk {
  int index, step;

  __device__ __forceinline__ explicit Walk(const F16Params& p) : index(blockIdx.x / C::kCluster) {
    step = turns(p) ? 2 * (width() - index) - 1 : width();
  }
  __device__ __forceinline__ void advance(const F16Params& p) {
    index += step;
    if (turns(p)) step = 2 * width() - step;
  }
  __device__ __forceinline__ int next() const { return index + step; }
  __device__ __forceinline__ int previous(const F16Params& p) const {
    return index - (turns(p) ? 2 * width() - step : step);
  }

 private:
  static __device__ __forceinline__ bool turns(const F16Params& p) {
    return C::kEnds && (!C::kBegins || C::kMasks) && p.turn_around;
  }
  static __device__ __forceinline__ int width() { return static_cast<int>(gridDim.x) / C::kCluster; }
};

// The first and the last key that a query sees; it sees none where the last comes before the first.
template <class C>
__device__ __forceinline__ int first_key(const F16Params& p, int row) {
  return C::kBegins ? max(row + p.low, 0) : 0;
}
template <class C>
__device__ __forceinline__ int last_key(const F16Params& p, int row) {
  return C::kEnds ? min(row + p.high, p.k_tokens - 1) : p.k_tokens - 1;
}

// Tiles of an item whose keys are all seen by all of some rows.
template <class C>
struct OpenTiles {
  int begin, end;
  __device__ __forceinline__ bool has(int tile) const { return tile < end && (!C::kBegins || tile >= begin); }
};

// A query block of a head; with clusters, that of one of its blocks.
template <class C>
struct Item {
  int plane, row0;
  int first_tile;  // that a row of the cluster sees; the item's tiles are counted from it
  int tiles;       // at least one, even where all is masked

  __device__ __forceinline__ Item(const F16Params& p, int index) {
    int q_block;
    // The longest of a run of planes first; with a mask, which planes may share, blocks get rows of the same length.
    if (C::kEnds && (!C::kBegins || C::kMasks)) {
      const int run = p.run_items.divide(index), at = index - run * static_cast<int>(p.run_items.divisor);
      const int first_plane = run * static_cast<int>(p.run_planes.divisor);
      const bool whole = first_plane + static_cast<int>(p.run_planes.divisor) <= p.planes;
      const int row = whole ? p.run_planes.divide(at) : p.last_planes.divide(at);
      plane = first_plane + at - row * static_cast<int>(whole ? p.run_planes.divisor : p.last_planes.divisor);
      q_block = static_cast<int>(p.q_blocks.divisor) - 1 - row;
    } else {
      plane = p.q_blocks.divide(index);
      q_block = index - plane * static_cast<int>(p.q_blocks.divisor);
    }
    row0 = q_block * C::kCluster * C::kBlockM;
    const int last = last_key<C>(p, row0 + C::kCluster * C::kBlockM - 1);
    const int end = last < 0 ? 1 : last / C::kBlockN + 1;
    first_tile = C::kBegins ? min(first_key<C>(p, row0) / C::kBlockN, end - 1) : 0;
    tiles = end - first_tile;
    if constexpr (C::kCluster > 1) row0 += ptx::block_in_cluster() * C::kBlockM;
  }

  __device__ __forceinline__ int tile_key(int tile) const { return (first_tile + tile) * C::kBlockN; }
  // The keys that all rows of the block see, if the first is not after the last.
  __device__ __forceinline__ int first_open(const F16Params& p) const { return first_key<C>(p, row0 + C::kBlockM - 1); }
  __device__ __forceinline__ int last_open(const F16Params& p) const { return last_key<C>(p, row0); }
  // For so many rows from row0 + row on.
  __device__ __forceinline__ OpenTiles<C> open_tiles(const F16Params& p, int row, int rows) const {
    const int first = first_key<C>(p, row0 + row + rows - 1), end = max(last_key<C>(p, row0 + row) + 1, 0);
    return {(first + C::kBlockN - 1) / C::kBlockN - first_tile, end / C::kBlockN - first_tile};
  }
  __device__ __forceinline__ int batch(const F16Params& p) const { return p.q_heads.divide(plane); }
  __device__ __forceinline__ int head(const F16Params& p) const { return p.q_heads.remainder(plane); }
  __device__ __forceinline__ int kv_head(const F16Params& p) const { return p.group.divide(head(p)); }
  __device__ __forceinline__ int kv_plane(const F16Params& p) const { return batch(p) * p.kv_heads + kv_head(p); }
};

// The tiles of an item that the mask does not close, from the last to the first; at least one. Whole warps ask.
template <class C>
class Visit {
 public:
  __device__ __forceinline__ Visit(const F16Params& p, const Item<C>& item)
      : open_(item.open_tiles(p, 0, C::kBlockM)), first_tile_(item.first_tile), base_(item.tiles) {
    mask_plane_ = p.mask.plane(item.batch(p), item.head(p));
    q_block_ = item.row0 / C::kBlockM;
    refill(p);
    if (left_ == 0) left_ = masked_ = 1;
  }

  __device__ __forceinline__ bool more() const { return left_ != 0; }
  __device__ __forceinline__ TakenTile take(const F16Params& p) {
    const int at = 31 - __clz(static_cast<int>(left_)), tile = first_tile_ + base_ + at;
    const bool masked = masked_ >> at & 1, edge = edges_ >> at & 1;
    left_ ^= 1u << at;
    if (left_ == 0) refill(p);
    return {tile, masked, edge, left_ == 0};
  }

 private:
  // Looks at 32 tiles at a time, until there is one.
  __device__ __forceinline__ void refill(const F16Params& p) {
    while (left_ == 0 && base_ > 0) {
      const int lane = threadIdx.x % 32, count = min(base_, 32);
      base_ -= count;
      bool closed = lane >= count, masked = false;
      if (!closed) {
        const TileState state = p.mask.template state<C::kBlockN>(mask_plane_, q_block_, first_tile_ + base_ + lane);
        masked = state != TileState::kOpen;
        closed = state == TileState::kClosed;
      }
      left_ = __ballot_sync(~0u, !closed);
      masked_ = __ballot_sync(~0u, masked);
      edges_ = __ballot_sync(~0u, !open_.has(base_ + lane));
    }
  }

  OpenTiles<C> open_;
  int first_tile_, base_;  // of the lowest bit, counted from the first
  int mask_plane_, q_block_;
  uint32_t left_ = 0, masked_ = 0, edges_ = 0;
};

// ---- values that are not finite ---------------------------------------------------------------------------------

__device__ __forceinline__ float element_value(const char* address, DType dtype) {
  if (dtype == DType::kF16) return __half2float(*reinterpret_cast<const __half*>(address));
  if (dtype == DType::kBF16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(address));
  return *reinterpret_cast<const float*>(address);
}

__device__ __forceinline__ void store_element(char* base, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF16)
    reinterpret_cast<__half*>(base)[index] = __float2half_rn(value);
  else if (dtype == DType::kBF16)
    reinterpret_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
  else
    reinterpret_cast<float*>(base)[index] = value;
}

template <ptx::Half kHalf>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kHalf == ptx::Half::kF16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// The same where `condition` holds. Without branches: as many as rows have channels keep the compiler busy for minutes.
__device__ __forceinline__ void store_if(bool condition, char* to, DType dtype, float value) {
  const uint32_t half = dtype == DType::kF16 ? pack<ptx::Half::kF16>(value, 0.0f) : pack<ptx::Half::kBF16>(value, 0.0f);
  asm volatile(
      "{ .reg .pred four, two; setp.eq.u32 four, %3, 4; setp.eq.u32 two, %3, 2; "
      "@four st.global.b32 [%0], %1; @two st.global.b16 [%0], %2; }" ::"l"(to),
      "f"(value), "h"(static_cast<uint16_t>(half)),
      "r"(!condition             ? 0u
          : dtype == DType::kF32 ? 4u
                                 : 2u)
      : "memory");
}

// Clears what is not finite from the rows `first` to `end` of a tile of V. Called by kThreads threads of whole warps,
// each of which looks at its part of the tile before it writes any.
template <class C, int kThreads>
__device__ __forceinline__ bool clear_not_finite(uint32_t v_tile, int first, int end, int thread) {
  constexpr uint32_t kExponent = C::kPV == ptx::Half::kF16 ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t kUnit = C::kPV == ptx::Half::kF16 ? 0x04000400u : 0x00800080u;  // carries into the sign
  constexpr uint32_t kSigns = 0x80008000u;
  uint32_t found = 0;
#pragma unroll 4
  for (int chunk = first * 8 + thread; chunk < end * 8; chunk += kThreads) {
#pragma unroll
    for (int panel = 0; panel < C::kVPanels; panel++) {
      const uint4 four = ptx::load_shared_16(v_tile + panel * C::kBlockN * 128 + chunk * 16);
      const uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; i++) found |= (word[i] & kExponent) + kUnit;
    }
  }
  if ((found & kSigns) == 0) return false;
#pragma unroll 1
  for (int chunk = first * 8 + thread; chunk < end * 8; chunk += kThreads) {
#pragma unroll 1
    for (int panel = 0; panel < C::kVPanels; panel++) {
      const uint32_t address = v_tile + panel * C::kBlockN * 128 + chunk * 16;
      const uint4 four = ptx::load_shared_16(address);
      uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] &= ~((((word[i] & kExponent) + kUnit & kSigns) >> 15) * 0xffffu);
      ptx::store_shared_16(address, make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
  return true;
}

// The score of a key that INT8 cannot hold, from the raw tensors: +-inf or NaN as exact arithmetic has it.
__device__ __forceinline__ float raw_score(const F16Params& p, int batch, int head, int row, int key) {
  if (p.raw_k.data == nullptr) return float_of(0x7fc00000u);
  const int bytes = p.raw_dtype == DType::kF32 ? 4 : 2;
  const char* q =
      p.raw_q.data + (batch * p.raw_q.stride[0] + head * p.raw_q.stride[1] + row * p.raw_q.stride[2]) * bytes;
  const char* k =
      p.raw_k.data +
      (batch * p.raw_k.stride[0] + p.group.divide(head) * p.raw_k.stride[1] + key * p.raw_k.stride[2]) * bytes;
  float sum = 0.0f;
#pragma unroll 1
  for (int d = 0; d < p.head_dim; d++) {
    sum += element_value(q + d * p.raw_q.stride[3] * bytes, p.raw_dtype) *
           element_value(k + d * p.raw_k.stride[3] * bytes, p.raw_dtype);
  }
  return sum;
}

// Whether the mask, if there is one, lets a query see a key.
template <class C>
__device__ __forceinline__ bool lets_see(const F16Params& p, int mask_plane, int row, int key) {
  if constexpr (!C::kMasks) return true;
  return p.mask.visible(mask_plane, row, key / kMaskTileKeys) >> key % kMaskTileKeys & 1;
}

// Goes over this block's items again, after their outputs are written: V that was cleared is added to the rows that
// see it, and then rows that see a key that is not finite become NaN, unless its score is -inf.
template <class C>
__device__ __noinline__ void repair(const F16Params& p, int thread) {
  for (Walk<C> walk(p); walk.index < p.items; walk.advance(p)) {
    const Item<C> item(p, walk.index);
    const int batch = item.batch(p), head = item.head(p), kv_head = item.kv_head(p);
    const int rows = min(C::kBlockM, p.q_tokens - item.row0);
    const int64_t o_plane = batch * p.o_stride[0] + head * p.o_stride[1];
    const int mask_plane = C::kMasks ? p.mask.plane(batch, head) : 0;
    if constexpr (C::kEnds) {
      const DType v_dtype = C::kPV == ptx::Half::kF16 ? DType::kF16 : DType::kBF16;
      const char* const v_plane = p.raw_v.data + (batch * p.raw_v.stride[0] + kv_head * p.raw_v.stride[1]) * 2;
      const int first_open = item.first_open(p), last_open = item.last_open(p);
      for (int channel = thread; channel < p.v_dim; channel += C::kConsumerThreads) {
        for (int key = first_key<C>(p, item.row0); key <= last_key<C>(p, item.row0 + rows - 1); key++) {
          const bool open = key >= first_open && key <= last_open;
          if constexpr (C::kMasks) {
            const TileState state =
                p.mask.template state<C::kBlockN>(mask_plane, item.row0 / C::kBlockM, key / C::kBlockN);
            if (state == TileState::kClosed || (open && state == TileState::kOpen)) continue;
          } else if (open) {
            key = last_open;
            continue;
          }
          const float value =
              element_value(v_plane + (key * p.raw_v.stride[2] + channel * p.raw_v.stride[3]) * 2, v_dtype);
          if (is_finite(value)) continue;
          for (int row = item.row0; row < item.row0 + rows; row++) {
            if (key < first_key<C>(p, row) || key > last_key<C>(p, row)) continue;
            if (!lets_see<C>(p, mask_plane, row, key)) continue;
            const int64_t at = o_plane + row * p.o_stride[2] + channel * p.o_stride[3];
            const int bytes = p.out_dtype == DType::kF32 ? 4 : 2;
            store_element(p.o, p.out_dtype, at, element_value(p.o + at * bytes, p.out_dtype) + value);
          }
        }
      }
    }
    if constexpr (C::kEnds && C::kQuantized) ptx::turn_wait<C::kConsumerThreads>(C::kConsumers + 1);
    if constexpr (C::kQuantized) {
      const uint32_t* const words = p.k_not_finite + static_cast<int64_t>(item.kv_plane(p)) * p.k_words;
      for (int i = thread; i < rows; i += C::kConsumerThreads) {
        const int row = item.row0 + i, first = first_key<C>(p, row), last = last_key<C>(p, row);
        bool bad = false;
        for (int key0 = first / 32 * 32; key0 <= last && !bad; key0 += 32) {
          for (uint32_t bits = words[key0 / 32]; bits != 0 && !bad; bits &= bits - 1) {
            const int key = key0 + __ffs(static_cast<int>(bits)) - 1;
            bad = key >= first && key <= last && lets_see<C>(p, mask_plane, row, key) &&
                  raw_score(p, batch, head, row, key) != -INFINITY;
          }
        }
        if (!bad) continue;
        const float nan = float_of(0x7fc00000u);
        for (int channel = 0; channel < p.v_dim; channel++) {
          store_element(p.o, p.out_dtype, o_plane + row * p.o_stride[2] + channel * p.o_stride[3], nan);
        }
        if (p.lse != nullptr) {
          p.lse[batch * p.lse_stride[0] + head * p.lse_stride[1] + row * p.lse_stride[2]] = nan;
        }
      }
    }
  }
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// s32 scores plus these bits, 1.5 * 2^23 as a float, read as that float plus the score where it is below 2^22. It
// leaves in the addend of the exponential.
constexpr int32_t kBiasBits = 0x4b400000;
constexpr float kBias = 12582912.0f;
// With the bias: -inf.
constexpr int32_t kMaskedScore = static_cast<int32_t>(0xff800000u - static_cast<uint32_t>(kBiasBits));

// Keeps a factor where neither factor * 0 nor factor * -inf is NaN, and a whole score stays finite. NaN stays.
__device__ __forceinline__ float clamp_factor(float factor) {
  return factor < 0x1p-126f ? 0x1p-126f : factor > 0x1p100f ? 0x1p100f : factor;
}

// Bits `first` to `last` of 32; none where the last comes before the first.
__device__ __forceinline__ uint32_t keys_between(int first, int last) {
  const int begin = max(first, 0);
  uint32_t keys;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(keys) : "r"(begin), "r"(max(last + 1 - begin, 0)));
  return keys;
}

// Of 32 keys, a bit each, those from this lane's first column on. The lane is read again, so that nothing made of it
// occupies a register all the while.
__device__ __forceinline__ uint32_t from_first_column(uint32_t keys) {
  asm volatile(
      "{ .reg .b32 column; mov.u32 column, %%tid.x; and.b32 column, column, 3; shl.b32 column, column, 1; "
      "shr.u32 %0, %0, column; }"
      : "+r"(keys));
  return keys;
}

// Maximum and sum of rows g and g + 8 of this lane's columns.
struct RowState {
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

// ---- the two products of a tile ---------------------------------------------------------------------------------

template <class C, class Score>
__device__ __forceinline__ void issue_scores(Score (&s)[C::kBlockN / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; panel++) {
#pragma unroll
    for (int step = 0; step < C::kWidth / 32; step++) {
      const uint64_t a = q + (panel * 64 * C::kWidth >> 4) + 2 * step;
      const uint64_t b = k + (panel * C::kBlockN * C::kWidth >> 4) + 2 * step;
      const auto issue = [&](auto accumulate) {
        constexpr bool kAccumulate = decltype(accumulate)::value;
        if constexpr (C::kQuantized) {
          ptx::ScoreProduct<C::kBlockN>::template issue<kAccumulate>(s, a, b);
        } else {
          ptx::HalfScoreProduct<C::kPV, C::kBlockN>::template issue<kAccumulate>(s, a, b);
        }
      };
      if (panel == 0 && step == 0)
        issue(std::false_type{});
      else
        issue(std::true_type{});
    }
  }
  ptx::product_commit();
}

template <class C>
__device__ __forceinline__ void issue_values(float (&o)[C::kHeadDim / 2], const uint32_t (&p)[C::kBlockN / 4],
                                             uint64_t v, int accumulate) {
#pragma unroll
  for (int step = 0; step < C::kBlockN / 16; step++) {
    ptx::HalfValueProduct<C::kPV, C::kHeadDim>::issue(o, p + 4 * step, v + (step * 16 * 128 >> 4),
                                                      step == 0 ? accumulate : 1);
  }
  ptx::product_commit();
}

// ---- the warps that move tiles ----------------------------------------------------------------------------------

// A panel of a tile of K or V. Every block of a cluster loads its part for all of them.
template <class C>
__device__ __forceinline__ void load_shared_box(uint32_t to, int width, const CUtensorMap& map, int channel, int tile,
                                                int head, int batch, uint32_t barrier) {
  if constexpr (C::kCluster == 1) {
    ptx::copy_box(to, map, channel, tile * C::kBlockN, head, batch, barrier);
  } else {
    constexpr int kRows = C::kBlockN / C::kCluster;
    const int row = ptx::block_in_cluster() * kRows;
    ptx::copy_box_to_cluster(to + row * width, map, channel, tile * C::kBlockN + row, head, batch, barrier,
                             (1 << C::kCluster) - 1);
  }
}

// One lane: a tile of K or V may be overwritten, as far as this warp is concerned.
template <class C>
__device__ __forceinline__ void release_shared(uint32_t barrier) {
  if constexpr (C::kCluster == 1) {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
  } else {
    if (threadIdx.x % 32 < C::kCluster) ptx::barrier_arrive_at(barrier, threadIdx.x % 32);
  }
}

template <class C>
__device__ __forceinline__ void load_queries_and_keys(const F16Params& p, const Shared<C>& shared) {
  ptx::prefetch_map(p.q);
  ptx::prefetch_map(p.k);
  Slot<C::kStages> stage;
  Slot<C::kQBuffers> buffer;
  const auto load_keys = [&](int tile, int kv_head, int batch, auto describe) {
    ptx::barrier_wait(shared.k_empty(stage.index), stage.parity ^ 1);
    describe(stage.index);
    ptx::barrier_expect(shared.k_full(stage.index), C::kKBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; panel++) {
      load_shared_box<C>(shared.k(stage.index) + panel * C::kBlockN * C::kWidth, C::kWidth, p.k,
                         panel * C::kWidth / C::kElement, tile, kv_head, batch, shared.k_full(stage.index));
    }
    stage.next();
  };
  const auto load_queries = [&](const Item<C>& item, int batch) {
    const int head = item.head(p);
#pragma unroll 1
    for (int group = 0; group < C::kConsumers; group++) {
      const uint32_t full = shared.q_full(buffer.index, group);
      ptx::barrier_wait(shared.q_empty(buffer.index, group), buffer.parity ^ 1);
      ptx::barrier_expect(full, C::kQBytes);
#pragma unroll
      for (int panel = 0; panel < C::kPanels; panel++) {
        ptx::copy_box(shared.q(buffer.index, group) + panel * 64 * C::kWidth, p.q, panel * C::kWidth / C::kElement,
                      item.row0 + group * 64, head, batch, full);
      }
    }
    buffer.next();
  };
  if constexpr (C::kMasks) {
    Walk<C> walk(p);
    Item<C> item(p, walk.index);
    Visit<C> visit(p, item);
    TakenTile tile = visit.take(p);
    bool first = true;
    while (true) {
      const Item<C> now = item;
      const bool last = tile.last();
      if (last) {
        walk.advance(p);
        item = Item<C>(p, min(walk.index, p.items - 1));
        visit = Visit<C>(p, item);
      }
      const TakenTile next = visit.take(p);
      if (threadIdx.x % 32 == 0) {
        const int batch = now.batch(p);
        load_keys(tile.tile(), now.kv_head(p), batch, [&](uint32_t at) { shared.describe(at, tile, next.tile()); });
        if (first) load_queries(now, batch);
      }
      __syncwarp();
      if (last && walk.index >= p.items) break;
      tile = next;
      first = last;
    }
  } else {
    const auto plain = [](uint32_t) {};
    for (Walk<C> walk(p); walk.index < p.items; walk.advance(p)) {
      const Item<C> item(p, walk.index);
      const int batch = item.batch(p), kv_head = item.kv_head(p);
      load_keys(item.first_tile + item.tiles - 1, kv_head, batch, plain);
      load_queries(item, batch);
#pragma unroll 1
      for (int tile = item.tiles - 2; tile >= 0; tile--) load_keys(item.first_tile + tile, kv_head, batch, plain);
    }
  }
}

template <class C>
__device__ __forceinline__ void load_values(const F16Params& p, const Shared<C>& shared) {
  ptx::prefetch_map(p.v);
  Slot<C::kStages> stage;
  for (Walk<C> walk(p); walk.index < p.items; walk.advance(p)) {
    const Item<C> item(p, walk.index);
    const int batch = item.batch(p), kv_head = item.kv_head(p);
    const auto load = [&](int tile) {
      ptx::barrier_wait(shared.v_empty(stage.index), stage.parity ^ 1);
      ptx::barrier_expect(shared.v_full(stage.index), C::kVBytes);
#pragma unroll
      for (int panel = 0; panel < C::kVPanels; panel++) {
        load_shared_box<C>(shared.v(stage.index) + panel * C::kBlockN * 128, 128, p.v, panel * 64, tile, kv_head, batch,
                           shared.v_full(stage.index));
      }
      stage.next();
    };
    if constexpr (C::kMasks) {
      for (Visit<C> visit(p, item); visit.more();) {
        const TakenTile tile = visit.take(p);
        if (threadIdx.x % 32 == 0) load(tile.tile());
        __syncwarp();
      }
    } else {
      for (int tile = item.tiles - 1; tile >= 0; tile--) load(item.first_tile + tile);
    }
  }
}

// Two warps clear the values that are hidden from some rows of the block.
constexpr int kCleaningWarps = 2;
template <class C>
__device__ __forceinline__ void clean_values(const F16Params& p, const Shared<C>& shared) {
  constexpr int kThreads = 32 * kCleaningWarps;
  const int thread = threadIdx.x % kThreads;
  Slot<C::kStages> stage;
  for (Walk<C> walk(p); walk.index < p.items; walk.advance(p)) {
    const Item<C> item(p, walk.index);
    // `anywhere`: not only where rows begin or end.
    const auto clean = [&](int first_key, bool masked, [[maybe_unused]] bool anywhere) {
      ptx::barrier_wait(shared.v_full(stage.index), stage.parity);
      if (masked) {
        const uint32_t v_tile = shared.v(stage.index);
        // Rows of the tile that are seen by all: none where they end before they begin.
        int end = max(item.last_open(p) + 1 - first_key, 0);
        bool found = false;
        if constexpr (C::kBegins) {
          const int begin = anywhere ? C::kBlockN : min(item.first_open(p) - first_key, C::kBlockN);
          found = clear_not_finite<C, kThreads>(v_tile, 0, begin, thread);
          end = max(end, begin);
        }
        if (clear_not_finite<C, kThreads>(v_tile, end, C::kBlockN, thread) || found) shared.set_flag(1);
        ptx::async_proxy_fence();
        __syncwarp();
      }
      if (masked && threadIdx.x % 32 == 0) ptx::barrier_arrive(shared.v_clean(stage.index));
      release_shared<C>(shared.v_empty(stage.index));  // so that no tile passes unseen
      stage.next();
    };
    if constexpr (C::kMasks) {
      for (Visit<C> visit(p, item); visit.more();) {
        const TakenTile tile = visit.take(p);
        clean(tile.tile() * C::kBlockN, tile.hides(), tile.masked());
      }
    } else {
      const OpenTiles<C> open = item.open_tiles(p, 0, C::kBlockM);
      for (int tile = item.tiles - 1; tile >= 0; tile--) clean(item.tile_key(tile), !open.has(tile), false);
    }
  }
}

// ---- the warpgroups that compute --------------------------------------------------------------------------------

// O / sum, from the fragments: rows g and g + 8 of a lane, columns 8n + 2c, + 1. Changes O on the way. `seen`: rows
// that see a key, a bit each, where a mask may hide them all.
template <class C>
__device__ __forceinline__ void write_rows(const F16Params& p, const Item<C>& item, int group,
                                           float (&o)[C::kHeadDim / 2], const RowState& rows,
                                           [[maybe_unused]] uint32_t seen) {
  int thread;  // read again, so that nothing made of it occupies a register all the while
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const int lane = thread % 32, c = lane % 4;
  const int batch = item.batch(p), head = item.head(p);
  float inverse[2];
  const auto sees = [&](int half, int row) {
    if constexpr (C::kMasks) return (seen >> half & 1u) != 0;
    return !C::kEnds || first_key<C>(p, row) <= last_key<C>(p, row);
  };
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float total = rows.sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    inverse[half] = ptx::reciprocal(total);
    const int in_block = group * 64 + thread / 32 % 4 * 16 + lane / 4 + half * 8, row = item.row0 + in_block;
    if (p.lse != nullptr && c == 0 && row < p.q_tokens) {
      float lse = (rows.maximum[half] + (log2f(total) + C::kShift)) * kLn2;
      if constexpr (C::kQuantized) {
        if (p.lse_shift != nullptr) lse += p.lse_shift[static_cast<int64_t>(item.plane) * p.q_tokens + row];
      }
      const bool visible = sees(half, row);
      p.lse[batch * p.lse_stride[0] + head * p.lse_stride[1] + row * p.lse_stride[2]] = visible ? lse : -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; i++) o[i] *= inverse[i / 2 % 2];
  if constexpr (C::kQuantized) {
    const int64_t v_plane = static_cast<int64_t>(item.kv_plane(p)) * p.v_dim;
    // Every lane loads the factors of a few channels, from where the others take them.
    const auto for_channels = [&](const float* values, auto change) {
      float mine[C::kHeadDim / 32];
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 32; i++) {
        mine[i] = values[v_plane + min(i / 2 * 64 + lane * 2 + i % 2, p.v_dim - 1)];
      }
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 2; i++) {
        if (i & 2) continue;
        const float value = __shfl_sync(~0u, mine[i / 32 * 2 + i % 2], i / 4 % 8 * 4 + c);
        change(o[i], value);
        change(o[i + 2], value);
      }
    };
    if (p.v_scales != nullptr) for_channels(p.v_scales, [](float& x, float scale) { x *= scale; });
    if (p.v_mean != nullptr) for_channels(p.v_mean, [](float& x, float mean) { x += mean; });
  }
  const int first_row = item.row0 + group * 64 + thread / 32 % 4 * 16 + lane / 4;
  const bool visible[2] = {sees(0, first_row), sees(1, first_row + 8)};
  // A mean of values is no larger than the largest; rounding P must not take it past what the type holds.
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; i++) most = fmaxf(most, fabsf(o[i]));
  if (__any_sync(~0u, most > p.largest * 0.99f)) {
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; i++) {
      if (is_finite(o[i])) o[i] = fminf(fmaxf(o[i], -p.largest), p.largest);
    }
  }
  const int64_t o_plane = batch * p.o_stride[0] + head * p.o_stride[1];
  if (p.wide_o) {
    const auto store = [&](auto type) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half;
        char* const to = p.o + (o_plane + row * p.o_stride[2] + c * 8) * 2;
        const int channels = row < p.q_tokens ? p.v_dim - 8 * c : 0;
#pragma unroll
        for (int n = 0; n < C::kHeadDim / 8; n += 4) {  // four lanes trade pairs of channels, so that each has eight
          uint32_t word[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float* const pair = o + 4 * (n + i) + 2 * half;
            word[i] = visible[half] ? pack<decltype(type)::value>(pair[0], pair[1]) : 0;
          }
#pragma unroll
          for (int bit = 1; bit <= 2; bit *= 2) {
            const bool upper = (c & bit) != 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
              if (i & bit) continue;
              const uint32_t other = __shfl_xor_sync(~0u, upper ? word[i] : word[i + bit], bit);
              word[i] = upper ? other : word[i];
              word[i + bit] = upper ? word[i + bit] : other;
            }
          }
          if (n * 8 < channels) *reinterpret_cast<uint4*>(to + n * 16) = make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
    };
    if (p.out_dtype == DType::kF16) return store(std::integral_constant<ptx::Half, ptx::Half::kF16>());
    return store(std::integral_constant<ptx::Half, ptx::Half::kBF16>());
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + 8 * half;
    if (row >= p.q_tokens) continue;
    const int bytes = p.out_dtype == DType::kF32 ? 4 : 2;
    char* to = p.o + (o_plane + row * p.o_stride[2] + c * 2 * p.o_stride[3]) * bytes;
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float value = visible[half] ? o[4 * n + 2 * half + e] : 0.0f;
        store_if(n * 8 + c * 2 + e < p.v_dim, to, p.out_dtype, value);
        to += p.o_stride[3] * (e == 0 ? bytes : 7 * bytes);
        asm volatile("" : "+l"(to));  // addresses one by one: many would need many registers
      }
    }
  }
}

// What turns the raw scores of a tile into base-2 logits, fetched one tile ahead.
template <class C>
struct Factors {
  float q[2];               // of rows g and g + 8
  float k[C::kScales];      // of runs of keys
  uint32_t not_finite = 0;  // in some lane not 0: some key of the item's plane is not finite

  __device__ __forceinline__ void fetch_rows(const F16Params& p, const Item<C>& item, int row) {
    if constexpr (C::kQuantized) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int known = min(item.row0 + row + half * 8, p.q_tokens - 1);
        const int run = known / p.q_group_rows;  // 1 row of kToken
        const int group = p.q_grouping == Grouping::kThreadQuery ? run * 8 + known % 8 : run;
        q[half] = p.scale_log2 * p.q_scales[static_cast<int64_t>(item.plane) * p.q_groups + group];
        const uint32_t bits = p.q_not_finite[static_cast<int64_t>(item.plane) * p.q_words + known / 32];
        if (bits >> known % 32 & 1) q[half] = float_of(0x7fc00000u);
      }
    }
  }

  __device__ __forceinline__ void fetch_plane(const F16Params& p, int kv_plane) {
    if constexpr (C::kQuantized) {
      const uint32_t* const words = p.k_not_finite + static_cast<int64_t>(kv_plane) * p.k_words;
      not_finite = 0;
#pragma unroll 4
      for (int word = threadIdx.x % 32; word < p.k_words; word += 32) not_finite |= words[word];
    }
  }

  __device__ __forceinline__ void fetch_keys(const F16Params& p, int kv_plane, int tile) {
    if constexpr (C::kQuantized) {
      const float* const scales = p.k_scales + static_cast<int64_t>(kv_plane) * p.k_groups;
#pragma unroll
      for (int i = 0; i < C::kScales; i++) {
        const int block = (tile * C::kBlockN + i * C::kScaleKeys) / kGroupKeys;
        const int group = p.k_lane_groups == 1 ? block : block * 4 + static_cast<int>(threadIdx.x % 4);
        k[i] = scales[min(group, p.k_groups - 1)];
      }
    }
  }

  __device__ __forceinline__ float multiplier(const F16Params& p, int run, int half) const {
    if constexpr (!C::kQuantized) return p.scale_log2;
    // Three bits less, so that the product with the bias is exact.
    return float_of(bits_of(clamp_factor(q[half] * k[run])) & ~7u);
  }
};

// Scores to exponentials. Returns whether the kept maxima of some row of this warp moved; O then takes `rescale`.
template <class C, class Score>
__device__ __forceinline__ bool exponentiate(const F16Params& p, const Factors<C>& factors,
                                             const Score (&s)[C::kBlockN / 2], float (&e)[C::kBlockN / 2],
                                             RowState& rows, float (&rescale)[2]) {
  constexpr int kRunTiles = C::kBlockN / 8 / C::kScales;
  float addend[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = -INFINITY;
#pragma unroll
    for (int run = 0; run < C::kScales; run++) {
      float of_run;
      if constexpr (C::kQuantized) {
        int most = s[4 * run * kRunTiles + 2 * half];
#pragma unroll
        for (int n = run * kRunTiles; n < (run + 1) * kRunTiles; n++)
          most = __vimax3_s32(most, s[4 * n + 2 * half], s[4 * n + 2 * half + 1]);
        of_run = __int_as_float(most + kBiasBits) - kBias;
      } else {
        of_run = s[2 * half];
#pragma unroll
        for (int n = 0; n < kRunTiles; n++) of_run = fmaxf(of_run, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      }
      of_run *= factors.multiplier(p, run, half);
      largest = C::kScales == 1 ? of_run : fmaxf(largest, of_run);
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    if (C::kQuantized) largest = ceilf(largest);  // exact with the bias
    const float next = largest > rows.maximum[half] + C::kHeadroom ? largest : rows.maximum[half];
    const float offset = next == -INFINITY ? 0.0f : next;  // nothing visible yet
    rescale[half] = ptx::exp2_approx(rows.maximum[half] - offset);
    rows.maximum[half] = next;
    rows.sum[half] *= rescale[half];
    addend[half] = -offset - C::kShift;
  }
#pragma unroll
  for (int run = 0; run < C::kScales; run++) {
    float multiplier[2], run_addend[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      multiplier[half] = factors.multiplier(p, run, half);
      run_addend[half] = C::kQuantized ? fmaf(-kBias, multiplier[half], addend[half]) : addend[half];
    }
#pragma unroll
    for (int i = 4 * run * kRunTiles; i < 4 * (run + 1) * kRunTiles; i++) {
      const int half = i / 2 % 2;
      float x;
      if constexpr (C::kQuantized)
        x = __int_as_float(s[i] + kBiasBits);
      else
        x = s[i];
      e[i] = ptx::exp2_approx(fmaf(x, multiplier[half], run_addend[half]));
      rows.sum[half] += e[i];
    }
  }
  return __any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f);
}

template <class C>
__device__ __forceinline__ void compute(const F16Params& p, const Shared<C>& shared, int group) {
  constexpr int kScoreCount = C::kBlockN / 2, kOutCount = C::kHeadDim / 2;
  using Score = std::conditional_t<C::kQuantized, int, float>;
  const Score kMasked = C::kQuantized ? static_cast<Score>(kMaskedScore) : static_cast<Score>(-INFINITY);
  const int lane = threadIdx.x % 32, c = lane % 4;
  const int lane_row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // of the block; and the one 8 further

  // Kept to what the loop needs: what it needs seldom is made again from the item's index.
  uint32_t count = 0, items = 0;  // tiles and items whose scores are done
  uint32_t clean_parity = 0;      // one bit a stage
  Walk<C> walk(p);
  int tile;  // counted from first_tile, like those below
  [[maybe_unused]] int first_tile = 0, row0 = 0;
  // With a mask: the tile as it was described, the one after it, the visible keys of this lane's rows, and which of
  // these rows see some, of the tile and of the item so far.
  [[maybe_unused]] TakenTile taken;
  [[maybe_unused]] int next_tile = 0, mask_plane = 0;
  constexpr int kParts = C::kMasks ? C::kBlockN / kMaskTileKeys : 1;
  [[maybe_unused]] uint64_t visible[2][kParts];
  [[maybe_unused]] uint32_t tile_seen = 0, seen = 0;
  OpenTiles<C> open_tiles, clean_tiles;  // that need no mask; whose values are hidden from no row of the block
  [[maybe_unused]] int kv_plane;
  [[maybe_unused]] bool bad_keys;  // in kv_plane

  Score s[kScoreCount];
  uint32_t probabilities[kScoreCount / 2];
  float o[kOutCount], e[kScoreCount];
#pragma unroll
  for (int i = 0; i < kOutCount; i++) o[i] = 0.0f;
#pragma unroll
  for (uint32_t& word : probabilities) word = 0;
  RowState rows;
  Factors<C> factors, next_factors;
  float rescale[2];

  const auto take_turn = [&] {
    if constexpr (C::kTakeTurns) ptx::turn_wait<256>(1 + group);
  };
  const auto pass_turn = [&] {
    if constexpr (C::kTakeTurns) ptx::turn_pass<256>(1 + (group + 1) % C::kConsumers);
  };
  const auto is_last = [&] { return C::kMasks ? taken.last() : tile == 0; };
  const auto hides_values = [&] { return C::kMasks ? taken.hides() : !clean_tiles.has(tile); };
  const auto start_item = [&] {
    const Item<C> item(p, walk.index);
    if constexpr (C::kEnds) row0 = item.row0;
    if constexpr (C::kMasks) {
      mask_plane = p.mask.plane(item.batch(p), item.head(p));
    } else {
      tile = item.tiles - 1;
      if constexpr (C::kBegins) first_tile = item.first_tile;
      open_tiles = item.open_tiles(p, group * 64, 64);
      clean_tiles = item.open_tiles(p, 0, C::kBlockM);
    }
    if constexpr (C::kQuantized) kv_plane = item.kv_plane(p);
    ptx::barrier_wait(shared.q_full(items % C::kQBuffers, group), items / C::kQBuffers & 1);
  };
  const auto start_scores = [&] {
    const uint32_t stage = count % C::kStages;
    ptx::barrier_wait(shared.k_full(stage), count / C::kStages & 1);
    take_turn();
    ptx::pin(probabilities);
    ptx::product_fence();
    issue_scores<C>(s,
                    ptx::tile_descriptor<C::kWidth>() | ptx::descriptor_address(shared.q(items % C::kQBuffers, group)),
                    ptx::tile_descriptor<C::kWidth>() | ptx::descriptor_address(shared.k(stage)));
    if constexpr (C::kMasks) shared.description(stage, taken, next_tile);
  };
  // Fetches what a mask shows of this tile, and the factors of the one after it, which takes longer than a product.
  const auto look_ahead = [&] {
    if constexpr (C::kMasks) {
      tile = taken.tile();
      if (taken.masked()) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int part = 0; part < kParts; part++) {
            visible[half][part] = p.mask.visible(mask_plane, row0 + lane_row + 8 * half, tile * kParts + part);
          }
        }
      }
    }
    if constexpr (C::kQuantized) {
      if (!is_last()) {
        if (C::kLooksAhead) next_factors.fetch_keys(p, kv_plane, C::kMasks ? next_tile : first_tile + tile - 1);
      } else {
        const Item<C> next(p, min(walk.next(), p.items - 1));
        next_factors.fetch_rows(p, next, lane_row);
        if (next.kv_plane(p) != kv_plane) next_factors.fetch_plane(p, next.kv_plane(p));
        if (C::kLooksAhead) {
          next_factors.fetch_keys(p, next.kv_plane(p), C::kMasks ? next_tile : next.first_tile + next.tiles - 1);
        }
      }
    }
  };
  const auto take_factors = [&](bool of_next_item) {
    if constexpr (C::kQuantized) {
#pragma unroll
      for (int i = 0; i < C::kScales; i++) {
        if (C::kLooksAhead) factors.k[i] = next_factors.k[i];
      }
      if (!C::kLooksAhead) factors.fetch_keys(p, kv_plane, first_tile + tile);
      if (of_next_item) bad_keys = __any_sync(~0u, next_factors.not_finite != 0);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (of_next_item) factors.q[half] = next_factors.q[half];
      }
    }
  };
  // The scores are there.
  const auto take_scores = [&] {
    ptx::pin(s);
    release_shared<C>(shared.k_empty(count % C::kStages));
    if (is_last() && lane == 0) ptx::barrier_arrive(shared.q_empty(items % C::kQBuffers, group));
    if constexpr (C::kMasks) {
      tile_seen = 3;
      if (taken.hides()) {
        tile_seen = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int word = 0; word < C::kBlockN / 32; word++) {
            uint32_t keys = ~0u;
            if (taken.masked()) keys = static_cast<uint32_t>(visible[half][word / 2] >> 32 * (word % 2));
            if (taken.edge()) {
              const int row = row0 + lane_row + 8 * half, key = tile * C::kBlockN + word * 32;
              keys &= keys_between(first_key<C>(p, row) - key, last_key<C>(p, row) - key);
            }
            if (keys != 0) tile_seen |= 1u << half;
            keys = from_first_column(keys);
#pragma unroll
            for (int i = 0; i < 8; i++) {
              const int at = word * 16 + i / 2 * 4 + half * 2 + i % 2;
              s[at] = keys >> (i / 2 * 8 + i % 2) & 1u ? s[at] : kMasked;
            }
          }
        }
      }
    } else if (!open_tiles.has(tile)) {
      const int key = (first_tile + tile) * C::kBlockN + c * 2;
      const int row = row0 + lane_row;
      int first[2], last[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        first[half] = first_key<C>(p, row + 8 * half) - key;
        last[half] = last_key<C>(p, row + 8 * half) - key;
      }
#pragma unroll
      for (int i = 0; i < kScoreCount; i++) {
        const int column = i / 4 * 8 + i % 2, half = i / 2 % 2;
        const bool seen = column <= last[half] && (!C::kBegins || column >= first[half]);
        s[i] = seen ? s[i] : kMasked;
      }
    }
    if constexpr (C::kQuantized) {
      if (bad_keys) {
#pragma unroll
        for (int word = 0; word < C::kBlockN / 32; word++) {
          const int at = (first_tile + tile) * (C::kBlockN / 32) + word;
          const uint32_t bits = at < p.k_words ? p.k_not_finite[static_cast<int64_t>(kv_plane) * p.k_words + at] : 0;
          if (bits != 0) shared.set_flag(1);
#pragma unroll
          for (int i = word * 16; i < word * 16 + 16; i++) {
            s[i] = bits >> 2 * c >> (i % 16 / 4 * 8 + i % 2) & 1 ? kMasked : s[i];
          }
        }
      }
    }
  };
  // Of tile `number`; some of its values were hidden from some rows, and it is the first of its item.
  const auto start_values = [&](uint32_t number, bool hidden, bool first) {
    const uint32_t stage = number % C::kStages;
    if (C::kEnds && hidden) {
      ptx::barrier_wait(shared.v_clean(stage), clean_parity >> stage & 1);
      clean_parity ^= 1u << stage;
    } else {
      ptx::barrier_wait(shared.v_full(stage), number / C::kStages & 1);
    }
    issue_values<C>(o, probabilities, ptx::panel_descriptor<C::kBlockN>() | ptx::descriptor_address(shared.v(stage)),
                    !first);
  };
  const auto pack_probabilities = [&] {
#pragma unroll
    for (int i = 0; i < kScoreCount / 2; i++) probabilities[i] = pack<C::kPV>(e[2 * i], e[2 * i + 1]);
  };

  if (C::kTakeTurns && group == C::kConsumers - 1) pass_turn();
  start_item();
  if constexpr (C::kQuantized) {
    factors.fetch_rows(p, Item<C>(p, walk.index), lane_row);
    if constexpr (!C::kMasks) factors.fetch_keys(p, kv_plane, first_tile + tile);
    factors.fetch_plane(p, kv_plane);
    bad_keys = __any_sync(~0u, factors.not_finite != 0);
    next_factors.not_finite = factors.not_finite;
  }
  start_scores();
  if constexpr (C::kQuantized && C::kMasks) factors.fetch_keys(p, kv_plane, taken.tile());
  pass_turn();
  look_ahead();
  ptx::product_wait<0>();
  take_scores();
  seen = tile_seen;
  exponentiate<C>(p, factors, s, e, rows, rescale);
  pack_probabilities();
  bool hidden = hides_values(), first = true;

#pragma unroll 1
  for (count = 1;; count++) {
    const bool last = is_last();
    if (last) {
      items++;
      if (walk.next() >= p.items) break;
      walk.advance(p);
      start_item();
    } else if (!C::kMasks) {
      tile--;
    }
    take_factors(last);
    start_scores();
    start_values(count - 1, hidden, first);
    pass_turn();
    look_ahead();
    ptx::product_wait<1>();
    take_scores();
    const RowState before = rows;
    [[maybe_unused]] const uint32_t seen_before = seen;
    if (last) rows = RowState{};
    seen = last ? tile_seen : seen | tile_seen;
    const bool moved = exponentiate<C>(p, factors, s, e, rows, rescale);
    // The compiler moves a wait up as far as it can within a block of code: this branch keeps the exponentials above.
    // All warps of a warpgroup must wait at the same place, so it is not the one that they decide on by themselves.
    if (!last) {
      ptx::product_wait<0>();
      ptx::pin(o);
      if (moved) {
#pragma unroll
        for (int i = 0; i < kOutCount; i++) o[i] *= rescale[i / 2 % 2];
      }
    }
    ptx::product_wait<0>();
    ptx::pin(e);
    ptx::pin(o);
    release_shared<C>(shared.v_empty((count - 1) % C::kStages));
    pack_probabilities();
    if (last) {
      ptx::pin(probabilities);  // before, as that takes half the registers
      write_rows<C>(p, Item<C>(p, walk.previous(p)), group, o, before, seen_before);
    }
    hidden = hides_values();
    first = last;
  }
  ptx::pin(probabilities);
  ptx::product_fence();
  start_values(count - 1, hidden, first);
  ptx::product_wait<0>();
  ptx::pin(o);
  write_rows<C>(p, Item<C>(p, walk.index), group, o, rows, seen);
  if (C::kTakeTurns && group == 0) take_turn();

  if constexpr (C::kEnds || C::kQuantized) {
    ptx::turn_wait<C::kConsumerThreads>(C::kConsumers + 1);
    if (shared.flag() != 0) {
      __threadfence_block();
      repair<C>(p, threadIdx.x);
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) attention_f16_kernel(const __grid_constant__ F16Params p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<C> shared{ptx::shared_address(memory)};
  if (p.whole_mask.tiles != nullptr && p.whole_mask.is_open() == C::kMasks) return;
  if (threadIdx.x == 0) {
    shared.set_flag(0);
    for (int i = 0; i < C::kStages; i++) {
      ptx::barrier_init(shared.k_full(i), 1);
      ptx::barrier_init(shared.v_full(i), 1);
      ptx::barrier_init(shared.k_empty(i), C::kCluster * 4 * C::kConsumers);
      ptx::barrier_init(shared.v_empty(i), C::kCluster * (4 * C::kConsumers + (C::kEnds ? kCleaningWarps : 0)));
      ptx::barrier_init(shared.v_clean(i), kCleaningWarps);
    }
    for (int i = 0; i < C::kQBuffers; i++) {
      for (int group = 0; group < C::kConsumers; group++) {
        ptx::barrier_init(shared.q_full(i, group), 1);
        ptx::barrier_init(shared.q_empty(i, group), 4);
      }
    }
    ptx::barrier_init_fence();
  }
  if constexpr (C::kCluster > 1)
    ptx::cluster_sync();
  else
    __syncthreads();

  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == C::kConsumers) {
    ptx::shrink_registers<C::kMoverRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (warp == 0) {
      if (C::kMasks || threadIdx.x % 32 == 0) load_queries_and_keys<C>(p, shared);
    } else if (warp == 1) {
      if (C::kMasks || threadIdx.x % 32 == 0) load_values<C>(p, shared);
    } else if constexpr (C::kEnds) {
      clean_values<C>(p, shared);
    }
  } else {
    ptx::grow_registers<C::kConsumerRegisters>();
    compute<C>(p, shared, group);
  }
  if constexpr (C::kCluster > 1) ptx::cluster_sync();  // the others may still write here
}

// ---- host side --------------------------------------------------------------------------------------------------

// Once a device: raises the limit of shared memory.
template <class C>
void prepare(int ordinal) {
  static std::atomic<uint64_t> prepared{0};
  const uint64_t bit = uint64_t{1} << ordinal % 64;
  if (ordinal < 64 && (prepared.load(std::memory_order_acquire) & bit)) return;
  SAGE_CUDA(
      cudaFuncSetAttribute(attention_f16_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  prepared.fetch_or(bit, std::memory_order_release);
}

struct Operands {
  View q, k, v;
};

// Planes to a run, of which the cache holds `most` at best and `few` easily. Where the items of so many are whole turns
// of the blocks there and back, all blocks get the same work. Next to whole turns is worst: then the same blocks get
// the longest items over and over.
inline int planes_of_run(int most, int few, int q_blocks, int width) {
  for (int planes = (most + 1) / 2; planes <= most; planes++) {
    if (planes * q_blocks % (2 * width) == 0) return planes;
  }
  return std::min(few, 32);
}

template <class C>
void launch_f16(F16Params params, const Operands& operands, cudaStream_t stream) {
  int ordinal = 0, multiprocessors = 0;
  SAGE_CUDA(cudaGetDevice(&ordinal));
  SAGE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal));
  prepare<C>(ordinal);
  params.q = make_tensor_map(operands.q, 64, C::kWidth);
  params.k = make_tensor_map(operands.k, C::kBlockN / C::kCluster, C::kWidth);
  params.v = make_tensor_map(operands.v, C::kBlockN / C::kCluster, 128);
  const int q_blocks = (params.q_tokens + C::kCluster * C::kBlockM - 1) / (C::kCluster * C::kBlockM);
  const int64_t plane_bytes =
      int64_t{params.k_tokens} * C::kHeadDim * (C::kElement + 2) / static_cast<int64_t>(params.group.divisor) + 1;
  // Many planes to a run: what matters is that all blocks get the same work. Few: that they stay near one another.
  constexpr int64_t kCacheBytes = 40 << 20, kLittleCacheBytes = 24 << 20, kManyPlanes = 6;
  params.longest_first = params.low == -params.q_tokens && params.high < params.k_tokens;
  params.turn_around = kCacheBytes / plane_bytes >= kManyPlanes && (!C::kMasks || params.longest_first);
  const auto fitting = [&](int64_t bytes) {
    return static_cast<int>(std::clamp<int64_t>(bytes / plane_bytes, 1, params.planes));
  };
  const int clusters = multiprocessors / C::kCluster, few_planes = fitting(kLittleCacheBytes);
  const int run_planes =
      params.turn_around ? planes_of_run(fitting(kCacheBytes), few_planes, q_blocks, clusters) : few_planes;
  params.q_blocks = Divisor(q_blocks);
  params.items = params.planes * q_blocks;
  params.run_planes = Divisor(run_planes);
  params.last_planes = Divisor(params.planes % run_planes == 0 ? run_planes : params.planes % run_planes);
  params.run_items = Divisor(run_planes * q_blocks);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = C::kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(params.items, clusters) * C::kCluster));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  SAGE_CUDA(cudaLaunchKernelEx(&config, attention_f16_kernel<C>, params));
}

}  // namespace sage::cuda::sm90
