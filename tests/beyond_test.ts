// What goes beyond the papers: rotation, the precision band, an exact first token, K means of tiles, and sage-int8.
import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import {
  type AttentionOptions,
  explain,
  fromFloat32,
  type MaskOptions,
  type MaskTensors,
  parseSafetensors,
  relativeL1,
  toFloat32,
} from "../mod.ts";
import {
  biased,
  type FloatProblem,
  run,
  type TestKernel,
  within,
  worstDifference,
} from "./attention.ts";
import { deviceTest, randomProblem, runs, uploadProblem } from "./devices.ts";
import { inBand, referenceRecipe, referenceRotate, rotationSign } from "./recipes.ts";
import {
  type Dims,
  normal,
  referenceAttention,
  type ReferenceMask,
  type ReferenceTensors,
} from "./reference.ts";

/** Everything at once. */
const all = { rotate: true, band: true, firstToken: true, kMeanRows: 64, causal: true } as const;

function halves(values: Float32Array): Float32Array<ArrayBuffer> {
  return toFloat32(fromFloat32(values, "f16"), "f16");
}

// ---- definitions --------------------------------------------------------------------------------------

Deno.test("rotation keeps products", () => {
  for (const channels of [1, 2, 40, 64, 128]) {
    const dims: Dims = [1, 1, 2, channels];
    const x = normal(channels, 2 * channels),
      { values, dims: [, , , width] } = referenceRotate(
        x,
        dims,
      );
    const product = (x: Float32Array, n: number) =>
      x.subarray(0, n).reduce((sum, value, c) => sum + value * x[n + c], 0);
    assertLess(Math.abs(width * product(values, width) - product(x, channels)), 1e-5);
  }
  const signs = Array.from({ length: 256 }, (_, c) => rotationSign(c));
  assertEquals(Math.abs(signs.reduce((a, b) => a + b)) < 48, true, "signs of both kinds");
});

/** Two tiles of queries and a part, on a diagonal that no tile begins with. */
const lengths = { heads: 2, kvHeads: 1, queries: 300, keys: 421, channels: 40, width: 24 };

/** Head dimensions that take other code on CUDA. */
const wider = [
  { queries: 140, keys: 200, channels: 96, width: 128 },
  { queries: 70, keys: 200, channels: 200, width: 136 },
];

/** Each option alone, and with others. */
const combinations: AttentionOptions[] = [
  {},
  { rotate: true },
  { rotate: true, smoothQ: true },
  { band: true, causal: true },
  { band: true, causal: true, smoothK: false },
  { firstToken: true },
  { firstToken: true, smoothV: true },
  { firstToken: true, smoothK: false, causal: true },
  { kMeanRows: 64 },
  { kMeanRows: 192, smoothQ: true, causal: true },
  { ...all, smoothQ: true, smoothV: true, granularity: "token" },
];

for (const kernel of ["sage1", "sage1-int8", "sage2", "sage2-int4", "sage-int8"] as const) {
  deviceTest(
    `options beyond the papers are what they are said to be: ${kernel}`,
    async (device) => {
      const cases = [
        [lengths, combinations] as const,
        ...wider.map((lengths) => [lengths, combinations.slice(-2)] as const),
      ];
      for (const [lengths, combinations] of cases) {
        const problem = randomProblem(lengths, "f16", 7);
        problem.q = halves(biased(problem.q, lengths.channels, 1, 1));
        problem.k = halves(biased(problem.k, lengths.channels, 2, 2));
        problem.v = halves(biased(problem.v, lengths.width, 1, 3));
        using tensors = uploadProblem(device, problem, "f16");
        for (const combination of combinations) {
          const options: AttentionOptions = { kernel, exponential: "exact", ...combination };
          if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
          // Hopper's own sage2 has groups, and a band, that are the matter of other tests.
          const { architecture } = explain(tensors.q, tensors.k, tensors.v, options);
          if (architecture === "sm_90" && kernel !== "sage1") continue;
          const { out, lse } = await run(tensors, { ...options, outDtype: "f32" });
          const expected = referenceRecipe(problem, options, architecture === "" ? "up" : "down");
          const name = `D ${lengths.channels}, ${JSON.stringify(options)}`;
          // Some weights may round to the other side: more on CUDA, where P is FP16 before it is codes, or relative to a
          // score that may be 2^8 smaller than the largest.
          const fromHalves = architecture !== "" && kernel !== "sage-int8";
          within(relativeL1(out, expected.out), fromHalves ? 6e-4 : 2e-5, name);
          const bound = kernel === "sage-int8" ? 4e-4 : 4e-6;
          within(worstDifference(lse, expected.lse), bound, `lse, ${name}`);
        }
      }
    },
  );
}

