/* The C ABI from plain C: whole attention on the CPU device, and on CUDA device 0 where there is one, besides
 * lifecycles and errors. Prints a line for every check that fails; the exit status says whether any did. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sage.h"

static int failures = 0, checks = 0;
static char error[512];

static void check(int good, const char *what, int line) {
  ++checks;
  if (good) return;
  ++failures;
  printf("abi.c:%d: %s (last message: %s)\n", line, what, error);
}
#define CHECK(condition) check((condition), #condition, __LINE__)
#define OK(call) CHECK((call) == SAGE_OK)
#define REFUSED(call, status, words) (CHECK((call) == (status)), CHECK(strstr(error, (words)) != NULL))
#define E error, sizeof error

/* ---- a small problem: values that f16 holds exactly --------------------------------------------------- */

enum { B = 2, HQ = 4, HKV = 2, NQ = 70, NK = 130, D = 24, DV = 40 };
enum { Q_COUNT = B * HQ * NQ * D, K_COUNT = B * HKV * NK * D, V_COUNT = B * HKV * NK * DV, O_COUNT = B * HQ * NQ * DV };
enum { LSE_COUNT = B * HQ * NQ };

static float q[Q_COUNT], k[K_COUNT], v[V_COUNT], o[O_COUNT], lse[LSE_COUNT], want_o[O_COUNT], want_lse[LSE_COUNT];

static void randomize(float *values, int count, uint32_t seed) {
  for (int i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = ((float)(seed >> 22) - 512.0f) / 256.0f;
  }
}

/* Multiples of 1/256 below 2 in magnitude, and their exact f16 code. */
static uint16_t to_f16(float x) {
  int exponent;
  if (x == 0) return 0;
  const float fraction = frexpf(fabsf(x), &exponent); /* in [1/2, 1) */
  const uint32_t mantissa = (uint32_t)(fraction * 2048.0f) - 1024u;
  return (uint16_t)((x < 0 ? 0x8000u : 0u) | (uint32_t)(exponent + 14) << 10 | mantissa);
}

/* What a call masks, on the host. */
typedef struct masks {
  const uint8_t *mask; /* [NQ, NK], or 0 */
  const float *sinks;  /* [HQ], or 0 */
  const float *alibi;
} masks;

static void reference(const sage_attention_options *options, const masks *masks, double scale) {
  static double weight[NK];
  const int offset = options->alignment == SAGE_ALIGN_TOP_LEFT ? 0 : NK - NQ;
  for (int row = 0; row < B * HQ * NQ; ++row) {
    const int i = row % NQ, h = row / NQ % HQ, kv = row / NQ / HQ * HKV + h / (HQ / HKV);
    double sum = masks->sinks ? exp(masks->sinks[h]) : 0;
    for (int j = 0; j < NK; ++j) {
      const int ahead = j - i - offset;
      double dot = 0;
      for (int d = 0; d < D; ++d) dot += (double)q[row * D + d] * k[(kv * NK + j) * D + d];
      dot *= scale;
      if (options->softcap != 0) dot = options->softcap * tanh(dot / options->softcap);
      if (masks->alibi) dot -= masks->alibi[h] * abs(ahead);
      weight[j] = exp(dot);
      if (options->causal && ahead > 0) weight[j] = 0;
      if (options->windowed && options->window_before >= 0 && -ahead > options->window_before) weight[j] = 0;
      if (options->windowed && options->window_after >= 0 && ahead > options->window_after) weight[j] = 0;
      if (masks->mask && !masks->mask[i * NK + j]) weight[j] = 0;
      sum += weight[j];
    }
    for (int d = 0; d < DV; ++d) {
      double value = 0;
      for (int j = 0; j < NK; ++j) value += weight[j] * v[(kv * NK + j) * DV + d];
      want_o[row * DV + d] = (float)(value / sum);
    }
    want_lse[row] = (float)log(sum);
  }
}

static double relative_l1(const float *got, const float *want, int count) {
  double difference = 0, magnitude = 0;
  for (int i = 0; i < count; ++i) {
    difference += fabs((double)got[i] - want[i]);
    magnitude += fabs((double)want[i]);
  }
  return difference / magnitude; /* NaN fails every comparison */
}

static sage_tensor tensor(uint64_t data, int32_t dtype, int32_t device, int64_t b, int64_t h, int64_t n, int64_t d) {
  const sage_tensor made = {data, dtype, device, {b, h, n, d}, {h * n * d, n * d, d, 1}};
  return made;
}

static uint64_t upload(uint64_t stream, const float *values, int count, int half) {
  uint64_t address = 0;
  const uint64_t bytes = (uint64_t)count * (half ? 2 : 4);
  OK(sage_memory_allocate(stream, bytes, &address, E));
  if (half) {
    uint16_t *codes = malloc(bytes);
    for (int i = 0; i < count; ++i) codes[i] = to_f16(values[i]);
    OK(sage_memory_write(stream, address, codes, bytes, E));
    free(codes);
  } else {
    OK(sage_memory_write(stream, address, values, bytes, E));
  }
  return address;
}

/* ---- attention on one device -------------------------------------------------------------------------- */

