// The C ABI: every function of sage.h. Arguments are checked here and in validate.cpp, a plan is made, and the
// work is handed to a stream; whatever goes wrong becomes a status and a message.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"
#include "registry.h"
#include "sage.h"
#include "validate.h"

#ifndef SAGE_VERSION
#define SAGE_VERSION "unknown"
#endif
#ifndef SAGE_ARCHITECTURES
#define SAGE_ARCHITECTURES ""
#endif
#ifndef SAGE_SOURCE_HASH
#define SAGE_SOURCE_HASH ""
#endif
#ifndef SAGE_CUDA_VERSION
#define SAGE_CUDA_VERSION 0
#endif
#ifndef SAGE_DEBUG
#define SAGE_DEBUG 0
#endif

namespace sage {

namespace {

// ---- errors ---------------------------------------------------------------------------------------------

// "cuda/api.cpp" of whatever path the compiler was given.
const char* short_path(const char* file) {
  const char* found = file;
  for (const char* at = file; (at = std::strstr(at, "cuda/")); ++at) {
    if (at == file || at[-1] == '/') found = at;
  }
  return found;
}

void report(char* error, size_t error_size, const char* message, const char* file, int line) {
  if (error && error_size) std::snprintf(error, error_size, "%s\n%s:%d", message, short_path(file), line);
}

template <typename Body>
sage_status guarded(char* error, size_t error_size, Body&& body) noexcept {
  if (error && error_size) error[0] = '\0';
  try {
    body();
    return SAGE_OK;
  } catch (const Error& failure) {
    report(error, error_size, failure.message.c_str(), failure.file, failure.line);
    return failure.status;
  } catch (const std::bad_alloc&) {
    report(error, error_size, "Cannot go on as the system gives no more memory.", __FILE__, __LINE__);
    return SAGE_OUT_OF_MEMORY;
  } catch (const std::exception& failure) {
    report(error, error_size, failure.what(), __FILE__, __LINE__);
    return SAGE_INTERNAL;
  } catch (...) {
    report(error, error_size, "Cannot go on as something unknown was thrown.", __FILE__, __LINE__);
    return SAGE_INTERNAL;
  }
}

// ---- plain arguments ------------------------------------------------------------------------------------

// The caller's pointers may be unaligned.
template <typename T>
void store(T* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

void check_pointer(const char* action, const char* name, const void* pointer) {
  if (!pointer) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, name, "not be a null pointer", "null"));
}

void check_device(const char* action, int32_t device) {
  if (device < SAGE_CPU) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(action, "device", "be -1 for the CPU or the number of a CUDA device", device));
  }
}

void check_cuda_device(const char* action, int32_t device) {
  const int count = cuda_device_count();
  if (device >= count) {
    SAGE_FAIL(SAGE_NO_DEVICE, cannot(action, "device", "be less than " + std::to_string(count), device));
  }
}

void check_zero(const char* action, const char* name, uint32_t value) {
  if (value != 0) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, name, "be 0", value));
}

template <size_t N>
void copy_text(char (&to)[N], const std::string& text) {
  to[text.copy(to, N - 1)] = '\0';
}

// ---- smooth, quantize and dequantize --------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

const std::initializer_list<DType> kFloats = {DType::kF32, DType::kF16, DType::kBF16};
const std::initializer_list<DType> kF32Only = {DType::kF32};

// A tensor of means or scales: the batches and heads of another, and rows and channels of its own.
void expect_beside(const Tensors& tensors, const char* name, const View& view, const char* other_name,
                   const View& other, int64_t rows, const char* rows_source, int64_t channels,
                   const char* channels_source) {
  tensors.expect(name, view, 0, other.batch(), (std::string(other_name) + ".shape[0]").c_str());
  tensors.expect(name, view, 1, other.heads(), (std::string(other_name) + ".shape[1]").c_str());
  tensors.expect(name, view, 2, rows, rows_source);
  tensors.expect(name, view, 3, channels, channels_source);
}

// One row for every `each` rows of the other tensor, or one for all where `each` is 0.
void expect_means(const Tensors& tensors, const char* name, const View& view, const char* other_name, const View& other,
                  uint32_t each = 0) {
  expect_beside(tensors, name, view, other_name, other, each ? divide_up(other.tokens(), each) : 1,
                each ? "the number of blocks" : "one row for all tokens", other.channels(),
                (std::string(other_name) + ".shape[3]").c_str());
}

