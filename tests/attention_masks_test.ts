// Masks of every kind with every kernel against the float64 definition, and what must not show through them.
import { assert, assertEquals, assertLess } from "@std/assert";
import {
  alibiSlopes,
  attention,
  type AttentionOptions,
  attentionQuantized,
  type Device,
  explain,
  flashAttention,
  type FloatDType,
  fromFloat32,
  kernels,
  type Layout,
  type MaskOptions,
  type MaskTensors,
  quantize,
  relativeL1,
  toFloat32,
} from "../mod.ts";
import {
  bits,
  checkSeenValues,
  commonGroups,
  exactly,
  nameOf,
  run,
  type Tensors,
  type TestKernel,
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
  upload,
  uploadProblem,
} from "./devices.ts";
import {
  count,
  type Dims,
  normal,
  referenceAttention,
  type ReferenceMask,
  type ReferenceTensors,
  uniform,
} from "./reference.ts";

// ---- masks to try -------------------------------------------------------------------------------------

type MaskDType = "bool" | FloatDType;

/** A mask of random numbers: some hide, and with `blocks` whole tiles are open or closed. */
function randomMask(dims: Dims, dtype: MaskDType, blocks: boolean, seed: number): ReferenceMask {
  const bool = dtype === "bool", next = uniform(seed), noise = normal(seed, count(dims));
  const blockOf = (i: number) => {
    const key = i % dims[3], query = Math.floor(i / dims[3]) % dims[2];
    return (Math.floor(key / 64) + Math.floor(query / 32)) % 3;
  };
  const values = Float32Array.from({ length: count(dims) }, (_, i) => {
    const block = blocks ? blockOf(i) : 2;
    const hidden = block === 0 || (block === 2 && next() < 0.3);
    if (bool) return hidden ? 0 : 1 + Math.floor(255 * next());
    return hidden ? -Infinity : block === 1 ? 0 : noise[i];
  });
  return {
    values: bool ? values : toFloat32(fromFloat32(values, dtype), dtype),
    dims,
    bool,
  };
}

/** Which of a problem's dimensions a mask has of its own; the others it repeats. */
interface MaskSpec {
  dtype: MaskDType;
  own: string; // of "bhq"
  blocks?: boolean;
}

/** A way to mask: options, and what to make tensors of. */
interface Masked extends MaskOptions {
  name: string;
  mask?: MaskSpec;
  sinks?: boolean;
  alibi?: "heads" | "batches";
}

const masked: readonly Masked[] = [
  { name: "top-left causal", causal: true, alignment: "top-left" },
  { name: "a window", window: 20 },
  { name: "a causal window", causal: true, window: 40 },
  { name: "a window before, top-left", window: [30, 0], alignment: "top-left" },
  { name: "a window after only", window: [Infinity, 5] },
  { name: "a window before only", window: [70, Infinity], alignment: "top-left" },
  { name: "a window of nothing but the diagonal", window: 0 },
  { name: "a soft cap", softcap: 1.5 },
  { name: "a wide soft cap, causal", softcap: 30, causal: true },
  { name: "a bool mask", mask: { dtype: "bool", own: "bhq" } },
  { name: "a bool mask of keys", mask: { dtype: "bool", own: "b" } },
  { name: "a bool mask in blocks", mask: { dtype: "bool", own: "q", blocks: true } },
  { name: "a causal bool mask", mask: { dtype: "bool", own: "hq", blocks: true }, causal: true },
  { name: "an f32 mask", mask: { dtype: "f32", own: "hq" } },
  { name: "an f32 mask in blocks", mask: { dtype: "f32", own: "bq", blocks: true } },
  { name: "an f16 mask", mask: { dtype: "f16", own: "bhq", blocks: true }, window: [90, 10] },
  { name: "a bf16 mask of keys", mask: { dtype: "bf16", own: "bh" }, causal: true },
  { name: "sinks", sinks: true },
  { name: "sinks, causal", sinks: true, causal: true },
  { name: "ALiBi", alibi: "heads" },
  { name: "ALiBi of every batch, causal", alibi: "batches", causal: true },
  {
    name: "everything at once",
    causal: true,
    alignment: "top-left",
    window: 100,
    softcap: 5,
    mask: { dtype: "f32", own: "bhq", blocks: true },
    sinks: true,
    alibi: "batches",
  },
];

