// The CPU device for every processor of an architecture.
#include <type_traits>

#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SAGE_ISA generic
#define SAGE_LANES 4
#define SAGE_TILE_ROWS 4
#include "tasks.h"

namespace sage::cpu {
const Kernels kGenericKernels = SAGE_KERNELS("generic");
}