void expect_scales(const Tensors& tensors, const char* name, const View& view, const char* other_name,
                   const View& other, Grouping grouping, int64_t group_rows) {
  expect_beside(tensors, name, view, other_name, other, group_count(grouping, other.tokens(), group_rows),
                "the number of groups", 1, "one scale a group");
}

void smooth(const sage_smooth_call* from) {
  constexpr const char* kAction = "smooth";
  const auto call = read_struct(kAction, "call", from);
  const OpenGate stream(call.stream);
  Tensors tensors(kAction, stream->device);
  SmoothOp op;
  op.x = tensors.add("x", call.x, Access::kRead, kFloats);
  op.mean = tensors.add("mean", call.mean, Access::kWrite, kF32Only);
  op.smoothed = tensors.add_optional("smoothed", call.smoothed, Access::kWrite, kFloats);
  op.block_rows = call.block_rows ? call.block_rows : op.x.tokens();
  expect_means(tensors, "mean", op.mean, "x", op.x, call.block_rows);
  if (op.smoothed) tensors.expect_same_shape("smoothed", op.smoothed, "x", op.x);
  tensors.pin(*stream);
  stream->queue->smooth(op);
}

float resolve_range(const char* action, float range, DType codes) {
  if (codes == DType::kE4M3) {
    if (!(range >= 0 && range <= kE4m3Range)) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT,
                cannot(action, "range", "be over 0 and at most 448, or 0 for 448", std::to_string(range)));
    }
    return range == 0 ? kE4m3Range : range;
  }
  if (range != 0) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(action, "range", "be 0 for codes that are not e4m3", std::to_string(range)));
  }
  return codes == DType::kI8 ? kInt8Range : kInt4Range;
}

void resolve_scales(const char* action, const sage_quantize_call& call, QuantizeOp& op) {
  if (call.granularity < SAGE_GRANULARITY_TOKEN || call.granularity > SAGE_GRANULARITY_CHANNEL) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(action, "granularity", "be token (1), block (2), warp (3), thread (4) or channel (5)",
                     call.granularity));
  }
  if (call.operand < SAGE_OPERAND_QUERY || call.operand > SAGE_OPERAND_VALUE) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, "operand", "be query (0), key (1) or value (2)", call.operand));
  }
  if (call.granularity == SAGE_GRANULARITY_THREAD && call.operand == SAGE_OPERAND_VALUE) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, "operand", "be query (0) or key (1) per thread", call.operand));
  }
  op.per_channel = call.granularity == SAGE_GRANULARITY_CHANNEL;
  const Groups groups = resolve_groups(action, "group_rows", op.per_channel ? SAGE_GRANULARITY_TOKEN : call.granularity,
                                       call.operand, call.group_rows);
  op.grouping = groups.grouping;
  op.group_rows = groups.rows;
}

bool resolve_takes_mean(const char* action, int32_t takes_mean, bool inverse) {
  if (takes_mean == 0 || (takes_mean == 1 && !inverse)) return takes_mean != 0;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, "takes_mean", inverse ? "be 0" : "be 0 or 1", takes_mean));
}

void quantize(const char* action, const sage_quantize_call* from, bool inverse) {
  const auto call = read_struct(action, "call", from);
  const OpenGate stream(call.stream);
  Tensors tensors(action, stream->device);
  const Access forward = inverse ? Access::kRead : Access::kWrite;
  QuantizeOp op;
  resolve_scales(action, call, op);
  op.takes_mean = resolve_takes_mean(action, call.takes_mean, inverse);
  op.x = tensors.add("x", call.x, inverse ? Access::kWrite : Access::kRead, kFloats);
  op.mean = op.takes_mean ? tensors.add("mean", call.mean, Access::kWrite, kF32Only)
                          : tensors.add_optional("mean", call.mean, Access::kRead, kF32Only);
  op.codes = tensors.add("codes", call.codes, forward, {DType::kI8, DType::kI4, DType::kE4M3});
  op.scales = tensors.add("scales", call.scales, forward, kF32Only);
  op.range = resolve_range(action, call.range, op.codes.dtype);
  op.mean_rows = call.mean_rows ? call.mean_rows : op.x.tokens();
  tensors.expect_same_shape("codes", op.codes, "x", op.x);
  if (op.mean) expect_means(tensors, "mean", op.mean, "x", op.x, call.mean_rows);
  if (op.per_channel) {
    expect_means(tensors, "scales", op.scales, "x", op.x);
  } else {
    expect_scales(tensors, "scales", op.scales, "x", op.x, op.grouping, op.group_rows);
  }
  tensors.pin(*stream);
  inverse ? stream->queue->dequantize(op) : stream->queue->quantize(op);
}

