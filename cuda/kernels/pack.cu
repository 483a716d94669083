// A strided tensor as the attention kernels take it: contiguous rows, padded with zeros.
#include "encode.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 4;  // of one thread

struct PackArguments {
  Tensor from, to;
};

template <DType kFrom, DType kTo>
__device__ __forceinline__ Octet<kTo> convert(const Octet<kFrom>& octet) {
  if constexpr (kFrom == kTo) {
    return octet;
  } else {
    float x[8];
    unpack(octet, x);
    if constexpr (kTo == DType::kI8)
      return encode_any<kTo>(x, [](int) { return 1.0f; });
    else
      return pack<kTo>(x);
  }
}

template <DType kFrom, DType kTo>
__global__ void __maxnreg__(80) pack_kernel(const __grid_constant__ PackArguments a, Place corner) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const Place place = place_of_block(corner);
  const int64_t row = place.tile * (kRows * step) + lane;
  Octet<kFrom> raw[kRows];
  load_rows(raw, a.from, plane_of(a.from, place.plane), row, step, a.from.tokens, channel);
  char* to = row_of(a.to, plane_of(a.to, place.plane), row);
#pragma unroll
  for (int i = 0; i < kRows; i++, to += step * a.to.token_stride) {
    if (row + i * step >= a.to.tokens) break;
    store_octet(convert<kFrom, kTo>(raw[i]), a.to, to, channel);
  }
}

}  // namespace

void launch_pack(const View& from, const View& to, cudaStream_t stream) {
  const dim3 block = block_of(to.channels());
  PackArguments a{};
  a.from = make_tensor(from);
  a.to = make_tensor(to);
  const auto launch = [&](auto kernel) {
    launch_grid(to, tiles_of(to.tokens(), kRows * block.y),
                [&](dim3 grid, Place corner) { kernel<<<grid, block, 0, stream>>>(a, corner); });
  };
  if (from.dtype == DType::kF32) return launch(pack_kernel<DType::kF32, DType::kF32>);
  if (from.dtype == DType::kI4) return launch(pack_kernel<DType::kI4, DType::kI8>);
  if (from.dtype == DType::kE4M3) return launch(pack_kernel<DType::kE4M3, DType::kF16>);
  if (to.dtype == DType::kF16) return launch(pack_kernel<DType::kI8, DType::kF16>);
  launch(pack_kernel<DType::kI8, DType::kI8>);
}

}  // namespace sage::cuda
