// The precision band of kernel sage2: what it leaves of the error on real tensors, lengths that no tile ends with, and
// when Hopper leaves it to the portable kernel.
import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  explain,
  type FloatDType,
  parseSafetensors,
  relativeL1,
  UnsupportedError,
} from "../mod.ts";
import {
  biased,
  bits,
  type FloatProblem,
  nameOf,
  run,
  within,
  worstDifference,
} from "./attention.ts";
import {
  deviceTest,
  download,
  type Lengths,
  poisoned,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { type Dims, referenceAttention } from "./reference.ts";

const exponentials = ["exact", "fast"] as const;
const band = { kernel: "sage2", band: true, causal: true } as const;

/** Relative L1, as measured: on the CPU, and on an H200, whose band has more tiles. */
const layers = [
  { file: "tinyllama-layer06", cpu: 0.006, cuda: 0.0024 },
  { file: "tinyllama-layer18", cpu: 0.0103, cuda: 0.007 },
] as const;

for (const { file, cpu, cuda } of layers) {
  deviceTest(`the band leaves as little error as recorded on ${file}`, async (device) => {
    const stored = parseSafetensors(
      await Deno.readFile(new URL(`data/${file}.safetensors`, import.meta.url)),
    );
    const [q, k, v] = ["q", "k", "v"].map((name) => stored.get(name, "f16"));
    const dims = ({ shape }: { shape: readonly number[] }) => shape as Dims;
    const problem: FloatProblem = {
      ...{ q: Float32Array.from(q.data), k: Float32Array.from(k.data) },
      ...{ v: Float32Array.from(v.data), qDims: dims(q), kDims: dims(k), vDims: dims(v) },
    };
    const reference = referenceAttention(problem, { causal: true });
    using tensors = uploadProblem(device, problem, "f16");
    for (const exponential of exponentials) {
      const options = { ...band, exponential };
      if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
      const { out, lse } = await run(tensors, options);
      const bound = device.name === "cpu" ? cpu : cuda;
      within(relativeL1(out, reference.out), 1.1 * bound, `${file}, ${exponential}`);
      within(worstDifference(lse, reference.lse), 0.15, `lse of ${file}, ${exponential}`);
    }
  });
}

/** Blocks of 128 rows and tiles of 64 keys that end anywhere, and rows that see no key. */
const lengths: Lengths[] = [
  { queries: 1, channels: 64 },
  { queries: 64, heads: 2, channels: 64 },
  { queries: 300, heads: 4, kvHeads: 2, channels: 64 },
  { queries: 129, keys: 257, batch: 2, channels: 40 },
  { queries: 77, keys: 513, heads: 3, kvHeads: 1, channels: 128 },
  { queries: 513, keys: 77, heads: 2, channels: 96 },
  { queries: 200, keys: 263, channels: 128 },
  { queries: 640, keys: 1500, heads: 2, kvHeads: 1, channels: 128 },
  { queries: 1, keys: 3000, channels: 64 },
];

for (const [at, size] of lengths.entries()) {
  deviceTest(`the band, ${nameOf(size)}`, async (device) => {
    for (const dtype of ["f16", "bf16"] as const satisfies FloatDType[]) {
      const clean = randomProblem(size, dtype, 40 + at);
      const problem = {
        ...clean,
        k: biased(clean.k, size.channels, 2, 3),
        v: biased(clean.v, size.channels, 1, 4),
      };
      using tensors = uploadProblem(device, problem, dtype);
      const { q, k, v } = tensors;
      for (const more of [{}, { smoothV: true }, { smoothK: false }] satisfies AttentionOptions[]) {
        const rounded: FloatProblem = {
          ...problem,
          ...{ q: await download(q), k: await download(k), v: await download(v) },
        };
        const reference = referenceAttention(rounded, { causal: true });
        for (const exponential of exponentials) {
          const options = { ...band, exponential, ...more };
          if (!runs(q, k, v, options)) continue;
          const what = `${dtype}, ${exponential}, ${JSON.stringify(more)}`;
          const once = async () => {
            using out = poisoned(device, problem.qDims, dtype);
            using result = attention(q, k, v, { ...options, out, returnLse: true });
            return { out: await download(result.out), lse: await download(result.lse) };
          };
          const { out, lse } = await once();
          within(relativeL1(out, reference.out), 0.045, `relative L1, ${what}`);
          within(worstDifference(lse, reference.lse), 0.15, `lse, ${what}`);
          assertEquals(bits((await once()).out), bits(out), `twice, ${what}`);
        }
      }
    }
  });
}

deviceTest("what Hopper's own band does not go with takes the portable kernel", (device) => {
  const explained = (dtype: FloatDType, channels: number, options: AttentionOptions) => {
    using tensors = uploadProblem(device, randomProblem({ queries: 64, channels }, dtype), dtype);
    return explain(tensors.q, tensors.k, tensors.v, { ...band, ...options });
  };
  if (explained("f16", 64, {}).architecture !== "sm_90") return;
  const reasons: [FloatDType, number, AttentionOptions, string][] = [
    ["f32", 64, {}, "the band has f32 operands"],
    ["f16", 256, {}, "the band has head dimensions above 128"],
    ["f16", 36, {}, "the band has addresses or strides that are not multiples of 16 bytes"],
    ["f16", 64, { smoothQ: true }, "the band has smoothed queries"],
    ["f16", 64, { window: 100 }, "the band has a window"],
  ];
  for (const [dtype, channels, options, reason] of reasons) {
    const plan = explained(dtype, channels, options);
    assertEquals(plan.architecture, "sm_80", reason);
    assertStringIncludes(plan.reason, `; by the portable kernel, as ${reason}`);
    assertThrows(
      () => explained(dtype, channels, { ...options, exponential: "fast" }),
      UnsupportedError,
      reason,
    );
  }
});