deviceTest("the band is the first tile of keys and those on the diagonal", async (device) => {
  // Values say which tile of keys a weight is from, without an error of their own.
  for (const [queries, keys, tiles] of [[256, 256, 4], [256, 293, 5], [256, 192, 3]] as const) {
    const problem = randomProblem({ queries, keys, channels: 64, width: tiles }, "f32", 8);
    problem.v.fill(0);
    for (let j = 0; j < keys; ++j) problem.v[j * tiles + Math.floor(j / 64)] = 1;
    using tensors = uploadProblem(device, problem, "f32");
    const options = { kernel: "sage2-int4", band: true, causal: true } as const;
    if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
    const { out, lse } = await run(tensors, options);
    const reference = referenceAttention(problem, { causal: true });
    const worst = [0, 1].map(() => new Array(tiles).fill(0));
    out.forEach((share, at) => {
      const row = Math.floor(at / tiles), i = Math.floor(row / 128), tile = at % tiles;
      const exact = reference.out[at] * Math.exp(reference.lse[row]);
      if (exact === 0 || Number.isNaN(exact)) return;
      const error = Math.abs(share * Math.exp(lse[row]) / exact - 1);
      worst[i][tile] = Math.max(worst[i][tile], error);
    });
    const exact = worst.map((tiles) => tiles.map((error) => error < 1e-5));
    const offset = keys - queries;
    const expected = worst.map((errors, i) =>
      errors.map((error, tile) => error === 0 || inBand(i, tile, offset))
    );
    assertEquals(exact, expected, `${queries} queries, ${keys} keys`);
  }
  // The last query of a tile of 128 sees two tiles of the diagonal, or three where they do not meet.
  const band = (query: number, offset: number) =>
    Array.from({ length: 8 }, (_, tile) => tile).filter((tile) => inBand(query, tile, offset));
  assertEquals(band(0, 0), [0, 1]);
  assertEquals(band(2, 0), [0, 4, 5]);
  assertEquals(band(2, 37), [0, 4, 5, 6]);
  assertEquals(band(1, -64), [0, 1, 2]);
  assertEquals(band(0, -200), [0]);
});

