/* Sage Attention: the C ABI. Plain C11; usable without Deno.
 *
 * Every function returns a sage_status and, when that is not SAGE_OK, writes one sentence into `error`
 * (NUL-terminated, cut to `error_size`; both may be 0), followed by a newline and the place it was noticed.
 * No function throws, aborts or prints. All functions may be called from any thread.
 *
 * Device work is stream-ordered: a call that takes a stream checks its arguments, enqueues and returns.
 * Memory is only read or written by calls on the stream it is used with; sage_memory_read waits.
 * Every tensor must lie inside one live allocation of sage_memory_allocate; anything else is refused.
 */
#ifndef SAGE_H
#define SAGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef SAGE_API
#if defined(SAGE_BUILD) && defined(__GNUC__)
#define SAGE_API __attribute__((visibility("default")))
#else
#define SAGE_API
#endif
#endif

/* Raised whenever a struct or a function below changes in a way an older caller would misread. */
#define SAGE_ABI_VERSION 3u

typedef int32_t sage_status;
enum {
  SAGE_OK = 0,
  SAGE_INVALID_ARGUMENT = 1, /* the caller's mistake: nothing was launched */
  SAGE_UNSUPPORTED = 2,      /* a valid request that this device or build cannot run */
  SAGE_OUT_OF_MEMORY = 3,    /* nothing was allocated; smaller calls still work */
  SAGE_NO_DEVICE = 4,        /* no such device, no NVIDIA driver, or the driver is too old */
  SAGE_DEVICE_ERROR = 5,     /* the device failed; it says so on every later call */
  SAGE_INTERNAL = 6          /* a defect of this library */
};

/* Device numbers: the CPU device, or a CUDA ordinal >= 0. */
#define SAGE_CPU (-1)

/* sage_tensor.dtype */
enum {
  SAGE_F32 = 0,
  SAGE_F16 = 1,
  SAGE_BF16 = 2,
  SAGE_I8 = 3,   /* codes in [-127, 127]; -128 marks a value that was not finite */
  SAGE_I4 = 4,   /* codes in [-7, 7], channel 2i in the low half of byte i; -8 marks a value that was not finite */
  SAGE_E4M3 = 5, /* FP8 e4m3fn codes; 0x7f and 0xff are NaN */
  SAGE_BOOL = 6  /* one byte: 0, or anything else for true */
};

/* A strided tensor [batch, heads, tokens, channels]. Strides count elements and may be anything that keeps
 * written elements apart; layouts HND and NHD differ in strides only. SAGE_I4 rows need channel stride 1, even
 * other strides and whole bytes a row. `data` is 0 where an optional tensor is absent. */
typedef struct sage_tensor {
  uint64_t data;
  int32_t dtype;
  int32_t device;
  int64_t shape[4];
  int64_t stride[4];
} sage_tensor;

/* Kernels. */
enum {
  SAGE_KERNEL_AUTO = 0,
  SAGE_KERNEL_FLASH = 1,      /* Q.K and P.V in the tensors' own type */
  SAGE_KERNEL_SAGE1 = 2,      /* INT8 Q.K, FP16 P.V */
  SAGE_KERNEL_SAGE1_INT8 = 3, /* INT8 Q.K, INT8 P.V */
  SAGE_KERNEL_SAGE2 = 4,      /* INT8 Q.K, FP8 P.V */
  SAGE_KERNEL_SAGE2_INT4 = 5, /* INT4 Q.K, FP8 P.V */
  SAGE_KERNEL_SAGE2PP = 6,    /* INT8 Q.K, FP8 P.V accumulated in FP16 */
  SAGE_KERNEL_SAGE_INT8 = 7   /* INT8 Q.K, P in unsigned INT8 scaled by row and key tile, V in INT8 */
};

