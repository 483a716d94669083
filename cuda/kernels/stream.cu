// The CUDA device's streams: memory in stream order from the device's pool, and operations as runs of launches.
#include <algorithm>
#include <array>

#include "events.h"
#include "sm90/decode.h"
#include "sm90/flash.h"
#include "tuning.h"
#include "workspace.h"

namespace sage {
namespace cuda {
namespace {

// ---- views of workspace -----------------------------------------------------------------------------------------

// A contiguous tensor [batch, heads, tokens, channels].
View dense(void* data, DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels) {
  View view;
  view.data = data;
  view.dtype = dtype;
  const int64_t shape[4] = {batch, heads, tokens, channels};
  int64_t stride = 1;
  for (int i = 3; i >= 0; i--) {
    view.shape[i] = shape[i];
    view.stride[i] = stride;
    stride *= shape[i];
  }
  return view;
}

bool is_dense(const View& view) {
  int64_t stride = 1;
  for (int i = 3; i >= 0; i--) {
    if (view.shape[i] != 1 && view.stride[i] != stride) return false;
    stride *= view.shape[i];
  }
  return true;
}

// A view of the channels that hold something.
View without_padding(View view, int64_t channels) {
  view.shape[3] = channels;
  return view;
}

// INT4 codes as the bytes that hold pairs of them; others as they are.
View in_bytes(View view) {
  if (view.dtype != DType::kI4) return view;
  view.dtype = DType::kI8;
  view.shape[3] /= 2;
  for (int i = 0; i < 3; i++) view.stride[i] /= 2;
  return view;
}

// Rows that the attention kernels can copy 16 bytes at a time.
bool has_aligned_rows(const View& codes) {
  for (int i = 0; i < 3; i++) {
    if (codes.shape[i] != 1 && codes.stride[i] % 16 != 0) return false;
  }
  return codes.stride[3] == 1 && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0;
}

// What V may grow to in FP16: with FP32 sums a power of two that FP16 holds; with FP16 sums of one key tile, whose
// weights are at most 1, small enough that rounding up cannot overflow them.
float largest_value(const Plan& plan) { return plan.f16_accumulator ? 60000.0f / plan.block_k : 32768.0f; }

// How kernels hold V: as numbers, or as codes with the largest at `range`.
struct ValueForm {
  DType codes;
  float range;

  explicit ValueForm(const Plan& plan) {
    switch (plan.kernel) {
      case Kernel::kSage1: codes = DType::kF16, range = largest_value(plan); return;
      case Kernel::kSage1Int8: codes = DType::kI8, range = kInt8Range; return;
      default: codes = DType::kE4M3, range = plan.v_range;
    }
  }
};

// The view of several sequences of which `view` is the first.
View batch_of(View view, int64_t sequences) {
  if (!view) return view;
  view.shape[0] = sequences;
  view.stride[0] = view.tokens() * view.stride[2];
  return view;
}

// Whether `next` lies where `view`, a batch of sequences, would have one more.
bool continues(const View& view, const View& next) {
  const int64_t bytes = view.batch() * view.tokens() * view.stride[2] * bits_per_element(view.dtype) / 8;
  return view.tokens() == next.tokens() && (!view || static_cast<char*>(view.data) + bytes == next.data);
}

// Neighbouring sequences of the same lengths are one batch.
std::vector<AttentionOp> merge_sequences(const std::vector<AttentionOp>& ops) {
  std::vector<AttentionOp> merged;
  for (const AttentionOp& op : ops) {
    if (!merged.empty()) {
      AttentionOp& batch = merged.back();
      const bool same = !op.masking.mask && op.masking.offset == batch.masking.offset &&
                        op.masking.before == batch.masking.before && op.masking.after == batch.masking.after;
      if (same && continues(batch.q, op.q) && continues(batch.k, op.k) && continues(batch.v, op.v) &&
          continues(batch.o, op.o) && continues(batch.lse, op.lse)) {
        const int64_t sequences = batch.q.batch() + 1;
        for (View* view : {&batch.q, &batch.k, &batch.v, &batch.o, &batch.lse}) *view = batch_of(*view, sequences);
        continue;
      }
    }
    merged.push_back(op);
  }
  for (AttentionOp& op : merged) {
    op.plan.workspace_bytes = attention_workspace_bytes(shape_of(op.q, op.k, op.v, op.o, op.masking), op.plan);
  }
  return merged;
}

constexpr size_t kLanes = 8;  // streams that sequences of different lengths are spread over
using SideStreams = std::array<cudaStream_t, kLanes - 1>;

class CudaStream final : public Stream {
 public:
  explicit CudaStream(Device& device) : device_(device) {
    enter(device_);
    SAGE_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    device_.streams++;
  }

