// Bool masks over many tiles, by the kernels that skip closed ones and take open ones as if there were no mask.
import { assert, assertEquals } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  type Device,
  explain,
  type FloatDType,
  type MaskOptions,
  relativeL1,
  type Tensor,
} from "../mod.ts";
import { bits, checkSeenValues, run, type Tensors, within, worstDifference } from "./attention.ts";
import {
  deviceTest,
  download,
  type Lengths,
  poisoned,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { type Sees, shownBy } from "./masks.ts";
import { type Dims, referenceAttention, uniform } from "./reference.ts";

/** A mask on a device, and as the reference takes it. */
function maskOf(device: Device, dims: Dims, sees: Sees) {
  const values = shownBy(dims, sees);
  const mask = device.tensor(values, dims, { dtype: "bool" });
  return {
    mask,
    reference: { mask: { values, dims, bool: true } },
    [Symbol.dispose]: () => mask.dispose(),
  };
}

/** Chance that does not depend on the order in which it is asked. */
function chance(seed: number, ...index: number[]): number {
  return uniform(index.reduce((hash, i) => (hash * 31 + i) % 1_000_003, seed))();
}

interface Shape extends Lengths {
  dtype: FloatDType;
}

/** Tails, shared heads and batches; lengths that take several tiles of 64, 80 or 128 keys, and blocks of 128 or 192. */
const shapes: Shape[] = [
  { batch: 2, heads: 4, kvHeads: 2, queries: 411, keys: 531, channels: 64, dtype: "f16" },
  { batch: 2, heads: 2, kvHeads: 1, queries: 300, keys: 650, channels: 128, dtype: "bf16" },
  { heads: 4, kvHeads: 2, queries: 531, keys: 411, channels: 128, dtype: "f16" },
  { heads: 2, kvHeads: 1, queries: 260, keys: 391, channels: 256, dtype: "f16" },
  { heads: 2, queries: 130, keys: 450, channels: 192, width: 128, dtype: "bf16" },
];

/** Which of a problem's dimensions a mask has of its own, and what it shows. */
interface Case extends MaskOptions {
  name: string;
  own: string; // of "bhq"
  sees: Sees;
}

const cases: Case[] = [
  { name: "dense, random", own: "bhq", sees: (i, j, b, h) => chance(1, i, j, b, h) < 0.6 },
  { name: "hardly a key", own: "hq", sees: (i, j, _, h) => chance(2, i, j, h) < 0.01 },
  {
    name: "blocks",
    own: "hq",
    sees: (i, j, _, h) => chance(3, Math.floor(i / 128), Math.floor(j / 128), h) < 0.5,
  },
  {
    name: "blocks and what is between",
    own: "bq",
    sees: (i, j, b) => {
      const kind = chance(4, Math.floor(i / 64), Math.floor(j / 64), b);
      return kind < 0.4 || (kind < 0.6 && chance(5, i, j, b) < 0.7);
    },
  },
  { name: "padding", own: "b", sees: (_, j, b) => j < 300 - 140 * b },
  {
    name: "padding of heads, at both ends",
    own: "bh",
    sees: (_, j, b, h) => j > 70 + 9 * h && j < 380 - 90 * b,
  },
  {
    name: "rows that see nothing",
    own: "q",
    sees: (i, j) => i % 3 > 0 && i >= 140 && (i + j) % 5 > 0,
  },
  { name: "nothing at all", own: "", sees: () => false },
  { name: "the diagonal", own: "q", sees: (i, j) => i === j },
  {
    name: "random, causal",
    own: "hq",
    sees: (i, j, _, h) => chance(6, i, j, h) < 0.5,
    causal: true,
  },
  {
    name: "blocks, top-left causal",
    own: "q",
    sees: (i, j) => chance(7, Math.floor(i / 64), Math.floor(j / 128)) < 0.6,
    causal: true,
    alignment: "top-left",
  },
  {
    name: "random, a window",
    own: "bq",
    sees: (i, j, b) => chance(8, i, j, b) < 0.8,
    window: [150, 40],
  },
  {
    name: "padding, a window",
    own: "b",
    sees: (_, j, b) => j < 280 - 50 * b,
    window: 90,
    causal: true,
  },
];

const kernels = ["flash", "sage1"] as const;

/** Of all numbers, of one, and of the log-sum-exp: the largest seen on CUDA and the CPU, and a third more. */
const bounds: Record<string, { all: number; one: number; lse: number }> = {
  "flash f16": { all: 3.7e-4, one: 2.6e-3, lse: 3.5e-6 },
  "flash bf16": { all: 2.9e-3, one: 2.1e-2, lse: 3.5e-6 },
  "sage1 f16": { all: 0.017, one: 0.13, lse: 0.071 },
  "sage1 bf16": { all: 0.017, one: 0.13, lse: 0.071 },
};

const seen: Record<string, { all: number; one: number; lse: number }> = {};
addEventListener("unload", () => Deno.env.get("SAGE_SHOW") && console.log(seen));

for (const { name, own, sees, ...options } of cases) {
  deviceTest(`a bool mask agrees with float64: ${name}`, async (device) => {
    for (const [seed, { dtype, ...lengths }] of shapes.entries()) {
      const problem = randomProblem(lengths, dtype, seed + 40);
      const [batch, heads, queries] = problem.qDims, [, , keys, width] = problem.vDims;
      const length = (of: string, all: number) => own.includes(of) ? all : 1;
      const dims: Dims = [length("b", batch), length("h", heads), length("q", queries), keys];
      using masked = maskOf(device, dims, sees);
      const expected = referenceAttention(problem, options, masked.reference);
      using tensors = uploadProblem(device, problem, dtype);
      for (const kernel of kernels) {
        const all: AttentionOptions = { kernel, ...options, mask: masked.mask };
        if (!runs(tensors.q, tensors.k, tensors.v, all)) continue;
        using out = poisoned(device, [batch, heads, queries, width], dtype);
        const { q, k, v } = tensors;
        using result = attention(q, k, v, { ...all, out, returnLse: true });
        const actual = await download(result.out), lse = await download(result.lse);
        const what = `${kernel}, ${dtype}, ${JSON.stringify(lengths)}`;
        assert(actual.every(Number.isFinite), `${what}: not finite`);
        const empty = expected.out.every((value) => value === 0);
        const found = {
          all: empty ? 0 : relativeL1(actual, expected.out),
          one: worstDifference(actual, expected.out),
          lse: worstDifference(lse, expected.lse),
        };
        const most = seen[`${kernel} ${dtype}`] ??= { all: 0, one: 0, lse: 0 };
        for (const part of ["all", "one", "lse"] as const) {
          most[part] = Math.max(most[part], found[part]);
          within(found[part], bounds[`${kernel} ${dtype}`][part], `${part} of ${what}`);
        }
        for (const [row, value] of expected.lse.entries()) {
          if (value !== -Infinity) continue;
          const blind = actual.subarray(row * width, (row + 1) * width);
          assertEquals([...new Set(bits(blind))], [0], `${what}: row ${row} sees nothing`);
        }
      }
    }
  });
}

deviceTest("flash and sage1 take bool masks by the code that runs without them", (device) => {
  for (const channels of [64, 128, 256]) {
    using x = device.empty([1, 2, 300, channels], { dtype: "f16" });
    using mask = device.tensor(new Uint8Array(300 * 300), [1, 1, 300, 300], { dtype: "bool" });
    using added = device.tensor(new Float32Array(300 * 300), [1, 1, 300, 300]);
    for (const kernel of kernels) {
      if (!runs(x, x, x, { kernel })) continue;
      const { architecture, implementation } = explain(x, x, x, { kernel });
      for (const options of [{}, { causal: true }, { window: 40 }]) {
        const plan = explain(x, x, x, { kernel, ...options, mask });
        assertEquals([plan.architecture, plan.implementation], [architecture, implementation]);
        assert(!plan.reason.includes("portable"), plan.reason);
      }
      if (architecture !== "sm_90") continue;
      for (const options of [{ mask: added }, { mask, softcap: 3 }]) {
        const plan = explain(x, x, x, { kernel, ...options });
        assertEquals(plan.architecture, "sm_80");
        assert(
          plan.reason.endsWith("by the portable kernel, as scores are masked or changed"),
          plan.reason,
        );
      }
    }
  }
});

// ---- what rounding does not hide ----------------------------------------------------------------------

/** Runs `check` with every kernel for f16 tensors of every head dimension. */
async function everywhere(
  device: Device,
  lengths: Omit<Lengths, "channels">,
  check: (what: string, tensors: Tensors, options: AttentionOptions) => Promise<void>,
): Promise<void> {
  for (const channels of [64, 128, 256]) {
    const problem = randomProblem({ ...lengths, channels }, "f16", channels);
    using tensors = uploadProblem(device, problem, "f16");
    for (const kernel of kernels) {
      if (!runs(tensors.q, tensors.k, tensors.v, { kernel })) continue;
      await check(`${kernel}, D ${channels}`, tensors, { kernel });
    }
  }
}

/** The same, bit by bit where tiles of keys are as long, and within rounding elsewhere. */
async function same(
  what: string,
  tensors: Tensors,
  one: AttentionOptions,
  other: AttentionOptions,
): Promise<void> {
  const { q, k, v } = tensors;
  const a = await run(tensors, one), b = await run(tensors, other);
  if (explain(q, k, v, one).blockK === explain(q, k, v, other).blockK) {
    assertEquals(bits(a.out), bits(b.out), what);
    assertEquals(bits(a.lse), bits(b.lse), what);
  } else {
    within(relativeL1(a.out, b.out), 4e-4, what);
    within(worstDifference(a.lse, b.lse), 2e-5, `lse of ${what}`);
  }
}

deviceTest(
  "a bool mask that is fully open changes no bit where tiles are the same",
  async (device) => {
    for (const [queries, keys] of [[300, 500], [514, 514]]) {
      using all = device.tensor(new Uint8Array(queries * keys).fill(7), [1, 1, queries, keys], {
        dtype: "bool",
      });
      using row = device.tensor(new Uint8Array(2 * keys).fill(1), [1, 2, 1, keys], {
        dtype: "bool",
      });
      await everywhere(
        device,
        { heads: 2, kvHeads: 1, queries, keys },
        async (what, tensors, plain) => {
          for (
            const options of [{}, { causal: true }, { window: 100 }, {
              window: [Infinity, 30],
            }] as MaskOptions[]
          ) {
            for (const mask of [all, row] as Tensor<"bool">[]) {
              const one = { ...plain, ...options };
              await same(`${what}, ${JSON.stringify(options)}`, tensors, one, { ...one, mask });
            }
          }
        },
      );
    }
  },
);

deviceTest(
  "bool masks that say the same as a diagonal or a window give the same",
  async (device) => {
    const [queries, keys] = [400, 530], offset = keys - queries;
    const windows: (MaskOptions & { sees: Sees })[] = [
      { causal: true, sees: (i, j) => j <= i + offset },
      { causal: true, alignment: "top-left", sees: (i, j) => j <= i },
      { window: [150, 20], sees: (i, j) => j >= i + offset - 150 && j <= i + offset + 20 },
    ];
    for (const { sees, ...options } of windows) {
      using masked = maskOf(device, [1, 1, queries, keys], sees);
      const { mask } = masked;
      await everywhere(device, { heads: 2, queries, keys }, async (what, tensors, plain) => {
        await same(`${what}, ${JSON.stringify(options)}`, tensors, { ...plain, ...options }, {
          ...plain,
          mask,
        });
        const both = { ...plain, ...options, mask };
        await same(`${what}, ${JSON.stringify(options)} and its mask`, tensors, {
          ...plain,
          ...options,
        }, both);
      });
    }
  },
);

deviceTest("what is not finite shows in the rows that a mask lets see it alone", async (device) => {
  const [queries, keys] = [300, 450], badKey = 260, badQuery = 77, blindQuery = 78;
  const badValues = [3, 70, 127, 128, 200, 201, 333, 449];
  const masks: (MaskOptions & { shows: Sees })[] = [
    { shows: (i, j) => chance(9, i, j) < 0.5 },
    { shows: (i, j) => chance(10, Math.floor(i / 64), Math.floor(j / 64)) < 0.5 },
    { shows: (i, j) => i < 128 ? j >= 128 : j < 256 },
    { shows: (i, j) => i % 2 === j % 2, causal: true },
    { shows: (i, j) => (i + j) % 3 > 0, window: [80, 30] },
    { shows: () => true },
  ];
  const offset = keys - queries;
  for (const { shows: lets, ...options } of masks) {
    const shows: Sees = (i, ...rest) => i !== blindQuery && lets(i, ...rest);
    const [before, after] = options.window as number[] | undefined ??
      [Infinity, options.causal ? 0 : Infinity];
    const sees = (i: number, j: number) =>
      shows(i, j, 0, 0) && j >= i + offset - before && j <= i + offset + after;
    using masked = maskOf(device, [1, 1, queries, keys], shows);
    for (
      const [channels, dtype] of [[64, "f16"], [128, "f16"], [128, "bf16"], [256, "f16"]] as const
    ) {
      const problem = randomProblem({ queries, keys, channels }, dtype, 45);
      const q = problem.q.slice(), k = problem.k.slice(), v = problem.v.slice();
      const zeroK = k.slice(), zeroV = v.slice();
      q[badQuery * channels + 5] = NaN, q[blindQuery * channels + 6] = Infinity;
      k[badKey * channels + 7] = NaN;
      zeroK.fill(0, badKey * channels, (badKey + 1) * channels);
      for (const [n, j] of badValues.entries()) {
        v[j * channels + 8 * n] = [Infinity, NaN, -Infinity][n % 3];
        zeroV[j * channels + 8 * n] = 0;
      }
      using bad = uploadProblem(device, { ...problem, q, k, v }, dtype);
      using good = uploadProblem(device, { ...problem, k: zeroK, v: zeroV }, dtype);
      for (const kernel of kernels) {
        const rough = kernel === "flash" ? {} : { smoothK: false, smoothV: false };
        const all: AttentionOptions = { kernel, ...options, ...rough, mask: masked.mask };
        if (!runs(bad.q, bad.k, bad.v, all)) continue;
        const a = await run(good, all), b = await run(bad, all);
        const what = `${kernel}, ${dtype}, D ${channels}, ${JSON.stringify(options)}, ${lets}`;
        for (let i = 0; i < queries; ++i) {
          const row = b.out.subarray(i * channels, (i + 1) * channels);
          if (i === badQuery || sees(i, badKey)) {
            assert(row.every(Number.isNaN) && Number.isNaN(b.lse[i]), `${what}: row ${i}`);
            continue;
          }
          if (kernel === "sage1" && Math.floor(i / 128) === 0) continue; // may share a scale with it
          checkSeenValues(a, b, i, channels, badValues, (j) => sees(i, j), what);
        }
      }
    }
  }
});