/* Granularity: which values share one scale. */
enum {
  SAGE_GRANULARITY_DEFAULT = 0,
  SAGE_GRANULARITY_TOKEN = 1,  /* every row */
  SAGE_GRANULARITY_BLOCK = 2,  /* runs of group_rows rows; default 128 for queries, 64 for keys */
  SAGE_GRANULARITY_WARP = 3,   /* the same; default 32 for queries, 64 for keys */
  SAGE_GRANULARITY_THREAD = 4, /* SageAttention2, Eq. 8: queries, rows {w*W + 8i + t}, t = 0..7, W = 32;
                                  keys, rows {b*W + 8i + 2t, +1}, t = 0..3, W = 64; W = group_rows */
  SAGE_GRANULARITY_CHANNEL = 5 /* every channel over all tokens: values */
};

enum { SAGE_DEFAULT = 0, SAGE_OFF = 1, SAGE_ON = 2 }; /* smoothing switches */
enum { SAGE_ACCUMULATOR_DEFAULT = 0, SAGE_ACCUMULATOR_F32 = 1, SAGE_ACCUMULATOR_F16 = 2 };

/* How kernel SAGE2 turns scores into FP8 codes of P. FAST replaces exp2 and rounding by one integer multiplication:
 * P's rms error grows from 2.66 % to 3.15 %. */
enum { SAGE_EXPONENTIAL_DEFAULT = 0, SAGE_EXPONENTIAL_EXACT = 1, SAGE_EXPONENTIAL_FAST = 2 };

enum { SAGE_OPERAND_QUERY = 0, SAGE_OPERAND_KEY = 1, SAGE_OPERAND_VALUE = 2 };

/* What SageAttention2++ narrows P and V to, so that FP16 can hold the sums: (largest P, largest V). */
enum { SAGE_RANGE_DEFAULT = 0, SAGE_RANGE_448_2 = 1, SAGE_RANGE_224_4 = 2, SAGE_RANGE_112_9 = 3 };

/* Where the diagonal lies, that causal masks, windows and ALiBi count from: query i stands at key i + offset. */
enum {
  SAGE_ALIGN_BOTTOM_RIGHT = 0, /* offset = Nk - Nq: the last query stands at the last key */
  SAGE_ALIGN_TOP_LEFT = 1      /* offset = 0 */
};

typedef struct sage_build_info {
  uint32_t size; /* in: sizeof(sage_build_info) */
  uint32_t abi_version;
  int32_t cuda_version; /* toolkit, 13000 for 13.0; 0 for a CPU-only build */
  uint32_t debug;
  char version[32];
  char architectures[128]; /* "80 90a", space-separated; "" for a CPU-only build */
  char source_hash[72];    /* SHA-256 of the sources, in hexadecimal */
} sage_build_info;

typedef struct sage_device_info {
  uint32_t size; /* in: sizeof(sage_device_info) */
  int32_t device;
  int32_t compute_capability; /* 90 for sm_90; 0 for the CPU */
  int32_t multiprocessors;    /* or CPU threads */
  int32_t clock_khz;          /* highest; 0 where unknown */
  int32_t driver_version;     /* 13000 for 13.0; 0 for the CPU */
  uint64_t memory_bytes;
  uint64_t free_bytes;
  char name[128];
  char features[128]; /* "sm_90a" or "avx512 vnni" */
} sage_device_info;

typedef struct sage_memory_stats {
  uint32_t size; /* in: sizeof(sage_memory_stats) */
  uint32_t streams;
  uint64_t allocations; /* live allocations of sage_memory_allocate */
  uint64_t bytes;
  uint64_t peak_bytes;
} sage_memory_stats;

typedef struct sage_smooth_call {
  uint32_t size;       /* in: sizeof(sage_smooth_call) */
  uint32_t block_rows; /* 0: one mean over all tokens; else one for every block_rows rows (queries: 128) */
  uint64_t stream;
  sage_tensor x;        /* [B, H, N, D] f32, f16 or bf16 */
  sage_tensor mean;     /* written: [B, H, 1 or ceil(N / block_rows), D] f32; values that are not finite do not count */
  sage_tensor smoothed; /* optional, written: x - mean, [B, H, N, D] f32, f16 or bf16 */
} sage_smooth_call;

