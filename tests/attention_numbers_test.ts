// Bad and extreme numbers: NaN and infinities reach only who sees them; zeros, constants and the largest are borne.
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { attention, type FloatDType, fromFloat32, kernels, relativeL1, toFloat32 } from "../mod.ts";
import {
  bits,
  dtypes,
  exactly,
  type FloatProblem,
  kinds,
  meanBounds,
  rounding,
  run,
  type TestKernel,
  within,
  worstBounds,
  worstRow,
} from "./attention.ts";
import { deviceTest, download, poisoned, randomProblem, runs, uploadProblem } from "./devices.ts";
import { referenceAttention } from "./reference.ts";

// ---- NaN and infinities -------------------------------------------------------------------------------

/** Where a bad number is put, in one channel of one token of a head of the first batch entry. */
interface BadPlace {
  dtype: FloatDType;
  lengths: { batch: number; heads: number; kvHeads: number; queries: number; channels: number };
  seed: number;
  tokens: number[];
  head: { q: number; k: number; v: number };
  /** Whether queries have signs that no rounding changes, where an infinity in K meets them. */
  signs: boolean;
}

const channel = 5;

const places: BadPlace[] = [
  {
    dtype: "f16",
    lengths: { batch: 2, heads: 4, kvHeads: 2, queries: 134, channels: 16 },
    seed: 31,
    tokens: [0, 70, 133],
    head: { q: 1, k: 0, v: 0 },
    signs: true,
  },
  ...(["f16", "bf16"] as const).map((dtype): BadPlace => ({
    dtype,
    lengths: { batch: 2, heads: 2, kvHeads: 2, queries: 150, channels: 32 },
    seed: 70,
    tokens: [0, 77, 149],
    head: { q: 1, k: 1, v: 1 },
    signs: false,
  })),
];

/** What attention must give with each bad number, which all kernels share. */
const references = new Map<string, ReturnType<typeof referenceAttention>>();

for (const kernel of kernels) {
  for (const [causal, band] of [[false, false], [true, false], [true, true]]) {
    if (band && kernel !== "sage2") continue;
    const more = `${causal ? ", causal" : ""}${band ? " with the band" : ""}`;
    deviceTest(
      `attention() keeps bad numbers where they belong: ${kernel}${more}`,
      async (device) => {
        const options = exactly({ kernel, causal, ...(band && { band }) });
        for (const [at, { dtype, lengths, seed, tokens, head, signs }] of places.entries()) {
          const { batch, heads, kvHeads, queries, channels } = lengths;
          const clean = randomProblem(lengths, dtype, seed);
          if (signs) {
            for (let row = 0; row < batch * heads * queries; ++row) {
              clean.q[row * channels + channel] = row % 3 ? 1.5 : -1.5;
            }
          }
          using cleanTensors = uploadProblem(device, clean, dtype);
          if (!runs(cleanTensors.q, cleanTensors.k, cleanTensors.v, options)) continue;
          const before = await run(cleanTensors, options);
          for (const operand of ["q", "k", "v"] as const) {
            for (const bad of [NaN, Infinity, -Infinity]) {
              for (const token of tokens) {
                const name = `${bad} in ${operand} at ${token}, ${dtype}`;
                const problem = { ...clean, [operand]: clean[operand].slice() };
                problem[operand][(head[operand] * queries + token) * channels + channel] = bad;
                using tensors = uploadProblem(device, problem, dtype);
                const { out, lse } = await run(tensors, options);
                const key = `${at}, ${causal}, ${name}`;
                const reference = references.get(key) ?? referenceAttention(problem, { causal });
                references.set(key, reference);

                const group = operand === "q" ? 1 : heads / kvHeads;
                const headSees = (h: number) => Math.floor(h / group) === head[operand];
                const sees = (i: number) => {
                  const n = Math.floor(i / channels) % queries;
                  return headSees(Math.floor(i / channels / queries)) &&
                    (operand === "q" ? n === token : !causal || n >= token);
                };
                out.forEach((number, i) => {
                  const what = `${name}: ${number} is element ${i}`;
                  if (!sees(i) || operand === "v" && i % channels !== channel) {
                    assert(Number.isFinite(number), what);
                  } else if (operand === "q") {
                    assert(Number.isNaN(number), what);
                  } else if (operand === "v") {
                    assertEquals(number, bad, what);
                  } else if (Number.isNaN(reference.out[i])) {
                    assert(Number.isNaN(number), what);
                  }
                });
                // Codes of small queries are 0, and 0 times an infinity is not what the query times it is.
                const exact = signs || operand !== "k" || kernel === "flash";
                if (exact) {
                  assertEquals(kinds(out), kinds(reference.out), name);
                  // Infinite scores may give an infinity or NaN.
                  assertEquals(
                    Array.from(lse, Number.isFinite),
                    Array.from(reference.lse, Number.isFinite),
                    `log-sum-exp, ${name}`,
                  );
                }
                const good = Array.from(out.keys()).filter((i) =>
                  exact ? Number.isFinite(reference.out[i]) : !sees(i)
                );
                within(
                  relativeL1(good.map((i) => out[i]), good.map((i) => reference.out[i])),
                  signs ? worstBounds[kernel][dtype].all : meanBounds[kernel].l1 + rounding[dtype],
                  `beside ${name}`,
                );
                // Heads that do not see it give the same bits.
                const size = queries * channels;
                for (let h = 0; h < batch * heads; ++h) {
                  if (headSees(h)) continue;
                  assertEquals(
                    bits(out.slice(h * size, (h + 1) * size)),
                    bits(before.out.slice(h * size, (h + 1) * size)),
                    `head ${h} beside ${name}`,
                  );
                }
              }
            }
          }
        }
      },
    );
  }
}

