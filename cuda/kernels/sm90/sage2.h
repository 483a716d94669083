// sage2 on sm_90a: what its packers write, its attention kernel reads and its repair mends. Host-only parts are pure:
// plans use them too.
#pragma once

#include "../../ops.h"

struct CUstream_st;

namespace sage::cuda {
enum class TileState : uint8_t;
}

namespace sage::cuda::sm90 {

// ---- tiles ------------------------------------------------------------------------------------------------------

constexpr int kBlockM = 128;  // query rows of a block: 64 for each of two warpgroups

struct Sage2Tiles {
  int block_n;  // keys of a tile
  int v_width;  // tokens of a chunk of V: its rows have as many bytes
};

constexpr Sage2Tiles sage2_tiles(int padded_head_dim, bool fast_exponential, bool band) {
  if (padded_head_dim == 64) return fast_exponential || band ? Sage2Tiles{192, 64} : Sage2Tiles{256, 128};
  return {128, 128};
}

constexpr int kShiftsOfPeak = 16;  // that share a largest magnitude

// Channels of Q and K lie in panels of so many bytes.
constexpr int panel_width(int padded_head_dim) { return padded_head_dim < 128 ? padded_head_dim : 128; }

// ---- packed operands --------------------------------------------------------------------------------------------
//
// Planes count batches and heads: b * heads + h. Rows, tokens and channels beyond the tensor are zeros (codes) or ones
// (scales). A chunk is 16 bytes; chunk i of row r of a tile lies where chunk i ^ swizzle(r) would, with swizzle
// r & 7 for rows of 128 bytes and (r >> 1) & 3 for rows of 64, as wgmma reads them.
//
// Every value that is not finite gets code 0 and is flagged; repair_sage2 puts in what exact arithmetic makes of it.
struct Sage2Packed {
  int8_t* q;         // [Hq planes][query blocks][panels][kBlockM][panel_width]
  float* q_scales;   // [Hq planes][query blocks * 8][8]: of rows g and g + 8 of 16 rows; holds scale * log2(e)
  uint32_t* q_bits;  // [Hq planes][query blocks * 4]: one bit a row, set where a value is not finite
  int8_t* k;         // [Hkv planes][tiles][panels][block_n][panel_width], less k_mean
  float* k_scales;   // [Hkv planes][tiles][4]: scale t is that of keys 8i + 2t and 8i + 2t + 1
  uint32_t* k_bits;  // [Hkv planes][tiles * block_n / 32]: one bit a key, set where a value is not finite
  uint8_t*
      v;  // [Hkv planes][tiles * block_n / v_width][padded_head_dim][v_width], e4m3, less v_mean but in the first tile
  float* v_scales;   // [Hkv planes][padded_head_dim], powers of two
  uint32_t* v_bits;  // as k_bits
  float*
      v_peaks;  // [Hkv planes][padded_head_dim], for the packers alone: scales of channels whose own came out too small
  uint32_t* flags;      // [Hkv planes]: of the constants below
  uint32_t* next_item;  // one word, 0: packing clears it, attention counts
  float* q_mean;        // [Hq planes][query blocks][D], of each block, or null
  float* k_mean;        // [Hkv planes][D] or null
  float* v_mean;        // [Hkv planes][padded_head_dim]
  // Where queries are smoothed: what that takes from the scores of a block with a key, base 2, finite. Keys are
  // permuted within every 16: position 4c + e (c, e = 0..3) holds key 2c + (e & 1) + 8 * (e >> 1).
  float* shifts;       // [Hq planes][query blocks][tiles * block_n]
  float* shift_peaks;  // [Hq planes][query blocks][tiles * block_n / 16]: largest magnitudes
};
// V's tokens are permuted within every 32, so that the fragment of scores, packed to bytes, is the fragment of P:
// position 4c + e (c, e = 0..3) holds token 2c + (e & 1) + 8 * (e >> 1), position 16 + 4c + e the one 16 further.

// V's channels are centred where their mean is significant, as any constant is an exact shift, and FP8 products of
// values of one sign are summed badly; but for the first tile (unless V is to be smoothed whole): causal models put
// much weight on a first token whose values are small.
//
// V's scales make the root mean square of a channel's codes (in a long context: of a sample of its tokens) this, within
// a factor of sqrt(2), as they are powers of two: far from both ends of e4m3, which is a float.
constexpr float kValueRms = 2.0f;
// Where products with V are summed in FP16, weights of P are at most kHalfWeightRange, and magnitudes of a tile's codes
// of V in a channel add up to half_value_sum() at most, so that a tile comes to 44800 (57344 with 256 keys), and leaves
// room for others. In a long context, whose sums are known too late for its scales, their root mean square is
// 128 / block_n.
constexpr float kHalfWeightRange = 112.0f;
constexpr float kHalfValueRange = 9.0f;
constexpr float half_value_sum(int block_n) { return block_n == 256 ? 512.0f : 400.0f; }
constexpr uint32_t kKeyFlag = 1;          // a key is not finite
constexpr uint32_t kValueFlag = 1 << 16;  // a value is not finite
constexpr uint32_t kRangeFlag = 2 << 16;  // for the packers alone: v_peaks are not all zeros

struct Sage2Op {
  View q, k, v, o, lse;  // as given; lse may be absent
  bool adds_lse;         // to what lse holds: scale * q . k_mean
  Sage2Packed packed;
  Masking masking;  // its window and mask alone
  bool causal;
  float scale;
  Plan plan;
  TileState* mask_tiles;  // as in MaskTiles, of kBlockM rows; where there is a mask
  uint64_t* mask_bits;
};

// Means (in a long context: of a sample of the tokens), scales, codes, bits and flags, in one pass over Q, K and V.
// Codes of Q and K are at most `range`. Where queries are smoothed, q_mean must be there.
void launch_sage2_pack(const Sage2Op& op, CUstream_st* stream);
// After packing, where queries are smoothed: packed.shifts.
void launch_sage2_shifts(const Sage2Op& op, CUstream_st* stream);
void launch_sage2_attention(const Sage2Op& op, CUstream_st* stream);
// Where plan.band.
void launch_band_d64(const Sage2Op& op, CUstream_st* stream);
void launch_band_d128(const Sage2Op& op, CUstream_st* stream);
void launch_band_d256(const Sage2Op& op, CUstream_st* stream);
// Rows that see something that is not finite.
void launch_sage2_repair(const Sage2Op& op, CUstream_st* stream);

}  // namespace sage::cuda::sm90
