// The precision band of kernel sage2: what it leaves of the error on real tensors, lengths that no tile ends with, and
// what a device refuses beside it.
import { assertEquals, assertThrows } from "@std/assert";
import {
  attention,
  type AttentionOptions,
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

deviceTest("what the band on a CUDA device does not go with is refused", (device) => {
  if (device.name === "cpu") return;
  const refused = (
    dtype: FloatDType,
    channels: number,
    options: AttentionOptions,
    says: string,
  ) => {
    using tensors = uploadProblem(device, randomProblem({ queries: 64, channels }, dtype), dtype);
    const { q, k, v } = tensors;
    if (dtype === "f16" && !runs(q, k, v, { kernel: "sage2", causal: true })) return;
    assertThrows(() => attention(q, k, v, { ...band, ...options }), UnsupportedError, says);
  };
  const fine = randomProblem({ queries: 64, channels: 64 }, "f16");
  using tensors = uploadProblem(device, fine, "f16");
  const { q, k, v } = tensors;
  if (!runs(q, k, v, band)) return;
  refused(
    "f32",
    64,
    {},
    "q.dtype must be f16 or bf16 with options.band on (2), or the kernel flash",
  );
  refused("f16", 256, {}, "the head dimension must be at most 128 with options.band on (2)");
  refused("f16", 36, {}, "the addresses and strides of q, k and v must be multiples of 16 bytes");
  refused(
    "f16",
    64,
    { smoothQ: true },
    "options.smooth_q must be off (1) with options.band on (2)",
  );
});
