// What the C ABI hands to a device: checked tensors, resolved options, and the Stream interface that the CPU
// device (cpu/) and CUDA (kernels/) both implement. Nothing behind this line validates arguments again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "numerics.h"
#include "sage.h"

namespace sage {

// ---- errors: thrown inside the library, turned into a status at the ABI ----------------------------------

struct Error {
  sage_status status;
  std::string message;  // one sentence
  const char* file;
  int line;
};

#define SAGE_FAIL(status, message) \
  throw ::sage::Error { (status), (message), __FILE__, __LINE__ }

// ---- tensors --------------------------------------------------------------------------------------------

enum class DType : int32_t { kF32, kF16, kBF16, kI8, kI4, kE4M3, kBool };  // the values of sage.h

inline int bits_per_element(DType dtype) {
  switch (dtype) {
    case DType::kF32: return 32;
    case DType::kF16:
    case DType::kBF16: return 16;
    case DType::kI4: return 4;
    default: return 8;
  }
}

// A checked tensor [batch, heads, tokens, channels]; strides in elements.
struct View {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
  int64_t batch() const { return shape[0]; }
  int64_t heads() const { return shape[1]; }
  int64_t tokens() const { return shape[2]; }
  int64_t channels() const { return shape[3]; }
};

// ---- operations -----------------------------------------------------------------------------------------

struct SmoothOp {
  View x, mean, smoothed;  // smoothed may be absent
  int64_t block_rows;      // rows of one mean; never 0 (all tokens: x.tokens())
};

struct QuantizeOp {  // and its inverse
  View x, mean, codes, scales;
  bool per_channel;  // else `grouping` over rows
  Grouping grouping;
  int64_t group_rows;       // never 0
  int64_t mean_rows;        // never 0
  float range;              // largest code magnitude
  bool rotate = false;      // codes, of rotated_channels(x.channels()) channels, are those of the rotated rows
  bool takes_mean = false;  // the mean of x is written first; else it is read, or absent
};

enum class Kernel : int32_t {  // as in sage.h
  kAuto,
  kFlash,
  kSage1,
  kSage1Int8,
  kSage2,
  kSage2Int4,
  kSage2PP,
  kSageInt8
};

constexpr int64_t kUnlimited = -1;

// Which keys a query sees, and what becomes of its scores before softmax: capped, then added to.
struct Masking {
  int64_t offset = 0;           // of the diagonal: query i stands at key i + offset
  int64_t before = kUnlimited;  // how many keys before the diagonal it sees
  int64_t after = kUnlimited;   // and after it; 0: causal
  float softcap = 0;            // 0: none
  // Absent, or with strides of 0 in dimensions of length 1:
  View mask;   // bool (true: visible) or floats (added; -inf: not visible): [B or 1, Hq or 1, Nq or 1, Nk]
  View sinks;  // f32 [1, Hq, 1, 1]: logits of the denominator alone
  View alibi;  // f32 [B or 1, Hq, 1, 1]: slope * -|i + offset - j| is added
};

// Everything decided about one attention call; made by plan.cpp, shown by sage_explain.
struct Plan {
  Kernel kernel;
  int architecture;  // 0: CPU
  int granularity;   // SAGE_GRANULARITY_* of Q and K
  Grouping q_grouping, k_grouping;
  int64_t q_group_rows, k_group_rows;
  bool smooth_q, smooth_k, smooth_v;
  bool f16_accumulator;    // sage1: P.V sums of one key tile in f16
  bool fast_exponential;   // sage2: codes of P by an integer multiplication
  bool rotate;             // Q and K by a Hadamard matrix before they are quantized
  bool band;               // causal: the first key tile and those on the diagonal as flash computes them
  bool first_token;        // the first key as flash computes it
  int64_t k_mean_rows;     // that share one row of k_mean; never 0
  float p_range, v_range;  // largest code of P and V; 448 unless sage2++
  int block_q, block_k;
  int padded_head_dim;
  int key_splits;      // CUDA flash for few queries: parts of the keys that are added up at the end; else 0
  bool fp8_products;   // portable CUDA kernels: P.V by FP8 tensor cores, else codes are multiplied as FP16 numbers
  bool int4_products;  // portable CUDA kernels: Q.K by INT4 tensor cores, else INT4 codes are multiplied as INT8
  size_t workspace_bytes;
  std::string implementation, reason;
};

struct AttentionOp {
  View q, k, v, o, lse;  // lse may be absent
  Masking masking;
  bool causal;  // masking.after == 0
  float scale;  // resolved, > 0
  Plan plan;
};

struct QuantizedAttentionOp {
  View q, q_scales, q_mean;  // means may be absent
  View k, k_scales, k_mean;
  View v, v_scales, v_mean;  // v_scales are absent for sage1
  View o, lse;
  int64_t q_mean_rows;  // never 0
  Masking masking;      // without tensors
  bool causal;          // masking.after == 0
  float scale;
  Plan plan;  // its smoothing flags are unused
};

// ---- streams --------------------------------------------------------------------------------------------

class Event {
 public:
  virtual ~Event() = default;
};

// A part of an operation, and how long it took on the device.
struct Stage {
  const char* name;  // a literal
  float ms;
};

// An ordered queue of work on one device. Calls enqueue and return; they throw Error. Thread-safe.
class Stream {
 public:
  virtual ~Stream() = default;  // waits

  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* address) noexcept = 0;
  virtual void write(void* to, const void* from, size_t bytes) = 0;  // from host; `from` may be reused on return
  virtual void read(void* to, const void* from, size_t bytes) = 0;   // to host; waits
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  virtual void fill(void* to, uint8_t value, size_t bytes) = 0;
  virtual void synchronize() = 0;
  virtual bool idle() = 0;