// ---- attention ------------------------------------------------------------------------------------------

constexpr int64_t kMostChannels = 256;
constexpr int64_t kMostScores = int64_t(1) << 60;

void check_channels(const char* name, const View& view) {
  if (view.channels() <= kMostChannels) return;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, std::string(name) + ".shape[3]",
                                          "be at most " + std::to_string(kMostChannels), view.channels()));
}

// What q, k, v, o and lse of both kinds of attention have in common.
void check_shapes(const Tensors& tensors, const View& q, const View& k, const View& v, const View& o, const View& lse) {
  check_channels("q", q);
  check_channels("v", v);
  tensors.expect("k", k, 0, q.batch(), "q.shape[0]");
  tensors.expect("k", k, 3, q.channels(), "q.shape[3]");
  tensors.expect("v", v, 0, q.batch(), "q.shape[0]");
  tensors.expect("v", v, 1, k.heads(), "k.shape[1]");
  tensors.expect("v", v, 2, k.tokens(), "k.shape[2]");
  if (q.heads() % k.heads() != 0) {
    SAGE_FAIL(
        SAGE_INVALID_ARGUMENT,
        cannot(kAttention, "q.shape[1]", "be a multiple of k.shape[1] (" + std::to_string(k.heads()) + ")", q.heads()));
  }
  int64_t scores = q.batch() * q.heads() * q.tokens();
  if (__builtin_mul_overflow(scores, k.tokens(), &scores) || scores > kMostScores) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(kAttention, "k.shape[2]", "make at most 2^60 scores with the rows of q", k.tokens()));
  }
  tensors.expect("o", o, 0, q.batch(), "q.shape[0]");
  tensors.expect("o", o, 1, q.heads(), "q.shape[1]");
  tensors.expect("o", o, 2, q.tokens(), "q.shape[2]");
  tensors.expect("o", o, 3, v.channels(), "v.shape[3]");
  if (!lse) return;
  tensors.expect("lse", lse, 0, q.batch(), "q.shape[0]");
  tensors.expect("lse", lse, 1, q.heads(), "q.shape[1]");
  tensors.expect("lse", lse, 2, q.tokens(), "q.shape[2]");
  tensors.expect("lse", lse, 3, 1, "one value a row");
}

float resolve_scale(const sage_attention_options& options, const View& q) {
  return options.scale == 0 ? 1.0f / std::sqrt(float(q.channels())) : options.scale;
}

Masking resolve_masking(const sage_attention_options& options, const View& q, const View& k) {
  const int64_t all = q.tokens() + k.tokens();  // so far no key is from any diagonal
  const auto limit = [all](int64_t tokens) { return tokens < all ? tokens : kUnlimited; };
  Masking masking;
  masking.offset = options.alignment == SAGE_ALIGN_TOP_LEFT ? 0 : k.tokens() - q.tokens();
  if (options.windowed) {
    masking.before = limit(options.window_before);
    masking.after = limit(options.window_after);
  }
  if (options.causal) masking.after = 0;
  masking.softcap = options.softcap;
  return masking;
}

// The tensors of a mask, which may be broadcast.
void read_mask_tensors(const sage_attention_call& call, const View& q, const View& k, Tensors& tensors,
                       Masking& masking) {
  const auto expect_heads = [&](const char* name, const View& view, const char* one) {
    tensors.expect(name, view, 1, q.heads(), "q.shape[1]");
    tensors.expect(name, view, 2, 1, one);
    tensors.expect(name, view, 3, 1, one);
  };
  masking.mask =
      tensors.add_optional("mask", call.mask, Access::kRead, {DType::kBool, DType::kF32, DType::kF16, DType::kBF16});
  masking.sinks = tensors.add_optional("sinks", call.sinks, Access::kRead, kF32Only);
  masking.alibi = tensors.add_optional("alibi", call.alibi, Access::kRead, kF32Only);
  if (masking.mask) {
    tensors.expect_or_one("mask", masking.mask, 0, q.batch(), "q.shape[0]");
    tensors.expect_or_one("mask", masking.mask, 1, q.heads(), "q.shape[1]");
    tensors.expect_or_one("mask", masking.mask, 2, q.tokens(), "q.shape[2]");
    tensors.expect("mask", masking.mask, 3, k.tokens(), "k.shape[2]");
  }
  if (masking.sinks) {
    tensors.expect("sinks", masking.sinks, 0, 1, "one sink a head");
    expect_heads("sinks", masking.sinks, "one sink a head");
  }
  if (masking.alibi) {
    tensors.expect_or_one("alibi", masking.alibi, 0, q.batch(), "q.shape[0]");
    expect_heads("alibi", masking.alibi, "one slope a head");
  }
}