deviceTest("nothing changes where quantization loses nothing", async (device) => {
  // Rows of a Hadamard matrix, in pairs that cancel, on means that smoothing takes away.
  const channels = 64, tokens = 256;
  const rows = (seed: number, mean: number, pairs: number) =>
    Float32Array.from({ length: tokens * channels }, (_, at) => {
      const n = Math.floor(at / channels), c = at % channels;
      const row = (Math.floor(n / 2) % pairs * 11 + seed) % channels;
      const odd = (row & c).toString(2).replaceAll("0", "").length % 2 === 1;
      return mean + (n % 2 ? -1 : 1) * (odd ? -1 : 1) * rotationSign(c);
    });
  const dims: Dims = [1, 1, tokens, channels];
  const problem: FloatProblem = {
    q: rows(5, 2, 64),
    k: rows(3, 8, 32),
    v: normal(9, tokens * channels),
    qDims: dims,
    kDims: dims,
    vDims: dims,
  };
  const slopes = new Float32Array([0.125]), logits = new Float32Array([130]);
  const hidden: ReferenceMask = {
    values: Float32Array.from({ length: tokens * tokens }, (_, i) => (i * 7 + (i >> 9)) % 5 && 1),
    dims: [1, 1, tokens, tokens],
    bool: true,
  };
  using tensors = uploadProblem(device, problem, "f32");
  using alibi = device.tensor(slopes, [1, 1, 1, 1]);
  using sinks = device.tensor(logits, [1, 1, 1, 1]);
  using mask = device.tensor(Uint8Array.from(hidden.values), [...hidden.dims], { dtype: "bool" });
  const masks: [MaskOptions & MaskTensors, ReferenceTensors][] = [
    [{}, {}],
    [{ softcap: 150, window: 100 }, {}],
    [{ mask, alibi, sinks }, { mask: hidden, alibi: slopes, sinks: logits }],
  ];
  for (const [tensorMasks, referenceMasks] of masks) {
    const masking = { ...tensorMasks, causal: true };
    const reference = referenceAttention(problem, masking, referenceMasks);
    for (const rotate of [false, true]) {
      for (const kMeanRows of [undefined, 64, 128]) {
        for (const [band, firstToken] of [[false, false], [true, false], [false, true]]) {
          const options = {
            ...{ kernel: "sage1", granularity: "token", smoothQ: true, ...masking } as const,
            ...{ rotate, kMeanRows, band, firstToken },
          };
          if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
          const { out, lse } = await run(tensors, options);
          const name = `${Object.keys(masking)}, ${
            JSON.stringify({ rotate, kMeanRows, band, firstToken })
          }`;
          within(relativeL1(out, reference.out), 3e-4, name); // P and V are f16
          within(worstDifference(lse, reference.lse), 2e-4, `lse, ${name}`); // of about 130
        }
      }
    }
  }
});

// ---- real tensors -------------------------------------------------------------------------------------

/** Relative L1 of some options over that of others is at most `most`. */
interface Gain {
  file: string;
  of: AttentionOptions & { kernel: TestKernel };
  over: AttentionOptions & { kernel: TestKernel };
  most: number;
}

/** As measured, and 5 % more. Of 1024 tokens the band is a third; of 2048, where it is 17 %, it does no worse. */
const gains: Gain[] = [
  ...([["06", 0.15], ["18", 0.35]] as const).map(([layer, most]): Gain => ({
    file: `tinyllama-layer${layer}`,
    of: { kernel: "sage2", band: true },
    over: { kernel: "sage2" },
    most,
  })),
  ...(["06", "18"] as const).map((layer): Gain => ({
    file: `tinyllama-layer${layer}`,
    of: { kernel: "sage2", rotate: true },
    over: { kernel: "sage2" },
    most: 0.88,
  })),
  ...([["06", 0.3], ["18", 0.6]] as const).map(([layer, most]): Gain => ({
    file: `tinyllama-layer${layer}`,
    of: { kernel: "sage-int8", firstToken: true },
    over: { kernel: "sage-int8" },
    most,
  })),
  ...([["06", 0.075], ["18", 0.19]] as const).map(([layer, most]): Gain => ({
    file: `tinyllama-layer${layer}`,
    of: { kernel: "sage-int8", rotate: true, band: true },
    over: { kernel: "sage2" },
    most,
  })),
  ...(["00", "06", "18"] as const).map((layer): Gain => ({
    file: `tinyllama-layer${layer}`,
    // By the same code: per thread, Hopper has a kernel of its own for the latter.
    of: { kernel: "sage2-int4", granularity: "warp", rotate: true, kMeanRows: 64 },
    over: { kernel: "sage2-int4", granularity: "warp", rotate: true },
    most: 1.02,
  })),
  {
    file: "whisper-encoder-layer01",
    of: { kernel: "sage2-int4", kMeanRows: 64 },
    over: { kernel: "sage2-int4" },
    most: 0.95,
  },
  {
    file: "whisper-encoder-layer01",
    of: { kernel: "sage-int8", rotate: true },
    over: { kernel: "sage2" },
    most: 0.43,
  },
];

