// The CPU device's inner work: one function a kind of task, compiled once for every instruction set.
#pragma once

#include "../ops.h"

namespace sage::cpu {

constexpr int kQueryTile = 128;  // query rows of one attention task
constexpr int kKeyTile = 64;     // keys that are packed together
constexpr int kMaxChannels = 256;
constexpr int kChannelPad = 16;     // channels of packed values come in whole vectors of every instruction set
constexpr int kSliceChannels = 64;  // channels of one task that runs over all tokens
constexpr int kSpanRows = 64;       // rows of one task that needs no other rows

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One attention call as its tasks see it. Views of what is absent have no data.
struct Attention {
  Kernel kernel;
  Masking masking;
  bool f16_accumulator;
  bool fast_exponential;
  float scale;
  float p_range;  // the code of probability 1
  bool rotated;   // codes are those of rotated rows
  bool band;
  bool first_token;
  View q, k, v;  // the caller's, numbers or codes: what is exact where codes hold no number
  View o, lse;
  View q_codes, q_scales;  // i8 or i4, with f32 scales [B, H, groups, 1]
  View k_codes, k_scales;
  Grouping q_grouping, k_grouping;
  int64_t q_group_rows, k_group_rows;
  View q_mean;  // its product with the keys is added to the scores
  int64_t q_mean_rows;
  View k_mean;  // its product with the queries is added to lse
  int64_t k_mean_rows;
  bool many_k_means;      // it has many rows, and their products with the queries are added to the scores
  View values;            // what is packed: v, or codes of it
  View v_scales, v_mean;  // of the packed values: the output is sum * scale + mean
  bool center_values;     // packing subtracts v_mean
  // Packed by tiles of kKeyTile keys, every tensor [B, KV heads, tiles]:
  char* key_tiles;
  size_t key_tile_bytes;
  float* key_scales;   // one a key
  float* exact_keys;   // with q_mean or a band: keys less their mean, [D, kKeyTile] a tile
  uint64_t* bad_keys;  // one bit a key: its codes hold no number
  char* value_tiles;
  size_t value_tile_bytes;
  float* exact_values;   // with a band: what value tiles are codes of
  uint64_t* bad_values;  // one bit a key: some of its values are not finite
  float* value_peaks;    // flash: the largest finite magnitude of a tile
  uint8_t* covers;       // with a mask: a byte for every row of it and tile of keys
  char* scratch;         // scratch_bytes for every worker
  size_t scratch_bytes;

  bool integer_values() const { return kernel == Kernel::kSage1Int8 || kernel == Kernel::kSageInt8; }
  bool keeps_queries() const { return band || first_token || many_k_means; }  // beside their codes
  int64_t tiles() const { return ceil_div(k.tokens(), kKeyTile); }
  int64_t query_tiles() const { return ceil_div(q.tokens(), kQueryTile); }
  // Covers come in blocks [tiles, rows], one for kQueryTile rows of the mask.
  int64_t cover_rows() const { return masking.mask.tokens() == 1 ? 1 : kQueryTile; }
  int64_t cover_blocks() const { return ceil_div(masking.mask.tokens(), kQueryTile); }  // of a head
  int64_t cover_tasks() const { return masking.mask.batch() * masking.mask.heads() * cover_blocks(); }
  int64_t padded_v_dim() const { return round_up(v.channels(), kChannelPad); }
};

struct Kernels {
  const char* name;
  int code_bytes;  // of one INT8 code in a packed tile

  void (*mean)(const SmoothOp&, int64_t task);
  void (*subtract_mean)(const SmoothOp&, int64_t task);
  void (*quantize_rows)(const QuantizeOp&, int64_t task);
  void (*quantize_channels)(const QuantizeOp&, int64_t task);
  void (*dequantize)(const QuantizeOp&, int64_t task);
  void (*scale_values)(const Attention&, int64_t task);  // sage1: v_scales from v
  void (*pack_keys)(const Attention&, int64_t task);
  void (*pack_values)(const Attention&, int64_t task);
  void (*cover_mask)(const Attention&, int64_t task);  // which tiles a mask opens and closes
  void (*attend)(const Attention&, int64_t task, int worker);
  size_t (*scratch_bytes)(const Attention&);  // of one worker of attend
};

// How many tasks each has.
int64_t mean_tasks(const SmoothOp& op);
int64_t subtract_mean_tasks(const SmoothOp& op);
int64_t quantize_tasks(const QuantizeOp& op);
int64_t dequantize_tasks(const QuantizeOp& op);

// quantize_rows or quantize_channels.
void quantize_task(const QuantizeOp& op, int64_t task);

const Kernels& kernels();  // the best that this processor runs

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx2VnniKernels, kAvx512Kernels, kAvx512VnniKernels;
#endif

}  // namespace sage::cpu
