// A bool mask as the kernels of sm_90a look at it: closed tiles are skipped, open ones taken as if there were no mask.
#pragma once

#include "../whole_mask.cuh"

namespace sage::cuda::sm90 {

struct TileMask {
  const TileState* tiles;     // of kMaskTileKeys keys: [planes, query blocks or 1, columns]; null: there is no mask
  const uint64_t* bits;       // visible keys: [planes, queries or 1, columns]
  int batch_step, head_step;  // of planes
  int rows, q_blocks;         // of a plane; 1: the same for all
  int columns;

  __device__ __forceinline__ int plane(int batch, int head) const { return batch * batch_step + head * head_step; }

  __device__ __forceinline__ TileState at(int plane, int q_block, int column) const {
    return tiles[(int64_t{plane} * q_blocks + min(q_block, q_blocks - 1)) * columns + column];
  }

  // Of kKeys keys: where all of their tiles are closed, or open, so are they.
  template <int kKeys>
  __device__ __forceinline__ TileState state(int plane, int q_block, int tile) const {
    static_assert(kKeys % kMaskTileKeys == 0, "tiles of keys are whole tiles of the mask");
    constexpr int kParts = kKeys / kMaskTileKeys;
    const TileState* const row = tiles + (int64_t{plane} * q_blocks + min(q_block, q_blocks - 1)) * columns;
    bool closed = true, open = true;
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const int column = tile * kParts + part;
      if (column >= columns) break;
      closed = closed && row[column] == TileState::kClosed;
      open = open && row[column] == TileState::kOpen;
    }
    return closed ? TileState::kClosed : open ? TileState::kOpen : TileState::kHides;
  }

  // Columns of a row: of kMaskTileKeys keys, a bit each.
  __device__ __forceinline__ const uint64_t* row(int plane, int row) const {
    return bits + (int64_t{plane} * rows + min(row, rows - 1)) * columns;
  }

  // One of them; none beyond the last.
  __device__ __forceinline__ uint64_t visible(int plane, int row, int column) const {
    return column < columns ? this->row(plane, row)[column] : 0;
  }
};

// Where looking costs little beside the work: a launch takes microseconds, and every block reads all tiles.
inline WholeMask make_whole_mask(const View& mask, const MaskTiles& tiles, int block_q, double scores) {
  constexpr double kLeastScores = 1 << 27;
  constexpr int64_t kMostTiles = 1 << 18;
  const int64_t count = count_mask_tiles(mask, block_q);
  if (scores < kLeastScores || count > kMostTiles) return {};
  return {tiles.tiles, static_cast<int>(count)};
}

inline TileMask make_tile_mask(const View& mask, const MaskTiles& tiles, int block_q) {
  TileMask out{};
  if (!mask) return out;
  out.tiles = tiles.tiles;
  out.bits = tiles.bits;
  out.batch_step = mask.batch() > 1 ? static_cast<int>(mask.heads()) : 0;
  out.head_step = mask.heads() > 1 ? 1 : 0;
  out.rows = static_cast<int>(mask.tokens());
  out.q_blocks = (out.rows + block_q - 1) / block_q;
  out.columns = static_cast<int>((mask.channels() + kMaskTileKeys - 1) / kMaskTileKeys);
  return out;
}

}  // namespace sage::cuda::sm90
