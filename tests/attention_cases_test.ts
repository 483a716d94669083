// Attention of every kernel against float64: shapes, options, smoothing, bad numbers and real tensors.
import { assert, assertEquals, assertGreater } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  attentionQuantized,
  cosine,
  Device,
  explain,
  flashAttention,
  type FloatDType,
  fromFloat32,
  type LseOption,
  parseSafetensors,
  quantize,
  relativeL1,
  smooth,
  type Tensor,
  toFloat32,
} from "../mod.ts";
import {
  deviceNames,
  deviceTest,
  download,
  kernels,
  type Lengths,
  poisoned,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { type Dims, normal, type Problem, referenceAttention, uniform } from "./reference.ts";

type TestKernel = (typeof kernels)[number];
type Values = Float32Array<ArrayBuffer>;
type FloatProblem = Problem & { q: Float32Array; k: Float32Array; v: Float32Array };
type Tensors = { q: Tensor<FloatDType>; k: Tensor<FloatDType>; v: Tensor<FloatDType> };

const dtypes: readonly FloatDType[] = ["f32", "f16", "bf16"];
const sageKernels = kernels.filter((kernel) => kernel !== "flash");

/** Bits, so that NaN equals NaN and 0 does not equal -0. */
function bits(values: Values): Uint32Array {
  return new Uint32Array(values.map((value) => Number.isNaN(value) ? NaN : value).buffer);
}

/** The largest relative L1 distance of a row. */
function worstRow(actual: ArrayLike<number>, reference: ArrayLike<number>, width: number): number {
  let worst = 0;
  for (let start = 0; start < reference.length; start += width) {
    let distance = 0, sum = 0;
    for (let i = start; i < start + width; ++i) {
      distance += Math.abs(actual[i] - reference[i]);
      sum += Math.abs(reference[i]);
    }
    if (!(distance <= worst * sum)) worst = distance / sum;
    if (Number.isNaN(worst)) return worst;
  }
  return worst;
}

/** The largest difference; infinities must be equal. */
function worstDifference(actual: ArrayLike<number>, reference: ArrayLike<number>): number {
  assertEquals(actual.length, reference.length);
  return Array.from(
    actual,
    (value, i) => value === reference[i] ? 0 : Math.abs(value - reference[i]),
  )
    .reduce((a, b) => Math.max(a, b), 0);
}

/** Fails where `value` is above `bound`, or is NaN. */
function within(value: number, bound: number, what: string): void {
  assert(value <= bound, `${what}: ${value} is above ${bound}`);
}

/** Runs attention and returns what it wrote. */
async function run(
  { q, k, v }: Tensors,
  options: AttentionOptions,
): Promise<{ out: Values; lse: Values }> {
  using result = attention(q, k, v, { ...options, returnLse: true });
  return { out: await download(result.out), lse: await download(result.lse) };
}

// ---- shapes -------------------------------------------------------------------------------------------

/** Largest errors: relative L1 of all and of one row, difference of log-sum-exp. */
interface Bounds {
  all: number;
  row: number;
  lse: number;
}

// Recorded on both devices, and a third more.
const bounds: Record<TestKernel, Record<FloatDType, Bounds>> = {
  flash: {
    f32: { all: 6e-7, row: 2e-6, lse: 2e-6 },
    f16: { all: 3.7e-4, row: 7.5e-4, lse: 3.5e-6 },
    bf16: { all: 2.9e-3, row: 5.4e-3, lse: 3.5e-6 },
  },
  sage1: quantized({ all: 0.017, row: 0.047, lse: 0.047 }),
  "sage1-int8": quantized({ all: 0.025, row: 0.055, lse: 0.047 }),
  sage2: quantized({ all: 0.049, row: 0.11, lse: 0.031 }),
  "sage2-int4": quantized({ all: 0.26, row: 0.66, lse: 0.68 }),
  "sage2++": quantized({ all: 0.047, row: 0.1, lse: 0.031 }),
};

/** Where quantization outweighs the rounding of the element types. */
function quantized(bound: Bounds): Record<FloatDType, Bounds> {
  return { f32: bound, f16: bound, bf16: bound };
}

const shapes: Lengths[] = [
  { queries: 1, channels: 1 },
  { queries: 2, channels: 3, width: 16, heads: 2 },
  { queries: 63, channels: 16, heads: 4, kvHeads: 2 },
  { queries: 64, channels: 40, batch: 2 },
  { queries: 65, channels: 64, heads: 6, kvHeads: 1 },
  { queries: 127, channels: 72, width: 40 },
  { queries: 129, channels: 80, batch: 2, heads: 2, kvHeads: 1 },
  { queries: 200, channels: 96, width: 128 },
  { queries: 64, channels: 128, heads: 4, kvHeads: 2, batch: 2 },
  { queries: 65, channels: 160 },
  { queries: 127, channels: 192, width: 256 },
  { queries: 129, channels: 256, width: 64 },
  { queries: 200, channels: 64, heads: 2 },
  { queries: 1, channels: 256, heads: 2, kvHeads: 1 },
  { queries: 2, channels: 64, width: 1 },
  { queries: 63, channels: 128, width: 3 },
  { queries: 1, keys: 200, channels: 64, heads: 4, kvHeads: 2 },
  { queries: 65, keys: 200, channels: 40, width: 72 },
  { queries: 200, keys: 65, channels: 128 },
  { queries: 130, keys: 1, channels: 64 },
];

function nameOf({ batch = 1, heads = 1, kvHeads = heads, queries, ...rest }: Lengths): string {
  const { keys = queries, channels, width = channels } = rest;
  return `B${batch} H${heads}/${kvHeads} N${queries}/${keys} D${channels}/${width}`;
}

for (const dtype of dtypes) {
  const problems = shapes.flatMap((lengths, seed) =>
    [false, true].map((causal) => ({ lengths, causal, seed }))
  );
  for (const kernel of kernels) {
    deviceTest(`attention() agrees with float64: ${kernel}, ${dtype}`, async (device) => {
      let done = 0;
      for (const { lengths, causal, seed } of problems) {
        const problem = randomProblem(lengths, dtype, seed + 1);
        const [batch, heads, queries] = problem.qDims, [, , keys, width] = problem.vDims;
        using tensors = uploadProblem(device, problem, dtype);
        const { q, k, v } = tensors;
        const options = { kernel, causal };
        if (!runs(q, k, v, options)) continue;
        ++done;
        const reference = referenceAttention(problem, { causal });
        using out = poisoned(device, [batch, heads, queries, width], dtype);
        using result = attention(q, k, v, { ...options, out, returnLse: true });
        assertEquals(result.out, out);
        const actual = await download(out), lse = await download(result.lse);
        const name = `${kernel}, ${dtype}, ${nameOf(lengths)}${causal ? " causal" : ""}`;
        assert(actual.every(Number.isFinite), `${name}: not finite`);
        const bound = bounds[kernel][dtype];
        within(worstDifference(lse, reference.lse), bound.lse, `lse of ${name}`);
        if (reference.out.length < 64) {
          within(worstDifference(actual, reference.out), bound.row, `difference of ${name}`);
          continue;
        }
        within(relativeL1(actual, reference.out), bound.all, `relative L1 of ${name}`);
        within(1 - cosine(actual, reference.out), bound.all ** 2, `1 - cosine of ${name}`);
        if (width >= 16) {
          within(worstRow(actual, reference.out, width), bound.row, `row of ${name}`);
        }
        if (causal && queries > keys) {
          const blind = (queries - keys) * width;
          assertEquals(bits(actual.slice(0, blind)), new Uint32Array(blind));
          assertEquals(
            lse.slice(0, queries - keys),
            new Float32Array(queries - keys).fill(-Infinity),
          );
        }
      }
      // What a device cannot do, runs() has asserted; it can at least do all shapes or none of a kernel's.
      assert(device.kind !== "cpu" || done === problems.length);
    });
  }
}

// ---- layouts, views, output ---------------------------------------------------------------------------

for (const kernel of kernels) {
  deviceTest(`attention() takes layouts, views, outputs and scales: ${kernel}`, async (device) => {
    const lengths = {
      batch: 2,
      heads: 4,
      kvHeads: 2,
      queries: 70,
      keys: 133,
      channels: 40,
      width: 24,
    };
    const problem = randomProblem(lengths, "f16", 5);
    using hnd = uploadProblem(device, problem, "f16");
    const options = { kernel, causal: true };
    if (!runs(hnd.q, hnd.k, hnd.v, options)) return;
    const first = await run(hnd, options);
    const again = await run(hnd, options);
    assertEquals(bits(again.out), bits(first.out));
    assertEquals(bits(again.lse), bits(first.lse));

    using nhd = uploadProblem(device, problem, "f16", "NHD");
    {
      using result = attention(nhd.q, nhd.k, nhd.v, { ...options, returnLse: true });
      assertEquals(result.out.layout, "NHD");
      assertEquals(result.out.shape, [2, 70, 4, 24]);
      assertEquals(result.lse.shape, [2, 70, 4, 1]);
      assertEquals(bits(await download(result.out)), bits(first.out));
      assertEquals(bits(await download(result.lse)), bits(first.lse));
    }
    using mixedOut = poisoned(device, [2, 4, 70, 24], "f16", "NHD");
    attention(hnd.q, nhd.k, hnd.v, { ...options, out: mixedOut });
    assertEquals(bits(await download(mixedOut)), bits(first.out));

    // Views: the second entry of the batch, its last two heads of Q and last of K and V.
    const q = nhd.q.view({ batch: [1, 2], heads: [2, 4], tokens: [3, 60] });
    const k = hnd.k.view({ batch: [1, 2], heads: [1, 2], tokens: [5, 120] });
    const v = nhd.v.view({ batch: [1, 2], heads: [1, 2], tokens: [5, 120] });
    using views = { q, k, v, [Symbol.dispose]: () => [q, k, v].forEach((x) => x.dispose()) };
    const part = await run(views, options);
    const partDims: Dims = [1, 2, 57, 40], keyDims: Dims = [1, 1, 115, 40];
    const copied: FloatProblem = {
      q: await download(q),
      k: await download(k),
      v: await download(v),
      qDims: partDims,
      kDims: keyDims,
      vDims: [1, 1, 115, 24],
    };
    using copies = uploadProblem(device, copied, "f16");
    const dense = await run(copies, options);
    assertEquals(bits(part.out), bits(dense.out));
    assertEquals(bits(part.lse), bits(dense.lse));

    // Writing to a view leaves the rest alone.
    using wide = poisoned(device, [2, 4, 70, 24], "f16", "NHD");
    using window = wide.view({ batch: [1, 2], heads: [1, 3], tokens: [4, 61] });
    attention(q, k, v, { ...options, out: window });
    assertEquals(bits(await download(window)), bits(dense.out));
    assertEquals(
      (await download(wide)).filter(Number.isNaN).length,
      2 * 4 * 70 * 24 - dense.out.length,
    );

    // One rounding of the same float32 result.
    using single = attention(hnd.q, hnd.k, hnd.v, { ...options, outDtype: "f32" });
    const precise = await download(single);
    for (const outDtype of ["f16", "bf16"] as const) {
      using rounded = attention(hnd.q, hnd.k, hnd.v, { ...options, outDtype });
      assertEquals(rounded.dtype, outDtype);
      assertEquals(
        bits(await download(rounded)),
        bits(toFloat32(fromFloat32(precise, outDtype), outDtype)),
      );
    }

    for (const scale of [0.02, 0.5]) {
      const { out, lse } = await run(hnd, { kernel, scale });
      const reference = referenceAttention(problem, { scale });
      within(
        relativeL1(out, reference.out),
        1.7 * bounds[kernel].f16.all,
        `relative L1 of ${kernel} scaled by ${scale}`,
      );
      within(
        worstDifference(lse, reference.lse),
        3.9 * bounds[kernel].f16.lse,
        `lse of ${kernel} scaled by ${scale}`,
      );
    }
  });
}

deviceTest("flashAttention() is attention() with kernel flash", async (device) => {
  using tensors = uploadProblem(
    device,
    randomProblem({ queries: 70, channels: 64 }, "bf16"),
    "bf16",
  );
  const { q, k, v } = tensors;
  if (!runs(q, k, v, { kernel: "flash", causal: true })) return;
  using one = flashAttention(q, k, v, { causal: true, scale: 0.3, returnLse: true });
  const other = await run(tensors, { kernel: "flash", causal: true, scale: 0.3 });
  assertEquals(bits(await download(one.out)), bits(other.out));
  assertEquals(bits(await download(one.lse)), bits(other.lse));
});

deviceTest("attention() with kernel auto is the kernel that explain() names", async (device) => {
  using tensors = uploadProblem(device, randomProblem({ queries: 70, channels: 64 }, "f16"), "f16");
  const { kernel } = explain(tensors.q, tensors.k, tensors.v);
  const chosen = await run(tensors, {}), named = await run(tensors, { kernel });
  assertEquals(bits(chosen.out), bits(named.out));
});

// ---- smoothing ----------------------------------------------------------------------------------------

/** Adds to every channel of a head-major array a number of N(0, size²). */
function biased(values: Float32Array, channels: number, size: number, seed: number): Float32Array {
  const offsets = normal(seed, channels).map((offset) => size * offset);
  return values.map((value, i) => value + offsets[i % channels]);
}

const switches = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => ({
  smoothQ: (i & 1) !== 0,
  smoothK: (i & 2) !== 0,
  smoothV: (i & 4) !== 0,
}));

