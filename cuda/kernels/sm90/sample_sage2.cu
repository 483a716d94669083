// Means of K and V and scales of V, from a sample of the tokens: any constant is an exact shift, and the scales leave
// the values that were not looked at room to be larger.
#include "../tile.cuh"
#include "launch.cuh"
#include "pack_sage2.cuh"

namespace sage::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // of one thread, at a time

// ---- which tokens -----------------------------------------------------------------------------------------------

constexpr int kFewest = 6, kMost = 11;  // 2^kFewest to 2^kMost of them, one in 32

struct Sample {
  int64_t tokens;
  int shift;  // log2 of how many are looked at
};

Sample make_sample(int64_t tokens) {
  int shift = kFewest;
  while (shift < kMost && (tokens >> shift) >= 64) shift++;
  return {tokens, shift};
}

// One token out of every equal part; where in its part varies, so that no period of the data can hide.
__device__ __forceinline__ int64_t token_of(const Sample& sample, int index) {
  const int64_t begin = index * sample.tokens >> sample.shift, end = (index + 1) * sample.tokens >> sample.shift;
  const uint32_t fraction = static_cast<uint32_t>(index) * 0x9e3779b9u;
  return begin + __umulhi(fraction, static_cast<uint32_t>(end - begin));
}

// ---- kernel -----------------------------------------------------------------------------------------------------

struct SampleArguments {
  Tensor k, v;
  Sage2Packed packed;
  Sample sample;
  int heads, head_dim;    // of K and V; as padded
  unsigned values, keys;  // blocks for V, then for K
  bool centre_all;        // channels of V, whether or not their mean is significant
  ValueCodes codes;       // of V
};

template <DType kType>
__global__ void __launch_bounds__(kThreads, kType == DType::kF32 ? 2 : 3)
    sample_kernel(const __grid_constant__ SampleArguments a) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  const bool is_value = blockIdx.x < a.values;
  const unsigned plane = is_value ? blockIdx.x : blockIdx.x - a.values;
  const Tensor& tensor = is_value ? a.v : a.k;
  const char* const from = plane_of(tensor, Plane{plane / a.heads, plane % a.heads});
  const int octets = a.head_dim / 8, octet = threadIdx.x % octets, lanes = kThreads / octets;
  const int count = 1 << a.sample.shift, channel = octet * 8;

  float pivot[8] = {};  // keys need none, having no use for squares
  if (is_value) load_pivot<kType>(pivot, tensor, from, channel);
  Summary summary[8] = {};
  const auto add = [&](const Octet<kType>& octet) {
    float x[8];
    unpack(octet, x);
#pragma unroll
    for (int j = 0; j < 8; j++) add_value(summary[j], x[j], pivot[j]);
  };
  const int set = threadIdx.x / octets;
#pragma unroll 1
  for (int first = set; first < count; first += lanes * kLoads) {
    Octet<kType> raw[kLoads][1];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int index = first + i * lanes;
      const int64_t token = index < count ? token_of(a.sample, index) : 0;
      load_rows(raw[i], tensor, from, token, 1, index < count ? tensor.tokens : 0, channel);
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (first + i * lanes < count) add(raw[i][0]);
    }
  }

  __shared__ Summary summaries[kThreads * 8];  // [lanes][8][octets]
  __shared__ float pivots[256];
  Summary* const own = summaries + set * a.head_dim + octet;  // of every octets-th
  bool finite = true;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    own[j * octets] = summary[j];
    if (set == 0) pivots[channel + j] = pivot[j];
    finite &= is_finite(summary[j].sum);
  }
  if (!finite) {
#pragma unroll
    for (int j = 0; j < 8; j++) own[j * octets] = {};
#pragma unroll 1
    for (int index = set; index < count; index += lanes) {
      Octet<kType> raw[1];
      load_rows(raw, tensor, from, token_of(a.sample, index), 1, tensor.tokens, channel);
      float x[8];
      unpack(raw[0], x);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (is_finite(x[j]))
          add_value(own[j * octets], x[j], pivot[j]);
        else
          own[j * octets].missing += 1.0f;
      }
    }
  }
  __syncthreads();

  const int slot = threadIdx.x, c = slot % octets * 8 + slot / octets;
  if (slot < a.head_dim) {
    Summary all = summaries[slot];
#pragma unroll 4
    for (int i = 1; i < lanes; i++) add_summary(all, summaries[i * a.head_dim + slot]);
    if (is_value) {
      const int64_t at = int64_t{plane} * a.head_dim + c;
      const Channel values = channel_of_values(all, pivots[c], count, a.centre_all, a.codes);
      const bool known = c < tensor.channels;
      a.packed.v_mean[at] = known ? values.mean : 0.0f;
      a.packed.v_scales[at] = known ? values.scale : 1.0f;
      a.packed.v_peaks[at] = 0.0f;
    } else if (a.packed.k_mean != nullptr && c < tensor.channels) {
      a.packed.k_mean[int64_t{plane} * tensor.channels + c] = mean_of_channel(all, pivots[c], count);
    }
  }
  if ((is_value || a.values == 0) && threadIdx.x == 0) a.packed.flags[plane] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.packed.next_item = 0;
}

}  // namespace

void launch_sage2_sample(const Sage2Op& op, bool keys_alone, CUstream_st* stream) {
  SampleArguments a{};
  a.k = make_tensor(op.k);
  a.v = make_tensor(op.v);
  a.packed = op.packed;
  a.sample = make_sample(op.k.tokens());
  a.heads = static_cast<int>(op.k.heads());
  a.head_dim = op.plan.padded_head_dim;
  const auto planes = static_cast<unsigned>(op.k.batch() * op.k.heads());
  a.values = keys_alone ? 0 : planes;
  a.keys = keys_alone || op.packed.k_mean != nullptr ? planes : 0;
  a.centre_all = op.plan.smooth_v;
  a.codes = ValueCodes::of(op.plan, false);
  for_float_type(op.k.dtype, [&](auto type) {
    launch_overlapped(sample_kernel<decltype(type)::value>, a.values + a.keys, kThreads, 0, stream, a);
  });
}

}  // namespace sage::cuda::sm90
