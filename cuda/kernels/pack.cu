// A strided tensor as the attention kernels take it: contiguous rows, padded with zeros.
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 4;  // of one thread

struct PackArguments {
  Tensor from, to;
};

template <DType kType>
__global__ void __maxnreg__(80) pack_kernel(const __grid_constant__ PackArguments a, Place corner) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const Place place = place_of_block(corner);
  const int64_t row = place.tile * (kRows * step) + lane;
  Octet<kType> raw[kRows];
  load_rows(raw, a.from, plane_of(a.from, place.plane), row, step, a.from.tokens, channel);
  char* to = row_of(a.to, plane_of(a.to, place.plane), row);
#pragma unroll
  for (int i = 0; i < kRows; i++, to += step * a.to.token_stride) {
    if (row + i * step >= a.to.tokens) break;
    store_octet(raw[i], a.to, to, channel);
  }
}

}  // namespace

void launch_pack(const View& from, const View& to, cudaStream_t stream) {
  const dim3 block = block_of(to.channels());
  PackArguments a{};
  a.from = make_tensor(from);
  a.to = make_tensor(to);
  launch_grid(to, tiles_of(to.tokens(), kRows * block.y), [&](dim3 grid, Place corner) {
    if (from.dtype == DType::kF32) {
      pack_kernel<DType::kF32><<<grid, block, 0, stream>>>(a, corner);
    } else {
      pack_kernel<DType::kI8><<<grid, block, 0, stream>>>(a, corner);
    }
  });
}

}  // namespace sage::cuda