static sage_attention_call prepare(int32_t device, uint64_t stream, int half) {
  const int32_t dtype = half ? SAGE_F16 : SAGE_F32;
  sage_attention_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  call.stream = stream;
  call.q = tensor(upload(stream, q, Q_COUNT, half), dtype, device, B, HQ, NQ, D);
  call.k = tensor(upload(stream, k, K_COUNT, half), dtype, device, B, HKV, NK, D);
  call.v = tensor(upload(stream, v, V_COUNT, half), dtype, device, B, HKV, NK, DV);
  call.o = tensor(0, SAGE_F32, device, B, HQ, NQ, DV);
  call.lse = tensor(0, SAGE_F32, device, B, HQ, NQ, 1);
  OK(sage_memory_allocate(stream, sizeof o, &call.o.data, E));
  OK(sage_memory_allocate(stream, sizeof lse, &call.lse.data, E));
  return call;
}

static void discard(const sage_attention_call *call) {
  OK(sage_memory_free(call->stream, call->q.data, E));
  OK(sage_memory_free(call->stream, call->k.data, E));
  OK(sage_memory_free(call->stream, call->v.data, E));
  OK(sage_memory_free(call->stream, call->o.data, E));
  OK(sage_memory_free(call->stream, call->lse.data, E));
}

static void run_kernel(sage_attention_call *call, int32_t kernel, double bound) {
  for (int causal = 0; causal < 2; ++causal) {
    sage_plan plan;
    plan.size = sizeof plan;
    call->options.kernel = kernel;
    call->options.causal = causal;
    const sage_status explained = sage_explain(call, &plan, E);
    if (explained == SAGE_UNSUPPORTED && call->o.device != SAGE_CPU) return;
    CHECK(explained == SAGE_OK);
    CHECK(kernel == SAGE_KERNEL_AUTO || plan.kernel == kernel);
    CHECK(plan.reason[0] != 0 && plan.implementation[0] != 0);
    OK(sage_memory_fill(call->stream, call->o.data, 0xff, sizeof o, E));
    OK(sage_attention(call, E));
    CHECK(error[0] == 0);
    OK(sage_memory_read(call->stream, o, call->o.data, sizeof o, E));
    OK(sage_memory_read(call->stream, lse, call->lse.data, sizeof lse, E));
    const masks none = {0, 0, 0};
    reference(&call->options, &none, call->options.scale == 0 ? 1 / sqrt(D) : call->options.scale);
    const double worse = relative_l1(o, want_o, O_COUNT), lse_worse = relative_l1(lse, want_lse, LSE_COUNT);
    printf("device %d, %s, kernel %d%s: relative L1 %.2e, of lse %.2e\n", call->o.device, plan.implementation, kernel,
           causal ? ", causal" : "", worse, lse_worse);
    CHECK(worse < bound);
    CHECK(lse_worse < bound);
  }
}

static void trace_attention(const sage_attention_call *call) {
  sage_stage stages[32];
  uint64_t count = 99, again = 99;
  REFUSED(sage_stream_read_trace(call->stream, stages, 32, &count, E), SAGE_INVALID_ARGUMENT, "current value is off");
  REFUSED(sage_stream_trace(call->stream, 2, E), SAGE_INVALID_ARGUMENT, "on must be 0 or 1: current value is 2.");
  OK(sage_stream_trace(call->stream, 1, E));
  REFUSED(sage_stream_trace(call->stream, 1, E), SAGE_INVALID_ARGUMENT, "current value is on");
  OK(sage_stream_read_trace(call->stream, NULL, 0, &count, E));
  CHECK(count == 0);
  OK(sage_attention(call, E));
  OK(sage_stream_read_trace(call->stream, stages, 32, &count, E));
  CHECK(count >= 3 && count <= 32 && !strcmp(stages[count - 1].name, "attention"));
  for (uint64_t i = 0; i < count && i < 32; ++i) CHECK(stages[i].ms >= 0 && stages[i].ms < 60e3f);
  OK(sage_attention(call, E));
  memset(stages, 0x55, sizeof stages);
  OK(sage_stream_read_trace(call->stream, stages, 1, &again, E));
  CHECK(again == 2 * count && stages[0].name[0] != 0x55 && stages[1].name[0] == 0x55);
  REFUSED(sage_stream_read_trace(call->stream, NULL, 1, &count, E), SAGE_INVALID_ARGUMENT, "stages must not be");
  REFUSED(sage_stream_read_trace(call->stream, stages, 1, NULL, E), SAGE_INVALID_ARGUMENT, "count must not be");
  OK(sage_stream_trace(call->stream, 0, E));
  OK(sage_stream_trace(call->stream, 0, E));
  OK(sage_stream_trace(call->stream, 1, E));
  OK(sage_stream_read_trace(call->stream, stages, 32, &count, E));
  CHECK(count == 0);
  OK(sage_stream_trace(call->stream, 0, E));
}

static void explain_to_callers_of_other_sizes(const sage_attention_call *call) {
  sage_plan plan;
  memset(&plan, 0x55, sizeof plan);
  plan.size = sizeof plan - 1;
  REFUSED(sage_explain(call, &plan, E), SAGE_INVALID_ARGUMENT, "plan->size must be");
  CHECK(plan.kernel == 0x55555555);
  plan.size = sizeof plan;
  OK(sage_explain(call, &plan, E));
  CHECK(plan.exponential == SAGE_EXPONENTIAL_EXACT && plan.reserved == 0);
}