// Errors of the output, relative to the size of one without biases. A bias of Q also makes softmax sharper.
const smoothBounds: Record<string, { out: number; lse: number }> = {
  sage1: { out: 0.017, lse: 0.011 },
  "sage1-int8": { out: 0.027, lse: 0.011 },
  sage2: { out: 0.049, lse: 0.0075 },
  "sage2-int4": { out: 0.27, lse: 0.21 },
  "sage2++": { out: 0.049, lse: 0.0075 },
};
const smoothQBounds: typeof smoothBounds = {
  sage1: { out: 0.043, lse: 0.047 },
  "sage1-int8": { out: 0.08, lse: 0.047 },
  sage2: { out: 0.142, lse: 0.026 },
  "sage2-int4": { out: 0.69, lse: 0.8 },
  "sage2++": { out: 0.146, lse: 0.026 },
};

for (const kernel of sageKernels) {
  deviceTest(`attention() smooths and corrects: ${kernel}`, async (device) => {
    const lengths = { heads: 2, kvHeads: 1, queries: 150, keys: 200, channels: 64, width: 64 };
    const plain = randomProblem(lengths, "f32", 11);
    for (const causal of [false, true]) {
      const plainReference = referenceAttention(plain, { causal });
      const size = plainReference.out.reduce((sum, x) => sum + Math.abs(x), 0);
      for (const smoothing of switches) {
        const { smoothQ, smoothK, smoothV } = smoothing;
        const label = `${smoothQ ? "Q" : ""}${smoothK ? "K" : ""}${smoothV ? "V" : ""}`;
        const options = { kernel, causal, ...smoothing };
        const problem = {
          ...plain,
          q: smoothQ ? biased(plain.q, 64, 3, 1) : plain.q,
          k: smoothK ? biased(plain.k, 64, 8, 2) : plain.k,
          v: smoothV ? biased(plain.v, 64, 8, 3) : plain.v,
        };
        using tensors = uploadProblem(device, problem, "f32");
        if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
        const reference = referenceAttention(problem, { causal });
        /** Mean error over the size of an output without biases. */
        const error = (out: Values) =>
          reference.out.reduce((sum, x, i) => sum + Math.abs(x - out[i]), 0) / size;
        const { out, lse } = await run(tensors, options);
        const bound = smoothQ ? smoothQBounds[kernel] : smoothBounds[kernel];
        within(error(out), bound.out, `${kernel} smoothing ${label}`);
        within(
          worstDifference(lse, reference.lse),
          bound.lse,
          `lse of ${kernel} smoothing ${label}`,
        );
        // Without it, what was biased is lost.
        if (smoothK && !smoothQ) {
          const rough = await run(tensors, { ...options, smoothK: false });
          assertGreater(error(rough.out), 1.4 * error(out), `${kernel} ${label}`);
        }
        if (smoothV && !smoothQ && !smoothK && kernel !== "sage1") {
          const rough = await run(tensors, { ...options, smoothV: false });
          assertGreater(error(rough.out), 1.4 * error(out), `${kernel} ${label}`);
        }
      }
    }
  });
}