deviceTest("attention() gives zeros for rows that see nothing", async (device) => {
  const problem = randomProblem({ queries: 200, keys: 70, heads: 2, channels: 64 }, "f16", 80);
  problem.v.fill(NaN); // nor may these be seen
  for (let i = 0; i < 2; ++i) problem.v.fill(1, i * 70 * 64, i * 70 * 64 + 64);
  using inputs = uploadProblem(device, problem, "f16");
  const { q, k, v } = inputs;
  for (const kernel of kernels) {
    if (!runs(q, k, v, { kernel, causal: true })) continue;
    using out = poisoned(device, [1, 2, 200, 64], "f16");
    using result = attention(q, k, v, { kernel, causal: true, out, returnLse: true });
    const values = await download(out), lse = await download(result.lse);
    for (const head of [0, 1]) {
      const rows = values.subarray(head * 200 * 64, head * 200 * 64 + 130 * 64);
      assertEquals(rows, new Float32Array(130 * 64), kernel);
      assertEquals(
        lse.subarray(head * 200, head * 200 + 130),
        new Float32Array(130).fill(-Infinity),
      );
      const first = values.subarray(head * 200 * 64 + 130 * 64, head * 200 * 64 + 131 * 64);
      first.forEach((value) => assertAlmostEquals(value, 1, 0.01, kernel)); // sees key 0 only
    }
  }
});

// ---- extremes -----------------------------------------------------------------------------------------

/** Numbers at the edge of what a type holds, or that leave nothing to quantize. */
interface Extreme {
  what: string;
  dtypes: readonly FloatDType[];
  change: (problem: FloatProblem, channels: number) => void;
  /** How many times the bound of N(0, 1) its error may be; 1 unless told. */
  times?: number;
  /** How many times as much that of a row may be; 3 unless told. */
  rowTimes?: number;
}

/** Sets the numbers of one channel, which may depend on the row. */
function setChannel(
  values: Float32Array,
  channels: number,
  channel: number,
  value: (row: number) => number,
): void {
  for (let row = 0; row * channels < values.length; ++row) {
    values[row * channels + channel] = value(row);
  }
}