/** What a case adds to a problem: as the reference takes it, and on a device. */
function tensorsOf(
  device: Device,
  { mask, sinks, alibi }: Masked,
  [batch, heads, queries]: Dims,
  keys: number,
  layout: Layout,
): { reference: ReferenceTensors; options: MaskTensors } & Disposable {
  const reference: ReferenceTensors = {}, options: MaskTensors = {};
  if (mask) {
    const own = (name: string, length: number) => mask.own.includes(name) ? length : 1;
    const dims: Dims = [own("b", batch), own("h", heads), own("q", queries), keys];
    reference.mask = randomMask(dims, mask.dtype, mask.blocks ?? false, 5);
    const values = Float32Array.from(reference.mask.values);
    options.mask = mask.dtype === "bool"
      ? device.tensor(Uint8Array.from(values), dims, { dtype: "bool" })
      : upload(device, values, dims, mask.dtype, layout);
  }
  if (sinks) {
    const values = normal(6, heads).map((value) => 1 + value);
    reference.sinks = values;
    options.sinks = device.tensor(values, [1, heads, 1, 1]);
  }
  if (alibi) {
    const rows = alibi === "heads" ? 1 : batch, slopes = alibiSlopes(heads);
    const values = Float32Array.from(
      { length: rows * heads },
      (_, i) => slopes[i % heads] * (1 + Math.floor(i / heads)),
    );
    reference.alibi = values;
    options.alibi = device.tensor(values, [rows, heads, 1, 1]);
  }
  return {
    reference,
    options,
    [Symbol.dispose]() {
      for (const tensor of Object.values(options)) tensor.dispose();
    },
  };
}

// ---- every mask, every kernel -------------------------------------------------------------------------

/** Heads shared, batches, tails; more queries than keys and fewer; MLA's 192 / 128, and 256 channels. */
const shapes: (Lengths & { dtype: FloatDType; layout: Layout })[] = [
  { batch: 2, heads: 4, kvHeads: 2, queries: 150, channels: 64, dtype: "f16", layout: "HND" },
  {
    heads: 2,
    kvHeads: 1,
    queries: 70,
    keys: 200,
    channels: 40,
    width: 24,
    dtype: "f32",
    layout: "NHD",
  },
  { heads: 2, queries: 200, keys: 70, channels: 64, dtype: "bf16", layout: "HND" },
  {
    heads: 2,
    kvHeads: 1,
    queries: 65,
    keys: 130,
    channels: 192,
    width: 128,
    dtype: "f16",
    layout: "NHD",
  },
  { heads: 1, queries: 33, keys: 97, channels: 256, dtype: "f32", layout: "HND" },
];

const smoothed = { smoothQ: true, smoothK: true, smoothV: true };
const rough = { smoothQ: false, smoothK: false, smoothV: false };

/** Where rows see few keys, errors do not average: the largest seen, and a third more. */
const fewKeys: Partial<Record<TestKernel, { row: number; lse: number }>> = {
  "sage1": { row: 0.055, lse: 0.071 },
  "sage1-int8": { row: 0.06, lse: 0.071 },
  "sage2": { row: 0.118, lse: 0.055 },
  "sage2-int4": { row: 0.9, lse: 1.03 },
  "sage2++": { row: 0.102, lse: 0.055 },
};

/** The largest relative distance of a row; values that f16 can hardly tell from 0 count as its smallest normal one. */
function worstRowOf(actual: ArrayLike<number>, reference: Float64Array, width: number): number {
  const normal = reference.map((value) => Math.abs(value) < 2 ** -14 ? 2 ** -14 : value);
  return worstRow(
    Float64Array.from(normal, (value, i) => value + actual[i] - reference[i]),
    normal,
    width,
  );
}

const seen: Record<string, { all: number; row: number; lse: number }> = {};
addEventListener("unload", () => Deno.env.get("SAGE_SHOW") && console.log(seen));

