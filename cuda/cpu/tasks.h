// Every task, compiled for one instruction set. Included last, once, by the file of that instruction set, which
// defines SAGE_ISA (the namespace), SAGE_LANES (floats of a vector), SAGE_TILE_ROWS (rows of a register tile) and,
// where they apply, SAGE_AVX2, SAGE_AVX512 and SAGE_BYTE_PRODUCTS, and has turned the instruction set on.
//
// These headers include no other: what is defined while the instruction set is on must be in its namespace, as the
// linker keeps one copy of every other inline function for all processors.
#pragma once

#include "attention_tasks.h"
#include "pack_tasks.h"
#include "quantize_tasks.h"
#include "smooth_tasks.h"

#define SAGE_KERNELS(name)                                                                              \
  {                                                                                                     \
    name, sizeof(SAGE_ISA::Code), SAGE_ISA::mean, SAGE_ISA::subtract_mean, SAGE_ISA::quantize_rows,     \
        SAGE_ISA::quantize_channels, SAGE_ISA::dequantize, SAGE_ISA::scale_values, SAGE_ISA::pack_keys, \
        SAGE_ISA::pack_values, SAGE_ISA::cover_mask, SAGE_ISA::attend, SAGE_ISA::scratch_bytes          \
  }