// All but the plan.
AttentionOp read_operands(const sage_attention_call& call, Tensors& tensors) {
  check_zero(kAttention, "call->reserved", call.reserved);
  check_options(call.options);
  AttentionOp op;
  op.q = tensors.add("q", call.q, Access::kRead, kFloats);
  op.k = tensors.add("k", call.k, Access::kRead, kFloats);
  op.v = tensors.add("v", call.v, Access::kRead, kFloats);
  op.o = tensors.add("o", call.o, Access::kWrite, kFloats);
  op.lse = tensors.add_optional("lse", call.lse, Access::kWrite, kF32Only);
  tensors.expect_same_dtype("k", op.k, "q", op.q);
  tensors.expect_same_dtype("v", op.v, "q", op.q);
  check_shapes(tensors, op.q, op.k, op.v, op.o, op.lse);
  op.masking = resolve_masking(call.options, op.q, op.k);
  read_mask_tensors(call, op.q, op.k, tensors, op.masking);
  op.causal = op.masking.after == 0;
  op.scale = resolve_scale(call.options, op.q);
  return op;
}

AttentionOp read_attention(const sage_attention_call& call, const DeviceTraits& traits, Tensors& tensors,
                           bool explains = false) {
  AttentionOp op = read_operands(call, tensors);
  AttentionShape shape = shape_of(op.q, op.k, op.v, op.o, op.masking);
  shape.lse = op.lse || (explains && call.lse.shape[0] > 0);  // which may have no memory
  op.plan = plan_attention(shape, call.options, traits);
  return op;
}

void attention(const sage_attention_call* from, bool flash_only) {
  auto call = read_struct(kAttention, "call", from);
  if (flash_only) {
    if (call.options.kernel != SAGE_KERNEL_AUTO && call.options.kernel != SAGE_KERNEL_FLASH) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, "options.kernel",
                                              "be auto (0) or flash (1) in sage_flash_attention", call.options.kernel));
    }
    call.options.kernel = SAGE_KERNEL_FLASH;
  }
  const OpenGate stream(call.stream);
  Tensors tensors(kAttention, stream->device);
  const AttentionOp op = read_attention(call, stream->traits, tensors);
  tensors.pin(*stream);
  stream->queue->attention(op);
}

// ---- sequences of different lengths -------------------------------------------------------------------------

constexpr uint64_t kMostSequences = uint64_t(1) << 24;

// Where sequences begin, and after them where the last one ends: rising, from 0 to all tokens.
std::vector<int64_t> read_starts(const char* name, const int64_t* from, uint64_t sequences, int64_t tokens,
                                 const char* source) {
  check_pointer(kAttention, name, from);
  std::vector<int64_t> starts(sequences + 1);
  std::memcpy(starts.data(), from, starts.size() * sizeof(int64_t));
  const auto fail = [&](uint64_t i, const std::string& must) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(kAttention, std::string(name) + "[" + std::to_string(i) + "]", must, starts[i]));
  };
  if (starts[0] != 0) fail(0, "be 0");
  for (uint64_t i = 1; i <= sequences; ++i) {
    if (starts[i] < starts[i - 1]) fail(i, "be at least the number before it (" + std::to_string(starts[i - 1]) + ")");
    if (starts[i] > tokens) fail(i, "be at most " + std::string(source) + " (" + std::to_string(tokens) + ")");
  }
  if (starts[sequences] != tokens)
    fail(sequences, "equal " + std::string(source) + " (" + std::to_string(tokens) + ")");
  return starts;
}

// Indices [from, to) of one dimension.
View slice(View view, int dimension, int64_t from, int64_t to) {
  if (!view) return view;
  const int64_t bits = from * view.stride[dimension] * bits_per_element(view.dtype);
  view.data = static_cast<char*>(view.data) + bits / 8;
  view.shape[dimension] = to - from;
  return view;
}