static void run_attention(int32_t device) {
  uint64_t stream = 0, begin = 0, end = 0;
  float milliseconds = -1;
  OK(sage_stream_create(device, &stream, E));
  OK(sage_event_create(stream, &begin, E));
  OK(sage_event_create(stream, &end, E));
  sage_attention_call call = prepare(device, stream, 1);
  OK(sage_event_record(begin, stream, E));
  run_kernel(&call, SAGE_KERNEL_FLASH, 1e-3);
  run_kernel(&call, SAGE_KERNEL_SAGE1, 2e-2);
  run_kernel(&call, SAGE_KERNEL_SAGE1_INT8, 6e-2);
  run_kernel(&call, SAGE_KERNEL_SAGE2, 6e-2);
  call.options.exponential = SAGE_EXPONENTIAL_FAST;
  run_kernel(&call, SAGE_KERNEL_SAGE2, 7e-2);
  call.options.exponential = SAGE_EXPONENTIAL_DEFAULT;
  run_kernel(&call, SAGE_KERNEL_SAGE2_INT4, 3e-1);
  run_kernel(&call, SAGE_KERNEL_SAGE2PP, 6e-2);
  run_kernel(&call, SAGE_KERNEL_SAGE_INT8, 6e-2);
  run_kernel(&call, SAGE_KERNEL_AUTO, 6e-2);
  call.options.scale = 0.5f;
  run_kernel(&call, SAGE_KERNEL_FLASH, 1e-3);
  OK(sage_flash_attention(&call, E));
  OK(sage_event_record(end, stream, E));
  OK(sage_event_elapsed(begin, end, &milliseconds, E));
  CHECK(milliseconds > 0);
  call.options.kernel = SAGE_KERNEL_SAGE1;
  REFUSED(sage_flash_attention(&call, E), SAGE_INVALID_ARGUMENT, "flash (1)");
  trace_attention(&call);
  explain_to_callers_of_other_sizes(&call);
  discard(&call);
  if (device == SAGE_CPU) {
    call = prepare(device, stream, 0);
    run_kernel(&call, SAGE_KERNEL_FLASH, 1e-5);
    discard(&call);
  }
  OK(sage_event_destroy(begin, E));
  OK(sage_event_destroy(end, E));
  OK(sage_stream_destroy(stream, E));
}

/* Smooth, quantize, attend: the parts that sage_attention fuses, against the same definition. */
static void run_parts(int32_t device) {
  enum { Q_GROUPS = (NQ + 127) / 128, K_GROUPS = (NK + 63) / 64 };
  uint64_t stream = 0, scratch = 0;
  OK(sage_stream_create(device, &stream, E));
  sage_attention_call whole = prepare(device, stream, 1);
  OK(sage_memory_allocate(stream, 1 << 20, &scratch, E));
  const uint64_t k_mean = scratch, q_scales = scratch + 4096, k_scales = scratch + 8192, q_codes = scratch + 65536,
                 k_codes = scratch + 262144, restored = scratch + 524288;

  sage_smooth_call smooth;
  memset(&smooth, 0, sizeof smooth);
  smooth.size = sizeof smooth;
  smooth.stream = stream;
  smooth.x = whole.k;
  smooth.mean = tensor(k_mean, SAGE_F32, device, B, HKV, 1, D);
  OK(sage_smooth(&smooth, E));

  sage_quantize_call quantize;
  memset(&quantize, 0, sizeof quantize);
  quantize.size = sizeof quantize;
  quantize.stream = stream;
  quantize.granularity = SAGE_GRANULARITY_BLOCK;
  quantize.operand = SAGE_OPERAND_QUERY;
  quantize.x = whole.q;
  quantize.codes = tensor(q_codes, SAGE_I8, device, B, HQ, NQ, D);
  quantize.scales = tensor(q_scales, SAGE_F32, device, B, HQ, Q_GROUPS, 1);
  OK(sage_quantize(&quantize, E));

  quantize.takes_mean = 1;
  REFUSED(sage_quantize(&quantize, E), SAGE_INVALID_ARGUMENT, "Cannot quantize as mean.");
  quantize.takes_mean = 2;
  REFUSED(sage_quantize(&quantize, E), SAGE_INVALID_ARGUMENT, "takes_mean must be 0 or 1: current value is 2.");
  quantize.takes_mean = 0;

  quantize.operand = SAGE_OPERAND_KEY;
  quantize.x = whole.k;
  quantize.mean = smooth.mean;
  quantize.codes = tensor(k_codes, SAGE_I8, device, B, HKV, NK, D);
  quantize.scales = tensor(k_scales, SAGE_F32, device, B, HKV, K_GROUPS, 1);
  OK(sage_quantize(&quantize, E));
  quantize.x = tensor(restored, SAGE_F32, device, B, HKV, NK, D);
  OK(sage_dequantize(&quantize, E));
  static float back[K_COUNT];
  OK(sage_memory_read(stream, back, restored, sizeof back, E));
  CHECK(relative_l1(back, k, K_COUNT) < 1e-2);

  sage_attention_quantized_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  call.stream = stream;
  call.options.kernel = SAGE_KERNEL_SAGE1;
  call.q = tensor(q_codes, SAGE_I8, device, B, HQ, NQ, D);
  call.q_scales = tensor(q_scales, SAGE_F32, device, B, HQ, Q_GROUPS, 1);
  call.k = quantize.codes;
  call.k_scales = quantize.scales;
  call.k_mean = smooth.mean;
  call.v = whole.v;
  call.o = whole.o;
  call.lse = whole.lse;
  OK(sage_attention_quantized(&call, E));
  OK(sage_memory_read(stream, o, call.o.data, sizeof o, E));
  OK(sage_memory_read(stream, lse, call.lse.data, sizeof lse, E));
  const masks none = {0, 0, 0};
  reference(&call.options, &none, 1 / sqrt(D));
  CHECK(relative_l1(o, want_o, O_COUNT) < 2e-2);
  CHECK(relative_l1(lse, want_lse, LSE_COUNT) < 2e-2);

  call.options.kernel = SAGE_KERNEL_FLASH;
  REFUSED(sage_attention_quantized(&call, E), SAGE_INVALID_ARGUMENT, "options.kernel must be sage1 (2)");
  call.options.kernel = SAGE_KERNEL_SAGE1;
  call.options.rotate = SAGE_ON;
  REFUSED(sage_attention_quantized(&call, E), SAGE_INVALID_ARGUMENT, "options.rotate must be default (0)");
  call.options.rotate = SAGE_DEFAULT, call.options.band = SAGE_ON;
  REFUSED(sage_attention_quantized(&call, E), SAGE_INVALID_ARGUMENT, "options.band must be default (0)");
  call.options.band = SAGE_DEFAULT, call.options.first_token = SAGE_ON;
  REFUSED(sage_attention_quantized(&call, E), SAGE_INVALID_ARGUMENT, "options.first_token must be default (0)");
  call.options.first_token = SAGE_DEFAULT, call.options.k_mean_rows = 64;
  REFUSED(sage_attention_quantized(&call, E), SAGE_INVALID_ARGUMENT, "options.k_mean_rows must be 0");
  call.options.k_mean_rows = 0;
  call.k_scales.shape[2] += 1;
  REFUSED(sage_attention_quantized(&call, E), SAGE_INVALID_ARGUMENT,
          "k_scales.shape[2] must equal the number of groups (3): current value is 4.");
  OK(sage_memory_free(stream, scratch, E));
  discard(&whole);
  OK(sage_stream_destroy(stream, E));
}