/* sage_quantize reads x (and mean) and writes codes and scales; sage_dequantize reads codes, scales (and mean)
 * and writes x. The code format is codes.dtype. x is approximated by code * scale + mean. */
typedef struct sage_quantize_call {
  uint32_t size;       /* in: sizeof(sage_quantize_call) */
  int32_t granularity; /* not DEFAULT */
  uint64_t stream;
  int32_t operand;     /* sets the default group_rows and, per thread, the rows of a group */
  uint32_t group_rows; /* 0: the default; ignored per token and per channel */
  uint32_t mean_rows;  /* rows that share one row of mean; 0: all */
  float range;         /* e4m3: the code value that the largest magnitude maps to; 0: 448 */
  int32_t takes_mean;  /* 1: sage_quantize takes the mean of x, as sage_smooth does, and writes it; 0: mean is read */
  uint32_t reserved;
  sage_tensor x;      /* [B, H, N, D] f32, f16 or bf16 */
  sage_tensor mean;   /* optional where it is read: [B, H, 1 or ceil(N / mean_rows), D] f32, subtracted first */
  sage_tensor codes;  /* [B, H, N, D] i8, i4 or e4m3 */
  sage_tensor scales; /* f32: [B, H, groups, 1], or per channel [B, H, 1, D] */
} sage_quantize_call;

typedef struct sage_attention_options {
  int32_t kernel;
  int32_t causal;      /* 0 or 1; query i sees keys j <= i + offset */
  float scale;         /* softmax scale, positive; 0: 1/sqrt(D) */
  int32_t granularity; /* of Q and K */
  int32_t smooth_q;    /* subtract the mean of every 128 query rows, with its exact correction */
  int32_t smooth_k;    /* subtract the mean over tokens */
  int32_t smooth_v;
  int32_t pv_accumulator; /* sage1 */
  int32_t pv_range;       /* sage2++ */
  int32_t exponential;    /* FAST: sage2 */
  int32_t alignment;
  int32_t windowed;      /* 0 or 1; query i sees keys i + offset - window_before <= j <= i + offset + window_after */
  int64_t window_before; /* -1: no limit */
  int64_t window_after;
  float softcap;        /* 0: none; scores become softcap * tanh(score / softcap) before anything is added to them */
  int32_t rotate;       /* Q and K by a Hadamard matrix with random signs before they are quantized; exact */
  int32_t band;         /* causal: the first key tile and those on the diagonal as kernel FLASH computes them */
  int32_t first_token;  /* the first key as kernel FLASH computes it */
  uint32_t k_mean_rows; /* keys that share a mean where smooth_k; 0: all */
  int32_t reserved;
} sage_attention_options;

/* sage_attention, sage_flash_attention, sage_explain. Shapes: q [B, Hq, Nq, D], k [B, Hkv, Nk, D],
 * v [B, Hkv, Nk, Dv], o [B, Hq, Nq, Dv], lse [B, Hq, Nq, 1] f32; Hq a multiple of Hkv; 1 <= D, Dv <= 256.
 * q, k, v share one dtype (f32, f16 or bf16); o is any of the three. */
typedef struct sage_attention_call {
  uint32_t size; /* in: sizeof(sage_attention_call) */
  uint32_t reserved;
  uint64_t stream;
  sage_attention_options options;
  sage_tensor q, k, v;
  sage_tensor o;     /* written */
  sage_tensor lse;   /* optional, written: natural logarithm of the softmax denominator; -inf for a fully masked row;
                        sage_explain: asked for where it has a shape */
  sage_tensor mask;  /* optional: [B or 1, Hq or 1, Nq or 1, Nk], bool (true: visible) or f32, f16, bf16 (added) */
  sage_tensor sinks; /* optional: f32 [1, Hq, 1, 1]: logits that count in the softmax denominator alone */
  sage_tensor alibi; /* optional: f32 [B or 1, Hq, 1, 1]: slope * -|i + offset - j| is added to the scores */
} sage_attention_call;