// One sequence of several. Without keys it gets one that none of its queries sees.
AttentionOp sequence_of(const AttentionOp& all, const sage_attention_options& options, int64_t q_from, int64_t q_to,
                        int64_t k_from, int64_t k_to, const DeviceTraits& traits) {
  const bool no_keys = k_from == k_to;
  if (no_keys) k_from = 0, k_to = 1;
  AttentionOp op;
  op.q = slice(all.q, 2, q_from, q_to);
  op.k = slice(all.k, 2, k_from, k_to);
  op.v = slice(all.v, 2, k_from, k_to);
  op.o = slice(all.o, 2, q_from, q_to);
  op.lse = slice(all.lse, 2, q_from, q_to);
  op.masking = resolve_masking(options, op.q, op.k);
  if (no_keys) op.masking.offset = -op.q.tokens(), op.masking.after = 0;
  op.masking.mask = slice(all.masking.mask, 3, k_from, k_to);
  if (all.masking.mask.tokens() > 1) op.masking.mask = slice(op.masking.mask, 2, q_from, q_to);
  op.masking.sinks = all.masking.sinks;
  op.masking.alibi = all.masking.alibi;
  op.causal = op.masking.after == 0;
  AttentionShape shape = shape_of(op.q, op.k, op.v, op.o, op.masking);
  shape.lse = bool(op.lse);
  op.plan = plan_attention(shape, options, traits);
  op.scale = all.scale;
  return op;
}

void attention_varlen(const sage_attention_call* from, const int64_t* q_from, const int64_t* k_from,
                      uint64_t sequences) {
  const auto call = read_struct(kAttention, "call", from);
  const OpenGate stream(call.stream);
  Tensors tensors(kAttention, stream->device);
  const AttentionOp all = read_operands(call, tensors);
  tensors.expect("q", all.q, 0, 1, "one batch of sequences");
  if (sequences < 1 || sequences > kMostSequences) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, "sequences", "be from 1 to " + std::to_string(kMostSequences),
                                            std::to_string(sequences)));
  }
  const auto q_starts = read_starts("q_starts", q_from, sequences, all.q.tokens(), "q.shape[2]");
  const auto k_starts = read_starts("k_starts", k_from, sequences, all.k.tokens(), "k.shape[2]");
  std::vector<AttentionOp> ops;
  for (uint64_t s = 0; s < sequences; ++s) {
    if (q_starts[s] == q_starts[s + 1]) continue;
    ops.push_back(
        sequence_of(all, call.options, q_starts[s], q_starts[s + 1], k_starts[s], k_starts[s + 1], stream->traits));
  }
  tensors.pin(*stream);
  stream->queue->attention_varlen(ops);
}

// ---- attention on codes ---------------------------------------------------------------------------------

struct QuantizedTypes {
  DType qk;
  bool coded_v;
  DType v;
};

QuantizedTypes quantized_types(int32_t kernel) {
  switch (kernel) {
    case SAGE_KERNEL_SAGE1: return {DType::kI8, false, DType::kF16};
    case SAGE_KERNEL_SAGE1_INT8:
    case SAGE_KERNEL_SAGE_INT8: return {DType::kI8, true, DType::kI8};
    case SAGE_KERNEL_SAGE2_INT4: return {DType::kI4, true, DType::kE4M3};
    default: return {DType::kI8, true, DType::kE4M3};
  }
}

