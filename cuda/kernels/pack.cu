// A strided tensor as the attention kernels take it: contiguous rows, padded with zeros.
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 4;  // of one thread

struct PackArguments {
  Tensor from, to;
  int64_t heads, tiles;  // of one head
};

template <DType kType>
__global__ void __maxnreg__(80) pack_kernel(const __grid_constant__ PackArguments a, int64_t first) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t item = first + blockIdx.x, plane = item / a.tiles;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t row = item % a.tiles * (kRows * step) + lane;
  Octet<kType> raw[kRows];
  load_rows(raw, a.from, plane_of(a.from, where), row, step, a.from.tokens, channel);
  char* to = row_of(a.to, plane_of(a.to, where), row);
#pragma unroll
  for (int i = 0; i < kRows; i++, to += step * a.to.token_stride) {
    if (row + i * step >= a.to.tokens) break;
    store_octet(raw[i], a.to, to, channel);
  }
}

}  // namespace

void launch_pack(const View& from, const View& to, cudaStream_t stream) {
  const dim3 block = block_of(to.channels());
  const int64_t tile_rows = kRows * block.y;
  PackArguments a{};
  a.from = make_tensor(from);
  a.to = make_tensor(to);
  a.heads = from.heads();
  a.tiles = (to.tokens() + tile_rows - 1) / tile_rows;
  launch_items(from.batch() * from.heads() * a.tiles, [&](int64_t first, unsigned blocks) {
    if (from.dtype == DType::kF32) {
      pack_kernel<DType::kF32><<<blocks, block, 0, stream>>>(a, first);
    } else {
      pack_kernel<DType::kI8><<<blocks, block, 0, stream>>>(a, first);
    }
  });
}

}  // namespace sage::cuda