// ---- granularities, ranges, quantized operands --------------------------------------------------------

const granularities = ["token", "block", "warp", "thread"] as const;

/** Options that only one kernel has. */
function variants(kernel: TestKernel): AttentionOptions[] {
  return [
    ...granularities.map((granularity) => ({ kernel, granularity })),
    ...(kernel === "sage1" ? [{ kernel, pvAccumulator: "f16" as const }] : []),
    ...(kernel === "sage2++"
      ? ([448, 224, 112] as const).map((pvRange) => ({ kernel, pvRange }))
      : []),
  ];
}

/** attentionQuantized() on operands quantized as attention() with the same options would. */
async function runQuantized(
  { q, k, v }: Tensors,
  options: AttentionOptions & { kernel: TestKernel },
): Promise<{ out: Values; lse: Values }> {
  const { granularity, smoothQ, smoothK, smoothV, ...rest } = options, { kernel } = options;
  const rows = {
    dtype: kernel === "sage2-int4" ? "i4" : "i8",
    granularity: granularity ?? (kernel.startsWith("sage1") ? "block" : "thread"),
  } as const;
  using qCodes = quantize(q, { operand: "query", ...rows, smooth: smoothQ });
  using kCodes = quantize(k, { operand: "key", ...rows, smooth: smoothK });
  const value = { operand: "value", smooth: smoothV } as const;
  const range = kernel === "sage2++"
    ? { 448: 2.25, 224: 4.5, 112: 9 }[options.pvRange ?? 112]
    : undefined;
  using values = kernel !== "sage1"
    ? quantize(v, kernel === "sage1-int8" ? { ...value, dtype: "i8" } : { ...value, range })
    : smoothV
    ? smooth(v)
    : v.view({});
  using result = attentionQuantized(qCodes, kCodes, values, {
    ...rest as Parameters<typeof attentionQuantized>[3],
    returnLse: true,
  });
  return { out: await download(result.out), lse: await download(result.lse) };
}

