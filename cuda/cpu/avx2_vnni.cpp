// The CPU device for processors with AVX2 and products of bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"
#include "target.h"

#define SAGE_ISA avx2_vnni
#define SAGE_LANES 8
#define SAGE_TILE_ROWS 4
#define SAGE_AVX2
#define SAGE_BYTE_PRODUCTS

SAGE_BEGIN_TARGET("avx2,fma,f16c,avxvnni")
#include "tasks.h"
SAGE_END_TARGET

namespace sage::cpu {
const Kernels kAvx2VnniKernels = SAGE_KERNELS("avx2 vnni");
}
#endif
