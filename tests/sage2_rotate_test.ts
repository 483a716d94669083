// Kernels sage2, sage2-int4 and sage2++ with `rotate`: on Hopper tensor cores rotate queries and keys as they are
// packed, and products stay what they are.
import { assert, assertEquals, assertLess } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  attentionVarlen,
  type Device,
  explain,
  type FloatDType,
  relativeL1,
} from "../mod.ts";
import { biased, bits, check, dtypes, type FloatProblem, nameOf, within } from "./attention.ts";
import { download, type Lengths, poisoned, randomProblem, uploadProblem } from "./devices.ts";
import { shownBy } from "./masks.ts";
import { rotationSign } from "./recipes.ts";
import { type Dims, referenceAttention } from "./reference.ts";
import {
  boundsOf,
  compare,
  exponentials,
  kernelTest,
  optionsOf,
  run,
  solve,
  variants,
} from "./sage2.ts";

const rotate = true;

/** Whether the device has Hopper's own kernel for what is not rotated. */
function isHopper(device: Device): boolean {
  const spec = { shape: [1, 1, 64, 64], dtype: "f16" } as const;
  return explain(spec, spec, spec, { kernel: "sage2", device }).architecture === "sm_90";
}

// ---- what runs ----------------------------------------------------------------------------------------

kernelTest("runs by the same code rotated and not", (device) => {
  const shown = (dtype: FloatDType, channels: number, options: AttentionOptions) => {
    const spec = { shape: [1, 2, 300, channels], dtype } as const;
    const plan = explain(spec, spec, spec, { device, ...options });
    const { architecture, implementation, exponential, reason } = plan;
    const workspaceBytes: number | undefined = plan.workspaceBytes;
    return { architecture, implementation, exponential, reason, workspaceBytes };
  };
  for (const channels of [24, 64, 80, 128, 256]) {
    for (const dtype of dtypes) {
      for (
        const options of [
          { kernel: "sage2" },
          { kernel: "sage2", smoothQ: true, exponential: "exact" },
          { kernel: "sage2", causal: true, window: 50, smoothK: false },
          { kernel: "sage2-int4", exponential: "exact" },
          { kernel: "sage2++" },
        ] as const
      ) {
        if (!isHopper(device) && device.kind === "cuda") continue; // rotated INT4 codes are bytes there
        const plain = shown(dtype, channels, options);
        const rotated = shown(dtype, channels, { ...options, rotate });
        if (isHopper(device)) assertEquals(plain.architecture, "sm_90");
        else rotated.workspaceBytes = plain.workspaceBytes; // of rows as wide as rotation makes them
        assertEquals(rotated, plain);
      }
    }
  }
  return Promise.resolve();
});

// ---- shapes -------------------------------------------------------------------------------------------

// Around tiles of 128, 192 and 256 keys and blocks of 128 queries, more keys than a cluster of blocks holds, channels
// that fill what is rotated and that do not, and shared heads.
const shapes: Lengths[] = [
  { queries: 1, keys: 2, channels: 64 },
  { queries: 64, keys: 64, channels: 1, width: 64 },
  { queries: 129, keys: 193, channels: 64, batch: 2, heads: 4, kvHeads: 1 },
  { queries: 257, keys: 385, channels: 24, width: 17 },
  { queries: 300, keys: 1300, channels: 64, heads: 2 },
  { queries: 127, keys: 383, channels: 48, width: 128 },
  { queries: 200, keys: 255, channels: 80, heads: 4, kvHeads: 2 },
  { queries: 130, keys: 129, channels: 128, width: 64 },
  { queries: 190, keys: 577, channels: 128, heads: 6, kvHeads: 2 },
  { queries: 333, keys: 333, channels: 104, batch: 2 },
  { queries: 256, keys: 256, channels: 256, heads: 2, kvHeads: 1 },
  { queries: 129, keys: 600, channels: 129, width: 256 },
  { queries: 17, keys: 321, channels: 250, width: 1 },
];