for (const kernel of sageKernels) {
  deviceTest(`attention() and attentionQuantized() agree: ${kernel}`, async (device) => {
    const lengths = {
      batch: 2,
      heads: 4,
      kvHeads: 2,
      queries: 150,
      keys: 200,
      channels: 64,
      width: 40,
    };
    const problem = randomProblem(lengths, "f16", 21);
    problem.k = toFloat32(fromFloat32(biased(problem.k, 64, 2, 22), "f16"), "f16");
    using tensors = uploadProblem(device, problem, "f16");
    const exact = [false, true].map((causal) => referenceAttention(problem, { causal }));
    let turn = 0;
    for (const variant of variants(kernel)) {
      for (const smoothing of switches) {
        const causal = turn++ % 2 === 1;
        const options = { ...variant, ...smoothing, causal, kernel };
        if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
        const { out, lse } = await run(tensors, options);
        const whole = await runQuantized(tensors, options);
        const name = JSON.stringify(options), { smoothQ, smoothK } = smoothing;
        // ΔS, and what mean(K) adds to the log-sum-exp, come from codes there and from floats here.
        const int4 = kernel === "sage2-int4";
        const outBound = smoothQ ? int4 ? 0.062 : 0.0122 : 1e-4;
        const lseBound = smoothK ? int4 ? 1.56 : 0.09 : smoothQ ? int4 ? 0.05 : 0.0029 : 1e-4;
        within(relativeL1(whole.out, out), outBound, `quantized operands, ${name}`);
        within(worstDifference(whole.lse, lse), lseBound, `lse of quantized operands, ${name}`);
        if (!smoothK) continue;
        const reference = exact[causal ? 1 : 0];
        within(relativeL1(out, reference.out), 1.1 * bounds[kernel].f16.all, name);
        within(worstRow(out, reference.out, 40), 1.25 * bounds[kernel].f16.row, `row, ${name}`);
      }
    }
  });
}