for (const one of masked) {
  deviceTest(`attention() with ${one.name} agrees with float64`, async (device) => {
    const refused = new Set<string>();
    for (const [seed, { dtype, layout, ...lengths }] of shapes.entries()) {
      const problem = randomProblem(lengths, dtype, seed + 20);
      const [batch, heads, queries] = problem.qDims, [, , keys, width] = problem.vDims;
      using extra = tensorsOf(device, one, problem.qDims, keys, layout);
      const { name: _, mask: __, sinks: ___, alibi: ____, ...plain } = one;
      const expected = referenceAttention(problem, plain, extra.reference);
      using tensors = uploadProblem(device, problem, dtype, layout);
      const { q, k, v } = tensors;
      for (const kernel of kernels) {
        for (const smoothing of kernel === "flash" ? [{}] : [{}, smoothed, rough]) {
          const options: AttentionOptions = exactly({
            kernel,
            ...plain,
            ...extra.options,
            ...smoothing,
          });
          if (!runs(q, k, v, options)) {
            refused.add(kernel);
            continue;
          }
          using out = poisoned(device, [batch, heads, queries, width], dtype, layout);
          using result = attention(q, k, v, { ...options, out, returnLse: true });
          const actual = await download(result.out), lse = await download(result.lse);
          const what = `${kernel}, ${dtype}, ${nameOf(lengths)}, ${JSON.stringify(smoothing)}`;
          assert(actual.every(Number.isFinite), `${what}: not finite`);
          const bound = { ...worstBounds[kernel][dtype], ...fewKeys[kernel] };
          const found = {
            all: relativeL1(actual, expected.out),
            row: worstRowOf(actual, expected.out, width),
            lse: worstDifference(lse, expected.lse),
          };
          const most = seen[`${kernel} ${dtype}`] ??= { all: 0, row: 0, lse: 0 };
          for (const name of ["all", "row", "lse"] as const) {
            most[name] = Math.max(most[name], found[name]);
          }
          within(found.all, bound.all, `relative L1 of ${what}`);
          within(found.row, bound.row, `row of ${what}`);
          within(found.lse, bound.lse, `lse of ${what}`);
        }
      }
    }
    if (refused.size) console.log(`skipped on ${device.name}: ${[...refused].join(", ")}`);
    assert(device.kind !== "cpu" || refused.size === 0);
  });
}

deviceTest("windows and alignments run by the code that runs without them", (device) => {
  const dims: Dims = [1, 2, 200, 64];
  using x = device.empty(dims, { dtype: "f16" });
  const windows: MaskOptions[] = [
    { window: [100, 30] },
    { causal: true, window: 20 },
    { causal: true, alignment: "top-left" },
  ];
  for (const kernel of kernels) {
    if (!runs(x, x, x, { kernel })) continue;
    const { architecture, implementation } = explain(x, x, x, { kernel });
    for (const options of windows) {
      const plan = explain(x, x, x, { kernel, ...options });
      assertEquals(
        [plan.architecture, plan.implementation],
        [architecture, implementation],
        kernel,
      );
    }
  }
});

deviceTest("windows over many tiles agree with float64", async (device) => {
  const windows: MaskOptions[] = [
    { window: [100, 30] },
    { causal: true, window: 200 },
    { window: [Infinity, 60], alignment: "top-left" },
    { window: [90, Infinity] },
  ];
  for (const [queries, keys, channels] of [[500, 700, 64], [600, 400, 128], [300, 500, 256]]) {
    const problem = randomProblem({ heads: 2, kvHeads: 1, queries, keys, channels }, "f16", 24);
    using tensors = uploadProblem(device, problem, "f16");
    for (const options of windows) {
      const expected = referenceAttention(problem, options);
      for (const kernel of kernels) {
        if (!runs(tensors.q, tensors.k, tensors.v, { kernel, ...options })) continue;
        const { out, lse } = await run(tensors, { kernel, ...options });
        const what = `${kernel}, ${queries} x ${keys}, D ${channels}, ${JSON.stringify(options)}`;
        assert(out.every(Number.isFinite), what);
        const bound = { ...worstBounds[kernel].f16, ...fewKeys[kernel] };
        within(relativeL1(out, expected.out), bound.all, `relative L1 of ${what}`);
        within(worstRowOf(out, expected.out, channels), bound.row, `row of ${what}`);
        within(worstDifference(lse, expected.lse), bound.lse, `lse of ${what}`);
      }
    }
  }
});