for (const variant of variants) {
  kernelTest(`agrees with float64 rotated, ${variant}`, async (device) => {
    for (const [seed, lengths] of shapes.entries()) {
      const dtype = dtypes[(seed + variant.length) % 3];
      const problem = randomProblem(lengths, dtype, seed + 160);
      using tensors = uploadProblem(device, problem, dtype);
      for (const causal of [false, true]) {
        for (const more of [{}, { smoothK: false }, { smoothQ: true }] as AttentionOptions[]) {
          if (more.smoothQ && (variant === "sage2++" || lengths.channels > 128)) continue;
          const options = { rotate, causal, ...optionsOf(variant), ...more };
          const what = `${dtype} ${nameOf(lengths)} ${JSON.stringify(options)}`;
          const actual = await run(tensors, options);
          assert(actual.out.every(Number.isFinite), `${what}: not finite`);
          const reference = referenceAttention(problem, { causal });
          compare(actual, reference, problem.vDims[3], boundsOf(device, variant), what);
        }
      }
    }
  });
}

kernelTest("is as exact rotated as not where nothing stands out", async (device) => {
  for (const channels of [64, 80, 128, 256]) {
    for (const dtype of dtypes) {
      const problem = randomProblem({ heads: 2, queries: 300, keys: 700, channels }, dtype, 5);
      const expected = referenceAttention(problem, {}).out;
      for (const kernel of ["sage2", "sage2-int4", "sage2++"] as const) {
        const error = async (options: AttentionOptions) =>
          relativeL1((await solve(device, problem, dtype, { kernel, ...options })).out, expected);
        const ratio = await error({ rotate }) / await error({});
        within(ratio, 1.06, `error of rotated over that of not, ${kernel} ${dtype} D${channels}`);
      }
      await check(device, problem, dtype, { kernel: "sage2-int4", rotate });
    }
  }
});

// ---- what rotation is for -------------------------------------------------------------------------------

/** Keys with one channel 50 times the rest, and queries that make up for it. */
function outlying(lengths: Lengths, dtype: FloatDType, channel: number): FloatProblem {
  const problem = randomProblem(lengths, dtype, 17);
  for (let at = channel; at < problem.k.length; at += lengths.channels) problem.k[at] *= 50;
  for (let at = channel; at < problem.q.length; at += lengths.channels) problem.q[at] /= 50;
  return problem;
}

kernelTest("spreads what stands out in a channel", async (device) => {
  for (const channels of [64, 80, 128, 256]) {
    for (const dtype of dtypes) {
      const problem = outlying({ heads: 2, queries: 200, keys: 640, channels }, dtype, 13);
      using tensors = uploadProblem(device, problem, dtype);
      const rounded: FloatProblem = {
        ...problem,
        q: await download(tensors.q),
        k: await download(tensors.k),
      };
      const expected = referenceAttention(rounded, {}).out;
      for (const variant of variants) {
        const error = async (options: AttentionOptions) =>
          relativeL1((await run(tensors, { ...optionsOf(variant), ...options })).out, expected);
        const plain = await error({}), rotated = await error({ rotate });
        const what = `${variant} ${dtype} D${channels}: ${plain} to ${rotated}`;
        assertLess(rotated, 0.3 * plain, what);
      }
    }
  }
});

// Means that keys share, and blocks of queries; what is subtracted is rotated too.
kernelTest("smooths rotated rows", async (device) => {
  for (const channels of [64, 80, 128, 256]) {
    for (const keys of [500, 1500]) {
      const dtype = dtypes[(channels / 16 + keys / 500) % 3];
      const problem = randomProblem(
        { heads: 2, kvHeads: 1, queries: 300, keys, channels },
        dtype,
        7,
      );
      problem.k = biased(problem.k, channels, 8, 3);
      problem.q = biased(problem.q, channels, 2, 4);
      using tensors = uploadProblem(device, problem, dtype);
      const rounded: FloatProblem = {
        ...problem,
        q: await download(tensors.q),
        k: await download(tensors.k),
      };
      for (const causal of [false, true]) {
        const expected = referenceAttention(rounded, { causal }).out;
        for (const exponential of exponentials) {
          const error = async (options: AttentionOptions) => {
            const all = { exponential, causal, ...options };
            return relativeL1((await run(tensors, all)).out, expected);
          };
          const what = `${dtype} D${channels}, ${keys} keys, ${exponential}`;
          within(await error({ rotate }), 0.075, what);
          if (channels <= 128) within(await error({ rotate, smoothQ: true }), 0.06, `${what}, Q`);
        }
      }
    }
  }
});

// ---- with what else there is ----------------------------------------------------------------------------