/* ---- masks, and sequences of different lengths -------------------------------------------------------- */

static void expect_masked(sage_attention_call *call, const masks *masks, const char *what) {
  static const int32_t kernels[] = {SAGE_KERNEL_FLASH, SAGE_KERNEL_SAGE1, SAGE_KERNEL_SAGE2};
  for (int i = 0; i < 3; ++i) {
    call->options.kernel = kernels[i];
    OK(sage_memory_fill(call->stream, call->o.data, 0xff, sizeof o, E));
    const sage_status status = sage_attention(call, E);
    if (status == SAGE_UNSUPPORTED && call->o.device != SAGE_CPU) continue;
    CHECK(status == SAGE_OK);
    OK(sage_memory_read(call->stream, o, call->o.data, sizeof o, E));
    OK(sage_memory_read(call->stream, lse, call->lse.data, sizeof lse, E));
    reference(&call->options, masks, 1 / sqrt(D));
    const double worse = relative_l1(o, want_o, O_COUNT), lse_worse = relative_l1(lse, want_lse, LSE_COUNT);
    printf("device %d, kernel %d, %s: relative L1 %.2e, of lse %.2e\n", call->o.device, kernels[i], what, worse,
           lse_worse);
    CHECK(worse < (i == 0 ? 1e-3 : 6e-2) && lse_worse < (i == 0 ? 1e-3 : 6e-2));
  }
}