// ---- what rounding does not hide ----------------------------------------------------------------------

/** Runs every kernel, smoothing nothing and everything, and says which could not run. */
async function everyKernel(
  { q, k, v }: Tensors,
  options: AttentionOptions,
  check: (what: string, options: AttentionOptions) => Promise<void>,
): Promise<void> {
  for (const kernel of kernels) {
    for (const smoothing of kernel === "flash" ? [{}] : [{}, smoothed]) {
      // With these, Hopper takes the kernel that it takes for masks, without any too.
      const groups = commonGroups(q.device, kernel);
      const all = exactly({ kernel, ...groups, ...options, ...smoothing });
      if (!runs(q, k, v, all)) console.log(`skipped on ${q.device.name}: ${kernel}`);
      else await check(`${kernel} ${JSON.stringify(smoothing)}`, all);
    }
  }
}

/** Rows of 120 bytes: on Hopper they go by the portable kernels, with masks and without. */
const portableChannels = 60;

deviceTest("a mask that is fully open changes no bit", async (device) => {
  const lengths = { heads: 2, queries: 130, keys: 200, channels: portableChannels };
  const problem = randomProblem(lengths, "f16", 3);
  using tensors = uploadProblem(device, problem, "f16");
  const masks = [
    device.tensor(new Uint8Array(130 * 200).fill(7), [1, 1, 130, 200], { dtype: "bool" }),
    device.tensor(new Uint8Array(200).fill(1), [1, 1, 1, 200], { dtype: "bool" }),
    device.tensor(new Float32Array(130 * 200), [1, 1, 130, 200]),
    device.tensor(new Float16Array(130 * 200).fill(-0), [1, 1, 130, 200]),
    device.tensor(new Uint16Array(2 * 200), [1, 2, 1, 200], { dtype: "bf16" }),
  ];
  try {
    for (const mask of masks) {
      await everyKernel(tensors, { mask }, async (what, { mask, ...plain }) => {
        const open = await run(tensors, { ...plain, mask });
        const none = await run(tensors, plain);
        assertEquals(bits(open.out), bits(none.out), what);
        assertEquals(bits(open.lse), bits(none.lse), what);
      });
    }
  } finally {
    for (const mask of masks) mask.dispose();
  }
});

deviceTest("masks that say the same give the same", async (device) => {
  const [queries, keys] = [150, 200], offset = keys - queries;
  const lengths = { heads: 2, queries, keys, channels: portableChannels };
  const problem = randomProblem(lengths, "f16", 4);
  using tensors = uploadProblem(device, problem, "f16");
  const positions = Array.from(
    { length: queries * keys },
    (_, i) => [Math.floor(i / keys) + offset, i % keys],
  );
  const sees = positions.map(([i, j]) => j <= i && j >= i - 30);
  using bool = device.tensor(Uint8Array.from(sees, Number), [1, 1, queries, keys], {
    dtype: "bool",
  });
  using added = device.tensor(Float32Array.from(sees, (one) => one ? 0 : -Infinity), [
    1,
    1,
    queries,
    keys,
  ]);
  using distance = device.tensor(
    Float32Array.from(positions, ([i, j]) => -0.25 * Math.abs(i - j)),
    [1, 1, queries, keys],
  );
  using alibi = device.tensor(new Float32Array([0.25, 0.25]), [1, 2, 1, 1]);
  const same: [string, AttentionOptions, AttentionOptions][] = [
    ["a window and its bool mask", { causal: true, window: 30 }, { mask: bool }],
    ["a window and its added mask", { window: [30, 0] }, { mask: added }],
    ["a mask over a wider window", { window: [30, 0] }, { mask: bool, window: [80, 9] }],
    ["ALiBi and its added mask", { alibi }, { mask: distance }],
  ];
  for (const [name, one, other] of same) {
    await everyKernel(tensors, {}, async (what, plain) => {
      if (!runs(tensors.q, tensors.k, tensors.v, { ...plain, ...one })) return;
      if (!runs(tensors.q, tensors.k, tensors.v, { ...plain, ...other })) return;
      const a = await run(tensors, { ...plain, ...one });
      const b = await run(tensors, { ...plain, ...other });
      within(relativeL1(a.out, b.out), 2e-4, `${name}: ${what}`);
      within(worstDifference(a.lse, b.lse), 2e-5, `lse, ${name}: ${what}`);
    });
  }
});