// ---- bad numbers --------------------------------------------------------------------------------------

/** NaN, an infinity or finite, of every element. */
function kinds(values: ArrayLike<number>): string[] {
  return Array.from(values, (x) => Number.isFinite(x) ? "finite" : String(x));
}

for (const kernel of kernels) {
  for (const causal of [false, true]) {
    deviceTest(
      `attention() keeps bad numbers where they belong: ${kernel}${causal ? ", causal" : ""}`,
      async (device) => {
        const lengths = { batch: 2, heads: 4, kvHeads: 2, queries: 134, channels: 16 };
        const channel = 5;
        const clean = randomProblem(lengths, "f16", 31);
        // Signs that no rounding changes, where an infinity in K meets them.
        for (let row = 0; row < 2 * 4 * 134; ++row) {
          clean.q[row * 16 + channel] = row % 3 ? 1.5 : -1.5;
        }
        using cleanTensors = uploadProblem(device, clean, "f16");
        const options = { kernel, causal };
        if (!runs(cleanTensors.q, cleanTensors.k, cleanTensors.v, options)) return;
        const before = await run(cleanTensors, options);
        for (const operand of ["q", "k", "v"] as const) {
          for (const bad of [NaN, Infinity, -Infinity]) {
            for (const token of [0, 70, 133]) {
              const head = operand === "q" ? 1 : 0; // of the first batch entry
              const problem = { ...clean, [operand]: clean[operand].slice() };
              problem[operand][(head * 134 + token) * 16 + channel] = bad;
              using tensors = uploadProblem(device, problem, "f16");
              const { out, lse } = await run(tensors, options);
              const reference = referenceAttention(problem, { causal });
              const name = `${bad} in ${operand} at ${token}`;
              assertEquals(kinds(out), kinds(reference.out), name);
              // Infinite scores may give an infinity or NaN.
              assertEquals(
                Array.from(lse, Number.isFinite),
                Array.from(reference.lse, Number.isFinite),
                `log-sum-exp, ${name}`,
              );
              const finite = Array.from(reference.out.keys()).filter((i) =>
                Number.isFinite(reference.out[i])
              );
              within(
                relativeL1(finite.map((i) => out[i]), finite.map((i) => reference.out[i])),
                bounds[kernel].f16.all,
                `beside ${name}`,
              );
              // Heads that do not see it give the same bits.
              const other = operand === "q" ? 0 : 2, size = 134 * 16;
              assertEquals(
                bits(out.slice(other * size, (other + 1) * size)),
                bits(before.out.slice(other * size, (other + 1) * size)),
              );
              assertEquals(bits(out.slice(4 * size)), bits(before.out.slice(4 * size)));
            }
          }
        }
      },
    );
  }
}

