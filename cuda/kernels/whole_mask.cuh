// A mask all of whose tiles are open is as good as none: what needs no mask runs then, and else what does. The host
// does not know which, so it launches both, and one of them leaves at once.
#pragma once

#include "kernels.h"

namespace sage::cuda {

struct WholeMask {
  const TileState* tiles;  // null: there is no other
  int count;

  // Every thread of the block asks.
  __device__ __forceinline__ bool is_open() const {
    constexpr uint32_t kFour = static_cast<uint32_t>(TileState::kOpen) * 0x01010101u;
    const int sixteens = count / 16;
    bool open = true;
    for (int i = threadIdx.x; i < sixteens; i += blockDim.x) {
      const uint4 four = reinterpret_cast<const uint4*>(tiles)[i];
      open = open && four.x == kFour && four.y == kFour && four.z == kFour && four.w == kFour;
    }
    const int at = 16 * sixteens + static_cast<int>(threadIdx.x);
    if (at < count) open = open && tiles[at] == TileState::kOpen;
    return __syncthreads_and(open);
  }
};

inline int64_t count_mask_tiles(const View& mask, int block_q) {
  return mask.batch() * mask.heads() * ((mask.tokens() + block_q - 1) / block_q) *
         ((mask.channels() + kMaskTileKeys - 1) / kMaskTileKeys);
}

// masks.cu: says of all tiles together whether they are open, in one.
void launch_whole_mask(const WholeMask& mask, TileState* whole, cudaStream_t stream);

}  // namespace sage::cuda