void attention_quantized(const sage_attention_quantized_call* from) {
  const auto call = read_struct(kAttention, "call", from);
  check_zero(kAttention, "call->reserved", call.reserved);
  check_zero(kAttention, "call->reserved2", call.reserved2);
  check_quantized_options(call.options);
  const OpenGate stream(call.stream);
  Tensors tensors(kAttention, stream->device);
  const QuantizedTypes types = quantized_types(call.options.kernel);
  QuantizedAttentionOp op;
  op.q = tensors.add("q", call.q, Access::kRead, {types.qk});
  op.q_scales = tensors.add("q_scales", call.q_scales, Access::kRead, kF32Only);
  op.q_mean = tensors.add_optional("q_mean", call.q_mean, Access::kRead, kF32Only);
  op.k = tensors.add("k", call.k, Access::kRead, {types.qk});
  op.k_scales = tensors.add("k_scales", call.k_scales, Access::kRead, kF32Only);
  op.k_mean = tensors.add_optional("k_mean", call.k_mean, Access::kRead, kF32Only);
  op.v = types.coded_v ? tensors.add("v", call.v, Access::kRead, {types.v})
                       : tensors.add("v", call.v, Access::kRead, kFloats);
  if (types.coded_v) {
    op.v_scales = tensors.add("v_scales", call.v_scales, Access::kRead, kF32Only);
  } else if (call.v_scales.data) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(kAttention, "v_scales.data", "be 0 with kernel sage1, whose v has no scales",
                     std::to_string(call.v_scales.data)));
  }
  op.v_mean = tensors.add_optional("v_mean", call.v_mean, Access::kRead, kF32Only);
  op.o = tensors.add("o", call.o, Access::kWrite, kFloats);
  op.lse = tensors.add_optional("lse", call.lse, Access::kWrite, kF32Only);
  check_shapes(tensors, op.q, op.k, op.v, op.o, op.lse);
  op.masking = resolve_masking(call.options, op.q, op.k);
  op.causal = op.masking.after == 0;
  op.plan = plan_attention_quantized(shape_of(op.q, op.k, op.v, op.o, op.masking), call, stream->traits);
  op.scale = resolve_scale(call.options, op.q);
  op.q_mean_rows = call.q_mean_rows ? call.q_mean_rows : op.q.tokens();
  expect_scales(tensors, "q_scales", op.q_scales, "q", op.q, op.plan.q_grouping, op.plan.q_group_rows);
  expect_scales(tensors, "k_scales", op.k_scales, "k", op.k, op.plan.k_grouping, op.plan.k_group_rows);
  if (op.v_scales) expect_means(tensors, "v_scales", op.v_scales, "v", op.v);
  if (op.q_mean) expect_means(tensors, "q_mean", op.q_mean, "q", op.q, call.q_mean_rows);
  if (op.k_mean) expect_means(tensors, "k_mean", op.k_mean, "k", op.k);
  if (op.v_mean) expect_means(tensors, "v_mean", op.v_mean, "v", op.v);
  tensors.pin(*stream);
  stream->queue->attention_quantized(op);
}

int32_t range_option(const Plan& plan) {
  if (plan.kernel != Kernel::kSage2PP) return SAGE_RANGE_DEFAULT;
  return plan.p_range == 448.0f ? SAGE_RANGE_448_2 : plan.p_range == 224.0f ? SAGE_RANGE_224_4 : SAGE_RANGE_112_9;
}

sage_plan show(const Plan& plan) {
  const auto shown = [](bool on) { return on ? SAGE_ON : SAGE_OFF; };
  sage_plan out{};
  out.kernel = int32_t(plan.kernel);
  out.architecture = plan.architecture;
  out.granularity = plan.granularity;
  out.smooth_q = shown(plan.smooth_q);
  out.smooth_k = shown(plan.smooth_k);
  out.smooth_v = shown(plan.smooth_v);
  const bool f16 = plan.f16_accumulator || plan.kernel == Kernel::kSage2PP;
  out.pv_accumulator = f16 ? SAGE_ACCUMULATOR_F16 : SAGE_ACCUMULATOR_F32;
  out.pv_range = range_option(plan);
  out.block_q = plan.block_q;
  out.block_k = plan.block_k;
  out.padded_head_dim = plan.padded_head_dim;
  out.workspace_bytes = plan.workspace_bytes;
  copy_text(out.implementation, plan.implementation);
  copy_text(out.reason, plan.reason);
  out.exponential = plan.fast_exponential ? SAGE_EXPONENTIAL_FAST : SAGE_EXPONENTIAL_EXACT;
  out.rotate = shown(plan.rotate);
  out.band = shown(plan.band);
  out.first_token = shown(plan.first_token);
  out.k_mean_rows = uint32_t(plan.k_mean_rows);
  return out;
}

void explain(const sage_attention_call* from, sage_plan* plan) {
  constexpr const char* kAction = "explain attention";
  const auto call = read_struct(kAction, "call", from);
  check_struct(kAction, "plan", plan, sizeof *plan, sizeof *plan, false);
  const auto stream = Registry::shared().stream(call.stream);
  Tensors tensors(kAttention, stream->device);
  const AttentionOp op = read_attention(call, stream->traits, tensors, true);
  tensors.pin(*stream, Tensors::Absent::kAllowed);
  write_struct(kAction, "plan", plan, show(op.plan));
}

}  // namespace

}  // namespace sage

// ---- the functions of sage.h ----------------------------------------------------------------------------

using namespace sage;