  ~CudaStream() override {
    cudaSetDevice(device_.ordinal);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    for (const cudaStream_t side : sides_) {
      if (side != nullptr) cudaStreamDestroy(side);
    }
    if (--device_.streams == 0) cudaMemPoolTrimTo(device_.pool, 0);
    cudaGetLastError();
  }

  // ---- memory ---------------------------------------------------------------------------------------------------

  void* allocate(size_t bytes) override {
    enter(device_);
    void* address = nullptr;
    if (bytes > device_.total_bytes) fail_out_of_memory(bytes);
    cudaError_t status = cudaMallocFromPoolAsync(&address, bytes, device_.pool, stream_);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      reclaim();
      status = cudaMallocFromPoolAsync(&address, bytes, device_.pool, stream_);
    }
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      fail_out_of_memory(bytes);
    }
    check(status, "cudaMallocFromPoolAsync", __FILE__, __LINE__);
    return address;
  }

  void release(void* address) noexcept override {
    if (address == nullptr) return;
    cudaSetDevice(device_.ordinal);
    cudaFreeAsync(address, stream_);
    cudaGetLastError();
  }

  void write(void* to, const void* from, size_t bytes) override {
    enter(device_);
    cudaPointerAttributes attributes{};
    SAGE_CUDA(cudaPointerGetAttributes(&attributes, from));
    SAGE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    // Pageable memory was copied when the call returns; memory that CUDA knows is still being read.
    if (attributes.type != cudaMemoryTypeUnregistered) SAGE_CUDA(cudaStreamSynchronize(stream_));
  }

  void read(void* to, const void* from, size_t bytes) override {
    enter(device_);
    SAGE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    SAGE_CUDA(cudaStreamSynchronize(stream_));
  }

  void copy(void* to, const void* from, size_t bytes) override {
    enter(device_);
    SAGE_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
  }

  void fill(void* to, uint8_t value, size_t bytes) override {
    enter(device_);
    SAGE_CUDA(cudaMemsetAsync(to, value, bytes, stream_));
  }

  // ---- waiting --------------------------------------------------------------------------------------------------

  void synchronize() override {
    enter(device_);
    SAGE_CUDA(cudaStreamSynchronize(stream_));
  }

  bool idle() override {
    enter(device_);
    const cudaError_t status = cudaStreamQuery(stream_);
    if (status != cudaErrorNotReady) {
      check(status, "cudaStreamQuery", __FILE__, __LINE__);
      return true;
    }
    cudaGetLastError();
    return false;
  }

  std::unique_ptr<Event> create_event() override { return std::make_unique<CudaEvent>(device_); }

  void record(Event& event) override {
    enter(device_);
    SAGE_CUDA(cudaEventRecord(static_cast<CudaEvent&>(event).get(), stream_));
  }

  float elapsed_ms(Event& begin, Event& end) override {
    enter(device_);
    return cuda::elapsed_ms(static_cast<CudaEvent&>(begin), static_cast<CudaEvent&>(end));
  }

  // ---- stage timings --------------------------------------------------------------------------------------------

  void trace(bool on) override {
    enter(device_);
    const auto trace = on ? std::make_shared<Trace>(device_, stream_) : nullptr;
    std::lock_guard lock(trace_mutex_);
    trace_ = trace;
  }

  std::vector<Stage> read_trace() override {
    enter(device_);
    const auto trace = current_trace();
    SAGE_CUDA(cudaStreamSynchronize(stream_));
    return trace ? trace->read() : std::vector<Stage>();
  }

  // ---- operations -----------------------------------------------------------------------------------------------