kernelTest("masks rotated rows, in windows, tensors and packs of sequences", async (device) => {
  for (const channels of [64, 80, 128, 256]) {
    const lengths = { batch: 2, heads: 4, kvHeads: 2, queries: 270, keys: 390, channels };
    const problem = randomProblem(lengths, "bf16", channels);
    using tensors = uploadProblem(device, problem, "bf16");
    const { q, k, v } = tensors;
    const sees = (i: number, j: number, b: number, h: number) => (i * 7 + j * 3 + b + h) % 5 > 1;
    const dims: Dims = [2, 4, 270, 390], shown = shownBy(dims, sees);
    const hidden = { values: Float32Array.from(shown), dims, bool: true };
    using mask = device.tensor(shown, dims, { dtype: "bool" });
    for (const exponential of exponentials) {
      for (const options of [{ window: [100, 30] }, { causal: true, window: 64 }] as const) {
        const actual = await run(tensors, { ...options, exponential, rotate });
        const what = `D${channels} ${exponential} ${JSON.stringify(options)}`;
        const reference = referenceAttention(problem, options);
        compare(actual, reference, channels, boundsOf(device, exponential), what);
      }
      const actual = await run(tensors, { mask, exponential, rotate });
      const reference = referenceAttention(problem, {}, { mask: hidden });
      const bound = boundsOf(device, exponential);
      compare(actual, reference, channels, bound, `D${channels} ${exponential}, mask`);
    }
    const options = { kernel: "sage2", rotate, causal: true } as const;
    const cuSeqlensQ = [0, 100, 270], cuSeqlensK = [0, 260, 390];
    using qOne = q.view({ batch: [0, 1] });
    using kOne = k.view({ batch: [0, 1] });
    using vOne = v.view({ batch: [0, 1] });
    using packed = attentionVarlen(qOne, kOne, vOne, { ...options, cuSeqlensQ, cuSeqlensK });
    for (const s of [0, 1]) {
      using rows = qOne.view({ tokens: [cuSeqlensQ[s], cuSeqlensQ[s + 1]] });
      using keys = kOne.view({ tokens: [cuSeqlensK[s], cuSeqlensK[s + 1]] });
      using values = vOne.view({ tokens: [cuSeqlensK[s], cuSeqlensK[s + 1]] });
      using part = packed.view({ tokens: [cuSeqlensQ[s], cuSeqlensQ[s + 1]] });
      using alone = attention(rows, keys, values, options);
      assertEquals(bits(await download(part)), bits(await download(alone)), `D${channels}, ${s}`);
    }
  }
});

kernelTest("has its band beside rotated rows", async (device) => {
  for (const channels of [64, 80, 128]) {
    for (const dtype of ["f16", "bf16"] as const) {
      const problem = outlying({ heads: 2, queries: 700, channels }, dtype, 5);
      using tensors = uploadProblem(device, problem, dtype);
      const rounded: FloatProblem = {
        ...problem,
        q: await download(tensors.q),
        k: await download(tensors.k),
      };
      const expected = referenceAttention(rounded, { causal: true });
      const options = { kernel: "sage2", causal: true, band: true } as const;
      const error = async (more: AttentionOptions) =>
        relativeL1((await run(tensors, { ...options, ...more })).out, expected.out);
      if (isHopper(device)) {
        const { architecture } = explain(tensors.q, tensors.k, tensors.v, { ...options, rotate });
        assertEquals(architecture, "sm_90");
      }
      assertLess(await error({ rotate }), 0.7 * await error({}), `${dtype} D${channels}`);
    }
  }
});

// ---- rows and numbers -----------------------------------------------------------------------------------

kernelTest("reads rotated rows that end in zeros, and that lie apart, alike", async (device) => {
  for (const [channels, to] of [[61, 64], [92, 96], [127, 128], [200, 256]]) {
    for (const dtype of dtypes) {
      const problem = randomProblem(
        { batch: 2, heads: 2, kvHeads: 1, queries: 217, keys: 333, channels, width: 64 },
        dtype,
        channels,
      );
      const wide = (values: Float32Array) =>
        Float32Array.from(
          { length: values.length / channels * to },
          (_, at) => at % to < channels ? values[Math.floor(at / to) * channels + at % to] : 0,
        );
      const dims = ([batch, heads, tokens]: Dims): Dims => [batch, heads, tokens, to];
      const padded = {
        ...problem,
        ...{ q: wide(problem.q), k: wide(problem.k) },
        ...{ qDims: dims(problem.qDims), kDims: dims(problem.kDims) },
      };
      for (const variant of variants) {
        const options = { ...optionsOf(variant), rotate, scale: 0.1 };
        const short = await solve(device, problem, dtype, options);
        const long = await solve(device, padded, dtype, options);
        assertEquals(bits(long.out), bits(short.out), `${variant} ${dtype} D${channels}`);
        using apart = uploadProblem(device, problem, dtype, "NHD");
        assertEquals(bits((await run(apart, options)).out), bits(short.out), `NHD ${dtype}`);
      }
    }
  }
});

