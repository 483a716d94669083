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
  kinds,
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
  { queries: 1, keys: 700, channels: 256 },
  { queries: 64, heads: 2, channels: 256 },
  { queries: 200, keys: 263, channels: 256 },
  { queries: 513, keys: 77, heads: 2, channels: 160 },
  { queries: 129, keys: 257, batch: 2, heads: 4, kvHeads: 2, channels: 192, width: 128 },
  { queries: 77, keys: 513, channels: 128, width: 200 },
  { queries: 400, keys: 900, heads: 2, kvHeads: 1, channels: 256 },
];

for (const [at, size] of lengths.entries()) {
  deviceTest(`the band, ${nameOf(size)}`, async (device) => {
    const { channels, width = channels } = size;
    for (const dtype of ["f16", "bf16"] as const satisfies FloatDType[]) {
      const clean = randomProblem(size, dtype, 40 + at);
      const problem = {
        ...clean,
        k: biased(clean.k, channels, 2, 3),
        v: biased(clean.v, width, 1, 4),
      };
      const [batch, heads, queries] = problem.qDims;
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
            using out = poisoned(device, [batch, heads, queries, width], dtype);
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

/** Multiprocessors of Hopper meet several items of these, one after the other. */
const manyHeads = { cpu: 2, cuda: 60 };

for (const channels of [128, 256]) {
  deviceTest(`the band after sums that drift, many items, D ${channels}`, async (device) => {
    const lengths = { queries: 640, keys: 2300, channels };
    const one = randomProblem(lengths, "bf16", 90);
    // The sum of the values from the right leaves zero, and comes back at the first keys.
    one.v.forEach((value, i) => one.v[i] = value + (i < 600 * channels ? 3 : -1));
    const heads = manyHeads[device.kind], size = one.q.length;
    const queries = new Float32Array(heads * size);
    for (let head = 0; head < heads; ++head) queries.set(one.q, head * size);
    const many = { ...one, q: queries, qDims: [1, heads, 640, channels] as Dims };
    using tensors = uploadProblem(device, many, "bf16");
    const rounded = { ...one, v: await download(tensors.v) };
    const reference = referenceAttention(rounded, { causal: true });
    for (const exponential of exponentials) {
      for (const dtype of ["bf16", "f32"] as const) {
        const options = { ...band, exponential };
        if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
        const what = `${exponential}, to ${dtype}`;
        using out = poisoned(device, many.qDims, dtype);
        const { q, k, v } = tensors;
        using result = attention(q, k, v, { ...options, out, returnLse: true });
        const found = bits(await download(result.out)), lse = await download(result.lse);
        const first = new Float32Array(found.buffer, 0, size);
        within(relativeL1(first, reference.out), 0.045, `relative L1, ${what}`);
        within(worstDifference(lse.slice(0, 640), reference.lse), 0.15, `lse, ${what}`);
        assertEquals(found.findIndex((bit, i) => bit !== found[i % size]), -1, `heads, ${what}`);
        assertEquals(lse.findIndex((number, i) => number !== lse[i % 640]), -1, `lse, ${what}`);
      }
    }
  });
}

for (const dtype of ["f16", "bf16"] as const) {
  deviceTest(`the band keeps bad numbers where they belong, D 256, ${dtype}`, async (device) => {
    const tokens = 330, channels = 256, size = tokens * channels, channel = 197;
    const clean = randomProblem({ heads: 2, queries: tokens, channels }, dtype, 95);
    // Signs that no rounding changes, where an infinity in K meets them.
    for (let row = 0; row < 2 * tokens; ++row) {
      clean.q[row * channels + channel] = row % 3 ? 1.5 : -1.5;
    }
    using cleanTensors = uploadProblem(device, clean, dtype);
    for (const exponential of exponentials) {
      const options = { ...band, exponential };
      if (!runs(cleanTensors.q, cleanTensors.k, cleanTensors.v, options)) continue;
      const before = await run(cleanTensors, options);
      for (const operand of ["q", "k", "v"] as const) {
        for (const [token, bad] of [[0, NaN], [150, Infinity], [329, -Infinity], [260, NaN]]) {
          const what = `${bad} in ${operand} at ${token}, ${exponential}`;
          const problem = { ...clean, [operand]: clean[operand].slice() };
          problem[operand][size + token * channels + channel] = bad;
          using tensors = uploadProblem(device, problem, dtype);
          const { out, lse } = await run(tensors, options);
          const reference = referenceAttention(problem, { causal: true });
          assertEquals(kinds(out), kinds(reference.out), what);
          assertEquals(
            Array.from(lse, Number.isFinite),
            Array.from(reference.lse, Number.isFinite),
          );
          const good = Array.from(out.keys()).filter((i) => Number.isFinite(reference.out[i]));
          within(
            relativeL1(good.map((i) => out[i]), good.map((i) => reference.out[i])),
            0.045,
            `beside ${what}`,
          );
          assertEquals(
            bits(out.slice(0, size)),
            bits(before.out.slice(0, size)),
            `head 0, ${what}`,
          );
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
