// Bool masks in kernel sage2 itself, with both exponentials: on Hopper tiles that a mask closes are skipped, and open
// ones taken as if there were none.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { attention, type AttentionOptions, explain, type MaskOptions } from "../mod.ts";
import { bits, type FloatProblem, nameOf, type Tensors } from "./attention.ts";
import { download, type Lengths, poisoned, randomProblem, runs, uploadProblem } from "./devices.ts";
import { type Dims, normal, referenceAttention, uniform } from "./reference.ts";
import { boolMask, type Sees } from "./masks.ts";
import { boundsOf, compare, exponentials, kernelTest, run } from "./sage2.ts";

// ---- masks --------------------------------------------------------------------------------------------

const hash = (...parts: number[]) =>
  uniform(parts.reduce((sum, part) => 31 * sum + part + 7, 1) % 65521)();

/** Which of [batch, heads, queries] a mask has of its own, and what it shows. */
interface Pattern extends MaskOptions {
  name: string;
  own: string;
  sees: Sees;
}

const patterns: readonly Pattern[] = [
  { name: "random keys", own: "bhq", sees: (i, j, b, h) => hash(i, j, h, b) < 0.7 },
  { name: "few keys", own: "hq", sees: (i, j, _, h) => hash(i, j, h) < 0.1 },
  { name: "padding", own: "b", sees: (_, j, b) => j >= 40 * b && j < 333 - 100 * b },
  { name: "random blocks", own: "q", sees: (i, j) => hash(i >> 7, j >> 8) < 0.5 || i === j },
  {
    name: "small blocks of every head",
    own: "hq",
    sees: (i, j, _, h) => hash(i >> 6, j >> 6, h) < 0.3 || j < 2,
  },
  { name: "the keys in the middle alone", own: "q", sees: (_, j) => j >= 64 && j < 300 },
  { name: "the first tile closed", own: "", sees: (_, j) => j >= 256 },
  { name: "blocks, causal", own: "q", sees: (i, j) => (i + j >> 6) % 3 !== 0, causal: true },
  {
    name: "keys, in a window",
    own: "h",
    sees: (_, j, __, h) => (j >> 7) % 2 !== h % 2 || j % 5 === 0,
    window: [200, 60],
  },
  {
    name: "rows, top-left",
    own: "bq",
    sees: (i, j, b) => (i + j + b) % 3 !== 0,
    causal: true,
    alignment: "top-left",
  },
];

const dimsOf = ([batch, heads, queries]: Dims, keys: number, own: string): Dims => {
  const length = (name: string, of: number) => own.includes(name) ? of : 1;
  return [length("b", batch), length("h", heads), length("q", queries), keys];
};

/** Around tiles of 64 to 256 keys and blocks of 128 queries; heads shared, values of another width. */
const shapes: readonly Lengths[] = [
  { batch: 2, heads: 4, kvHeads: 2, queries: 300, keys: 333, channels: 64 },
  { batch: 2, heads: 2, queries: 129, keys: 577, channels: 48, width: 64 },
  { batch: 2, heads: 2, kvHeads: 1, queries: 260, keys: 385, channels: 128, width: 72 },
  { heads: 3, queries: 140, keys: 1000, channels: 128 },
  { batch: 2, heads: 2, queries: 200, keys: 449, channels: 256 },
];

// ---- what runs ----------------------------------------------------------------------------------------