for (const kernel of kernels) {
  deviceTest(`attention() bears zeros, constants and extremes: ${kernel}`, async (device) => {
    const lengths = { queries: 70, channels: 32 };
    const check = async (
      dtype: FloatDType,
      change: (problem: FloatProblem) => void,
      bound: number,
      what: string,
    ) => {
      const problem = randomProblem(lengths, dtype, 41);
      change(problem);
      using tensors = uploadProblem(device, problem, dtype);
      for (const causal of [false, true]) {
        const options = { kernel, causal };
        if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
        const { out, lse } = await run(tensors, options);
        const reference = referenceAttention(problem, { causal });
        assert(out.every(Number.isFinite) && lse.every(Number.isFinite), what);
        within(relativeL1(out, reference.out), bound, `extremes, ${what}`);
        within(worstRow(out, reference.out, 32), 3 * bound, `rows of extremes, ${what}`);
      }
    };
    const bound = bounds[kernel].bf16.all;
    for (const dtype of dtypes) {
      await check(dtype, ({ q }) => q.fill(0), bound, `Q of zeros, ${dtype}`);
      await check(dtype, ({ k }) => k.fill(0), bound, `K of zeros, ${dtype}`);
      await check(
        dtype,
        ({ q, k, v }) => [q, k, v].forEach((x) => x.fill(0)),
        0,
        `zeros, ${dtype}`,
      );
      await check(
        dtype,
        ({ q, k, v }) => {
          for (const x of [q, k, v]) {
            for (let i = 3; i < x.length; i += 32) x[i] = 4;
          }
        },
        bound,
        `a constant channel, ${dtype}`,
      );
      await check(
        dtype,
        ({ k, v }) => [k, v].forEach((x) => x.fill(2)),
        bound,
        `constants, ${dtype}`,
      );
    }
    await check("f16", ({ v }) => v.fill(65504), bound, "65504 in all of V");
    await check(
      "f16",
      ({ v }) => {
        for (let i = 7; i < v.length; i += 32) v[i] = i % 64 < 32 ? 65504 : 65504 / 2;
      },
      bound,
      "65504 in a channel of V",
    );
    const huge = toFloat32(fromFloat32(Float32Array.of(3e38), "bf16"), "bf16")[0];
    await check("bf16", ({ v }) => v.fill(huge), bound, "3e38 in all of V");
    await check(
      "bf16",
      ({ v }) => {
        for (let i = 7; i < v.length; i += 32) v[i] = i % 64 < 32 ? huge : huge / 2;
      },
      bound,
      "3e38 in a channel of V",
    );
  });
}

// ---- real tensors -------------------------------------------------------------------------------------