for (const file of new Set(gains.map(({ file }) => file))) {
  deviceTest(`options beyond the papers pay on ${file}`, async (device) => {
    const causal = file.startsWith("tinyllama");
    const path = new URL(`data/${file}.safetensors`, import.meta.url);
    const stored = parseSafetensors(await Deno.readFile(path));
    const [q, k, v] = ["q", "k", "v"].map((name) => stored.get(name, "f16"));
    const dims = (shape: readonly number[]) => shape as Dims;
    const problem: FloatProblem = {
      ...{ q: Float32Array.from(q.data), k: Float32Array.from(k.data) },
      ...{ v: Float32Array.from(v.data), qDims: dims(q.shape), kDims: dims(k.shape) },
      vDims: dims(v.shape),
    };
    const reference = referenceAttention(problem, { causal }).out;
    using tensors = uploadProblem(device, problem, "f16");
    const error = async (options: AttentionOptions) =>
      relativeL1((await run(tensors, { ...options, causal, outDtype: "f32" })).out, reference);
    for (const { of, over, most } of gains.filter((gain) => gain.file === file)) {
      if (!runs(tensors.q, tensors.k, tensors.v, { ...of, causal })) continue;
      const name = `${JSON.stringify(of)} over ${JSON.stringify(over)}`;
      within(await error(of) / await error(over), most, name);
    }
  });
}

deviceTest(
  "sage-int8 loses what a sink leaves of its tile, but for an exact first token",
  async (device) => {
    const problem = randomProblem({ queries: 256, channels: 64 }, "f32", 12);
    for (let c = 0; c < 64; ++c) problem.k[c] = 0; // a sink: most of the weight on a key of no value
    for (let i = 0; i < 256; ++i) problem.q[i * 64] = 12;
    problem.k[0] = 8;
    problem.v.fill(0, 0, 64);
    const options = { kernel: "sage-int8", causal: true } as const;
    using tensors = uploadProblem(device, problem, "f32");
    if (!runs(tensors.q, tensors.k, tensors.v, options)) return;
    const reference = referenceAttention(problem, { causal: true }).out;
    const error = async (more: AttentionOptions) =>
      relativeL1((await run(tensors, { ...options, ...more })).out, reference);
    const plain = await error({});
    assertGreater(plain, 0.3);
    assertLess(await error({ firstToken: true }), 0.1 * plain);
    assertLess(await error({ band: true }), 0.1 * plain);
  },
);

// ---- bad numbers --------------------------------------------------------------------------------------

for (const kernel of ["sage1", "sage1-int8", "sage2", "sage2-int4", "sage-int8"] as const) {
  deviceTest(`bad numbers stay where they belong beyond the papers: ${kernel}`, async (device) => {
    const queries = 200, channels = 16, channel = 5;
    const clean = randomProblem({ queries, keys: 261, channels }, "f16", 31);
    for (let row = 0; row < queries; ++row) {
      clean.q[row * channels + channel] = row % 3 ? 1.5 : -1.5;
    }
    const kinds = (values: ArrayLike<number>) =>
      Array.from(values, (x) => Number.isFinite(x) ? "finite" : String(x));
    for (
      const options of [
        { ...all, kernel },
        { kernel, rotate: true, firstToken: true, causal: false },
        { kernel, rotate: true, causal: false },
      ]
    ) {
      for (const operand of ["q", "k", "v"] as const) {
        for (const bad of [NaN, Infinity, -Infinity]) {
          for (const token of [0, 70, 133, 199]) {
            const problem = { ...clean, [operand]: clean[operand].slice() };
            problem[operand][token * channels + channel] = bad;
            using tensors = uploadProblem(device, problem, "f16");
            if (!runs(tensors.q, tensors.k, tensors.v, options)) return;
            const { out, lse } = await run(tensors, options);
            const reference = referenceAttention(problem, options);
            const name = `${bad} in ${operand} at ${token}, ${JSON.stringify(options)}`;
            // An infinity in a query may give any score, so that its row is NaN; infinite values are what they are.
            const expected = operand === "q"
              ? Array.from(out, (_, at) => Math.floor(at / channels) === token ? "NaN" : "finite")
              : operand === "v"
              ? Array.from(
                reference.out,
                (value) => Number.isFinite(value) ? "finite" : String(bad),
              )
              : kinds(reference.out);
            assertEquals(kinds(out), expected, name);
            if (operand !== "q") {
              assertEquals(
                Array.from(lse, Number.isFinite),
                Array.from(reference.lse, Number.isFinite),
              );
            }
          }
        }
      }
    }
  });
}