extern "C" {

uint32_t sage_abi_version(void) { return SAGE_ABI_VERSION; }

sage_status sage_build_describe(sage_build_info* info, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    sage_build_info out{};
    out.abi_version = SAGE_ABI_VERSION;
    out.cuda_version = SAGE_CUDA_VERSION;
    out.debug = SAGE_DEBUG;
    copy_text(out.version, SAGE_VERSION);
    copy_text(out.architectures, SAGE_ARCHITECTURES);
    copy_text(out.source_hash, SAGE_SOURCE_HASH);
    write_struct("describe the build", "info", info, out);
  });
}

sage_status sage_cuda_device_count(int32_t* count, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    check_pointer("count CUDA devices", "count", count);
    store(count, 0);
    store(count, cuda_device_count());
  });
}

sage_status sage_device_describe(int32_t device, sage_device_info* info, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "describe a device";
    check_struct(kAction, "info", info, sizeof *info, sizeof *info, false);
    check_device(kAction, device);
    if (device != SAGE_CPU) check_cuda_device(kAction, device);
    write_struct(kAction, "info", info, device == SAGE_CPU ? describe_cpu() : describe_cuda(device));
  });
}

// ---- streams --------------------------------------------------------------------------------------------

sage_status sage_stream_create(int32_t device, uint64_t* stream, char* error, size_t error_size) {
  return sage_stream_create_for(device, 0, stream, error, error_size);
}

sage_status sage_stream_create_for(int32_t device, int32_t architecture, uint64_t* stream, char* error,
                                   size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "create a stream";
    check_pointer(kAction, "stream", stream);
    check_device(kAction, device);
    if (device != SAGE_CPU) check_cuda_device(kAction, device);
    store(stream, Registry::shared().open_stream(device, architecture)->id);
  });
}

sage_status sage_stream_destroy(uint64_t stream, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { Registry::shared().close_stream(stream); });
}

sage_status sage_stream_synchronize(uint64_t stream, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { Registry::shared().stream(stream)->queue->synchronize(); });
}

sage_status sage_stream_wait(uint64_t stream) { return sage_stream_synchronize(stream, nullptr, 0); }

sage_status sage_stream_query(uint64_t stream, int32_t* idle, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    check_pointer("query a stream", "idle", idle);
    store(idle, int32_t(Registry::shared().stream(stream)->queue->idle()));
  });
}

// ---- memory ---------------------------------------------------------------------------------------------

sage_status sage_memory_allocate(uint64_t stream, uint64_t bytes, uint64_t* address, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "allocate";
    check_pointer(kAction, "address", address);
    if (bytes == 0) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, "bytes", "be at least 1", 0));
    const OpenGate gate(stream);
    store(address, Registry::shared().allocate(gate.stream(), bytes));
  });
}

sage_status sage_memory_free(uint64_t stream, uint64_t address, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { Registry::shared().free(Registry::shared().stream(stream), address); });
}

sage_status sage_memory_write(uint64_t stream, uint64_t address, const void* source, uint64_t bytes, char* error,
                              size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "write memory";
    check_pointer(kAction, "source", source);
    const OpenGate gate(stream);
    const auto memory = pin_range(kAction, "address", *gate, address, bytes);
    gate->queue->write(reinterpret_cast<void*>(address), source, bytes);
  });
}

sage_status sage_memory_read(uint64_t stream, void* target, uint64_t address, uint64_t bytes, char* error,
                             size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "read memory";
    check_pointer(kAction, "target", target);
    const auto open = Registry::shared().stream(stream);
    const auto memory = pin_range(kAction, "address", *open, address, bytes);
    open->queue->read(target, reinterpret_cast<const void*>(address), bytes);
  });
}

sage_status sage_memory_copy(uint64_t stream, uint64_t target, uint64_t source, uint64_t bytes, char* error,
                             size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "copy memory";
    const OpenGate gate(stream);
    const auto to = pin_range(kAction, "target", *gate, target, bytes);
    const auto from = pin_range(kAction, "source", *gate, source, bytes);
    if (std::max(target, source) - std::min(target, source) < bytes) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, "target", "not overlap source",
                                              std::to_string(target) + " and " + std::to_string(source) + ", " +
                                                  std::to_string(bytes) + " bytes each"));
    }
    gate->queue->copy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
  });
}

sage_status sage_memory_fill(uint64_t stream, uint64_t address, uint8_t value, uint64_t bytes, char* error,
                             size_t error_size) {
  return guarded(error, error_size, [&] {
    const OpenGate gate(stream);
    const auto memory = pin_range("fill memory", "address", *gate, address, bytes);
    gate->queue->fill(reinterpret_cast<void*>(address), value, bytes);
  });
}

