// The CPU device for processors with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"
#include "target.h"

#define SAGE_ISA avx2
#define SAGE_LANES 8
#define SAGE_TILE_ROWS 4
#define SAGE_AVX2

SAGE_BEGIN_TARGET("avx2,fma,f16c")
#include "tasks.h"
SAGE_END_TARGET

namespace sage::cpu {
const Kernels kAvx2Kernels = SAGE_KERNELS("avx2");
}
#endif
