// What attention needs to know of a mask before it starts: which of its tiles are closed, open or neither, and a bit
// for every key that a row may see.
#include "tile.cuh"
#include "workspace.h"

namespace sage::cuda {
namespace {

constexpr int kWarps = 8, kHeld = 4;  // rows that a warp has in flight

struct MaskArguments {
  const char* mask;
  int64_t stride[4];  // bytes
  int64_t heads, rows, keys, q_tiles, k_tiles;
  int block_q;
  MaskTiles out;
};

// A key of a row: 0 where it is hidden, 1 where it is visible, 2 where a number that is not 0 is added.
template <DType kType>
__device__ __forceinline__ int look(const char* address) {
  if constexpr (kType == DType::kBool) return *reinterpret_cast<const uint8_t*>(address) != 0;
  if constexpr (kType == DType::kF32) {
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(address);
    return bits == 0xff800000u ? 0 : bits << 1 == 0 ? 1 : 2;
  }
  if constexpr (kType == DType::kF16 || kType == DType::kBF16) {
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(address);
    return bits == (kType == DType::kF16 ? 0xfc00u : 0xff80u) ? 0 : (bits & 0x7fffu) == 0 ? 1 : 2;
  }
}

// One block a tile; a lane of a warp looks at keys lane and lane + 32 of a row.
template <DType kType>
__global__ void __launch_bounds__(kWarps * 32)
    mask_tiles_kernel(const __grid_constant__ MaskArguments a, int64_t first) {
  const int64_t item = first + blockIdx.x, k_tile = item % a.k_tiles, q_tile = item / a.k_tiles % a.q_tiles;
  const int64_t plane = item / a.k_tiles / a.q_tiles, batch = plane / a.heads, head = plane % a.heads;
  const int64_t row0 = q_tile * a.block_q, end = min(row0 + a.block_q, a.rows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const char* const from = a.mask + batch * a.stride[0] + head * a.stride[1];
  const int64_t key = k_tile * kMaskTileKeys + lane;
  bool any_visible = false, any_hidden = false, any_added = false;
  for (int64_t begin = row0 + warp; begin < end; begin += kWarps * kHeld) {
    int seen[kHeld][2];
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int64_t row = min(begin + i * kWarps, end - 1);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const bool known = key + half * 32 < a.keys;
        seen[i][half] = look<kType>(from + row * a.stride[2] + (known ? key + half * 32 : 0) * a.stride[3]);
        if (!known) seen[i][half] = -1;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      uint32_t word[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        any_visible |= seen[i][half] > 0;
        any_hidden |= seen[i][half] == 0;
        any_added |= seen[i][half] == 2;
        word[half] = __ballot_sync(~0u, seen[i][half] > 0);
      }
      const int64_t row = begin + i * kWarps;
      if (lane == 0 && row < end)
        a.out.bits[(plane * a.rows + row) * a.k_tiles + k_tile] = word[0] | static_cast<uint64_t>(word[1]) << 32;
    }
  }
  any_visible = __syncthreads_or(any_visible);
  any_hidden = __syncthreads_or(any_hidden);
  any_added = __syncthreads_or(any_added);
  if (threadIdx.x != 0) return;
  a.out.tiles[(plane * a.q_tiles + q_tile) * a.k_tiles + k_tile] = !any_visible ? TileState::kClosed
                                                                   : any_hidden ? TileState::kHides
                                                                   : any_added  ? TileState::kAdds
                                                                                : TileState::kOpen;
}

}  // namespace

void launch_mask_tiles(const View& mask, int block_q, const MaskTiles& out, cudaStream_t stream) {
  MaskArguments a{};
  a.mask = static_cast<const char*>(mask.data);
  for (int i = 0; i < 4; i++) a.stride[i] = mask.stride[i] * bits_per_element(mask.dtype) / 8;
  a.heads = mask.heads();
  a.rows = mask.tokens();
  a.keys = mask.channels();
  a.q_tiles = tiles_of(a.rows, block_q);
  a.k_tiles = tiles_of(a.keys, kMaskTileKeys);
  a.block_q = block_q;
  a.out = out;
  launch_items(mask.batch() * a.heads * a.q_tiles * a.k_tiles, [&](int64_t first, unsigned blocks) {
    const auto launch = [&](auto kernel) { kernel<<<blocks, kWarps * 32, 0, stream>>>(a, first); };
    switch (mask.dtype) {
      case DType::kBool: return launch(mask_tiles_kernel<DType::kBool>);
      case DType::kF32: return launch(mask_tiles_kernel<DType::kF32>);
      case DType::kF16: return launch(mask_tiles_kernel<DType::kF16>);
      default: return launch(mask_tiles_kernel<DType::kBF16>);
    }
  });
}

}  // namespace sage::cuda