deviceTest(
  "the first token alone is its value, and rows that see none are zeros",
  async (device) => {
    const problem = randomProblem({ queries: 70, keys: 64, channels: 64 }, "f32", 14);
    using tensors = uploadProblem(device, problem, "f32");
    const reference = referenceAttention(problem, { causal: true });
    for (const kernel of ["sage1", "sage2", "sage-int8"] as const) {
      const options = { kernel, causal: true, firstToken: true, smoothV: true };
      if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
      const { out, lse } = await run(tensors, options);
      assertEquals(out.subarray(0, 6 * 64), new Float32Array(6 * 64), kernel);
      assertEquals(lse.subarray(0, 6), new Float32Array(6).fill(-Infinity), kernel);
      out.subarray(6 * 64, 7 * 64).forEach((value, c) =>
        assertLess(Math.abs(value - problem.v[c]), 1e-5, kernel)
      );
      assertLess(Math.abs(lse[6] - reference.lse[6]), 1e-5, kernel);
    }
  },
);

// ---- explain ------------------------------------------------------------------------------------------

deviceTest("explain() says what is done beyond the papers", (device) => {
  const spec = { shape: [1, 2, 500, 40], dtype: "f16" } as const;
  const shown = (options: AttentionOptions) => {
    const { kMeanRows, rotate, band, firstToken } = explain(spec, spec, spec, {
      device,
      ...options,
    });
    return { kMeanRows, rotate, band, firstToken };
  };
  const off = { rotate: false, band: false, firstToken: false };
  assertEquals(shown({ kernel: "sage2" }), { ...off, kMeanRows: 500 });
  assertEquals(shown({ kernel: "sage2", smoothK: false }), { ...off, kMeanRows: undefined });
  assertEquals(shown({ kernel: "flash" }), { ...off, kMeanRows: undefined });
  const { causal: _, ...rest } = all;
  assertEquals(shown({ kernel: "sage-int8", ...all }), rest);
  const plan = explain(spec, spec, spec, { device, kernel: "sage-int8" });
  assertEquals([plan.kernel, plan.granularity, plan.smoothK], ["sage-int8", "thread", true]);
  assert(plan.reason.includes("sage-int8"));
  if (device.kind === "cpu") return;
  const portable: AttentionOptions[] = [
    { kernel: "sage2", firstToken: true },
    { kernel: "sage2-int4", kMeanRows: 64 },
    { kernel: "sage2", band: true, causal: true, smoothQ: true },
    { kernel: "sage1", band: true, causal: true },
    { kernel: "sage1", firstToken: true },
    { kernel: "sage1", kMeanRows: 128 },
  ];
  const hopper = explain(spec, spec, spec, { device, kernel: "sage2" }).architecture === "sm_90";
  for (const options of portable) {
    const { architecture, reason } = explain(spec, spec, spec, { device, ...options });
    const name = `${JSON.stringify(options)}: ${reason}`;
    assertEquals(architecture, "sm_80", name);
    assertEquals(reason.includes("; by the portable kernel, as "), hopper, name);
  }
  for (const options of [{ rotate: true }, { firstToken: true }, { kMeanRows: 64 }]) {
    assertEquals(explain(spec, spec, spec, { device, ...options }).kernel, "sage1");
  }
});