deviceTest("hidden keys never show, whatever they hold", async (device) => {
  // NaN in the keys and values outside: 0 · NaN must not happen, nor may a tile be read that no row reaches.
  const [queries, keys] = [160, 320];
  const problem = randomProblem({ queries, keys, channels: 64 }, "f32", 8);
  const cases: [string, MaskOptions, (j: number) => boolean, boolean?][] = [
    ["window", { window: [10, 0], causal: true }, (j) => j < keys - queries - 10],
    ["top-left causal", { causal: true, alignment: "top-left" }, (j) => j >= queries],
    ["window after", { window: [0, 3], alignment: "top-left" }, (j) => j >= queries + 3],
    ["bool mask", {}, (j) => j % 3 === 0, true],
    ["bool mask of tiles", {}, (j) => j < 128, true],
  ];
  const both = (["f32", "f16"] as const).flatMap((dtype) =>
    cases.map((one) => [dtype, ...one] as const)
  );
  for (const [dtype, name, options, hidden, masks] of both) {
    const spoil = (values: Float32Array, bad: (j: number) => number) =>
      values.map((value, i) => hidden(Math.floor(i / 64)) ? bad(Math.floor(i / 64)) : value);
    using clean = uploadProblem(device, {
      ...problem,
      k: spoil(problem.k, () => 0),
      v: spoil(problem.v, () => 0),
    }, dtype);
    using spoiled = uploadProblem(device, {
      ...problem,
      k: spoil(problem.k, (j) => [NaN, Infinity, -Infinity][j % 3]),
      v: spoil(problem.v, (j) => [Infinity, NaN, -Infinity][j % 3]),
    }, dtype);
    using mask = device.tensor(
      Uint8Array.from({ length: keys }, (_, j) => Number(!hidden(j))),
      [1, 1, 1, keys],
      { dtype: "bool" },
    );
    // Zeros count in the means of K and V, and NaN does not: smoothing off, the results are equal bit by bit.
    const all = { ...options, ...(masks ? { mask } : {}) };
    await everyKernel(clean, all, async (what, one) => {
      const off = one.kernel === "flash" ? one : { ...one, smoothK: false, smoothV: false };
      const a = await run(clean, off), b = await run(spoiled, off);
      assert(b.out.every(Number.isFinite), `${name}: ${what}`);
      assertEquals(bits(a.out), bits(b.out), `${name}: ${what}`);
      assertEquals(bits(a.lse), bits(b.lse), `${name}: ${what}`);
      const smooth = await run(spoiled, one);
      assert(smooth.out.every(Number.isFinite), `${name}: ${what} smoothed`);
    });
  }
});

deviceTest(
  "visible keys that are not finite show in the rows that see them alone",
  async (device) => {
    const [queries, keys, bad] = [130, 130, 70];
    const problem = randomProblem({ queries, keys, channels: 64 }, "f32", 9);
    problem.v[bad * 64 + 5] = Infinity;
    using tensors = uploadProblem(device, problem, "f32");
    using mask = device.tensor(
      Uint8Array.from(
        { length: queries * keys },
        (_, i) => Number(i % keys !== bad || Math.floor(i / keys) % 2 === 0),
      ),
      [1, 1, queries, keys],
      { dtype: "bool" },
    );
    await everyKernel(tensors, { mask, window: 40 }, async (what, options) => {
      const { out } = await run(tensors, options);
      out.forEach((value, at) => {
        const i = Math.floor(at / 64);
        const sees = i % 2 === 0 && Math.abs(i - bad) <= 40;
        const expected = sees && at % 64 === 5 ? Infinity : undefined;
        if (expected) assertEquals(value, expected, `${what}: row ${i}`);
        else assert(Number.isFinite(value), `${what}: row ${i}`);
      });
    });
  },
);

