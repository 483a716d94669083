// Writes cuda/kernels/ptx/wgmma.cuh: one wrapper for every wgmma shape in use. Run from the project's root:
//   deno run --allow-write=cuda/kernels/ptx tools/generate_wgmma.ts
const scoreWidths = [64, 128, 192, 256];
const valueWidths = [8, 72, 136, 256];
const halfScoreWidths = [64, 80, 128];
const halfValueWidths = [64, 128, 256];

function registers(first: number, count: number): string {
  return Array.from({ length: count }, (_, i) => `%${first + i}`).join(", ");
}

function wrap(items: string[], indent: string): string {
  const lines: string[] = [];
  let line = "";
  for (const item of items) {
    if (line && (indent + line + " " + item).length > 118) {
      lines.push(indent + line);
      line = "";
    }
    line += (line ? " " : "") + item;
  }
  return [...lines, indent + line].join("\n");
}

function outputs(kind: "r" | "f", count: number): string {
  return wrap(
    Array.from({ length: count }, (_, i) => `"+${kind}"(d[${i}])${i + 1 < count ? "," : ""}`),
    "          ",
  );
}

function accumulator(count: number): string {
  const lines = wrap(registers(0, count).split(" "), "").split("\n");
  return lines.map((line) => `        "${line} "`).join("\n");
}

function scores(width: number): string {
  const n = width / 2;
  return `template <>
struct ScoreProduct<${width}> {
  template <bool kAccumulate>
  static __device__ __forceinline__ void issue(int (&d)[${n}], uint64_t a, uint64_t b) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %${
    n + 2
  }, 0; wgmma.mma_async.sync.aligned.m64n${width}k32.s32.s8.s8 {"
${accumulator(n)}
        "}, %${n}, %${n + 1}, p; }"
        :
${outputs("r", n)}
        : "l"(a), "l"(b), "n"(kAccumulate ? 1 : 0));
  }
};
`;
}

function values(width: number): string {
  const n = width / 2;
  return `template <>
struct ValueProduct<${width}> {
  static __device__ __forceinline__ void issue(float (&d)[${n}], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %${
    n + 5
  }, 0; wgmma.mma_async.sync.aligned.m64n${width}k32.f32.e4m3.e4m3 {"
${accumulator(n)}
        "}, {${registers(n, 4)}}, %${n + 4}, p, 1, 1; }"
        :
${outputs("f", n)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};
`;
}

function valuesInHalf(width: number): string {
  const n = width / 4;
  return `template <>
struct ValueProductInHalf<${width}> {
  static __device__ __forceinline__ void issue(uint32_t (&d)[${n}], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %${
    n + 5
  }, 0; wgmma.mma_async.sync.aligned.m64n${width}k32.f16.e4m3.e4m3 {"
${accumulator(n)}
        "}, {${registers(n, 4)}}, %${n + 4}, p, 1, 1; }"
        :
${outputs("r", n)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};
`;
}

const halfTypes = [["Half::kF16", "f16"], ["Half::kBF16", "bf16"]];

function halfScores(width: number): string {
  const n = width / 2;
  return halfTypes.map(([name, type]) =>
    `template <>
struct HalfScoreProduct<${name}, ${width}> {
  template <bool kAccumulate>
  static __device__ __forceinline__ void issue(float (&d)[${n}], uint64_t a, uint64_t b) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %${
      n + 2
    }, 0; wgmma.mma_async.sync.aligned.m64n${width}k16.f32.${type}.${type} {"
${accumulator(n)}
        "}, %${n}, %${n + 1}, p, 1, 1, 0, 0; }"
        :
${outputs("f", n)}
        : "l"(a), "l"(b), "n"(kAccumulate ? 1 : 0));
  }
};
`
  ).join("\n");
}

function halfValues(width: number): string {
  const n = width / 2;
  return halfTypes.map(([name, type]) =>
    `template <>
struct HalfValueProduct<${name}, ${width}> {
  static __device__ __forceinline__ void issue(float (&d)[${n}], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %${
      n + 5
    }, 0; wgmma.mma_async.sync.aligned.m64n${width}k16.f32.${type}.${type} {"
${accumulator(n)}
        "}, {${registers(n, 4)}}, %${n + 4}, p, 1, 1, 1; }"
        :
${outputs("f", n)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};
`
  ).join("\n");
}

const text =
  `// Warpgroup products (sm_90a); written by tools/generate_wgmma.ts. Descriptors a and b name K-major tiles in shared
// memory. A product that does not accumulate overwrites d.
#pragma once

#include <cstdint>

// clang-format off
namespace sage::cuda::ptx {

// d [64 x kWidth] s32 (+)= a (shared memory) * b, 32 INT8 deep.
template <int kWidth>
struct ScoreProduct;

// d [64 x kWidth] f32 (+)= a (registers) * b, 32 e4m3 deep.
template <int kWidth>
struct ValueProduct;

// d [64 x kWidth] f16, in pairs, (+)= a (registers) * b, 32 e4m3 deep.
template <int kWidth>
struct ValueProductInHalf;

enum class Half { kF16, kBF16 };

// d [64 x kWidth] f32 (+)= a (shared memory) * b, 16 deep.
template <Half kHalf, int kWidth>
struct HalfScoreProduct;

// d [64 x kWidth] f32 (+)= a (registers) * b, 16 deep; b names a tile whose rows are tokens (MN-major).
template <Half kHalf, int kWidth>
struct HalfValueProduct;

${
    [
      ...scoreWidths.map(scores),
      ...valueWidths.map(values),
      ...valueWidths.map(valuesInHalf),
      ...halfScoreWidths.map(halfScores),
      ...halfValueWidths.map(halfValues),
    ].join("\n")
  }
}  // namespace sage::cuda::ptx
`;

await Deno.writeTextFile("cuda/kernels/ptx/wgmma.cuh", text);
