// CUDA kernel launchers: each enqueues on a stream, checks its launch and throws Error. kernels/stream.cu strings
// them together; views are checked tensors in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops.h"

namespace sage::cuda {

// Throws SAGE_DEVICE_ERROR (or SAGE_OUT_OF_MEMORY) with the CUDA error's name and description.
void check(cudaError_t status, const char* what, const char* file, int line);
#define SAGE_CUDA(call) ::sage::cuda::check((call), #call, __FILE__, __LINE__)

// ---- mean.cu: the mean of every block_rows rows, in the order that numerics.h fixes -----------------------
size_t mean_scratch_bytes(const View& x, int64_t block_rows);
void launch_mean(const View& x, const View& mean, int64_t block_rows, void* scratch, cudaStream_t stream);
// The same; `smoothed`, unless it is absent, receives what is left of x.
void launch_smooth(const View& x, const View& mean, int64_t block_rows, const View& smoothed, void* scratch,
                   cudaStream_t stream);

// ---- quantize.cu, dequantize.cu ----------------------------------------------------------------------------
// `not_finite`, where it is not null, receives one bit a row, [B, H, ceil(N / 32)] words: the row holds a value
// that is not finite. Its codes are then the marker of the format. Rows and channels of `codes` beyond x's (a
// padded workspace) are written as 0.
size_t quantize_scratch_bytes(const QuantizeOp& op);
void launch_quantize(const QuantizeOp& op, uint32_t* not_finite, void* scratch, cudaStream_t stream);
void launch_dequantize(const QuantizeOp& op, cudaStream_t stream);
// The same bits from INT8 codes that somebody else made.
void launch_find_not_finite(const View& codes, uint32_t* not_finite, cudaStream_t stream);

// ---- values.cu: V as the FP16 P.V product takes it --------------------------------------------------------
// v16 [B, H, N, >= Dv] = (v - mean) / scale, with a scale per channel; values that are not finite stay so. Padding
// channels are written as 0. `mean` may be absent. kF16: scales are powers of two, with |v16| <= range; kI8, kE4M3:
// v16 is a code of that type, the largest magnitude's is `range`. `not_finite`, where it is not null, receives one bit
// a token, as above.
size_t values_scratch_bytes(const View& v);
void launch_values(const View& v, const View& mean, DType codes, float range, const View& v16, const View& scales,
                   uint32_t* not_finite, void* scratch, cudaStream_t stream);

// ---- tile_values.cu: codes of V in tiles of 64 keys, a row for each channel, zeros beyond ---------------------
// In 16 keys those with one lane's scores come together: 0, 1, 8, 9, 2, 3, 10, 11, ...
// v: FP8 codes, or the FP16 numbers that they are, [B, H, N, D]. tiles [B, H, ceil(N / 64) * D', 64] of rows up to D'.
// FP16 numbers that are not finite become codes that no finite one has.
constexpr uint8_t kInfinityCode = 0xff, kMinusInfinityCode = 0x80, kNotANumberCode = 0x7f;
void launch_fp8_tiles(const View& v, const View& tiles, cudaStream_t stream);
// INT8 codes [B, H, N, Dv] as tiles [B, H, ceil(N / 64), rows, 64]; `not_finite` receives one bit a token, as above,
// and their codes are 0.
void launch_int8_tiles(const View& codes, int rows, void* tiles, uint32_t* not_finite, cudaStream_t stream);

// ---- masks.cu: which tiles of a mask need to be looked at -------------------------------------------------
enum class TileState : uint8_t { kClosed, kOpen, kAdds, kHides };  // kAdds: numbers, but all keys are visible

constexpr int kMaskTileKeys = 64;

struct MaskTiles {
  TileState* tiles;  // [B or 1, Hq or 1, ceil(Nq / block_q) or 1, ceil(Nk / 64)]; null: no mask
  uint64_t* bits;    // [B or 1, Hq or 1, Nq or 1, ceil(Nk / 64)]: visible keys
};
void launch_mask_tiles(const View& mask, int block_q, const MaskTiles& out, cudaStream_t stream);

// ---- attention.cu -----------------------------------------------------------------------------------------
void launch_flash(const AttentionOp& op, const MaskTiles& tiles, cudaStream_t stream);
// decode.cu: the same where plan.key_splits is not 0; takes decode_workspace_bytes().
void launch_decode(const AttentionOp& op, void* workspace, cudaStream_t stream);
// Quantized operands in the kernel's own layout, made by stream.cu with the launchers above.
struct SageOp {
  View q_raw, k_raw;  // what the codes were made of; absent where nobody knows
  View q, k;          // INT8 (plan.int4_products: pairs in bytes), channels padded with zeros to plan.padded_head_dim
  const uint32_t* q_not_finite;
  const uint32_t* k_not_finite;
  const uint32_t* v_not_finite;  // or null: that of V where P is rounded, so that it may be 0
  View q_scales, k_scales;       // f32 [B, H, groups, 1]
  View delta;  // absent, or f32 [B, Hq, ceil(Nq / delta_rows), Nk]: (rows subtracted from Q) . K^T, not yet times scale
  int64_t delta_rows;
  View v;                 // f16: numbers, or codes of INT8 or FP8; or tiles: plan.fp8_products, sage-int8
  DType v_dtype;          // of V as it was given
  View v_scales, v_mean;  // f32 [B, H, 1, Dv] or absent
  View o, lse;
  View lse_shift;  // absent, or f32 [B, Hq, Nq, 1]: added to lse (natural logarithm): scale * q . k_mean
  Masking masking;
  MaskTiles mask_tiles;  // where there is a mask
  bool causal;           // masking.after == 0
  float scale;           // of codes
  Plan plan;
  // Beyond the papers, and for kernel sage-int8:
  View v_raw;         // V as it was given: numbers, or INT8 codes
  View first_scores;  // absent, or f32 [B, Hq, Nq, 1]: scale * q . (first key), which is then apart from the others
  View k_mean;        // f32 [B, Hkv, means, D], where the plan has a band or means of tiles of keys
};
void launch_sage(const SageOp& op, cudaStream_t stream);

// ---- row_products.cu: the corrections of smoothed queries and of lse, in f32 ---------------------------------
// Rows x * scale + mean or x * scale - mean: numbers, or INT8 codes with the scales of their groups.
struct ProductOperand {
  View x;
  View scales;  // absent, or f32 [B, H, groups, 1]
  Grouping grouping;
  int64_t group_rows;
  View mean;  // absent, or f32 [B, H, ceil(N / mean_rows), D]
  int64_t mean_rows;
  bool add_mean;  // else subtract
};
// out[b, h, i, j] = factor * rows[b, h, i, :] . columns[b, h / group, j, :], out f32 [B, Hq, rows, columns].
void launch_row_products(const ProductOperand& rows, const ProductOperand& columns, float factor, const View& out,
                         cudaStream_t stream);

// ---- pack.cu: f32 or INT8, copied; INT4 as INT8; INT8 or FP8 codes as the FP16 numbers that they are -----------
// Rows and channels of `to` beyond those of `from` are zeros.
void launch_pack(const View& from, const View& to, cudaStream_t stream);

}  // namespace sage::cuda