kernelTest("runs by the same code with a bool mask and without", (device) => {
  using x = device.empty([1, 2, 300, 64], { dtype: "f16" });
  using mask = device.empty([1, 1, 1, 300], { dtype: "bool" });
  using added = device.empty([1, 1, 1, 300], { dtype: "f16" });
  using sinks = device.empty([1, 2, 1, 1], { dtype: "f32" });
  const shown = (options: AttentionOptions) => {
    const { implementation, exponential, reason } = explain(x, x, x, options);
    return { implementation, exponential, reason };
  };
  for (const options of [{ kernel: "sage2" }, { kernel: "sage2-int4", smoothQ: false }] as const) {
    const plain = shown(options);
    for (const more of [{}, { causal: true }, { window: 50 }] as MaskOptions[]) {
      assertEquals(shown({ ...options, ...more, mask }), plain);
    }
    if (device.info.computeCapability !== "9.0") continue; // has one kernel for all
    assertStringIncludes(plain.implementation, "sm_90a");
    const others: [AttentionOptions, string][] = [
      [{ mask: added }, "scores are masked or changed"],
      [{ mask, sinks }, "scores are masked or changed"],
      [{ mask, softcap: 5 }, "scores are masked or changed"],
      [{ mask, smoothQ: true }, "keys are masked and queries smoothed"],
      [{ mask, band: true, causal: true }, "keys are masked beside a band"],
      [{ mask, kernel: "sage2++" }, "keys are masked in sage2++"],
    ];
    for (const [more, why] of others) {
      const { implementation, reason } = shown({ ...options, ...more });
      assert(!implementation.includes("sm_90a"), why);
      assertStringIncludes(reason, `by the portable kernel, as ${why}`);
    }
  }
  return Promise.resolve();
});

// ---- against float64 ----------------------------------------------------------------------------------

for (const pattern of patterns) {
  kernelTest(`agrees with float64 where a mask shows ${pattern.name}`, async (device) => {
    const { name, own, sees, ...more } = pattern;
    for (const [seed, lengths] of shapes.entries()) {
      const dtype = (["f16", "bf16", "f32"] as const)[seed % 3];
      const problem = randomProblem(lengths, dtype, seed + 80), { qDims, kDims, vDims } = problem;
      const dims = dimsOf(qDims, kDims[2], own);
      using mask = boolMask(device, dims, sees);
      const values = Float32Array.from(await mask.data());
      const reference = referenceAttention(problem, more, { mask: { values, dims, bool: true } });
      using tensors = uploadProblem(device, problem, dtype);
      for (const exponential of exponentials) {
        const what = `${name}, ${exponential}, ${dtype} ${nameOf(lengths)}`;
        const actual = await run(tensors, { exponential, mask, ...more });
        assert(actual.out.every(Number.isFinite), `${what}: not finite`);
        // Errors of rows that see few keys do not average.
        const bound = boundsOf(device, exponential);
        compareSeen(actual, reference, vDims[3], {
          all: 1.3 * bound.all,
          row: 0.16,
          lse: 2 * bound.lse,
        }, what);
      }
    }
  });
}

type Results = { out: Float32Array; lse: Float32Array };

/** The same of the rows that see a key; the others hold zeros and -Infinity. */
function compareSeen(
  actual: Results,
  reference: { out: Float64Array; lse: Float64Array },
  width: number,
  bound: { all: number; row: number; lse: number },
  what: string,
): void {
  const rows = Array.from(reference.lse.keys());
  const [seen, blind] = [true, false].map((some) =>
    rows.filter((row) => (reference.lse[row] !== -Infinity) === some)
  );
  for (const row of blind) {
    assertEquals(actual.lse[row], -Infinity, `${what}: lse of row ${row}`);
    const values = actual.out.slice(row * width, (row + 1) * width);
    assertEquals(bits(values), new Uint32Array(width), `${what}: row ${row}`);
  }
  const of = <T extends Float32Array | Float64Array>({ out, lse }: { out: T; lse: T }) => ({
    out: seen.flatMap((row) => Array.from(out.subarray(row * width, (row + 1) * width))),
    lse: seen.map((row) => lse[row]),
  });
  const some = of(actual as { out: Float32Array; lse: Float32Array }), all = of(reference);
  compare(
    { out: Float32Array.from(some.out), lse: Float32Array.from(some.lse) },
    { out: Float64Array.from(all.out), lse: Float64Array.from(all.lse) },
    width,
    bound,
    what,
  );
}

// ---- bit by bit ---------------------------------------------------------------------------------------