sage_status sage_memory_describe(int32_t device, sage_memory_stats* stats, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "describe memory";
    check_struct(kAction, "stats", stats, sizeof *stats, sizeof *stats, false);
    check_device(kAction, device);
    if (device != SAGE_CPU) check_cuda_device(kAction, device);
    sage_memory_stats out{};
    Registry::shared().describe(device, out);
    write_struct(kAction, "stats", stats, out);
  });
}

// ---- events ---------------------------------------------------------------------------------------------

sage_status sage_event_create(uint64_t stream, uint64_t* event, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    check_pointer("create an event", "event", event);
    const OpenGate gate(stream);
    auto open = std::make_shared<OpenEvent>();
    open->stream = gate.stream();
    open->event = gate->queue->create_event();
    store(event, Registry::shared().add_event(std::move(open)));
  });
}

sage_status sage_event_record(uint64_t event, uint64_t stream, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    const auto open = Registry::shared().event(event);
    const OpenGate gate(stream);
    if (open->stream->device != gate->device) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT,
                cannot("record an event", "the stream's device",
                       "equal the event's (" + std::to_string(open->stream->device) + ")", gate->device));
    }
    gate->queue->record(*open->event);
    open->recorded = true;
  });
}

sage_status sage_event_elapsed(uint64_t begin, uint64_t end, float* milliseconds, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "time events";
    check_pointer(kAction, "milliseconds", milliseconds);
    const auto first = Registry::shared().event(begin), last = Registry::shared().event(end);
    if (first->stream->device != last->stream->device) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT,
                cannot(kAction, "the device of end",
                       "equal that of begin (" + std::to_string(first->stream->device) + ")", last->stream->device));
    }
    for (const auto& [name, event] : {std::pair{"begin", first}, std::pair{"end", last}}) {
      if (!event->recorded) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, name, "be recorded", "not recorded"));
    }
    store(milliseconds, first->stream->queue->elapsed_ms(*first->event, *last->event));
  });
}

sage_status sage_event_destroy(uint64_t event, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { Registry::shared().close_event(event); });
}

// ---- stage timings --------------------------------------------------------------------------------------

sage_status sage_stream_trace(uint64_t stream, int32_t on, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "trace a stream";
    if (on != 0 && on != 1) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, "on", "be 0 or 1", on));
    const OpenGate gate(stream);
    if (gate->traced.exchange(on != 0) && on) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, "its tracing", "be off", "on"));
    }
    gate->queue->trace(on != 0);
  });
}

sage_status sage_stream_read_trace(uint64_t stream, sage_stage* stages, uint64_t capacity, uint64_t* count, char* error,
                                   size_t error_size) {
  return guarded(error, error_size, [&] {
    constexpr const char* kAction = "read a trace";
    check_pointer(kAction, "count", count);
    if (capacity != 0) check_pointer(kAction, "stages", stages);
    const auto open = Registry::shared().stream(stream);
    if (!open->traced) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, "the stream's tracing", "be on", "off"));
    const std::vector<Stage> found = open->queue->read_trace();
    for (uint64_t i = 0; i < std::min<uint64_t>(capacity, found.size()); ++i) {
      sage_stage stage{};
      copy_text(stage.name, found[i].name);
      stage.ms = found[i].ms;
      store(stages + i, stage);
    }
    store(count, uint64_t(found.size()));
  });
}

// ---- operations -----------------------------------------------------------------------------------------

sage_status sage_smooth(const sage_smooth_call* call, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { smooth(call); });
}

sage_status sage_quantize(const sage_quantize_call* call, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { quantize("quantize", call, false); });
}

sage_status sage_dequantize(const sage_quantize_call* call, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { quantize("dequantize", call, true); });
}

sage_status sage_attention(const sage_attention_call* call, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { attention(call, false); });
}

sage_status sage_attention_quantized(const sage_attention_quantized_call* call, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { attention_quantized(call); });
}

sage_status sage_flash_attention(const sage_attention_call* call, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { attention(call, true); });
}

sage_status sage_attention_varlen(const sage_attention_call* call, const int64_t* q_starts, const int64_t* k_starts,
                                  uint64_t sequences, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { attention_varlen(call, q_starts, k_starts, sequences); });
}

sage_status sage_explain(const sage_attention_call* call, sage_plan* plan, char* error, size_t error_size) {
  return guarded(error, error_size, [&] { explain(call, plan); });
}

}  // extern "C"