kernelTest("keeps what is not finite in its rotated row", async (device) => {
  const heads = 4, queries = 150, keys = 290;
  for (const channels of [64, 80, 128, 256]) {
    for (const dtype of dtypes) {
      const clean = randomProblem(
        { batch: 2, heads, kvHeads: 2, queries, keys, channels },
        dtype,
        3,
      );
      for (const causal of [false, true]) {
        const options: AttentionOptions = { causal, rotate, smoothQ: channels === 64 };
        if (channels === 64) options.exponential = "exact";
        const before = await solve(device, clean, dtype, options);
        for (
          const [operand, bad] of [["q", NaN], ["q", Infinity], ["k", NaN], ["v", NaN]] as const
        ) {
          const kvHead = 1, token = 140, of = operand === "q" ? heads : 2;
          const tokens = operand === "q" ? queries : keys;
          const problem = { ...clean, [operand]: clean[operand].slice() };
          problem[operand][((of + kvHead) * tokens + token) * channels + 9] = bad;
          const after = await solve(device, problem, dtype, options);
          const what = `${bad} in ${operand}, ${dtype} D${channels}${causal ? " causal" : ""}`;
          after.out.forEach((value, at) => {
            const row = Math.floor(at / channels),
              i = row % queries,
              plane = Math.floor(row / queries);
            const head = plane % heads, own = plane >= heads;
            const shares = operand === "q" ? head === kvHead : head >> 1 === kvHead;
            const hit = own && shares &&
              (operand === "q" ? i === token : (!causal || token <= i + keys - queries) &&
                (operand === "k" || at % channels === 9));
            if (Number.isNaN(value) !== hit) throw new Error(`${what}: ${value} at ${at}`);
            if (!(own && shares) && value !== before.out[at]) {
              throw new Error(`${what}: changed at ${at}`);
            }
          });
          if (operand === "v") continue;
          // The others of the head are as near to attention as they were.
          const finite = (values: ArrayLike<number>) =>
            Float32Array.from(Array.from(after.out, (x, at) => Number.isNaN(x) ? 0 : values[at]));
          const reference = finite(referenceAttention(clean, { causal }).out);
          within(relativeL1(finite(after.out), reference), 0.054, what);
        }
      }
    }
  }
});

kernelTest("bears rotated rows of the largest numbers", async (device) => {
  if (!isHopper(device)) return; // others mark what overflows
  const largest = 3.4028234663852886e38;
  for (const channels of [64, 128, 256]) {
    const keys = 300, problem = randomProblem({ queries: 40, keys, channels }, "f32", 9);
    const fill = (row: number, sign: number) => {
      for (let c = 0; c < channels; ++c) {
        problem.k[row * channels + c] = sign * rotationSign(c) * largest;
      }
    };
    fill(7, 1), fill(120, 1), fill(260, -1); // the mean is not 0, and what it is subtracted from overflows
    problem.q.forEach((_, at) => problem.q[at] = 0.001 * rotationSign(at % channels));
    const { out } = await solve(device, problem, "f32", { rotate });
    const row = (j: number) => problem.v.subarray(j * channels, (j + 1) * channels);
    const expected = row(7).map((value, c) => (value + row(120)[c]) / 2);
    for (let i = 0; i < 40; ++i) {
      within(
        relativeL1(out.subarray(i * channels, (i + 1) * channels), expected),
        0.06,
        `row ${i}, D${channels}`,
      );
    }
  }
});

kernelTest("writes the same to poisoned memory, rotated, time after time", async (device) => {
  const problem = randomProblem({ heads: 8, kvHeads: 2, queries: 700, channels: 128 }, "bf16", 2);
  using tensors = uploadProblem(device, problem, "bf16");
  const first = await run(tensors, { rotate });
  for (let i = 0; i < 5; ++i) {
    using garbage = poisoned(device, [1, 8, 4096, 128], "f16"); // what a workspace may hold
    garbage.dispose();
    assertEquals(bits((await run(tensors, { rotate })).out), bits(first.out));
  }
});