/* Attention on what sage_quantize made. options.granularity is that of Q and K; smoothing switches must be
 * DEFAULT (a mean that is present was subtracted). With q_mean, the correction uses the dequantized keys. */
typedef struct sage_attention_quantized_call {
  uint32_t size; /* in: sizeof(sage_attention_quantized_call) */
  uint32_t reserved;
  uint64_t stream;
  sage_attention_options options; /* kernel not AUTO and not FLASH */
  uint32_t q_group_rows;          /* as in sage_quantize_call */
  uint32_t k_group_rows;
  uint32_t q_mean_rows; /* rows that share one row of q_mean; 0: all */
  uint32_t reserved2;
  sage_tensor q, q_scales, q_mean; /* i8 or i4; f32; optional f32 */
  sage_tensor k, k_scales, k_mean; /* k_mean is optional and only moves lse */
  sage_tensor v, v_scales, v_mean; /* sage1: f16 or bf16 or f32 without scales; otherwise codes with channel scales */
  sage_tensor o, lse;
} sage_attention_quantized_call;

/* What sage_attention would do with a call whose tensors may have data = 0. */
typedef struct sage_plan {
  uint32_t size; /* in: sizeof(sage_plan) */
  int32_t kernel;
  int32_t architecture; /* the oldest that has the kernel's instructions, 80, 89 or 90; 0 for the CPU */
  int32_t granularity;
  int32_t smooth_q, smooth_k, smooth_v; /* SAGE_OFF or SAGE_ON */
  int32_t pv_accumulator;
  int32_t pv_range;
  int32_t block_q, block_k; /* query rows and keys of a tile */
  int32_t padded_head_dim;
  uint64_t workspace_bytes;
  char implementation[64];           /* "cpu avx512", "sm_80 mma" */
  char reason[256];                  /* why this kernel, one sentence */
  int32_t exponential;               /* SAGE_EXPONENTIAL_EXACT or FAST */
  int32_t rotate, band, first_token; /* SAGE_OFF or SAGE_ON */
  uint32_t k_mean_rows;
  int32_t reserved;
} sage_plan;

/* A part of an operation, such as "quantize" or "attention", and how long it took on the device. */
typedef struct sage_stage {
  char name[32];
  float ms;
} sage_stage;

SAGE_API uint32_t sage_abi_version(void);
SAGE_API sage_status sage_build_describe(sage_build_info *info, char *error, size_t error_size);

/* How many CUDA devices can be used. SAGE_NO_DEVICE, with the reason, where there is none. */
SAGE_API sage_status sage_cuda_device_count(int32_t *count, char *error, size_t error_size);
SAGE_API sage_status sage_device_describe(int32_t device, sage_device_info *info, char *error, size_t error_size);

/* A queue of work on a device. Destroying it waits for the work. */
SAGE_API sage_status sage_stream_create(int32_t device, uint64_t *stream, char *error, size_t error_size);
/* The same, with the attention kernels that GPUs of an older compute capability get: 80, 89 (where this device and what
 * the library was compiled for have its instructions) or the device's own; 0: its own. The CPU has none but 0. */
SAGE_API sage_status sage_stream_create_for(int32_t device, int32_t architecture, uint64_t *stream, char *error,
                                            size_t error_size);
SAGE_API sage_status sage_stream_destroy(uint64_t stream, char *error, size_t error_size);
SAGE_API sage_status sage_stream_synchronize(uint64_t stream, char *error, size_t error_size);
/* The same without an error buffer, for callers that wait on another thread; ask again for the sentence. */
SAGE_API sage_status sage_stream_wait(uint64_t stream);
/* *idle = 1 when all work is done. */
SAGE_API sage_status sage_stream_query(uint64_t stream, int32_t *idle, char *error, size_t error_size);