/** What a call writes where there was something else, with a log-sum-exp and without. */
async function results(
  { q, k, v }: Tensors,
  options: AttentionOptions,
): Promise<{ out: Uint32Array; lse: Uint32Array; alone: Uint32Array }> {
  const all = { kernel: "sage2", ...options } as const;
  const { out, lse } = await run({ q, k, v }, all);
  using poison = poisoned(q.device, [...q.shape.slice(0, 3), v.shape[3]] as unknown as Dims, "f16");
  using alone = attention(q, k, v, { ...all, out: poison });
  return { out: bits(out), lse: bits(lse), alone: bits(await download(alone)) };
}

kernelTest("a mask that is fully open changes no bit", async (device) => {
  for (const [seed, lengths] of shapes.entries()) {
    const problem = randomProblem(lengths, "f16", seed + 90);
    using tensors = uploadProblem(device, problem, "f16");
    for (const own of ["", "b", "q", "bhq"]) {
      using mask = boolMask(device, dimsOf(problem.qDims, problem.kDims[2], own), () => true);
      for (const exponential of exponentials) {
        for (
          const more of [{}, { causal: true }, { window: 90, smoothV: true }] as AttentionOptions[]
        ) {
          const options = { exponential, ...more };
          assertEquals(
            await results(tensors, { ...options, mask }),
            await results(tensors, options),
            `${nameOf(lengths)} ${own} ${JSON.stringify(options)}`,
          );
        }
      }
    }
  }
});

kernelTest("masks that say the same give the same bits", async (device) => {
  // Every form of a mask has the tiles of the others.
  for (const [seed, lengths] of shapes.entries()) {
    const problem = randomProblem(lengths, "f16", seed + 100);
    using tensors = uploadProblem(device, problem, "f16");
    const keys = problem.kDims[2], sees: Sees = (_, j) => j % 256 < 100 || j > 500;
    const masks = ["", "b", "h", "q", "bhq"].map((own) =>
      boolMask(device, dimsOf(problem.qDims, keys, own), sees)
    );
    for (const exponential of exponentials) {
      const [first, ...others] = await Promise.all(
        masks.map((mask) => results(tensors, { exponential, mask })),
      );
      for (const other of others) assertEquals(other, first, nameOf(lengths));
    }
    for (const mask of masks) mask.dispose();
  }
});

kernelTest(
  "a mask that says what a causal mask or a window says gives the same",
  async (device) => {
    const windows: (MaskOptions & { sees: Sees })[] = [
      { causal: true, sees: (i, j) => j <= i + 200 },
      { causal: true, window: 150, sees: (i, j) => j <= i + 200 && j >= i + 50 },
      { window: [20, 300], alignment: "top-left", sees: (i, j) => j >= i - 20 && j <= i + 300 },
    ];
    for (const channels of [64, 128, 256]) {
      const problem = randomProblem(
        { heads: 2, queries: 300, keys: 500, channels },
        "f16",
        channels,
      );
      using tensors = uploadProblem(device, problem, "f16");
      for (const { sees, ...window } of windows) {
        using mask = boolMask(device, [1, 1, 300, 500], sees);
        for (const exponential of exponentials) {
          const what = `D${channels} ${exponential} ${JSON.stringify(window)}`;
          // The tiles are the same, and so are their scores.
          assertEquals(
            await results(tensors, { exponential, mask }),
            await results(tensors, { exponential, ...window }),
            what,
          );
        }
      }
    }
  },
);

// ---- what is hidden -----------------------------------------------------------------------------------

const bad = [NaN, Infinity, -Infinity];

/** Tokens replaced by what `of` says. */
const replaced = (
  values: Float32Array,
  channels: number,
  of: (token: number) => number | undefined,
) => values.map((value, i) => of(Math.floor(i / channels)) ?? value);