  void smooth(const SmoothOp& op) override {
    enter(device_);
    expect_channels("smooth", op.x);
    const Workspace scratch(*this, mean_scratch_bytes(op.x, op.block_rows));
    Stages stages(current_trace());
    stages.begin("smooth");
    launch_smooth(op.x, op.mean, op.block_rows, op.smoothed, scratch.at(0), stream_);
  }

  void quantize(const QuantizeOp& op) override {
    enter(device_);
    expect_channels("quantize", op.x);
    const Workspace scratch(*this, quantize_scratch_bytes(op));
    Stages stages(current_trace());
    stages.begin("quantize");
    launch_quantize(op, nullptr, scratch.at(0), stream_);
  }

  void dequantize(const QuantizeOp& op) override {
    enter(device_);
    expect_channels("dequantize", op.x);
    Stages stages(current_trace());
    stages.begin("dequantize");
    launch_dequantize(op, stream_);
  }

  void attention(const AttentionOp& op) override {
    enter(device_);
    const Workspace memory(*this, op.plan.workspace_bytes);
    Stages stages(current_trace());
    run_attention(op, {stream_, memory.base()}, stages);
  }

  // Sequences share nothing, so they run side by side: each on a lane with memory of its own.
  void attention_varlen(const std::vector<AttentionOp>& sequences) override {
    enter(device_);
    if (sequences.empty()) return;
    const std::vector<AttentionOp> ops = merge_sequences(sequences);
    size_t slice = 0;
    for (const AttentionOp& op : ops) slice = std::max(slice, (op.plan.workspace_bytes + 255) / 256 * 256);
    const size_t lanes = std::min(kLanes, ops.size());
    const Workspace memory(*this, lanes * slice);
    Stages stages(current_trace());
    stages.begin("attention");
    Stages untold(nullptr);
    const Fork fork(*this, lanes - 1);
    for (size_t i = 0; i < ops.size(); i++) {
      const size_t lane = i % lanes;
      run_attention(ops[i], {fork.lane(lane), memory.base() + lane * slice}, untold);
    }
  }

  void attention_quantized(const QuantizedAttentionOp& op) override {
    enter(device_);
    QuantizedNeeds needs{};
    const auto pack = [&](const View& codes) {
      return codes.dtype == DType::kI4 || codes.channels() != op.plan.padded_head_dim || !has_aligned_rows(codes);
    };
    needs.pack_q = pack(op.q);
    needs.pack_k = pack(op.k);
    needs.pack_q_scales = !is_dense(op.q_scales);
    needs.pack_k_scales = !is_dense(op.k_scales);
    needs.pack_v_scales = op.v_scales && !is_dense(op.v_scales);
    needs.pack_v_mean = op.v_mean && !is_dense(op.v_mean);
    needs.delta = static_cast<bool>(op.q_mean);
    needs.delta_rows = op.q_mean.tokens() > 1 ? op.q_mean_rows : op.q.tokens();
    needs.lse_shift = (op.lse || op.masking.softcap > 0) && op.k_mean;
    needs.convert_v = op.v.dtype != DType::kF16 || op.plan.f16_accumulator;
    const AttentionShape shape = shape_of(op.q, op.k, op.v, op.o, op.masking);
    const QuantizedWorkspace layout(shape, op.plan, needs);
    const Workspace memory(*this, layout.bytes);
    Stages stages(current_trace());
    run_quantized(op, needs, layout, {stream_, memory.base()}, stages);
  }