static void run_masks(int32_t device) {
  uint64_t stream = 0, scratch = 0;
  OK(sage_stream_create(device, &stream, E));
  const sage_attention_call plain = prepare(device, stream, 1);
  sage_attention_call call = plain;
  static uint8_t visible[NQ * NK];
  for (int i = 0; i < NQ * NK; ++i) visible[i] = (uint8_t)(i % 3 ? 200 : i % NK == 0);
  const float sinks[HQ] = {0.5f, -2, 3, 0}, slopes[HQ] = {0.5f, 0.25f, 0.125f, 0};
  OK(sage_memory_allocate(stream, sizeof visible + 256, &scratch, E));
  OK(sage_memory_write(stream, scratch, sinks, sizeof sinks, E));
  OK(sage_memory_write(stream, scratch + 64, slopes, sizeof slopes, E));
  OK(sage_memory_write(stream, scratch + 256, visible, sizeof visible, E));
  const masks some = {visible, sinks, slopes}, none = {0, 0, 0};
  call.mask = tensor(scratch + 256, SAGE_BOOL, device, 1, 1, NQ, NK);
  call.sinks = tensor(scratch, SAGE_F32, device, 1, HQ, 1, 1);
  call.alibi = tensor(scratch + 64, SAGE_F32, device, 1, HQ, 1, 1);
  expect_masked(&call, &some, "mask, sinks and ALiBi");
  call.options.softcap = 1.5f;
  call.options.causal = 1;
  call.options.alignment = SAGE_ALIGN_TOP_LEFT;
  expect_masked(&call, &some, "the same, capped and causal from the top left");
  call = plain;
  call.options.windowed = 1;
  call.options.window_before = 9;
  call.options.window_after = -1;
  expect_masked(&call, &none, "a window");
  call.options.window_after = 2;
  expect_masked(&call, &none, "a smaller window");

  call.options.kernel = SAGE_KERNEL_FLASH;
  call.mask = tensor(scratch + 256, SAGE_BOOL, device, 1, 1, NQ, NK);
#define BAD_MASK(change, words)                                       \
  do {                                                                \
    sage_attention_call bad = call;                                   \
    (void)(change);                                                   \
    REFUSED(sage_attention(&bad, E), SAGE_INVALID_ARGUMENT, (words)); \
  } while (0)
  BAD_MASK(bad.options.alignment = 2,
           "options.alignment must be bottom-right (0) or top-left (1): current value is 2.");
  BAD_MASK(bad.options.windowed = 2, "options.windowed must be 0 or 1: current value is 2.");
  BAD_MASK(bad.options.window_before = -2,
           "options.window_before must be at least 0, or -1 for no limit: current value is -2.");
  BAD_MASK(bad.options.window_after = -9, "options.window_after must be at least 0, or -1 for no limit");
  BAD_MASK(bad.options.windowed = 0,
           "options.window_before must be 0 where options.windowed is 0: current value is 9.");
  BAD_MASK(bad.options.causal = 1,
           "options.window_after must be 0 or -1 where options.causal is 1: current value is 2.");
  BAD_MASK(bad.options.softcap = -1, "options.softcap must be positive and finite, or 0 for none");
  BAD_MASK(bad.options.softcap = NAN, "options.softcap must be positive and finite, or 0 for none");
  BAD_MASK(bad.options.softcap = INFINITY, "options.softcap must be positive and finite, or 0 for none");
  BAD_MASK(bad.mask.dtype = SAGE_I8, "mask.dtype must be bool (6), f32 (0), f16 (1) or bf16 (2): current value is i8.");
  BAD_MASK(bad.mask.shape[0] = 3, "mask.shape[0] must be 1 or equal q.shape[0] (2): current value is 3.");
  BAD_MASK(bad.mask.shape[1] = 3, "mask.shape[1] must be 1 or equal q.shape[1] (4): current value is 3.");
  BAD_MASK(bad.mask.shape[2] = 69, "mask.shape[2] must be 1 or equal q.shape[2] (70): current value is 69.");
  BAD_MASK(bad.mask.shape[3] = 1, "mask.shape[3] must equal k.shape[2] (130): current value is 1.");
  if (sage_attention(&call, E) != SAGE_UNSUPPORTED || device == SAGE_CPU) {
    BAD_MASK(bad.mask.dtype = SAGE_F32, "mask.data must be followed by");
    BAD_MASK(bad.mask.data = 64, "outside every allocation");
    BAD_MASK(bad.mask.data = bad.o.data, "o must not overlap mask");
  }
  BAD_MASK((bad.sinks = bad.q), "sinks.dtype must be f32 (0): current value is f16.");
  BAD_MASK((bad.sinks = bad.lse, bad.sinks.data = scratch), "sinks.shape[0] must equal one sink a head (1)");
  BAD_MASK((bad.alibi = bad.lse, bad.alibi.data = scratch), "alibi.shape[2] must equal one slope a head (1)");
  OK(sage_memory_free(stream, scratch, E));
  discard(&plain);
  OK(sage_stream_destroy(stream, E));
}

/* The whole as one sequence, then every sequence as attention on its part. */
static void run_varlen(int32_t device) {
  static float part[HQ * 30 * DV];
  uint64_t stream = 0;
  OK(sage_stream_create(device, &stream, E));
  const sage_attention_call both = prepare(device, stream, 1);
  sage_attention_call call = both;
  call.q.shape[0] = call.k.shape[0] = call.v.shape[0] = call.o.shape[0] = call.lse.shape[0] = 1;
  call.options.kernel = SAGE_KERNEL_SAGE1;
  const int64_t q_starts[] = {0, 40, 40, NQ}, k_starts[] = {0, 100, 100, NK}, all_q[] = {0, NQ}, all_k[] = {0, NK};
  OK(sage_attention(&call, E));
  OK(sage_memory_read(stream, want_o, call.o.data, sizeof o / 2, E));
  OK(sage_memory_fill(stream, call.o.data, 0xff, sizeof o, E));
  OK(sage_attention_varlen(&call, all_q, all_k, 1, E));
  OK(sage_memory_read(stream, o, call.o.data, sizeof o / 2, E));
  CHECK(!memcmp(o, want_o, sizeof o / 2));

  OK(sage_memory_fill(stream, call.o.data, 0xff, sizeof o, E));
  OK(sage_attention_varlen(&call, q_starts, k_starts, 3, E));
  OK(sage_memory_read(stream, o, call.o.data, sizeof o / 2, E));
  sage_attention_call last = call;
  last.q.data += 40 * D * 2;
  last.k.data += 100 * D * 2;
  last.v.data += 100 * DV * 2;
  last.q.shape[2] = last.o.shape[2] = last.lse.shape[2] = last.k.shape[2] = last.v.shape[2] = 30;
  last.o.stride[1] = 30 * DV;
  OK(sage_attention(&last, E));
  OK(sage_memory_read(stream, part, last.o.data, sizeof part, E));
  for (int h = 0; h < HQ; ++h) CHECK(!memcmp(o + (h * NQ + 40) * DV, part + h * 30 * DV, 30 * DV * sizeof(float)));

#define BAD_STARTS(from, to, count, words) \
  REFUSED(sage_attention_varlen(&call, (from), (to), (count), E), SAGE_INVALID_ARGUMENT, (words))
  const int64_t falling[] = {0, 41, 40, NQ}, late[] = {1, 2, 3, NQ}, far[] = {0, NQ + 1, NQ + 1, NQ},
                early[] = {0, 5, 6, 7};
  const int64_t negative[] = {0, -1, 5, NQ}, least[] = {0, INT64_MIN, 5, NQ}, most[] = {0, INT64_MAX, INT64_MAX, NQ};
  BAD_STARTS(NULL, k_starts, 3, "q_starts must not be a null pointer");
  BAD_STARTS(q_starts, NULL, 3, "k_starts must not be a null pointer");
  BAD_STARTS(q_starts, k_starts, 0, "sequences must be from 1 to 16777216: current value is 0.");
  BAD_STARTS(q_starts, k_starts, ~0ull, "sequences must be from 1 to 16777216");
  BAD_STARTS(falling, k_starts, 3, "q_starts[2] must be at least the number before it (41): current value is 40.");
  BAD_STARTS(late, k_starts, 3, "q_starts[0] must be 0: current value is 1.");
  BAD_STARTS(far, k_starts, 3, "q_starts[1] must be at most q.shape[2] (70): current value is 71.");
  BAD_STARTS(early, k_starts, 3, "q_starts[3] must equal q.shape[2] (70): current value is 7.");
  BAD_STARTS(negative, k_starts, 3, "q_starts[1] must be at least the number before it (0): current value is -1.");
  BAD_STARTS(least, k_starts, 3, "q_starts[1] must be at least the number before it (0)");
  BAD_STARTS(most, k_starts, 3, "q_starts[1] must be at most q.shape[2] (70)");
  BAD_STARTS(q_starts, q_starts, 3, "k_starts[3] must equal k.shape[2] (130): current value is 70.");
  call = both;
  BAD_STARTS(q_starts, k_starts, 3, "q.shape[0] must equal one batch of sequences (1): current value is 2.");
  REFUSED(sage_attention_varlen(NULL, q_starts, k_starts, 3, E), SAGE_INVALID_ARGUMENT, "null pointer");
  discard(&both);
  OK(sage_stream_destroy(stream, E));
}

