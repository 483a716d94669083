// What attention needs to know of a mask before it starts: which of its tiles are closed, open or neither, and a bit
// for every key that a row may see.
#include "tile.cuh"
#include "whole_mask.cuh"
#include "workspace.h"

namespace sage::cuda {
namespace {

constexpr int kThreads = 256, kKeys = 8, kHeld = 2;  // keys of a thread, and rows that it loads at once
constexpr int kThreadsARow = kMaskTileKeys / kKeys, kStep = kThreads / kThreadsARow;

struct MaskArguments {
  Tensor mask;
  int64_t heads, q_tiles, k_tiles;
  int block_q;
  MaskTiles out;
};

// Keys that are hidden, and those that a number other than 0 is added to, a bit each.
struct Looks {
  uint32_t hidden, added;
};

// Eight keys of a row: what `octet` holds in places that do not exist counts as nothing.
template <DType kType>
__device__ __forceinline__ Looks look(const Octet<kType>& octet) {
  Looks looks{};
#pragma unroll
  for (int j = 0; j < kKeys; j++) {
    if constexpr (kType == DType::kI8) {
      looks.hidden |= (octet.word[j / 4] >> j % 4 * 8 & 255u) == 0 ? 1u << j : 0;
    } else {
      float x[8];
      unpack(octet, x);
      looks.hidden |= x[j] == -INFINITY ? 1u << j : 0;
      looks.added |= x[j] != 0.0f ? 1u << j : 0;
    }
  }
  return looks;
}

// One block a tile.
template <DType kType>
__global__ void __launch_bounds__(kThreads) mask_tiles_kernel(const __grid_constant__ MaskArguments a, int64_t first) {
  const int64_t item = first + blockIdx.x, k_tile = item % a.k_tiles, q_tile = item / a.k_tiles % a.q_tiles;
  const int64_t plane = item / a.k_tiles / a.q_tiles;
  const int64_t row0 = q_tile * a.block_q, end = min(row0 + a.block_q, a.mask.tokens);
  const int part = threadIdx.x % kThreadsARow, key = static_cast<int>(k_tile) * kMaskTileKeys + part * kKeys;
  const uint32_t known = key >= a.mask.channels ? 0u : 0xffu >> max(key + kKeys - a.mask.channels, 0);
  const char* const from = plane_of(a.mask, {plane / a.heads, plane % a.heads});
  auto* const bits = reinterpret_cast<uint8_t*>(a.out.bits);
  uint32_t visible = 0, hidden = 0, added = 0;
  for (int64_t first_row = row0 + threadIdx.x / kThreadsARow; first_row < end; first_row += kHeld * kStep) {
    Octet<kType> octet[kHeld];
    load_rows(octet, a.mask, from, first_row, kStep, end, key);
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int64_t row = first_row + i * kStep;
      if (row >= end) break;
      const Looks looks = look(octet[i]);
      visible |= ~looks.hidden & known;
      hidden |= looks.hidden & known;
      added |= looks.added & known;
      bits[((plane * a.mask.tokens + row) * a.k_tiles + k_tile) * kThreadsARow + part] =
          static_cast<uint8_t>(~looks.hidden & known);
    }
  }
  visible = __syncthreads_or(static_cast<int>(visible));
  hidden = __syncthreads_or(static_cast<int>(hidden));
  added = __syncthreads_or(static_cast<int>(added));
  if (threadIdx.x != 0) return;
  a.out.tiles[(plane * a.q_tiles + q_tile) * a.k_tiles + k_tile] = !visible ? TileState::kClosed
                                                                   : hidden ? TileState::kHides
                                                                   : added  ? TileState::kAdds
                                                                            : TileState::kOpen;
}

constexpr int kWholeThreads = 1024;

__global__ void __launch_bounds__(kWholeThreads) whole_mask_kernel(WholeMask mask, TileState* whole) {
  const bool open = mask.is_open();
  if (threadIdx.x == 0) *whole = open ? TileState::kOpen : TileState::kHides;
}

}  // namespace

void launch_mask_tiles(const View& mask, int block_q, const MaskTiles& out, cudaStream_t stream) {
  MaskArguments a{};
  View bytes = mask;
  if (mask.dtype == DType::kBool) bytes.dtype = DType::kI8;
  a.mask = make_tensor(bytes);
  a.heads = mask.heads();
  a.q_tiles = tiles_of(mask.tokens(), block_q);
  a.k_tiles = tiles_of(mask.channels(), kMaskTileKeys);
  a.block_q = block_q;
  a.out = out;
  launch_items(mask.batch() * a.heads * a.q_tiles * a.k_tiles, [&](int64_t first, unsigned blocks) {
    const auto launch = [&](auto kernel) { kernel<<<blocks, kThreads, 0, stream>>>(a, first); };
    switch (bytes.dtype) {
      case DType::kI8: return launch(mask_tiles_kernel<DType::kI8>);
      case DType::kF32: return launch(mask_tiles_kernel<DType::kF32>);
      case DType::kF16: return launch(mask_tiles_kernel<DType::kF16>);
      default: return launch(mask_tiles_kernel<DType::kBF16>);
    }
  });
}

void launch_whole_mask(const WholeMask& mask, TileState* whole, cudaStream_t stream) {
  whole_mask_kernel<<<1, kWholeThreads, 0, stream>>>(mask, whole);
  SAGE_CUDA(cudaGetLastError());
}

}  // namespace sage::cuda