/* Stream-ordered memory: usable by later calls on this stream; on others after a synchronization. */
SAGE_API sage_status sage_memory_allocate(uint64_t stream, uint64_t bytes, uint64_t *address, char *error,
                                          size_t error_size);
SAGE_API sage_status sage_memory_free(uint64_t stream, uint64_t address, char *error, size_t error_size);
/* Host to device; `source` may be reused on return. */
SAGE_API sage_status sage_memory_write(uint64_t stream, uint64_t address, const void *source, uint64_t bytes,
                                       char *error, size_t error_size);
/* Device to host; waits for the stream. */
SAGE_API sage_status sage_memory_read(uint64_t stream, void *target, uint64_t address, uint64_t bytes, char *error,
                                      size_t error_size);
SAGE_API sage_status sage_memory_copy(uint64_t stream, uint64_t target, uint64_t source, uint64_t bytes, char *error,
                                      size_t error_size);
SAGE_API sage_status sage_memory_fill(uint64_t stream, uint64_t address, uint8_t value, uint64_t bytes, char *error,
                                      size_t error_size);
SAGE_API sage_status sage_memory_describe(int32_t device, sage_memory_stats *stats, char *error, size_t error_size);

/* Points in a stream, to time what lies between two of them. */
SAGE_API sage_status sage_event_create(uint64_t stream, uint64_t *event, char *error, size_t error_size);
SAGE_API sage_status sage_event_record(uint64_t event, uint64_t stream, char *error, size_t error_size);
/* Waits for `end`. */
SAGE_API sage_status sage_event_elapsed(uint64_t begin, uint64_t end, float *milliseconds, char *error,
                                        size_t error_size);
SAGE_API sage_status sage_event_destroy(uint64_t event, char *error, size_t error_size);

/* on = 1: the stages of operations enqueued from now on are timed, until on = 0, which forgets them. Timing one
 * takes a little memory and time; a stream that is not traced spends neither. */
SAGE_API sage_status sage_stream_trace(uint64_t stream, int32_t on, char *error, size_t error_size);
/* Waits for the stream. *count is how many stages there are so far, in order; the first `capacity` are written to
 * `stages`, which may be 0 where capacity is. */
SAGE_API sage_status sage_stream_read_trace(uint64_t stream, sage_stage *stages, uint64_t capacity, uint64_t *count,
                                            char *error, size_t error_size);

SAGE_API sage_status sage_smooth(const sage_smooth_call *call, char *error, size_t error_size);
SAGE_API sage_status sage_quantize(const sage_quantize_call *call, char *error, size_t error_size);
SAGE_API sage_status sage_dequantize(const sage_quantize_call *call, char *error, size_t error_size);
SAGE_API sage_status sage_attention(const sage_attention_call *call, char *error, size_t error_size);
SAGE_API sage_status sage_attention_quantized(const sage_attention_quantized_call *call, char *error,
                                              size_t error_size);
/* Sequences of different lengths, one after the other in the tokens of q and k: batch 1, queries q_starts[s] to
 * q_starts[s + 1] - 1 see keys k_starts[s] to k_starts[s + 1] - 1, each sequence with means, scales and a diagonal of
 * its own. Both arrays hold sequences + 1 rising numbers, from 0 to all tokens, and are read before the call returns.
 */
SAGE_API sage_status sage_attention_varlen(const sage_attention_call *call, const int64_t *q_starts,
                                           const int64_t *k_starts, uint64_t sequences, char *error, size_t error_size);
/* sage_attention with kernel FLASH; any other kernel named in the options is refused. */
SAGE_API sage_status sage_flash_attention(const sage_attention_call *call, char *error, size_t error_size);
SAGE_API sage_status sage_explain(const sage_attention_call *call, sage_plan *plan, char *error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