/* ---- errors ------------------------------------------------------------------------------------------- */

static void refuse_calls(int32_t device) {
  uint64_t stream = 0;
  OK(sage_stream_create(device, &stream, E));
  const sage_attention_call good = prepare(device, stream, 1);
  sage_attention_call bad;
#define BAD(change, words) \
  (bad = good, (void)(change), REFUSED(sage_attention(&bad, E), SAGE_INVALID_ARGUMENT, (words)))
  REFUSED(sage_attention(NULL, E), SAGE_INVALID_ARGUMENT, "null pointer");
  BAD(bad.size = 8, "call->size must be from");
  BAD(bad.size = 1u << 30, "call->size must be from");
  BAD(bad.reserved = 1, "call->reserved must be 0: current value is 1.");
  BAD(bad.stream = 0, "stream");
  BAD(bad.stream = ~0ull, "stream");
  BAD(bad.k.shape[3] = 12, "k.shape[3] must equal q.shape[3] (24): current value is 12.");
  BAD(bad.v.shape[2] = 12, "v.shape[2] must equal k.shape[2] (130): current value is 12.");
  BAD(bad.o.shape[1] = 1, "o.shape[1] must equal q.shape[1] (4): current value is 1.");
  BAD(bad.lse.shape[3] = 2, "lse.shape[3] must equal one value a row (1): current value is 2.");
  BAD((bad.k.shape[1] = bad.v.shape[1] = 3), "q.shape[1] must be a multiple of k.shape[1] (3): current value is 4.");
  BAD((bad.q.shape[3] = bad.k.shape[3] = 257), "q.shape[3] must be at most 256: current value is 257.");
  BAD(bad.q.shape[2] = 0, "q.shape[2] must be at least 1: current value is 0.");
  BAD(bad.q.shape[0] = -1, "q.shape[0] must be at least 1: current value is -1.");
  BAD((bad.q.shape[0] = bad.q.shape[2] = 1ll << 40), "q.shape must hold at most 2^48 elements");
  BAD((bad.q.shape[2] = 1ll << 35, bad.q.stride[2] = 0, bad.k.shape[2] = bad.v.shape[2] = 1ll << 35),
      "make at most 2^60 scores");
  BAD(bad.q.stride[0] = INT64_MAX, "q.stride must keep the tensor within a 64-bit address space");
  BAD(bad.q.stride[2] = -24, "q.stride[2] must be at least 0: current value is -24.");
  BAD(bad.o.stride[2] = 0, "o.stride must keep written elements apart");
  BAD(bad.o.stride[1] = 1, "o.stride must keep written elements apart");
  BAD(bad.q.dtype = SAGE_I8, "q.dtype must be f32 (0), f16 (1) or bf16 (2): current value is i8.");
  BAD(bad.q.dtype = 77, "q.dtype must be f32 (0), f16 (1) or bf16 (2): current value is 77.");
  BAD(bad.k.dtype = SAGE_BF16, "k.dtype must equal q.dtype (f16): current value is bf16.");
  BAD(bad.v.device = device + 1, "v.device must equal the stream's device");
  BAD(bad.q.data = 0, "q.data must not be 0");
  BAD(bad.q.data += 1, "q.data must be a multiple of 2 for f16");
  BAD(bad.q.data += 2, "q.data must be followed by");
  BAD(bad.q.data = 64, "outside every allocation");
  BAD(bad.q.data = ~0ull - 63, "64-bit address space");
  BAD((bad.o = bad.q, bad.o.shape[3] = DV, bad.o.stride[3] = 0), "keep written elements apart");
  BAD(bad.lse.data = bad.o.data, "overlap");
  BAD(bad.options.kernel = 8, "options.kernel must be auto (0)");
  BAD(bad.options.causal = 2, "options.causal must be 0 or 1: current value is 2.");
  BAD(bad.options.scale = -1, "options.scale");
  BAD(bad.options.scale = NAN, "options.scale");
  BAD(bad.options.granularity = SAGE_GRANULARITY_CHANNEL, "options.granularity");
  BAD(bad.options.smooth_k = 3, "options.smooth_k must be default (0), off (1) or on (2): current value is 3.");
  BAD(bad.options.exponential = 3, "options.exponential must be default (0), exact (1) or fast (2)");
  BAD((bad.options.kernel = SAGE_KERNEL_FLASH, bad.options.exponential = SAGE_EXPONENTIAL_FAST), "with kernel flash");
  BAD((bad.options.kernel = SAGE_KERNEL_FLASH, bad.options.smooth_q = SAGE_ON), "with kernel flash");
  BAD((bad.options.kernel = SAGE_KERNEL_SAGE1, bad.options.pv_range = SAGE_RANGE_448_2), "with kernel sage1");
  BAD((bad.options.kernel = SAGE_KERNEL_FLASH, bad.options.rotate = SAGE_ON), "with kernel flash");
  BAD((bad.options.kernel = SAGE_KERNEL_FLASH, bad.options.first_token = SAGE_ON), "with kernel flash");
  BAD((bad.options.kernel = SAGE_KERNEL_FLASH, bad.options.k_mean_rows = 64), "be 0 with kernel flash");
  BAD(bad.options.rotate = 3, "options.rotate must be default (0), off (1) or on (2): current value is 3.");
  BAD(bad.options.first_token = -1, "options.first_token must be default (0), off (1) or on (2)");
  BAD(bad.options.band = 3, "options.band must be default (0), off (1) or on (2)");
  BAD(bad.options.k_mean_rows = 65, "options.k_mean_rows must be a multiple of 64");
  BAD((bad.options.kernel = SAGE_KERNEL_SAGE1, bad.options.causal = 0, bad.options.band = SAGE_ON),
      "options.causal must be 1 with options.band on (2): current value is 0.");
  BAD((bad.options.kernel = SAGE_KERNEL_SAGE1, bad.options.smooth_k = SAGE_OFF, bad.options.k_mean_rows = 64),
      "options.k_mean_rows must be 0 where options.smooth_k is off (1): current value is 64.");
  CHECK(strstr(error, "\ncuda/plan.cpp:") != NULL);

  /* Messages are cut, never overrun, and not needed. */
  char small[8] = "xxxxxxx";
  CHECK(sage_attention(NULL, small, 4) == SAGE_INVALID_ARGUMENT && !strcmp(small, "Can") && small[4] == 'x');
  CHECK(sage_attention(NULL, small, 0) == SAGE_INVALID_ARGUMENT && small[0] == 'C');
  CHECK(sage_attention(NULL, NULL, 100) == SAGE_INVALID_ARGUMENT);

  /* A newer caller's longer struct, as long as it asks for nothing new. */
  struct {
    sage_attention_call call;
    uint64_t more;
  } longer = {good, 0};
  longer.call.size = sizeof longer;
  OK(sage_attention(&longer.call, E));
  longer.more = 1;
  REFUSED(sage_attention(&longer.call, E), SAGE_INVALID_ARGUMENT, "must be 0");

  /* A call whose workspace no machine has is refused when it is made, and leaves the stream as it was. */
  if (device == SAGE_CPU) {
    bad = good;
    bad.options.kernel = SAGE_KERNEL_SAGE1;
    bad.k.shape[2] = bad.v.shape[2] = 1ll << 40;
    bad.k.stride[2] = bad.v.stride[2] = 0;
    REFUSED(sage_attention(&bad, E), SAGE_OUT_OF_MEMORY, "bytes must be at most what is available");
    OK(sage_attention(&good, E));
  }

  /* q, k and v interleaved in one buffer with o: apart, though their ranges overlap. */
  uint64_t fused = 0;
  OK(sage_memory_allocate(stream, B * HQ * NQ * 4 * D * 2, &fused, E));
  OK(sage_memory_fill(stream, fused, 0, B * HQ * NQ * 4 * D * 2, E));
  sage_attention_call slices = good;
  sage_tensor *parts[4] = {&slices.q, &slices.k, &slices.v, &slices.o};
  for (int i = 0; i < 4; ++i) {
    const sage_tensor slice = {
        fused + (uint64_t)i * D * 2, SAGE_F16, device, {B, HQ, NQ, D}, {NQ * HQ * 4 * D, 4 * D, HQ * 4 * D, 1}};
    *parts[i] = slice;
  }
  OK(sage_attention(&slices, E));
  slices.o.data -= 2;
  REFUSED(sage_attention(&slices, E), SAGE_INVALID_ARGUMENT, "o must not overlap v");
  OK(sage_memory_free(stream, fused, E));
  discard(&good);
  REFUSED(sage_attention(&good, E), SAGE_INVALID_ARGUMENT, "outside every allocation");
  OK(sage_stream_destroy(stream, E));
  REFUSED(sage_attention(&good, E), SAGE_INVALID_ARGUMENT, "stream");
}