kernelTest("hidden keys never show", async (device) => {
  const hidings: [string, (j: number) => boolean][] = [
    ["every third", (j) => j % 3 === 0],
    ["whole tiles", (j) => j < 256],
    ["the end", (j) => j >= 300],
  ];
  for (const channels of [64, 128, 256]) {
    const problem = randomProblem(
      { heads: 2, queries: 200, keys: 600, channels },
      "f16",
      channels + 1,
    );
    for (const [name, hidden] of hidings) {
      using mask = boolMask(device, [1, 1, 1, 600], (_, j) => !hidden(j));
      const spoilt = (of: (j: number) => number): FloatProblem => ({
        ...problem,
        k: replaced(problem.k, channels, (at) => hidden(at % 600) ? of(at) : undefined),
        v: replaced(problem.v, channels, (at) => hidden(at % 600) ? of(at + 1) : undefined),
      });
      using clean = uploadProblem(device, spoilt(() => 0), "f16");
      using dirty = uploadProblem(device, spoilt((j) => bad[j % 3]), "f16");
      for (const exponential of exponentials) {
        // Zeros count in means and NaN does not.
        const options = { exponential, mask, smoothK: false };
        const what = `${name}, D${channels}, ${exponential}`;
        const [good, worse] = [await run(clean, options), await run(dirty, options)];
        assert(worse.out.every(Number.isFinite) && worse.lse.every(Number.isFinite), what);
        compare(
          worse,
          { out: Float64Array.from(good.out), lse: Float64Array.from(good.lse) },
          channels,
          { all: 0.05, row: 0.15, lse: 0.05 },
          what,
        );
        const smoothed = await run(dirty, { exponential, mask });
        assert(smoothed.out.every(Number.isFinite), `${what} smoothed`);
      }
    }
  }
});

kernelTest("what is not finite shows in the rows that see it alone", async (device) => {
  const [queries, keys] = [300, 400], badQuery = 77, badKey = 260, badValues = [3, 70, 201, 399];
  const sees: Sees = (i, j) =>
    i % 7 !== 0 &&
    (badValues.includes(j) || j === badKey ? (i >> 2) % 2 === j % 2 : (i + j) % 5 !== 0);
  for (const channels of [64, 128, 256]) {
    const problem = randomProblem({ queries, keys, channels }, "f16", channels + 2);
    const q = problem.q.slice(), k = problem.k.slice(), v = problem.v.slice();
    q[badQuery * channels + 3] = NaN;
    k[badKey * channels + 7] = NaN;
    for (const [n, j] of badValues.entries()) v[j * channels + 8 * n] = bad[n % 3];
    using tensors = uploadProblem(device, { ...problem, q, k, v }, "f16");
    using mask = boolMask(device, [1, 1, queries, keys], sees);
    for (const exponential of exponentials) {
      for (const window of [Infinity, 150]) {
        const options = { exponential, mask, ...window === Infinity ? {} : { window } };
        const { out, lse } = await run(tensors, options);
        for (let i = 0; i < queries; ++i) {
          const reaches = (j: number) =>
            sees(i, j, 0, 0) && Math.abs(i + keys - queries - j) <= window;
          const row = out.subarray(i * channels, (i + 1) * channels),
            what = `D${channels}, row ${i}`;
          if (i % 7 === 0) { // it sees nothing
            assertEquals(bits(row.slice()), new Uint32Array(channels), what);
            assertEquals(lse[i], -Infinity, what);
          } else if (i === badQuery || reaches(badKey)) {
            assert(row.every(Number.isNaN) && Number.isNaN(lse[i]), what);
          } else {
            assert(Number.isFinite(lse[i]), what);
            const broken = new Map(badValues.map((j, n) => [8 * n, reaches(j) ? bad[n % 3] : 0]));
            row.forEach((value, c) => {
              const expected = broken.get(c) ?? 0;
              if (Number.isFinite(expected)) {
                assert(Number.isFinite(value), `${what}, channel ${c}`);
              } else assertEquals(value, expected, `${what}, channel ${c}`);
            });
          }
        }
      }
    }
  }
});

