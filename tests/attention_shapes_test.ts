// Attention of every shape against the float64 definition: two lists, each under its own bounds, and what no rounding
// hides.
import { assert, assertAlmostEquals, assertEquals, assertLess } from "@std/assert";
import { attention, cosine, type FloatDType, kernels, type Layout, relativeL1 } from "../mod.ts";
import {
  bits,
  check,
  dtypes,
  exactly,
  type FloatProblem,
  nameOf,
  within,
  worstBounds,
  worstDifference,
  worstRow,
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
import { count, type Dims, referenceAttention } from "./reference.ts";

// ---- types and layouts, under the bounds of the mean --------------------------------------------------

/** Odd lengths, head counts, types and layouts; each kernel runs all of them, with and without a mask. */
const mixedShapes: (Lengths & { dtype: FloatDType; layout: Layout })[] = [
  { queries: 1, channels: 64, dtype: "f16", layout: "HND" },
  { queries: 2, channels: 16, heads: 2, dtype: "f32", layout: "NHD" },
  { queries: 63, channels: 40, batch: 2, heads: 2, dtype: "bf16", layout: "HND" },
  { queries: 64, channels: 64, heads: 4, kvHeads: 2, dtype: "f16", layout: "NHD" },
  { queries: 65, channels: 72, heads: 3, kvHeads: 1, dtype: "f16", layout: "HND" },
  { queries: 127, channels: 80, width: 64, dtype: "bf16", layout: "NHD" },
  { queries: 129, channels: 96, batch: 2, dtype: "f16", layout: "HND" },
  { queries: 200, channels: 128, heads: 4, kvHeads: 1, dtype: "f16", layout: "NHD" },
  { queries: 65, channels: 160, width: 192, dtype: "bf16", layout: "HND" },
  { queries: 129, channels: 256, dtype: "f16", layout: "HND" },
  { queries: 70, channels: 192, width: 3, heads: 2, kvHeads: 2, dtype: "f16", layout: "NHD" },
  { queries: 100, channels: 3, width: 7, dtype: "f32", layout: "HND" },
  { queries: 33, channels: 1, width: 1, dtype: "f16", layout: "HND" },
  { queries: 33, channels: 24, width: 256, dtype: "f32", layout: "HND" },
  { queries: 1, keys: 300, channels: 128, heads: 8, kvHeads: 2, dtype: "f16", layout: "NHD" },
  { queries: 130, keys: 65, channels: 64, dtype: "f16", layout: "HND" },
  { queries: 65, keys: 257, channels: 64, dtype: "bf16", layout: "HND" },
  { queries: 200, keys: 3, channels: 32, dtype: "f32", layout: "NHD" },
];

for (const causal of [false, true]) {
  for (const [seed, { dtype, layout, ...lengths }] of mixedShapes.entries()) {
    const name = `${dtype} ${layout} ${JSON.stringify(lengths).replaceAll('"', "")}`;
    deviceTest(
      `attention() agrees with the definition${causal ? ", causal," : ""} for ${name}`,
      async (device) => {
        const problem = randomProblem(lengths, dtype, seed + 1);
        const expected = referenceAttention(problem, { causal });
        for (const kernel of kernels) {
          await check(device, problem, dtype, { kernel, causal }, layout, expected);
        }
      },
    );
  }
}

// ---- every type, under the bounds of the worst --------------------------------------------------------

/** Heads shared, batches, widths and lengths that no block divides; each kernel runs all of them in every type. */
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
        const options = exactly({ kernel, causal });
        if (!runs(q, k, v, options)) continue;
        ++done;
        const reference = referenceAttention(problem, { causal });
        using out = poisoned(device, [batch, heads, queries, width], dtype);
        using result = attention(q, k, v, { ...options, out, returnLse: true });
        assertEquals(result.out, out);
        const actual = await download(out), lse = await download(result.lse);
        const name = `${kernel}, ${dtype}, ${nameOf(lengths)}${causal ? " causal" : ""}`;
        assert(actual.every(Number.isFinite), `${name}: not finite`);
        const bound = worstBounds[kernel][dtype];
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

// ---- structure: what no rounding hides ----------------------------------------------------------------

deviceTest("attention() sees every visible key once", async (device) => {
  // Q = 0 weighs all visible keys alike; channel c of V counts those with j % width = c.
  const width = 32, queries = 257;
  for (const keys of [1, 31, 64, 65, 128, 129, 200, 257, 300]) {
    for (const causal of [false, true]) {
      const problem: FloatProblem = {
        q: new Float32Array(queries * 16),
        k: new Float32Array(keys * 16),
        v: Float32Array.from(
          { length: keys * width },
          (_, i) => i % width === (i / width | 0) % width ? 1 : 0,
        ),
        qDims: [1, 1, queries, 16],
        kDims: [1, 1, keys, 16],
        vDims: [1, 1, keys, width],
      };
      using inputs = uploadProblem(device, problem, "f16");
      for (const kernel of kernels) {
        const options = exactly({ kernel, causal });
        if (!runs(inputs.q, inputs.k, inputs.v, options)) continue;
        using result = attention(inputs.q, inputs.k, inputs.v, {
          ...options,
          returnLse: true,
          outDtype: "f32",
        });
        const out = await download(result.out), lse = await download(result.lse);
        for (let i = 0; i < queries; ++i) {
          const visible = causal ? Math.max(0, i + keys - queries + 1) : keys;
          const seen = Math.min(visible, keys);
          if (seen === 0) assertEquals(lse[i], -Infinity);
          else assertAlmostEquals(lse[i], Math.log(seen), 1e-5);
          for (let c = 0; c < width; ++c) {
            const expected = Math.floor((seen - c + width - 1) / width);
            assertAlmostEquals(
              out[i * width + c] * seen,
              seen === 0 ? 0 : expected,
              0.004 * Math.max(1, expected),
              `${kernel}, ${keys} keys, causal ${causal}, row ${i}, channel ${c}`,
            );
          }
        }
      }
    }
  }
});

deviceTest("attention() finds the one key that matches, in the right head", async (device) => {
  // Keys are the binary digits of their number as ±1; a query is 8 times the key it looks for.
  const heads = 6, kvHeads = 3, tokens = 190, channels = 64, batch = 2;
  const digit = (n: number, c: number) =>
    Math.imul(n + 1, 2654435761) >>> (c % 31) & 1 ^ (c >> 5 & n & 1) ? 1 : -1;
  const wanted = (b: number, h: number, i: number) => (i * 37 + h * 11 + b * 5) % tokens;
  const kDims: Dims = [batch, kvHeads, tokens, channels];
  const k = Float32Array.from(
    { length: count(kDims) },
    (_, i) => digit(i / channels % tokens | 0, i % channels),
  );
  const v = Float32Array.from({ length: count(kDims) }, (_, i) => {
    const n = i / channels % tokens | 0,
      h = i / channels / tokens % kvHeads | 0,
      b = i / channels / tokens / kvHeads | 0;
    return ((n * 7 + h * 3 + b + i % channels) % 13) - 6;
  });
  const qDims: Dims = [batch, heads, tokens, channels];
  const q = Float32Array.from({ length: count(qDims) }, (_, i) => {
    const n = i / channels % tokens | 0,
      h = i / channels / tokens % heads | 0,
      b = i / channels / tokens / heads | 0;
    return 8 * digit(wanted(b, h, n), i % channels);
  });
  const problem: FloatProblem = { q, k, v, qDims, kDims, vDims: kDims };
  const expected = referenceAttention(problem);
  for (const layout of ["HND", "NHD"] as const) {
    using inputs = uploadProblem(device, problem, "f16", layout);
    for (const kernel of kernels) {
      if (!runs(inputs.q, inputs.k, inputs.v, { kernel })) continue;
      using out = attention(inputs.q, inputs.k, inputs.v, { kernel, outDtype: "f32" });
      const actual = await download(out);
      const worst = actual.reduce(
        (most, value, i) => Math.max(most, Math.abs(value - expected.out[i])),
        0,
      );
      assertLess(worst, 0.5, `${kernel} ${layout}`);
    }
  }
});