static void lifecycles(int32_t device) {
  uint64_t stream = 0, other = 0, address = 0, event = 0;
  int32_t idle = -1;
  char bytes[64] = "before", back[64];
  sage_memory_stats stats;
  stats.size = sizeof stats;
  OK(sage_stream_create(device, &stream, E));
  OK(sage_stream_create(device, &other, E));
  CHECK(stream != other);
  OK(sage_memory_allocate(stream, 64, &address, E));
  CHECK(address % 64 == 0);
  OK(sage_memory_describe(device, &stats, E));
  CHECK(stats.streams == 2 && stats.allocations == 1 && stats.bytes == 64 && stats.peak_bytes >= 64);
  OK(sage_memory_write(stream, address, bytes, 64, E));
  memset(bytes, 0, sizeof bytes);
  OK(sage_memory_copy(stream, address + 32, address, 32, E));
  OK(sage_memory_fill(stream, address, 'z', 3, E));
  OK(sage_memory_read(stream, back, address, 64, E));
  CHECK(!strcmp(back, "zzzore") && !strcmp(back + 32, "before"));
  REFUSED(sage_memory_copy(stream, address + 16, address, 32, E), SAGE_INVALID_ARGUMENT, "overlap");
  REFUSED(sage_memory_read(stream, back, address + 1, 64, E), SAGE_INVALID_ARGUMENT, "with 63 bytes left");
  REFUSED(sage_memory_read(stream, NULL, address, 64, E), SAGE_INVALID_ARGUMENT, "null pointer");
  REFUSED(sage_memory_write(stream, address, bytes, 0, E), SAGE_INVALID_ARGUMENT, "bytes must be at least 1");
  REFUSED(sage_memory_free(stream, address + 1, E), SAGE_INVALID_ARGUMENT, "start of a live allocation");
  OK(sage_stream_synchronize(stream, E));
  CHECK(sage_stream_wait(stream) == SAGE_OK);
  OK(sage_stream_query(stream, &idle, E));
  CHECK(idle == 1);

  /* Memory outlives the stream that it came from. */
  OK(sage_stream_destroy(stream, E));
  REFUSED(sage_stream_destroy(stream, E), SAGE_INVALID_ARGUMENT, "stream");
  CHECK(sage_stream_wait(stream) == SAGE_INVALID_ARGUMENT);
  OK(sage_memory_read(other, back, address, 64, E));
  OK(sage_memory_free(other, address, E));
  REFUSED(sage_memory_free(other, address, E), SAGE_INVALID_ARGUMENT, "live allocation");

  /* More memory than exists, and then little. What a driver says of it is its own. */
  const int cpu = device == SAGE_CPU;
  REFUSED(sage_memory_allocate(other, 1ull << 50, &address, E), SAGE_OUT_OF_MEMORY, cpu ? "1125899906842624" : "");
  REFUSED(sage_memory_allocate(other, UINT64_MAX, &address, E), SAGE_OUT_OF_MEMORY, cpu ? "18446744073709551615" : "");
  REFUSED(sage_memory_allocate(other, 0, &address, E), SAGE_INVALID_ARGUMENT, "at least 1");
  OK(sage_memory_allocate(other, 1, &address, E));
  OK(sage_memory_free(other, address, E));

  float milliseconds;
  OK(sage_event_create(other, &event, E));
  REFUSED(sage_event_elapsed(event, event, &milliseconds, E), SAGE_INVALID_ARGUMENT, "be recorded");
  OK(sage_event_record(event, other, E));
  OK(sage_event_elapsed(event, event, &milliseconds, E));
  CHECK(milliseconds == 0);
  REFUSED(sage_event_record(other, event, E), SAGE_INVALID_ARGUMENT, "event");
  OK(sage_stream_destroy(other, E));
  OK(sage_event_destroy(event, E));
  REFUSED(sage_event_destroy(event, E), SAGE_INVALID_ARGUMENT, "event");
  OK(sage_memory_describe(device, &stats, E));
  CHECK(stats.streams == 0 && stats.allocations == 0 && stats.bytes == 0);
}