deviceTest("what is not finite shows in the rows whose windows reach it alone", async (device) => {
  const [queries, keys, channels] = [300, 400, 64], badKey = 260;
  const badValues = [3, 70, 127, 128, 200, 201, 333, 399];
  const windows: (MaskOptions & { sees: (i: number, j: number) => boolean })[] = [
    { window: [60, 20], sees: (i, j) => j >= i + 100 - 60 && j <= i + 100 + 20 },
    { window: 150, causal: true, sees: (i, j) => j >= i + 100 - 150 && j <= i + 100 },
    { causal: true, alignment: "top-left", sees: (i, j) => j <= i },
    { window: [Infinity, 10], sees: (i, j) => j <= i + 110 },
    { window: [5, Infinity], alignment: "top-left", sees: (i, j) => j >= i - 5 },
  ];
  const problem = randomProblem({ queries, keys, channels }, "f16", 25);
  const k = problem.k.slice(), v = problem.v.slice();
  const zeroK = problem.k.slice(), zeroV = problem.v.slice();
  k[badKey * channels + 7] = NaN;
  zeroK.fill(0, badKey * channels, (badKey + 1) * channels);
  for (const [n, j] of badValues.entries()) {
    v[j * channels + 8 * n] = [Infinity, NaN, -Infinity][n % 3];
    zeroV[j * channels + 8 * n] = 0;
  }
  for (const dtype of ["f16", "f32"] as const) {
    using bad = uploadProblem(device, { ...problem, k, v }, dtype);
    using good = uploadProblem(device, { ...problem, k: zeroK, v: zeroV }, dtype);
    for (const { sees, ...window } of windows) {
      for (const kernel of kernels) {
        // Per thread, Hopper's sage2 takes scales from a sample, in which zeros count.
        const options = exactly({
          kernel,
          ...window,
          ...commonGroups(device, kernel),
          ...kernel === "flash" ? {} : rough,
        });
        if (!runs(bad.q, bad.k, bad.v, options)) continue;
        const a = await run(good, options), b = await run(bad, options);
        const what = `${kernel}, ${dtype}, ${JSON.stringify(window)}`;
        for (let i = 0; i < queries; ++i) {
          const row = b.out.subarray(i * channels, (i + 1) * channels);
          if (sees(i, badKey)) {
            assert(row.every(Number.isNaN) && Number.isNaN(b.lse[i]), `${what}: row ${i}`);
            continue;
          }
          checkSeenValues(a, b, i, channels, badValues, (j) => sees(i, j), what);
        }
      }
    }
  }
});

deviceTest("NaN in a mask or in Q shows in its row alone", async (device) => {
  const [queries, keys] = [100, 130];
  const clean = randomProblem({ queries, keys, channels: 64 }, "f32", 10);
  const q = clean.q.slice();
  q[60 * 64 + 1] = NaN, q[61 * 64 + 2] = Infinity;
  const values = new Float32Array(queries * keys).fill(0.5);
  values[40 * keys + 100] = NaN, values[41 * keys + 3] = -Infinity;
  using good = uploadProblem(device, clean, "f32"),
    bad = uploadProblem(device, { ...clean, q }, "f32");
  using mask = device.tensor(values, [1, 1, queries, keys]);
  for (const extra of [{}, { softcap: 2 }, { causal: true, window: 20 }]) {
    await everyKernel(good, { mask, ...extra }, async (what, options) => {
      const smooth = options.smoothQ || options.kernel === "sage2-int4"; // over other rows then
      const { mask: _, ...plain } = options;
      const expected = await run(good, plain);
      const { out, lse } = await run(bad, options);
      for (let i = 0; i < queries; ++i) {
        const row = out.slice(i * 64, i * 64 + 64);
        const reaches = !options.causal || 100 <= i + 30; // key 100, from the diagonal
        if ((i === 40 && reaches) || i === 60 || i === 61) {
          assert(row.every(Number.isNaN) && Number.isNaN(lse[i]), `${what}: row ${i}`);
        } else if (i !== 41 && !smooth) { // 0.5 more for all keys changes no weight
          within(
            relativeL1(row, expected.out.slice(i * 64, i * 64 + 64)),
            0.02,
            `${what}: row ${i}`,
          );
        }
        if (i !== 40 && i !== 60 && i !== 61) {
          assert(row.every(Number.isFinite), `${what}: row ${i}`);
        }
      }
    });
  }
});