 private:
  // Temporary memory in stream order: later work may reuse it as soon as the launches so far are done.
  class Workspace {
   public:
    Workspace(CudaStream& stream, size_t bytes)
        : stream_(stream), base_(bytes == 0 ? nullptr : static_cast<char*>(stream.allocate(bytes))) {}
    ~Workspace() { stream_.release(base_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    char* base() const { return base_; }
    void* at(size_t offset) const { return base_ + offset; }

   private:
    CudaStream& stream_;
    char* base_;
  };

  // Where an operation runs, and its memory there.
  struct Lane {
    cudaStream_t stream;
    char* memory;

    void* at(size_t offset) const { return memory + offset; }
    uint32_t* words_at(size_t offset) const { return static_cast<uint32_t*>(at(offset)); }
  };

  // While it lives, lanes beside the stream: what they do begins after all that was enqueued, and what is enqueued
  // later begins after it.
  class Fork {
   public:
    Fork(CudaStream& stream, size_t sides) : main_(stream.stream_), sides_(stream.side_streams()), count_(sides) {
      if (count_ == 0) return;
      SAGE_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
      cudaEventRecord(event_, main_);
      for (size_t i = 0; i < count_; i++) cudaStreamWaitEvent(sides_[i], event_);
    }
    ~Fork() {
      if (count_ == 0) return;
      for (size_t i = 0; i < count_; i++) {
        cudaEventRecord(event_, sides_[i]);
        cudaStreamWaitEvent(main_, event_);
      }
      cudaEventDestroy(event_);  // once its work is done
    }
    Fork(const Fork&) = delete;
    Fork& operator=(const Fork&) = delete;

    cudaStream_t lane(size_t index) const { return index == 0 ? main_ : sides_[index - 1]; }

   private:
    cudaStream_t main_;
    const SideStreams& sides_;
    size_t count_;
    cudaEvent_t event_ = nullptr;
  };

  const SideStreams& side_streams() {
    std::lock_guard lock(sides_mutex_);
    for (cudaStream_t& side : sides_) {
      if (side == nullptr) SAGE_CUDA(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    }
    return sides_;
  }

  std::shared_ptr<Trace> current_trace() {
    std::lock_guard lock(trace_mutex_);
    return trace_;
  }

  // Gives back what the pool holds for later; a capture, whose memory belongs to its graph, must not wait.
  void reclaim() {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    SAGE_CUDA(cudaStreamIsCapturing(stream_, &capture));
    if (capture != cudaStreamCaptureStatusNone) return;
    SAGE_CUDA(cudaStreamSynchronize(stream_));
    SAGE_CUDA(cudaMemPoolTrimTo(device_.pool, 0));
  }

  [[noreturn]] void fail_out_of_memory(size_t bytes) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    cudaGetLastError();
    SAGE_FAIL(SAGE_OUT_OF_MEMORY, "Cannot allocate " + std::to_string(bytes) + " bytes on " + name_of(device_) + ": " +
                                      std::to_string(free_bytes) + " of its " + std::to_string(total_bytes) +
                                      " bytes are free.");
  }

  // A block holds whole rows.
  static void expect_channels(const char* action, const View& x) {
    if (x.channels() <= 256) return;
    SAGE_FAIL(SAGE_UNSUPPORTED, std::string("Cannot ") + action +
                                    " as x.shape[3] must be at most 256 on a CUDA device: current value is " +
                                    std::to_string(x.channels()) + ".");
  }

  static void expect_planned(size_t bytes, const Plan& plan) {
    if (bytes == plan.workspace_bytes) return;
    SAGE_FAIL(SAGE_INTERNAL, "Cannot run a plan of " + std::to_string(plan.workspace_bytes) +
                                 " workspace bytes: the kernels need " + std::to_string(bytes) + ".");
  }

  void run_attention(const AttentionOp& op, const Lane& lane, Stages& stages) {
    const AttentionShape shape = shape_of(op.q, op.k, op.v, op.o, op.masking);
    if (op.plan.kernel == Kernel::kFlash) return run_flash(op, shape, lane, stages);
    if (is_hopper_sage2(op.plan)) return run_sage2(op, shape, lane, stages);
    run_sage(op, SageWorkspace(shape, op.plan), lane, stages);
  }

  void run_flash(const AttentionOp& op, const AttentionShape& shape, const Lane& lane, Stages& stages) {
    if (op.plan.key_splits != 0) {
      stages.begin("attention");
      return op.plan.architecture == 90 ? sm90::launch_decode(op, lane.at(0), lane.stream)
                                        : launch_decode(op, lane.at(0), lane.stream);
    }
    const FlashWorkspace layout(shape, op.plan);
    expect_planned(layout.carver.bytes(), op.plan);
    const MaskTiles tiles = look_at_mask(op.masking, op.plan, lane, layout.mask.tiles, layout.mask.bits, stages);
    stages.begin("attention");
    op.plan.architecture == 90 ? sm90::launch_flash(op, tiles, lane.stream) : launch_flash(op, tiles, lane.stream);
  }

  MaskTiles look_at_mask(const Masking& masking, const Plan& plan, const Lane& lane, size_t tiles, size_t bits,
                         Stages& stages) {
    if (!masking.mask) return {};
    stages.begin("mask");
    const MaskTiles out{static_cast<TileState*>(lane.at(tiles)), static_cast<uint64_t*>(lane.at(bits))};
    launch_mask_tiles(masking.mask, plan.block_q, out, lane.stream);
    return out;
  }

  // Codes of rows as the attention kernel takes them.
  void quantize_rows(const View& x, const View& mean, bool takes_mean, int64_t mean_rows, Grouping grouping,
                     int64_t group_rows, const View& codes, const View& scales, const Plan& plan, uint32_t* not_finite,
                     cudaStream_t stream) {
    QuantizeOp op{};
    op.x = x;
    op.mean = mean;
    op.takes_mean = takes_mean;
    op.codes = codes;
    op.scales = scales;
    op.grouping = grouping;
    op.group_rows = group_rows;
    op.mean_rows = mean_rows;
    op.range = plan.kernel == Kernel::kSage2Int4 ? kInt4Range : kInt8Range;
    op.rotate = plan.rotate;
    launch_quantize(op, not_finite, nullptr, stream);
  }

  // V in FP16, or its codes in FP16, with the scales of its channels.
  void convert_values(const View& v, const View& mean, int64_t padded_v_dim, const Plan& plan, void* to, void* scales,
                      void* scratch, SageOp& run, uint32_t* not_finite, cudaStream_t stream) {
    const ValueForm form(plan);
    View v16 = dense(to, DType::kF16, v.batch(), v.heads(), v.tokens(), padded_v_dim);
    run.v_scales = dense(scales, DType::kF32, v.batch(), v.heads(), 1, v.channels());
    launch_values(v, mean, form.codes, form.range, v16, run.v_scales, not_finite, scratch, stream);
    v16.shape[3] = v.channels();
    run.v = v16;
  }

  // FP16 numbers that are codes, as FP8 products take them.
  View fp8_tiles(const View& v, const Plan& plan, void* to, cudaStream_t stream) {
    const int64_t k_tiles = (v.tokens() + plan.block_k - 1) / plan.block_k;
    const View tiles = dense(to, DType::kE4M3, v.batch(), v.heads(), k_tiles * plan.padded_head_dim, plan.block_k);
    launch_fp8_tiles(v, tiles, stream);
    return tiles;
  }

  // Codes of V as tiles of bytes.
  void int8_tiles(const View& codes, const Plan& plan, void* tiles, uint32_t* not_finite, SageOp& run,
                  cudaStream_t stream) {
    constexpr int64_t kTileKeys = 64;
    const int64_t rows = (codes.tokens() + kTileKeys - 1) / kTileKeys * plan.padded_head_dim;
    launch_int8_tiles(codes, plan.padded_head_dim, tiles, not_finite, stream);
    run.v = dense(tiles, DType::kI8, codes.batch(), codes.heads(), rows, kTileKeys);
    run.v_not_finite = not_finite;
  }

  // V in bytes, with the scales of its channels.
  void quantize_values(const View& v, const View& mean, const Plan& plan, const SageWorkspace& layout, const Lane& lane,
                       SageOp& run) {
    View codes = dense(lane.at(layout.v_codes), DType::kI8, v.batch(), v.heads(), v.tokens(), layout.padded_v_dim);
    run.v_scales = dense(lane.at(layout.v_scales), DType::kF32, v.batch(), v.heads(), 1, v.channels());
    QuantizeOp op{};
    op.x = v;
    op.mean = mean;
    op.codes = codes;
    op.scales = run.v_scales;
    op.per_channel = true;
    op.mean_rows = v.tokens();
    op.range = kInt8Range;
    launch_quantize(op, nullptr, lane.at(layout.scratch), lane.stream);
    int8_tiles(without_padding(codes, v.channels()), plan, lane.at(layout.v), lane.words_at(layout.v_not_finite), run,
               lane.stream);
  }

  // Every kernel that quantizes but sage2 on sm_90a.
  void run_sage(const AttentionOp& op, const SageWorkspace& layout, const Lane& lane, Stages& stages) {
    const Plan& plan = op.plan;
    expect_planned(layout.bytes, plan);
    const int64_t batch = op.q.batch(), q_heads = op.q.heads(), k_heads = op.k.heads();
    const int64_t nq = op.q.tokens(), nk = op.k.tokens(), d = op.q.channels(), dv = op.v.channels();
    View q_mean, k_mean, v_mean;
    if (plan.smooth_k || plan.smooth_v) stages.begin("mean");
    if (plan.smooth_q) q_mean = dense(lane.at(layout.q_mean), DType::kF32, batch, q_heads, layout.q_means, d);
    if (plan.smooth_k) {
      k_mean = dense(lane.at(layout.k_mean), DType::kF32, batch, k_heads, layout.k_means, d);
      launch_mean(op.k, k_mean, plan.k_mean_rows, lane.at(layout.scratch), lane.stream);
    }
    if (plan.smooth_v) {
      v_mean = dense(lane.at(layout.v_mean), DType::kF32, batch, k_heads, 1, dv);
      launch_mean(op.v, v_mean, nk, lane.at(layout.scratch), lane.stream);
    }

    SageOp run{};
    run.q_raw = op.q;
    run.k_raw = op.k;
    const DType codes = plan.int4_products ? DType::kI4 : DType::kI8;
    const View q_codes = dense(lane.at(layout.q_codes), codes, batch, q_heads, nq, plan.padded_head_dim);
    const View k_codes = dense(lane.at(layout.k_codes), codes, batch, k_heads, nk, plan.padded_head_dim);
    run.q = in_bytes(q_codes);
    run.k = in_bytes(k_codes);
    run.q_scales = dense(lane.at(layout.q_scales), DType::kF32, batch, q_heads, layout.q_groups, 1);
    run.k_scales = dense(lane.at(layout.k_scales), DType::kF32, batch, k_heads, layout.k_groups, 1);
    run.q_not_finite = lane.words_at(layout.q_not_finite);
    run.k_not_finite = lane.words_at(layout.k_not_finite);
    stages.begin("quantize");
    quantize_rows(op.q, q_mean, plan.smooth_q, kQueryMeanRows, plan.q_grouping, plan.q_group_rows, q_codes,
                  run.q_scales, plan, lane.words_at(layout.q_not_finite), lane.stream);
    quantize_rows(op.k, k_mean, false, plan.k_mean_rows, plan.k_grouping, plan.k_group_rows, k_codes, run.k_scales,
                  plan, lane.words_at(layout.k_not_finite), lane.stream);

    const ProductOperand keys_less_mean{op.k, {}, Grouping::kToken, 1, k_mean, plan.k_mean_rows, false};
    const bool tile_means = has_tile_means(plan, nk);
    const bool shifts = plan.smooth_k && !tile_means && (op.lse || op.masking.sinks || op.masking.softcap > 0);
    // What is quantized is the rotated rows over the number of their channels.
    const float gain = plan.rotate ? rotated_channels(d) : 1.0f;
    if (plan.smooth_q || shifts || plan.first_token) stages.begin("correct");
    if (plan.smooth_q) {
      run.delta = dense(lane.at(layout.delta), DType::kF32, batch, q_heads, layout.q_means, nk);
      run.delta_rows = kQueryMeanRows;
      launch_row_products({q_mean, {}, Grouping::kToken, 1, {}, 1, false}, keys_less_mean, 1.0f / gain, run.delta,
                          lane.stream);
    }
    if (plan.first_token) {
      run.first_scores = dense(lane.at(layout.first_scores), DType::kF32, batch, q_heads, nq, 1);
      View first_key = op.k;
      first_key.shape[2] = 1;
      const View mean = tile_means ? View{} : k_mean;
      launch_row_products({op.q, {}, Grouping::kToken, 1, {}, 1, false},
                          {first_key, {}, Grouping::kToken, 1, mean, nk, false}, op.scale, run.first_scores,
                          lane.stream);
    }
    if (shifts) {
      run.lse_shift = dense(lane.at(layout.lse_shift), DType::kF32, batch, q_heads, nq, 1);
      launch_row_products({op.q, {}, Grouping::kToken, 1, {}, 1, false},
                          {k_mean, {}, Grouping::kToken, 1, {}, 1, false}, op.scale, run.lse_shift, lane.stream);
    }

    run.v = run.v_raw = op.v;
    run.v_dtype = op.v.dtype;
    run.v_mean = v_mean;
    if (tile_means || plan.band) run.k_mean = k_mean;
    uint32_t* const not_finite = plan.kernel == Kernel::kSage1 ? nullptr : lane.words_at(layout.v_not_finite);
    run.v_not_finite = not_finite;
    if (layout.convert_v) stages.begin("pack");
    if (plan.kernel == Kernel::kSageInt8) {
      quantize_values(op.v, v_mean, plan, layout, lane, run);
    } else if (layout.convert_v) {
      convert_values(op.v, v_mean, layout.padded_v_dim, plan, lane.at(layout.v), lane.at(layout.v_scales),
                     lane.at(layout.scratch), run, not_finite, lane.stream);
    }
    if (plan.fp8_products) run.v = fp8_tiles(run.v, plan, lane.at(layout.v_tiles), lane.stream);
    run.o = op.o;
    run.lse = op.lse;
    run.masking = op.masking;
    run.mask_tiles = look_at_mask(op.masking, plan, lane, layout.mask_tiles, layout.mask_bits, stages);
    run.causal = op.causal;
    run.scale = op.scale * gain;
    run.plan = plan;
    stages.begin("attention");
    plan.architecture == 90 ? sm90::launch_sage1(run, lane.stream) : launch_sage(run, lane.stream);
  }

  void run_sage2(const AttentionOp& op, const AttentionShape& shape, const Lane& lane, Stages& stages) {
    const Sage2Workspace layout(shape, op.plan);
    expect_planned(layout.bytes, op.plan);
    sm90::Sage2Op run{};
    run.q = op.q;
    run.k = op.k;
    run.v = op.v;
    run.o = op.o;
    run.lse = op.lse;
    run.packed = layout.at(lane.memory, op.plan);
    run.masking = op.masking;
    run.causal = op.causal;
    run.scale = op.scale;
    run.plan = op.plan;
    const MaskTiles mask = look_at_mask(op.masking, op.plan, lane, layout.mask_tiles, layout.mask_bits, stages);
    run.mask_tiles = mask.tiles;
    run.mask_bits = mask.bits;
    if (op.plan.smooth_q) {
      stages.begin("mean");
      const int64_t blocks = (shape.q_tokens + sm90::kBlockM - 1) / sm90::kBlockM;
      const View mean = dense(run.packed.q_mean, DType::kF32, shape.batch, shape.q_heads, blocks, shape.head_dim);
      launch_mean(op.q, mean, sm90::kBlockM, nullptr, lane.stream);
    }
    stages.begin("pack");
    sm90::launch_sage2_pack(run, lane.stream);
    if (op.plan.smooth_q) {
      stages.begin("correct");
      sm90::launch_sage2_shifts(run, lane.stream);
    }
    if (op.lse && op.plan.smooth_k) {  // what lse lacks without the mean
      stages.begin("correct");
      const View mean = dense(run.packed.k_mean, DType::kF32, shape.batch, shape.kv_heads, 1, shape.head_dim);
      launch_row_products({op.q, {}, Grouping::kToken, 1, {}, 1, false}, {mean, {}, Grouping::kToken, 1, {}, 1, false},
                          op.scale, op.lse, lane.stream);
      run.adds_lse = true;
    }
    stages.begin("attention");
    sm90::launch_sage2_attention(run, lane.stream);
    stages.begin("repair");
    sm90::launch_sage2_repair(run, lane.stream);
  }

  // The tensor itself, or its copy in the workspace.
  View packed(bool needed, const View& from, DType dtype, int64_t channels, void* to, cudaStream_t stream) {
    if (!needed) return from;
    const View copy = dense(to, dtype, from.batch(), from.heads(), from.tokens(), channels);
    launch_pack(from, copy, stream);
    return copy;
  }

  void run_quantized(const QuantizedAttentionOp& op, const QuantizedNeeds& needs, const QuantizedWorkspace& layout,
                     const Lane& lane, Stages& stages) {
    const Plan& plan = op.plan;
    const int64_t batch = op.q.batch(), q_heads = op.q.heads(), nq = op.q.tokens(), nk = op.k.tokens();
    stages.begin("pack");
    SageOp run{};
    const auto pack = [&](bool needed, const View& from, DType dtype, int64_t channels, size_t to) {
      return packed(needed, from, dtype, channels, lane.at(to), lane.stream);
    };
    run.q = pack(needs.pack_q, op.q, DType::kI8, plan.padded_head_dim, layout.q_codes);
    run.k = pack(needs.pack_k, op.k, DType::kI8, plan.padded_head_dim, layout.k_codes);
    run.q_scales = pack(needs.pack_q_scales, op.q_scales, DType::kF32, 1, layout.q_scales);
    run.k_scales = pack(needs.pack_k_scales, op.k_scales, DType::kF32, 1, layout.k_scales);
    run.v_mean = pack(needs.pack_v_mean, op.v_mean, DType::kF32, op.v.channels(), layout.v_mean);
    const View q_codes = without_padding(run.q, op.q.channels()), k_codes = without_padding(run.k, op.k.channels());
    run.q_not_finite = lane.words_at(layout.q_not_finite);
    run.k_not_finite = lane.words_at(layout.k_not_finite);
    launch_find_not_finite(q_codes, lane.words_at(layout.q_not_finite), lane.stream);
    launch_find_not_finite(k_codes, lane.words_at(layout.k_not_finite), lane.stream);

    if (needs.delta || needs.lse_shift) stages.begin("correct");
    if (needs.delta) {
      run.delta = dense(lane.at(layout.delta), DType::kF32, batch, q_heads, layout.deltas, nk);
      run.delta_rows = needs.delta_rows;
      launch_row_products({op.q_mean, {}, Grouping::kToken, 1, {}, 1, false},
                          {k_codes, op.k_scales, plan.k_grouping, plan.k_group_rows, {}, 1, false}, 1.0f, run.delta,
                          lane.stream);
    }
    if (needs.lse_shift) {
      run.lse_shift = dense(lane.at(layout.lse_shift), DType::kF32, batch, q_heads, nq, 1);
      launch_row_products({q_codes, op.q_scales, plan.q_grouping, plan.q_group_rows, op.q_mean, op.q_mean_rows, true},
                          {op.k_mean, {}, Grouping::kToken, 1, {}, 1, false}, op.scale, run.lse_shift, lane.stream);
    }

    run.v = run.v_raw = op.v;
    run.v_dtype = op.v.dtype;
    if (needs.convert_v) stages.begin("pack");
    if (op.v_scales)
      run.v_scales = pack(needs.pack_v_scales, op.v_scales, DType::kF32, op.v.channels(), layout.v_scales);
    if (plan.kernel == Kernel::kSageInt8) {
      int8_tiles(op.v, plan, lane.at(layout.v), lane.words_at(layout.v_not_finite), run, lane.stream);
    } else if (op.v_scales) {
      run.v = without_padding(pack(true, op.v, DType::kF16, layout.padded_v_dim, layout.v), op.v.channels());
    } else if (needs.convert_v) {
      convert_values(op.v, {}, layout.padded_v_dim, plan, lane.at(layout.v), lane.at(layout.v_scales),
                     lane.at(layout.scratch), run, nullptr, lane.stream);
    }
    if (plan.fp8_products) run.v = fp8_tiles(run.v, plan, lane.at(layout.v_tiles), lane.stream);
    run.o = op.o;
    run.lse = op.lse;
    run.masking = op.masking;
    run.causal = op.causal;
    run.scale = op.scale;
    run.plan = plan;
    stages.begin("attention");
    launch_sage(run, lane.stream);
  }

  Device& device_;
  cudaStream_t stream_;
  std::mutex sides_mutex_;
  SideStreams sides_{};  // made when they are needed
  std::mutex trace_mutex_;
  std::shared_ptr<Trace> trace_;
};

}  // namespace
}  // namespace cuda

std::unique_ptr<Stream> open_cuda_stream(int ordinal) {
  return std::make_unique<cuda::CudaStream>(cuda::open_device(ordinal));
}

}  // namespace sage