static void describe(int32_t device) {
  sage_device_info info;
  info.size = sizeof info;
  OK(sage_device_describe(device, &info, E));
  CHECK(info.device == device && info.multiprocessors > 0 && info.memory_bytes > 0 && info.name[0] != 0);
  CHECK((info.compute_capability == 0) == (device == SAGE_CPU));
  printf("device %d: %s, %s, %d\n", device, info.name, info.features, info.multiprocessors);
  run_attention(device);
  run_parts(device);
  run_masks(device);
  run_varlen(device);
  refuse_calls(device);
  lifecycles(device);
}

int main(void) {
  sage_build_info build;
  build.size = sizeof build;
  CHECK(sage_abi_version() == SAGE_ABI_VERSION);
  OK(sage_build_describe(&build, E));
  CHECK(build.abi_version == SAGE_ABI_VERSION && build.version[0] != 0);
  build.size = sizeof build - 1;
  REFUSED(sage_build_describe(&build, E), SAGE_INVALID_ARGUMENT, "info->size");
  REFUSED(sage_build_describe(NULL, E), SAGE_INVALID_ARGUMENT, "null pointer");
  uint64_t stream;
  REFUSED(sage_stream_create(-2, &stream, E), SAGE_INVALID_ARGUMENT, "current value is -2");
  CHECK(sage_stream_create(1000, &stream, E) == SAGE_NO_DEVICE);
  REFUSED(sage_stream_create_for(SAGE_CPU, 80, &stream, E), SAGE_INVALID_ARGUMENT, "current value is 80");

  randomize(q, Q_COUNT, 1);
  randomize(k, K_COUNT, 2);
  randomize(v, V_COUNT, 3);
  describe(SAGE_CPU);
  int32_t count = -1;
  const sage_status found = sage_cuda_device_count(&count, E);
  if (found == SAGE_OK) {
    describe(0);
  } else {
    CHECK(found == SAGE_NO_DEVICE && count == 0 && error[0] != 0);
    printf("no CUDA device: %s\n", error);
  }
  printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