kernelTest("rows that see no key give zeros", async (device) => {
  for (const channels of [64, 128, 256]) {
    const problem = randomProblem(
      { batch: 2, heads: 2, queries: 300, keys: 520, channels },
      "f16",
      5,
    );
    using tensors = uploadProblem(
      device,
      { ...problem, v: problem.v.map((value) => value + 4) },
      "f16",
    );
    const cases: [string, Dims, Sees][] = [
      ["none", [1, 1, 1, 520], () => false],
      ["every other", [1, 1, 300, 520], (i) => i % 2 === 1],
      ["a whole block", [1, 2, 300, 520], (i, _, __, h) => (i >> 7) % 2 !== h],
      ["a whole batch", [2, 1, 1, 520], (_, __, b) => b === 1],
    ];
    for (const [name, dims, sees] of cases) {
      using mask = boolMask(device, dims, sees);
      for (const exponential of exponentials) {
        for (const more of [{}, { smoothV: true }, { causal: true }]) {
          const { out, lse } = await run(tensors, { exponential, mask, ...more });
          for (let row = 0; row < 4 * 300; ++row) {
            const plane = Math.floor(row / 300), what = `${name}, D${channels}, row ${row}`;
            const values = out.slice(row * channels, (row + 1) * channels);
            if (sees(row % 300, 0, plane >> 1, plane % 2)) {
              assert(values.every(Number.isFinite) && values.some((x) => x !== 0), what);
              assert(Number.isFinite(lse[row]), what);
            } else {
              assertEquals(bits(values), new Uint32Array(channels), what);
              assertEquals(lse[row], -Infinity, what);
            }
          }
        }
      }
    }
  }
});

kernelTest(
  "values whose first token is apart are centred whatever a mask closes",
  async (device) => {
    // V's first tile is not less the mean of V, so the last tile that is taken must not pass for it.
    const [queries, keys] = [130, 1100];
    for (const channels of [64, 128, 256]) {
      const problem = randomProblem({ queries, keys, channels }, "f16", channels + 3);
      const offsets = normal(9, channels),
        shifted = {
          ...problem,
          v: problem.v.map((value, i) => value + 20 * offsets[i % channels]),
        };
      using tensors = uploadProblem(device, shifted, "f16");
      for (const first of [0, 5, 256, 512, 700]) {
        const sees: Sees = (i, j) => j >= first && (i + j) % 3 !== 0;
        using mask = boolMask(device, [1, 1, queries, keys], sees);
        const dims: Dims = [1, 1, queries, keys], values = Float32Array.from(await mask.data());
        const reference = referenceAttention(shifted, {}, { mask: { values, dims, bool: true } });
        for (const exponential of exponentials) {
          const what = `D${channels}, ${exponential}, from key ${first}`;
          const actual = await run(tensors, { exponential, mask });
          compare(actual, reference, channels, { all: 0.006, row: 0.02, lse: 0.06 }, what);
        }
      }
    }
  },
);

kernelTest("thousands of tiles, most of them closed", async (device) => {
  if (device.kind === "cpu") return;
  const [queries, keys, channels] = [200, 70_000, 64], seen = [3, 4096, 33_333, 69_999];
  const problem = randomProblem({ queries, keys, channels }, "f16", 7);
  const sees: Sees = (i, j) => j === seen[i >> 6 & 3] || (i % 2 === 0 && j === 50_000);
  using tensors = uploadProblem(device, problem, "f16");
  using mask = boolMask(device, [1, 1, queries, keys], sees);
  if (!runs(tensors.q, tensors.k, tensors.v, { kernel: "sage2", mask })) return;
  for (const exponential of exponentials) {
    const { out } = await run(tensors, { exponential, mask });
    for (let i = 1; i < queries; i += 2) { // its one key's value
      const key = seen[i >> 6 & 3];
      for (let c = 0; c < channels; ++c) {
        const value = problem.v[key * channels + c], found = out[i * channels + c];
        assert(
          Math.abs(found - value) <= 0.07 * Math.abs(value) + 0.03,
          `row ${i}, channel ${c}: ${found} for ${value}`,
        );
      }
    }
  }
});