deviceTest("rows that see no key give zeros, and the log-sum-exp of their sink", async (device) => {
  const [queries, keys, width] = [140, 70, 64];
  const problem = randomProblem({ heads: 2, queries, keys, channels: 64, width }, "f16", 12);
  using tensors = uploadProblem(device, problem, "f16");
  using sinks = device.tensor(new Float32Array([0.5, -3]), [1, 2, 1, 1]);
  using nobody = device.tensor(new Uint8Array(keys), [1, 1, 1, keys], { dtype: "bool" });
  using odd = device.tensor(
    Float32Array.from(
      { length: queries * keys },
      (_, i) => Math.floor(i / keys) % 2 ? 0 : -Infinity,
    ),
    [1, 1, queries, keys],
  );
  const cases: [AttentionOptions, (i: number) => boolean][] = [
    [{ causal: true }, (i) => i < queries - keys],
    [{ window: [3, 0], alignment: "top-left" }, (i) => i >= keys + 3],
    [{ mask: nobody }, () => true],
    [{ mask: odd }, (i) => i % 2 === 0],
    [{ mask: odd, causal: true, softcap: 4 }, (i) => i % 2 === 0 || i < queries - keys],
  ];
  for (const [options, blind] of cases) {
    for (const [extra, lone] of [[{}, [-Infinity, -Infinity]], [{ sinks }, [0.5, -3]]] as const) {
      await everyKernel(tensors, { ...options, ...extra }, async (what, all) => {
        const { out, lse } = await run(tensors, all);
        for (let row = 0; row < 2 * queries; ++row) {
          const values = out.slice(row * width, row * width + width);
          if (!blind(row % queries)) {
            assert(values.every((x) => Number.isFinite(x)) && values.some((x) => x !== 0), what);
            assertLess(lone[Math.floor(row / queries)], lse[row], what);
            continue;
          }
          assertEquals(bits(values), new Uint32Array(width), `${what}: row ${row}`);
          assertEquals(lse[row], lone[Math.floor(row / queries)], `${what}: row ${row}`);
        }
      });
    }
  }
});

deviceTest("sinks and caps are corrected for what was smoothed", async (device) => {
  // Means of K and V far from 0: a sink must be compared with scores before smoothing, and V's mean be weighed.
  const problem = randomProblem({ heads: 2, queries: 130, keys: 150, channels: 64 }, "f32", 13);
  const shifted = {
    ...problem,
    k: problem.k.map((value, i) => value + (i % 64 < 8 ? 3 : 0)),
    v: problem.v.map((value) => value + 4),
  };
  const values = [2, -1];
  using tensors = uploadProblem(device, shifted, "f32");
  using sinks = device.tensor(Float32Array.from(values), [1, 2, 1, 1]);
  for (const [extra, options] of [[{ sinks: values }, { sinks }], [{}, { softcap: 2 }]] as const) {
    const expected = referenceAttention(shifted, { ...options as MaskOptions }, extra);
    await everyKernel(tensors, options, async (what, all) => {
      const { out, lse } = await run(tensors, all);
      const bound = all.kernel === "flash" ? 1e-6 : all.kernel === "sage2-int4" ? 0.1 : 0.012;
      within(relativeL1(out, expected.out), bound, what);
      const room = all.kernel === "flash" ? 1e-5 : all.kernel === "sage2-int4" ? 1 : 0.06;
      within(worstDifference(lse, expected.lse), room, `lse of ${what}`);
    });
  }
});

// ---- what the log-sum-exp is for ----------------------------------------------------------------------

