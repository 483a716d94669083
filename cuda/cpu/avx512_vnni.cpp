// The CPU device for processors with AVX-512 and products of bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"
#include "target.h"

#define SAGE_ISA avx512_vnni
#define SAGE_LANES 16
#define SAGE_TILE_ROWS 8
#define SAGE_AVX512
#define SAGE_BYTE_PRODUCTS

SAGE_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512vnni")
#include "tasks.h"
SAGE_END_TARGET

namespace sage::cpu {
const Kernels kAvx512VnniKernels = SAGE_KERNELS("avx512 vnni");
}
#endif