  virtual std::unique_ptr<Event> create_event() = 0;
  virtual void record(Event& event) = 0;
  virtual float elapsed_ms(Event& begin, Event& end) = 0;  // waits for end

  virtual void trace(bool on) = 0;              // times the stages of what is enqueued from now on; off: forgets them
  virtual std::vector<Stage> read_trace() = 0;  // waits; empty where tracing is off

  virtual void smooth(const SmoothOp& op) = 0;
  virtual void quantize(const QuantizeOp& op) = 0;
  virtual void dequantize(const QuantizeOp& op) = 0;
  virtual void attention(const AttentionOp& op) = 0;
  virtual void attention_varlen(const std::vector<AttentionOp>& ops) = 0;  // of tokens apart from each other's
  virtual void attention_quantized(const QuantizedAttentionOp& op) = 0;
};

// ---- devices --------------------------------------------------------------------------------------------

// What a plan needs to know of a device; plain data, so plans can be made and tested without one.
struct DeviceTraits {
  bool cpu = true;
  int compute_capability = 0;  // 90 for sm_90
  int code_level = 0;          // features that its portable kernels were compiled with: 80, or 89 for FP8 too
  int architecture = 0;        // the compute capability whose kernels it uses; see choose_architecture()
  int multiprocessors = 0;
  std::string implementation;  // of the CPU device: "cpu avx512"
};

std::unique_ptr<Stream> open_cpu_stream();
sage_device_info describe_cpu();

// In a CPU-only build these say so (SAGE_NO_DEVICE).
int cuda_device_count();  // throws Error{SAGE_NO_DEVICE} with the reason where there is none
std::unique_ptr<Stream> open_cuda_stream(int ordinal);
sage_device_info describe_cuda(int ordinal);
DeviceTraits cuda_traits(int ordinal);  // with its own architecture
DeviceTraits cpu_traits();

// ---- plans ----------------------------------------------------------------------------------------------

struct AttentionShape {
  int64_t batch, q_heads, kv_heads, q_tokens, k_tokens, head_dim, v_dim;
  DType dtype, out_dtype;
  bool causal;
  bool boxes;            // q, k and v can be copied as boxes
  Masking masking = {};  // its tensors may lie nowhere
  bool lse = false;      // is wanted too
};

// Whether hardware can copy boxes of the tensor (by a tensor map): base and strides are multiples of 16 bytes.
inline bool has_boxes(const View& view) {
  constexpr int64_t kLargestStride = int64_t{1} << 40;  // bytes
  if (bits_per_element(view.dtype) < 8 || reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  if (view.channels() > 1 && view.stride[3] != 1) return false;
  const int64_t bytes = bits_per_element(view.dtype) / 8;
  for (int i = 0; i < 3; i++) {
    const int64_t stride = view.stride[i];
    if (view.shape[i] > 1 && (stride <= 0 || stride >= kLargestStride / bytes || stride * bytes % 16 != 0))
      return false;
  }
  return true;
}

inline AttentionShape shape_of(const View& q, const View& k, const View& v, const View& o, const Masking& masking) {
  return {q.batch(),
          q.heads(),
          k.heads(),
          q.tokens(),
          k.tokens(),
          q.channels(),
          v.channels(),
          q.dtype,
          o.dtype,
          masking.after == 0,
          has_boxes(q) && has_boxes(k) && has_boxes(v),
          masking};
}

// Pure: throws SAGE_UNSUPPORTED, with the allowed values, where the device cannot do it.
int choose_architecture(const DeviceTraits& device, int wanted);  // 0: its own
Plan plan_attention(const AttentionShape& shape, const sage_attention_options& options, const DeviceTraits& device);
Plan plan_attention_quantized(const AttentionShape& shape, const sage_attention_quantized_call& call,
                              const DeviceTraits& device);

}  // namespace sage