/** Of two halves of the keys, each with its log-sum-exp. */
function merge(
  parts: { out: Float32Array; lse: Float32Array }[],
  width: number,
): { out: Float64Array; lse: Float64Array } {
  const [{ lse: first }] = parts;
  const lse = Float64Array.from(first, (_, row) => {
    const most = Math.max(...parts.map((part) => part.lse[row]));
    return most + Math.log(parts.reduce((sum, part) => sum + Math.exp(part.lse[row] - most), 0));
  });
  const out = Float64Array.from(parts[0].out, (_, at) => {
    const row = Math.floor(at / width);
    return parts.reduce((sum, part) => sum + part.out[at] * Math.exp(part.lse[row] - lse[row]), 0);
  });
  return { out, lse };
}

deviceTest(
  "attention over parts of the keys merges by log-sum-exp into the whole",
  async (device) => {
    const problem = randomProblem({ heads: 2, queries: 100, keys: 300, channels: 64 }, "f32", 14);
    const half = problem.k.map((value, i) => i % 64 < 4 ? value + 2 : value);
    using tensors = uploadProblem(device, { ...problem, k: half }, "f32");
    const { q, k, v } = tensors;
    await everyKernel(tensors, { softcap: undefined }, async (what, options) => {
      const parts = [];
      for (const tokens of [[0, 130], [130, 300]] as [number, number][]) {
        using kPart = k.view({ tokens }), vPart = v.view({ tokens });
        parts.push(await run({ q, k: kPart, v: vPart }, options));
      }
      const merged = merge(parts, 64), whole = await run(tensors, options);
      // A quantized kernel's parts have scales of their own: as far from the whole as it is from exact attention.
      const bound = options.kernel === "flash"
        ? 1e-5
        : worstBounds[options.kernel as TestKernel].f32.all;
      within(relativeL1(merged.out, whole.out), 1.4 * bound, what);
      if (options.kernel !== "flash") return;
      within(worstDifference(merged.out, whole.out), 1e-5, what);
      within(worstDifference(merged.lse, whole.lse), 1e-5, `lse of ${what}`);
    });
  },
);

// ---- the other ways in --------------------------------------------------------------------------------

deviceTest("flashAttention() and explain() take masks", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 70, channels: 64 }, "f16", 16);
  using tensors = uploadProblem(device, problem, "f16");
  const { q, k, v } = tensors;
  using mask = device.tensor(new Uint8Array(70).fill(1, 0, 50), [1, 1, 1, 70], { dtype: "bool" });
  const options = { mask, window: 30, softcap: 3 };
  if (!runs(q, k, v, { kernel: "flash", ...options })) return;
  using o = flashAttention(q, k, v, options);
  const expected = await run(tensors, { kernel: "flash", ...options });
  assertEquals(bits(await download(o)), bits(expected.out));
  assertEquals(explain(q, k, v, options).kernel, explain(q, k, v).kernel);
});

deviceTest("attentionQuantized() takes windows, alignments and caps", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 130, keys: 200, channels: 64 }, "f16", 17);
  using tensors = uploadProblem(device, problem, "f16");
  const { q, k, v } = tensors;
  using qCodes = quantize(q, { operand: "query", smooth: true });
  using kCodes = quantize(k, { operand: "key", smooth: true });
  using vCodes = quantize(v, { operand: "value" });
  const cases: MaskOptions[] = [
    { causal: true, alignment: "top-left" },
    { window: [20, 30] },
    { window: 40, causal: true, softcap: 2 },
  ];
  for (const options of cases) {
    if (!runs(q, k, v, { kernel: "sage2", exponential: "exact", ...options })) continue;
    using result = attentionQuantized(qCodes, kCodes, vCodes, {
      ...options,
      exponential: "exact",
      returnLse: true,
    });
    const expected = referenceAttention(problem, options);
    within(relativeL1(await download(result.out), expected.out), 0.05, JSON.stringify(options));
    within(
      worstDifference(await download(result.lse), expected.lse),
      0.031,
      `lse with ${JSON.stringify(options)}`,
    );
  }
});