const extremes: Extreme[] = [
  { what: "zeros", dtypes, change: ({ q, k, v }) => [q, k, v].forEach((x) => x.fill(0)), times: 0 },
  { what: "Q of zeros", dtypes, change: ({ q }) => q.fill(0) },
  { what: "K of zeros", dtypes, change: ({ k }) => k.fill(0) },
  { what: "V of zeros", dtypes: ["f16"], change: ({ v }) => v.fill(0) },
  {
    what: "a channel of V of zeros",
    dtypes: ["f16"],
    change: ({ v }, channels) => setChannel(v, channels, 0, () => 0),
  },
  {
    what: "a constant channel",
    dtypes,
    change: ({ q, k, v }, channels) =>
      [q, k, v].forEach((x) => setChannel(x, channels, 3, () => 4)),
  },
  { what: "constant K", dtypes: ["f16"], change: ({ k }) => k.fill(3) },
  { what: "constant K and V", dtypes, change: ({ k, v }) => [k, v].forEach((x) => x.fill(2)) },
  { what: "65504 in all of V", dtypes: ["f16"], change: ({ v }) => v.fill(65504) },
  {
    what: "65504 in a channel of V",
    dtypes: ["f16"],
    change: ({ v }, channels) => setChannel(v, channels, 7, (row) => row % 2 ? 65504 / 2 : 65504),
  },
  {
    what: "V up to 65504",
    dtypes: ["f16"],
    change: ({ v }) => v.forEach((_, i) => v[i] = i % 3 ? 65504 : 60000),
  },
  { what: "3e38 in all of V", dtypes: ["bf16"], change: ({ v }) => v.fill(3e38) },
  {
    what: "3e38 in a channel of V",
    dtypes: ["bf16"],
    change: ({ v }, channels) => setChannel(v, channels, 7, (row) => row % 2 ? 1.5e38 : 3e38),
  },
  {
    what: "V up to 3e38",
    dtypes: ["bf16"],
    change: ({ v }) => v.forEach((_, i) => v[i] = i % 3 ? 3e38 : 2e38),
  },
  { what: "tiny V", dtypes: ["f16"], change: ({ v }) => v.forEach((_, i) => v[i] *= 2 ** -14) },
  { what: "tinier V", dtypes: ["bf16"], change: ({ v }) => v.forEach((_, i) => v[i] *= 1e-30) },
  {
    what: "large Q and K",
    dtypes: ["f16"],
    change: ({ q, k }) => [q, k].forEach((x) => x.forEach((_, i) => x[i] *= 3)),
    times: 4,
    rowTimes: 5,
  },
];

/** Two problems, each under its own bounds. */
const extremeSizes: {
  lengths: { queries: number; channels: number; heads: number };
  seed: number;
  outDtype: (dtype: FloatDType) => FloatDType;
  bound: (kernel: TestKernel, dtype: FloatDType) => number;
}[] = [
  {
    lengths: { queries: 70, channels: 32, heads: 1 },
    seed: 41,
    outDtype: (dtype) => dtype,
    bound: (kernel) => worstBounds[kernel].bf16.all,
  },
  {
    lengths: { queries: 129, channels: 64, heads: 2 },
    seed: 90,
    outDtype: (dtype) => dtype === "bf16" ? "bf16" : "f32",
    bound: (kernel, dtype) => meanBounds[kernel].l1 + rounding[dtype],
  },
];

for (const kernel of kernels) {
  deviceTest(`attention() bears zeros, constants and extremes: ${kernel}`, async (device) => {
    for (const { lengths, seed, outDtype, bound } of extremeSizes) {
      for (const { what, dtypes, change, times = 1, rowTimes = 3 } of extremes) {
        for (const dtype of dtypes) {
          const problem = randomProblem(lengths, dtype, seed);
          change(problem, lengths.channels);
          for (const part of ["q", "k", "v"] as const) {
            problem[part] = toFloat32(fromFloat32(problem[part], dtype), dtype);
          }
          using tensors = uploadProblem(device, problem, dtype);
          for (const causal of [false, true]) {
            const options = exactly({ kernel, causal, outDtype: outDtype(dtype) });
            if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
            const { out, lse } = await run(tensors, options);
            const reference = referenceAttention(problem, { causal });
            const name = `${what}, ${dtype}, ${lengths.queries} tokens${causal ? ", causal" : ""}`;
            assert(out.every(Number.isFinite) && lse.every(Number.isFinite), name);
            const most = times * bound(kernel, dtype);
            within(relativeL1(out, reference.out), most, name);
            within(
              worstRow(out, reference.out, lengths.channels),
              rowTimes * most,
              `a row, ${name}`,
            );
          }
        }
      }
    }
  });
}
