// Products of the rows of two tensors in f32, for what is small beside attention itself: one row for every block of
// queries against all keys, or all queries against one mean.
#include "tile.cuh"

namespace sage::cuda {
namespace {

// ---- operands ---------------------------------------------------------------------------------------------------

struct Operand {
  Tensor x, scales;
  Groups groups;
  Means means;
  float mean_sign;
  DType type;
};

Operand make_operand(const ProductOperand& from) {
  Operand operand{};
  operand.x = make_tensor(from.x);
  operand.groups = make_groups(Grouping::kToken, 1);
  if (from.scales) {
    operand.scales = make_tensor(from.scales);
    operand.groups = make_groups(from.grouping, from.group_rows);
  }
  operand.means = make_means(from.mean, from.mean_rows);
  operand.mean_sign = from.add_mean ? 1.0f : -1.0f;
  operand.type = from.x.dtype;
  return operand;
}

template <DType kType>
__device__ __forceinline__ void load_as(const Tensor& tensor, const char* plane, int64_t row, int channel,
                                        float (&x)[8]) {
  Octet<kType> octet[1];
  load_rows(octet, tensor, plane, row, 1, tensor.tokens, channel);
  unpack(octet[0], x);
}

// One head of an operand, rows counting from `base`.
class OperandRows {
 public:
  __device__ __forceinline__ OperandRows(const Operand& operand, Plane plane, int64_t base)
      : operand_(operand),
        x_(plane_of(operand.x, plane)),
        scales_(plane_of(operand.scales, plane)),
        means_(plane_of(operand.means.tensor, plane)),
        groups_(operand.groups, base),
        runs_(operand.means.runs, base),
        base_(base) {}

  // 8 channels of a row; zeros beyond the tensor.
  __device__ __forceinline__ void load(int local, int channel, float (&x)[8]) const {
    switch (operand_.type) {
      case DType::kF32: load_as<DType::kF32>(operand_.x, x_, base_ + local, channel, x); break;
      case DType::kF16: load_as<DType::kF16>(operand_.x, x_, base_ + local, channel, x); break;
      case DType::kBF16: load_as<DType::kBF16>(operand_.x, x_, base_ + local, channel, x); break;
      default: load_as<DType::kI8>(operand_.x, x_, base_ + local, channel, x); break;
    }
    if (base_ + local >= operand_.x.tokens) return;
    if (operand_.scales.data != nullptr) {
      const float scale = float_at(operand_.scales, scales_, groups_.of(local), 0);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] *= scale;
    }
    if (operand_.means.tensor.data != nullptr) {
      float mean[8];
      load_as<DType::kF32>(operand_.means.tensor, means_, runs_.of(local), channel, mean);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] = fmaf(operand_.mean_sign, mean[j], x[j]);
    }
  }

 private:
  const Operand& operand_;
  const char* x_;
  char* scales_;
  const char* means_;
  GroupWindow groups_;
  RunWindow runs_;
  int64_t base_;
};

struct ProductArguments {
  Operand rows, columns;
  Tensor out;
  float factor;
  int64_t heads, group, row_tiles, column_tiles;  // of the rows' heads
};

// ---- many columns -----------------------------------------------------------------------------------------------

constexpr int kThreads = 128, kTileColumns = 128, kDepth = 16;

