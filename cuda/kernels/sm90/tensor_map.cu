// Makes tensor maps by the driver's function, found at run time: the library does not link the driver.
#include <cudaTypedefs.h>

#include <string>

#include "../kernels.h"
#include "tensor_map.h"

namespace sage::cuda::sm90 {

namespace {

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    SAGE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      SAGE_FAIL(SAGE_DEVICE_ERROR, "Cannot run attention as the driver must have cuTensorMapEncodeTiled (CUDA 12.0).");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address);
  }();
  return encoder;
}

}  // namespace

CUtensorMap make_tensor_map(const View& view, int rows, int width) {
  const int64_t bytes = bits_per_element(view.dtype) / 8;
  const CUtensorMapDataType type = view.dtype == DType::kF16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : view.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUtensorMapSwizzle swizzle = width == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; i++) {
    sizes[i] = static_cast<cuuint64_t>(view.shape[3 - i]);
    if (i < 3) strides[i] = static_cast<cuuint64_t>(view.shape[2 - i] > 1 ? view.stride[2 - i] * bytes : 16);
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(width / bytes), static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, type, 4, view.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    SAGE_FAIL(SAGE_INTERNAL, "Cannot make a tensor map: cuTensorMapEncodeTiled gave " + std::to_string(result) + ".");
  }
  return map;
}

}  // namespace sage::cuda::sm90