const layers: { file: string; causal: boolean; largest: Partial<Record<TestKernel, number>> }[] = [
  {
    file: "tinyllama-layer06",
    causal: true,
    largest: {
      flash: 0.0005,
      sage1: 0.0287,
      sage2: 0.0358,
      "sage2-int4": 0.178,
      "sage2++": 0.0349,
    },
  },
  {
    file: "tinyllama-layer18",
    causal: true,
    largest: { flash: 0.0005, sage1: 0.023, sage2: 0.0293, "sage2-int4": 0.193, "sage2++": 0.0293 },
  },
  {
    file: "tinyllama-layer00",
    causal: true,
    largest: { flash: 0.0005, sage1: 0.0076, sage2: 0.0132 },
  },
  {
    file: "whisper-encoder-layer01",
    causal: false,
    largest: { flash: 0.0005, sage1: 0.0024, sage2: 0.02 },
  },
];

for (const { file, causal, largest } of layers) {
  const path = new URL(`data/${file}.safetensors`, import.meta.url);
  let loaded: { problem: FloatProblem; reference: Float64Array } | undefined;
  const load = async () => {
    const tensors = parseSafetensors(await Deno.readFile(path));
    const [q, k, v] = ["q", "k", "v"].map((name) => tensors.get(name, "f16"));
    const floats = [q, k, v].map(({ data }) => Float32Array.from(data));
    const problem: FloatProblem = {
      q: floats[0],
      k: floats[1],
      v: floats[2],
      qDims: q.shape as readonly number[] as Dims,
      kDims: k.shape as readonly number[] as Dims,
      vDims: v.shape as readonly number[] as Dims,
    };
    return { problem, reference: referenceAttention(problem, { causal }).out };
  };
  deviceTest(`attention() is as exact as recorded on ${file}`, async (device) => {
    const { problem, reference } = loaded ??= await load();
    using tensors = uploadProblem(device, problem, "f16");
    for (const [kernel, error] of Object.entries(largest) as [TestKernel, number][]) {
      const options = { kernel, causal };
      if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
      const { out } = await run(tensors, options);
      const bound = kernel === "flash" ? error : 1.1 * error;
      within(relativeL1(out, reference), bound, `${file}, ${kernel}`);
    }
  });
}

// ---- devices against each other -----------------------------------------------------------------------

for (const name of deviceNames.filter((name) => name !== "cpu")) {
  Deno.test(`attention() on ${name} agrees with the CPU on random shapes and options`, async () => {
    using device = Device.open(name);
    using cpu = Device.open("cpu");
    const next = uniform(51);
    const upTo = (limit: number) => 1 + Math.floor(next() * limit);
    const start = Date.now();
    let done = 0;
    for (; done < 150 && Date.now() - start < 30_000; ++done) {
      const kvHeads = upTo(3);
      const lengths = {
        batch: upTo(2),
        kvHeads,
        heads: kvHeads * upTo(3),
        queries: upTo(260),
        keys: upTo(260),
        channels: upTo(256),
        width: upTo(256),
      };
      const kernel = done % 2 ? "flash" : "sage1";
      const dtype = dtypes[Math.floor(next() * 3)];
      const options: AttentionOptions & LseOption = {
        kernel,
        causal: next() < 0.5,
        scale: next() < 0.3 ? 0.05 + next() / 10 : undefined,
        ...(kernel === "sage1" && {
          granularity: granularities[Math.floor(next() * 4)],
          smoothQ: next() < 0.5,
          smoothK: next() < 0.5,
          smoothV: next() < 0.5,
        }),
      };
      const layout = next() < 0.5 ? "HND" : "NHD";
      const problem = randomProblem(lengths, dtype, 1000 + done);
      using there = uploadProblem(device, problem, dtype, layout);
      using here = uploadProblem(cpu, problem, dtype, layout);
      if (!runs(there.q, there.k, there.v, options)) continue;
      const actual = await run(there, options), expected = await run(here, options);
      const what = `${dtype} ${layout} ${nameOf(lengths)} ${JSON.stringify(options)}`;
      within(relativeL1(actual.out, expected.out), 1.3 * bounds.flash[dtype].all + 2e-3, what);
      within(worstDifference(actual.lse, expected.lse), 5e-3, `lse of ${what}`);
    }
    assertGreater(done, 20, "too slow to say anything");
  });
}