// A tile of 8 * kThreadRows rows and kTileColumns columns; every thread multiplies kThreadRows rows with 8 columns.
template <int kThreadRows>
__global__ void __launch_bounds__(kThreads)
    row_products_kernel(const __grid_constant__ ProductArguments a, int64_t first) {
  constexpr int kTileRows = 8 * kThreadRows;
  __shared__ float rows[kDepth][kTileRows + 4], columns[kDepth][kTileColumns + 4];
  const int64_t item = first + blockIdx.x, tile = item / a.column_tiles, plane = tile / a.row_tiles;
  const int64_t row0 = tile % a.row_tiles * kTileRows, column0 = item % a.column_tiles * kTileColumns;
  const Plane where{plane / a.heads, plane % a.heads};
  const OperandRows from_rows(a.rows, where, row0);
  const OperandRows from_columns(a.columns, {where.batch, where.head / a.group}, column0);
  const int thread_row = threadIdx.x / 16 * kThreadRows, thread_column = threadIdx.x % 16 * 4;

  float sum[kThreadRows][8] = {};
  for (int channel = 0; channel < a.rows.x.channels; channel += kDepth) {
    for (int i = threadIdx.x; i < (kTileRows + kTileColumns) * kDepth / 8; i += kThreads) {
      const int row = i / (kDepth / 8), octet = i % (kDepth / 8) * 8;
      float x[8];
      if (row < kTileRows) {
        from_rows.load(row, channel + octet, x);
#pragma unroll
        for (int j = 0; j < 8; j++) rows[octet + j][row] = x[j];
      } else {
        from_columns.load(row - kTileRows, channel + octet, x);
#pragma unroll
        for (int j = 0; j < 8; j++) columns[octet + j][row - kTileRows] = x[j];
      }
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; depth++) {
      float row[kThreadRows], column[8];
#pragma unroll
      for (int i = 0; i < kThreadRows; i++) row[i] = rows[depth][thread_row + i];
#pragma unroll
      for (int j = 0; j < 8; j++) column[j] = columns[depth][thread_column + j / 4 * (kTileColumns / 2) + j % 4];
#pragma unroll
      for (int i = 0; i < kThreadRows; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) sum[i][j] = fmaf(row[i], column[j], sum[i][j]);
      }
    }
    __syncthreads();
  }

  char* const to = plane_of(a.out, where);
#pragma unroll
  for (int i = 0; i < kThreadRows; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t row = row0 + thread_row + i, column = column0 + thread_column + j / 4 * (kTileColumns / 2) + j % 4;
      if (row < a.rows.x.tokens && column < a.columns.x.tokens) float_at(a.out, to, row, column) = a.factor * sum[i][j];
    }
  }
}

// ---- one column -------------------------------------------------------------------------------------------------

constexpr int kRows = 4;  // of one thread

__global__ void __maxnreg__(128) single_column_kernel(const __grid_constant__ ProductArguments a, int64_t first) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t item = first + blockIdx.x, plane = item / a.row_tiles, base = item % a.row_tiles * (kRows * step);
  const Plane where{plane / a.heads, plane % a.heads};
  const OperandRows rows(a.rows, where, base);
  const OperandRows columns(a.columns, {where.batch, where.head / a.group}, 0);
  float column[8];
  columns.load(0, channel, column);
  float sum[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    float x[8];
    rows.load(lane + i * step, channel, x);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[i] = fmaf(x[j], column[j], sum[i]);
  }
  for (int offset = blockDim.x / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kRows; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
  }
  char* const to = plane_of(a.out, where);
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const int64_t row = base + lane + i * step;
    if (threadIdx.x == 0 && row < a.rows.x.tokens) float_at(a.out, to, row, 0) = a.factor * sum[i];
  }
}

template <int kThreadRows>
void launch_tiles(ProductArguments a, int64_t planes, cudaStream_t stream) {
  a.row_tiles = (a.rows.x.tokens + 8 * kThreadRows - 1) / (8 * kThreadRows);
  a.column_tiles = (a.columns.x.tokens + kTileColumns - 1) / kTileColumns;
  launch_items(planes * a.row_tiles * a.column_tiles, [&](int64_t first, unsigned blocks) {
    row_products_kernel<kThreadRows><<<blocks, kThreads, 0, stream>>>(a, first);
  });
}

}  // namespace

void launch_row_products(const ProductOperand& rows, const ProductOperand& columns, float factor, const View& out,
                         cudaStream_t stream) {
  ProductArguments a{};
  a.rows = make_operand(rows);
  a.columns = make_operand(columns);
  a.out = make_tensor(out);
  a.factor = factor;
  a.heads = rows.x.heads();
  a.group = rows.x.heads() / columns.x.heads();
  const int64_t planes = rows.x.batch() * rows.x.heads();
  if (columns.x.tokens() == 1) {
    const dim3 block = block_of(rows.x.channels());
    a.row_tiles = (rows.x.tokens() + kRows * block.y - 1) / (kRows * block.y);
    launch_items(planes * a.row_tiles,
                 [&](int64_t first, unsigned blocks) { single_column_kernel<<<blocks, block, 0, stream>>>(a, first); });
  } else if (rows.x.tokens() <= 16) {
    launch_tiles<2>(a, planes, stream);
  } else {
    launch_tiles<8>(a, planes, stream);
  }
}

}  // namespace sage::cuda
