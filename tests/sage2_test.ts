// Kernels sage2, with both exponentials, and sage2++ in depth: where their tiles end, where their sums are long, where
// their numbers are extreme, and whether they give the same bits twice.
import { assert, assertEquals, assertGreater, assertThrows } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  attentionQuantized,
  cosine,
  Device,
  explain,
  type FloatDType,
  fromFloat32,
  NoDeviceError,
  quantize,
  relativeL1,
  type Tensor,
  toFloat32,
  UnsupportedError,
} from "../mod.ts";
import {
  biased,
  bits,
  dtypes,
  type FloatProblem,
  nameOf,
  type Tensors,
  type Values,
  within,
  worstDifference,
  worstRow,
} from "./attention.ts";
import { download, type Lengths, poisoned, randomProblem, uploadProblem } from "./devices.ts";
import { count, type Dims, normal, referenceAttention, uniform } from "./reference.ts";

type Exponential = "exact" | "fast";
type Variant = Exponential | "sage2++";

const exponentials: readonly Exponential[] = ["exact", "fast"];
const variants: readonly Variant[] = [...exponentials, "sage2++"];

/** The options that ask for it. */
function optionsOf(variant: Variant): AttentionOptions {
  return variant === "sage2++" ? { kernel: variant } : { kernel: "sage2", exponential: variant };
}

/** Whether a device is there and has kernel sage2. */
function hasKernel(name: "cpu" | "cuda:0"): boolean {
  try {
    using device = Device.open(name);
    const spec = { shape: [1, 1, 64, 64], dtype: "f16" } as const;
    return explain(spec, spec, spec, { kernel: "sage2", device }).kernel === "sage2";
  } catch (error) {
    if (error instanceof NoDeviceError || error instanceof UnsupportedError) return false;
    throw error;
  }
}

const deviceNames = ["cpu", "cuda:0"] as const;
const present = new Set(deviceNames.filter(hasKernel));

/** One test for the CPU and one for CUDA, skipped where there is no such device or kernel. */
function kernelTest(name: string, body: (device: Device) => Promise<void>): void {
  for (const deviceName of deviceNames) {
    Deno.test({
      name: `sage2 ${name} on ${deviceName}`,
      ignore: !present.has(deviceName),
      fn: async () => {
        using device = Device.open(deviceName);
        const { allocations } = device.memory();
        await body(device);
        await device.synchronize();
        assertEquals(device.memory().allocations, allocations, "memory was left behind");
      },
    });
  }
}

// Recorded over random shapes, and a third more. `all` and `row` are relative L1, `lse` is a difference.
const bounds: Record<Variant, { all: number; row: number; lse: number }> = {
  exact: { all: 0.049, row: 0.11, lse: 0.031 },
  fast: { all: 0.054, row: 0.11, lse: 0.04 },
  "sage2++": { all: 0.049, row: 0.11, lse: 0.031 },
};

/**
 * The log-sum-exp of fast exponentials is that of P as it was coded. On CUDA a maximum is kept until a score exceeds it
 * by 4 (base 2), so the largest P of a row is not exact either, which shows with few keys.
 */
function boundsOf(device: Device, variant: Variant): typeof bounds.exact {
  const bound = bounds[variant];
  const room = device.kind === "cuda" && variant === "fast" ? 1.5 : 1;
  return { ...bound, lse: room * bound.lse };
}

/** Compares with float64: all of it, every row, and the angle; few numbers by their largest difference. */
function compare(
  actual: { out: Values; lse: Values },
  reference: { out: Float64Array; lse: Float64Array },
  width: number,
  bound: { all: number; row: number; lse: number },
  what: string,
): void {
  within(worstDifference(actual.lse, reference.lse), bound.lse, `lse of ${what}`);
  if (reference.out.length < 64) {
    return within(worstDifference(actual.out, reference.out), bound.row, `difference of ${what}`);
  }
  within(relativeL1(actual.out, reference.out), bound.all, `relative L1 of ${what}`);
  within(1 - cosine(actual.out, reference.out), bound.all ** 2, `1 - cosine of ${what}`);
  if (width >= 16) within(worstRow(actual.out, reference.out, width), bound.row, `row of ${what}`);
}

/** Runs the kernel on poisoned memory and returns what it wrote. */
async function run(
  { q, k, v }: Tensors,
  options: AttentionOptions,
): Promise<{ out: Values; lse: Values }> {
  const at = (dimension: "heads" | "tokens", { shape, layout }: Tensor) =>
    shape[(dimension === "heads") === (layout === "HND") ? 1 : 2];
  const dims: Dims = [q.shape[0], at("heads", q), at("tokens", q), v.shape[3]];
  using out = poisoned(q.device, dims, q.dtype);
  using result = attention(q, k, v, { kernel: "sage2", ...options, out, returnLse: true });
  return { out: await download(result.out), lse: await download(result.lse) };
}

/** The same for a problem; lse included. */
async function solve(
  device: Device,
  problem: FloatProblem,
  dtype: FloatDType,
  options: AttentionOptions,
): Promise<{ out: Values; lse: Values }> {
  using tensors = uploadProblem(device, problem, dtype);
  return await run(tensors, options);
}

// ---- options ------------------------------------------------------------------------------------------

Deno.test("explain() shows the exponential, and only sage2 takes the fast one", () => {
  using device = Device.open("cpu");
  const spec = { shape: [1, 2, 64, 64], dtype: "f16" } as const;
  const shown = (options: AttentionOptions) =>
    explain(spec, spec, spec, { ...options, device }).exponential;
  assertEquals(shown({ kernel: "sage2" }), "exact");
  for (const exponential of exponentials) {
    assertEquals(shown({ kernel: "sage2", exponential }), exponential);
  }
  for (const kernel of ["auto", "flash", "sage1", "sage1-int8", "sage2-int4", "sage2++"] as const) {
    assertEquals(shown({ kernel, exponential: "exact" }), "exact");
    assertThrows(
      () => shown({ kernel, exponential: "fast" }),
      TypeError,
      `kernel with exponential "fast" must be "sage2": current value is "${kernel}"`,
    );
  }
  for (const wrong of ["", "Fast", 1, null, true]) {
    assertThrows(
      () => shown({ kernel: "sage2", exponential: wrong as "fast" }),
      Error,
      `exponential must be one of "exact", "fast"`,
    );
  }
});

Deno.test("attentionQuantized() takes the exponential", async () => {
  using device = Device.open("cpu");
  const problem = randomProblem({ queries: 150, keys: 200, channels: 64 }, "f16", 3);
  using tensors = uploadProblem(device, problem, "f16");
  using q = quantize(tensors.q, { operand: "query" });
  using k = quantize(tensors.k, { operand: "key", smooth: true });
  using v = quantize(tensors.v, { operand: "value" });
  for (const exponential of exponentials) {
    using parts = attentionQuantized(q, k, v, { exponential, outDtype: "f16" });
    const whole = await solve(device, problem, "f16", { exponential });
    assertEquals(bits(await download(parts)), bits(whole.out));
  }
  assertThrows(
    () => attentionQuantized(q, k, v, { kernel: "sage2++", exponential: "fast" }),
    TypeError,
    "must be",
  );
});

kernelTest("is nearly as exact with the fast exponential, and not the same", async (device) => {
  for (const channels of [64, 128, 256]) {
    for (const causal of [false, true]) {
      const problem = randomProblem({ heads: 2, queries: 512, channels }, "f16", channels);
      const reference = referenceAttention(problem, { causal }).out;
      const [exact, fast] = await Promise.all(
        exponentials.map((exponential) => solve(device, problem, "f16", { causal, exponential })),
      );
      const what = `D${channels}${causal ? " causal" : ""}`;
      const ratio = relativeL1(fast.out, reference) / relativeL1(exact.out, reference);
      within(ratio, 1.12, `error of fast over that of exact, ${what}`);
      assertGreater(ratio, 1, `${what}: the fast exponential is not in use`);
    }
  }
});

// ---- shapes -------------------------------------------------------------------------------------------

// Around tiles of 64, 128 and 192 keys, blocks of 64 and 128 queries, and padded channels.
const shapes: Lengths[] = [
  { queries: 1, channels: 1 },
  { queries: 1, keys: 2, channels: 64 },
  { queries: 1, keys: 700, channels: 128, heads: 8, kvHeads: 2 },
  { queries: 1, keys: 193, channels: 256, batch: 3 },
  { queries: 3, keys: 1000, channels: 64, heads: 2 },
  { queries: 64, keys: 64, channels: 64 },
  { queries: 65, keys: 127, channels: 64, width: 63 },
  { queries: 128, keys: 192, channels: 64, heads: 3 },
  { queries: 129, keys: 193, channels: 64, batch: 2, heads: 4, kvHeads: 1 },
  { queries: 127, keys: 383, channels: 48, width: 64 },
  { queries: 257, keys: 385, channels: 33, width: 17 },
  { queries: 128, keys: 128, channels: 128 },
  { queries: 130, keys: 129, channels: 128, width: 64 },
  { queries: 200, keys: 255, channels: 65, width: 128 },
  { queries: 190, keys: 577, channels: 128, heads: 6, kvHeads: 2 },
  { queries: 256, keys: 256, channels: 256 },
  { queries: 129, keys: 257, channels: 129, width: 256, heads: 2, kvHeads: 1 },
  { queries: 100, keys: 321, channels: 250, width: 1 },
  { queries: 300, keys: 100, channels: 64, heads: 2 },
  { queries: 400, keys: 130, channels: 128, width: 96 },
  { queries: 260, keys: 3, channels: 200 },
];

for (const variant of variants) {
  kernelTest(`agrees with float64 where tiles end, ${variant}`, async (device) => {
    for (const [seed, lengths] of shapes.entries()) {
      const dtype = dtypes[seed % 3], problem = randomProblem(lengths, dtype, seed + 60);
      using tensors = uploadProblem(device, problem, dtype);
      for (const causal of [false, true]) {
        const what = `${dtype} ${nameOf(lengths)}${causal ? " causal" : ""}`;
        const reference = referenceAttention(problem, { causal });
        const actual = await run(tensors, { causal, ...optionsOf(variant) });
        assert(actual.out.every(Number.isFinite), `${what}: not finite`);
        compare(actual, reference, problem.vDims[3], boundsOf(device, variant), what);
        const [, , queries, width] = [...problem.qDims.slice(0, 3), problem.vDims[3]];
        const blind = causal ? Math.max(0, queries - problem.kDims[2]) : 0;
        assertEquals(bits(actual.out.slice(0, blind * width)), new Uint32Array(blind * width));
        assertEquals(actual.lse.slice(0, blind), new Float32Array(blind).fill(-Infinity));
      }
    }
  });
}

kernelTest("agrees with float64 on random shapes", async (device) => {
  const next = uniform(71), upTo = (limit: number) => 1 + Math.floor(next() * limit);
  const start = Date.now();
  let done = 0;
  for (; done < 60 && Date.now() - start < 8_000; ++done) {
    const kvHeads = upTo(2);
    const lengths = {
      batch: upTo(2),
      kvHeads,
      heads: kvHeads * upTo(3),
      queries: upTo(300),
      keys: upTo(450),
      channels: upTo(256),
      width: upTo(256),
    };
    const dtype = dtypes[done % 3], variant = variants[Math.floor(next() * 3)];
    const options = { causal: next() < 0.5, ...optionsOf(variant), smoothK: next() < 0.8 };
    const problem = randomProblem(lengths, dtype, 2000 + done);
    const what = `${dtype} ${nameOf(lengths)} ${JSON.stringify(options)}`;
    const actual = await solve(device, problem, dtype, options);
    const reference = referenceAttention(problem, options);
    compare(actual, reference, lengths.width, boundsOf(device, variant), what);
  }
  assertGreater(done, 5, "too slow to say anything");
});

kernelTest("reads strided tensors, and writes to views alone", async (device) => {
  const lengths = { batch: 2, heads: 6, kvHeads: 2, queries: 150, keys: 210, channels: 71 };
  const problem = randomProblem({ ...lengths, width: 41 }, "f16", 5);
  using dense = uploadProblem(device, problem, "f16");
  using nhd = uploadProblem(device, problem, "f16", "NHD");
  for (const variant of variants) {
    const options = { causal: true, ...optionsOf(variant) };
    const first = await run(dense, options);
    const moved = await run(nhd, options);
    assertEquals(bits(moved.out), bits(first.out));
    assertEquals(bits(moved.lse), bits(first.lse));

    using wide = poisoned(device, [2, 8, 160, 41], "f16", "NHD");
    using window = wide.view({ heads: [1, 7], tokens: [3, 153] });
    attention(nhd.q, dense.k, nhd.v, { ...options, out: window });
    assertEquals(bits(await download(window)), bits(first.out));
    const all = await download(wide);
    assertEquals(all.filter(Number.isNaN).length, all.length - first.out.length);

    // Heads and tokens in the middle; rows of an odd length.
    const views = [nhd, dense].map(({ q, k, v }) => ({
      q: q.view({ batch: [1, 2], heads: [3, 6], tokens: [7, 140] }),
      k: k.view({ batch: [1, 2], heads: [1, 2], tokens: [2, 199] }),
      v: v.view({ batch: [1, 2], heads: [1, 2], tokens: [2, 199] }),
    }));
    const copied: FloatProblem = {
      q: await download(views[0].q),
      k: await download(views[0].k),
      v: await download(views[0].v),
      qDims: [1, 3, 133, 71],
      kDims: [1, 1, 197, 71],
      vDims: [1, 1, 197, 41],
    };
    const expected = await solve(device, copied, "f16", options);
    for (const view of views) {
      const actual = await run(view, options);
      assertEquals(bits(actual.out), bits(expected.out));
      assertEquals(bits(actual.lse), bits(expected.lse));
      for (const tensor of Object.values(view)) tensor.dispose();
    }
  }
});

kernelTest("writes every output type from the same sums, and takes scales", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 140, keys: 260, channels: 128 }, "bf16", 8);
  using tensors = uploadProblem(device, problem, "bf16");
  const { q, k, v } = tensors;
  for (const variant of variants) {
    const options = optionsOf(variant);
    using single = attention(q, k, v, { ...options, outDtype: "f32" });
    const precise = await download(single);
    for (const outDtype of ["f16", "bf16"] as const) {
      using rounded = attention(q, k, v, { ...options, outDtype });
      assertEquals(
        bits(await download(rounded)),
        bits(toFloat32(fromFloat32(precise, outDtype), outDtype)),
      );
    }
    for (const scale of [0.01, 0.3]) {
      const actual = await run(tensors, { ...options, scale });
      const bound = { ...bounds[variant], row: 0.12, lse: 0.095 }; // softmax is sharper
      compare(actual, referenceAttention(problem, { scale }), 128, bound, `scale ${scale}`);
    }
  }
});

// ---- smoothed queries -----------------------------------------------------------------------------------

// What smoothing takes from a score grows with the mean of Q: small beside the scores, many times their size, and more
// than integers about 2^23 have room for; tiny scores are those of nearly uniform rows.
kernelTest("smooths queries of any mean", async (device) => {
  for (const channels of [64, 128]) {
    for (const mean of [0, 30, 1000]) {
      for (const factor of [1, 0.001]) {
        const lengths = { queries: 140, keys: 530, channels };
        const problem = randomProblem(lengths, "f32", mean + channels);
        problem.q = biased(problem.q, channels, mean, 1);
        const scale = factor / channels ** 0.5;
        using tensors = uploadProblem(device, problem, "f32");
        for (const causal of [false, true]) {
          const reference = referenceAttention(problem, { causal, scale });
          for (const exponential of exponentials) {
            const options = { kernel: "sage2", smoothQ: true, causal, scale, exponential } as const;
            using out = attention(tensors.q, tensors.k, tensors.v, options);
            within(
              relativeL1(await download(out), reference.out),
              0.054,
              `mean ${mean}, scale ${factor}, D${channels}, ${exponential}${
                causal ? ", causal" : ""
              }`,
            );
          }
        }
      }
    }
  }
});

// ---- long sums ----------------------------------------------------------------------------------------

// V + 1: what P's errors do to the mean cancels where the sum of P is that of its codes; what the sums lose does not.
kernelTest("keeps the mean of V over long contexts", async (device) => {
  const longest = device.kind === "cpu" ? 8192 + 77 : 32768 + 77;
  for (const channels of [64, 128, 256]) {
    for (const keys of [2048, channels === 128 ? longest : 8192]) {
      for (const causal of [false, true]) {
        const problem = randomProblem({ queries: 70, keys, channels }, "f16", channels);
        const rounded = fromFloat32(problem.v.map((value) => value + 1), "f16");
        problem.v = toFloat32(rounded, "f16");
        const reference = referenceAttention(problem, { causal });
        for (const variant of variants) {
          const actual = await solve(device, problem, "f16", { causal, ...optionsOf(variant) });
          const what = `${variant}, D${channels}, ${keys} keys${causal ? ", causal" : ""}`;
          within(relativeL1(actual.out, reference.out), 0.003, `V + 1, ${what}`);
          within(worstDifference(actual.lse, reference.lse), 0.006, `lse, ${what}`);
        }
      }
    }
  }
});

// Weights and values at the upper end of their codes, side by side: sums that FP16 does not hold.
kernelTest("adds up more than 65504", async (device) => {
  const keys = 25600 + 300, queries = 70, large = [9000, 9640];
  for (const channels of device.kind === "cpu" ? [64] : [64, 128, 256]) {
    const dims: Dims = [1, 1, keys, channels];
    const problem: FloatProblem = {
      q: new Float32Array(queries * channels).fill(1),
      // The last keys come first, and all others have twice their weight.
      k: Float32Array.from(
        { length: count(dims) },
        (_, i) => i < 25600 * channels ? 0.68 / Math.sqrt(channels) : 0,
      ),
      v: Float32Array.from({ length: count(dims) }, (_, i) => {
        const token = Math.floor(i / channels);
        return token >= large[0] && token < large[1] ? 1 : 0;
      }),
      qDims: [1, 1, queries, channels],
      kDims: dims,
      vDims: dims,
    };
    const reference = referenceAttention(problem, {});
    for (const variant of variants) {
      const actual = await solve(device, problem, "f32", { ...optionsOf(variant), smoothK: false });
      within(relativeL1(actual.out, reference.out), 0.02, `${variant}, D${channels}`);
    }
  }
});

kernelTest("follows a maximum that grows with the keys, either way", async (device) => {
  for (const channels of [64, 128, 256]) {
    const keys = 900, problem = randomProblem({ queries: 140, keys, channels }, "f16", 4);
    for (const [way, size] of [["up", 1], ["down", -1]] as const) {
      // Scores from about -30 to 30, in steps that are whole factors of P from tile to tile.
      const ramp = (key: number) => size * 60 * (key / (keys - 1) - 0.5);
      const q = problem.q.slice(), k = problem.k.slice();
      for (let i = 0; i < q.length; i += channels) q[i] = Math.sqrt(channels);
      for (let i = 0; i < k.length; i += channels) k[i] = ramp(i / channels);
      const steep = { ...problem, q, k: toFloat32(fromFloat32(k, "f16"), "f16") };
      steep.q = toFloat32(fromFloat32(q, "f16"), "f16");
      for (const causal of [false, true]) {
        const reference = referenceAttention(steep, { causal });
        for (const variant of variants) {
          const actual = await solve(device, steep, "f16", {
            causal,
            ...optionsOf(variant),
            smoothK: false,
          });
          const bound = { all: 0.125, row: 0.31, lse: 0.18 }; // scores far apart have large INT8 steps
          const what = `${variant}, ${way}, D${channels}${causal ? ", causal" : ""}`;
          compare(actual, reference, channels, bound, what);
        }
      }
    }
  }
});

kernelTest("gives the same bits again, with every multiprocessor at work", async (device) => {
  for (const channels of [64, 128, 256]) {
    const heads = device.kind === "cpu" ? 8 : 512 / (channels / 64);
    const [queries, keys] = [300, 333], noise = normal(9, 1 << 16);
    // Cheap to make: pieces of the same noise, another for every tensor.
    const values = (dims: Dims, step: number) =>
      Float32Array.from({ length: count(dims) }, (_, i) => noise[(i * step + (i >> 16)) & 0xffff]);
    const problem: FloatProblem = {
      q: values([1, heads, queries, channels], 1),
      k: values([1, heads / 2, keys, channels], 3),
      v: values([1, heads / 2, keys, channels], 5),
      qDims: [1, heads, queries, channels],
      kDims: [1, heads / 2, keys, channels],
      vDims: [1, heads / 2, keys, channels],
    };
    using tensors = uploadProblem(device, problem, "f16");
    for (const causal of [false, true]) {
      for (const variant of variants) {
        const first = await run(tensors, { causal, ...optionsOf(variant) });
        assert(first.out.every(Number.isFinite));
        for (let i = 0; i < 3; ++i) {
          const again = await run(tensors, { causal, ...optionsOf(variant) });
          assertEquals(worstDifference(again.out, first.out), 0, `run ${i}, D${channels}`);
          assertEquals(worstDifference(again.lse, first.lse), 0, `lse of run ${i}, D${channels}`);
        }
      }
    }
  }
});

// ---- bad and extreme numbers --------------------------------------------------------------------------

/** "finite", "nan", "inf" or "-inf" of each. */
function kinds(values: ArrayLike<number>): string[] {
  return Array.from(
    values,
    (value) => Number.isFinite(value) ? "finite" : String(value).toLowerCase().replace("inity", ""),
  );
}

kernelTest("keeps values that are not finite where they belong", async (device) => {
  for (const channels of device.kind === "cpu" ? [100] : [64, 100, 256]) {
    const lengths = { heads: 4, kvHeads: 2, queries: 150, keys: 333, channels, width: 48 };
    const clean = randomProblem(lengths, "f16", channels);
    const bad = channels >> 1;
    // Signs that no rounding changes, where an infinity in K meets them.
    for (let row = 0; row < 4 * 150; ++row) clean.q[row * channels + bad] = row % 3 ? 1.5 : -1.5;
    for (const causal of [false, true]) {
      const untouched = await Promise.all(
        variants.map((variant) => solve(device, clean, "f16", { causal, ...optionsOf(variant) })),
      );
      for (const operand of ["q", "k", "v"] as const) {
        const [last, width] = operand === "q"
          ? [149, channels]
          : [332, operand === "k" ? channels : 48];
        for (const value of [NaN, Infinity, -Infinity]) {
          for (const token of [0, 200 % (last + 1), last]) {
            const problem = { ...clean, [operand]: clean[operand].slice() };
            const head = 1;
            problem[operand][(head * (last + 1) + token) * width + (bad % width)] = value;
            const reference = referenceAttention(problem, { causal });
            const good = Array.from(reference.out.keys()).filter((i) =>
              Number.isFinite(reference.out[i])
            );
            for (const [index, variant] of variants.entries()) {
              const what = `${variant}, ${value} in ${operand} at ${token}, D${channels}` +
                (causal ? ", causal" : "");
              const { out, lse } = await solve(device, problem, "f16", {
                causal,
                ...optionsOf(variant),
              });
              assertEquals(kinds(out), kinds(reference.out), what);
              assertEquals(
                Array.from(lse, Number.isFinite),
                Array.from(reference.lse, Number.isFinite),
                `lse, ${what}`,
              );
              within(
                relativeL1(good.map((i) => out[i]), good.map((i) => reference.out[i])),
                bounds[variant].all,
                `beside ${what}`,
              );
              // Heads of other keys give the same bits.
              const [from, to] = operand === "q" ? [2, 4] : [0, 2], size = 150 * 48;
              assertEquals(
                bits(out.slice(from * size, to * size)),
                bits(untouched[index].out.slice(from * size, to * size)),
                `other heads, ${what}`,
              );
            }
          }
        }
      }
    }
  }
});

kernelTest("bears many values that are not finite at once", async (device) => {
  const problem = randomProblem(
    { batch: 2, heads: 4, kvHeads: 2, queries: 200, keys: 300, channels: 64 },
    "bf16",
    77,
  );
  for (let row = 0; row < problem.q.length / 64; ++row) problem.q[row * 64] = row % 2 ? 2 : -2;
  const next = uniform(78), some = [NaN, Infinity, -Infinity];
  const damage = (values: Float32Array, rows: number, channel: () => number) => {
    for (let i = 0; i < rows; ++i) {
      const row = Math.floor(next() * values.length / 64);
      values[row * 64 + channel()] = some[i % 3];
    }
  };
  damage(problem.q, 20, () => 1 + Math.floor(next() * 63));
  damage(problem.v, 3, () => Math.floor(next() * 64));
  for (const keyRow of [290, 600 + 297]) problem.k[keyRow * 64] = Infinity; // late: few causal rows see them
  for (const causal of [false, true]) {
    const reference = referenceAttention(problem, { causal });
    for (const variant of variants) {
      const { out } = await solve(device, problem, "bf16", { causal, ...optionsOf(variant) });
      assertEquals(kinds(out), kinds(reference.out), `${variant}${causal ? ", causal" : ""}`);
    }
  }
});

kernelTest("bears zeros, extremes and tiny and huge scales", async (device) => {
  const check = async (
    what: string,
    dtype: FloatDType,
    change: (problem: FloatProblem) => void,
    extrasOf: (channels: number) => AttentionOptions = () => ({}),
  ) => {
    for (const channels of device.kind === "cpu" ? [64] : [64, 128, 256]) {
      const options = extrasOf(channels);
      const problem = randomProblem({ heads: 2, queries: 140, keys: 210, channels }, dtype, 41);
      change(problem);
      for (const x of ["q", "k", "v"] as const) {
        problem[x] = toFloat32(fromFloat32(problem[x], dtype), dtype);
      }
      using tensors = uploadProblem(device, problem, dtype);
      for (const causal of [false, true]) {
        const reference = referenceAttention(problem, { ...options, causal });
        const most = reference.out.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        for (const variant of variants) {
          const name = `${what}, ${dtype}, ${variant}, D${channels}${causal ? ", causal" : ""}`;
          const actual = await run(tensors, { ...options, causal, ...optionsOf(variant) });
          assert(actual.out.every(Number.isFinite), `${name}: not finite`);
          if (most === 0) {
            assertEquals(actual.out.findIndex((value) => value !== 0), -1, name);
          } else {
            compare(actual, reference, channels, boundsOf(device, variant), name);
          }
        }
      }
    }
  };
  const scaled = (values: Float32Array, factor: number) => values.map((value) => value * factor);
  for (const dtype of dtypes) {
    await check("Q of zeros", dtype, ({ q }) => q.fill(0));
    await check("K of zeros", dtype, ({ k }) => k.fill(0));
    await check("V of zeros", dtype, ({ v }) => v.fill(0));
    await check("zeros", dtype, ({ q, k, v }) => [q, k, v].forEach((x) => x.fill(0)));
    await check("constants", dtype, ({ k, v }) => [k, v].forEach((x) => x.fill(2)));
  }
  for (const dtype of ["f32", "bf16"] as const) {
    const by = (factor: number) => (problem: FloatProblem) => {
      problem.q = scaled(problem.q, factor);
      problem.k = scaled(problem.k, factor);
    };
    await check("Q and K of 1e-20", dtype, by(1e-20));
    await check("Q and K of 1e-30", dtype, by(1e-30));
    await check(
      "Q and K of 1e-15",
      dtype,
      by(1e-15),
      (channels) => ({ scale: 1e30 / channels ** 0.5 }),
    );
    await check(
      "Q and K of 1e15",
      dtype,
      by(1e15),
      (channels) => ({ scale: 1e-30 / channels ** 0.5 }),
    );
    await check("V of 1e-25", dtype, (problem) => {
      problem.v = scaled(problem.v, 1e-25);
    });
    await check("V of 1e30", dtype, (problem) => {
      problem.v = scaled(problem.v, 1e30);
    });
  }
  const everySecond = (v: Float32Array, value: number) => {
    for (let i = 7; i < v.length; i += 32) v[i] = i % 64 < 32 ? value : value / 2;
  };
  await check("65504 in all of V", "f16", ({ v }) => v.fill(65504));
  await check("65504 in channels of V", "f16", ({ v }) => everySecond(v, 65504));
  await check("3e38 in all of V", "bf16", ({ v }) => v.fill(3e38));
  await check("3e38 in channels of V", "bf16", ({ v }) => everySecond(v, 3e38));
});

// ---- against the CPU device ---------------------------------------------------------------------------

Deno.test({
  name: "sage2 on cuda:0 is as near to exact attention as on the CPU",
  ignore: !present.has("cuda:0"),
  fn: async () => {
    using device = Device.open("cuda:0");
    using cpu = Device.open("cpu");
    const next = uniform(91), upTo = (limit: number) => 1 + Math.floor(next() * limit);
    const start = Date.now();
    let done = 0;
    for (; done < 200 && Date.now() - start < 12_000; ++done) {
      const kvHeads = upTo(3);
      const lengths = {
        batch: upTo(2),
        kvHeads,
        heads: kvHeads * upTo(3),
        queries: upTo(700),
        keys: upTo(1500),
        channels: upTo(256),
        width: upTo(256),
      };
      const dtype = dtypes[Math.floor(next() * 3)], layout = next() < 0.5 ? "HND" : "NHD";
      const options: AttentionOptions = {
        causal: next() < 0.5,
        ...optionsOf(variants[Math.floor(next() * 3)]),
        scale: next() < 0.3 ? 0.05 + next() / 10 : undefined,
      };
      const problem = randomProblem(lengths, dtype, 3000 + done);
      using there = uploadProblem(device, problem, dtype, layout);
      using here = uploadProblem(cpu, problem, dtype, layout);
      const exact = await run(here, { ...options, exponential: undefined, kernel: "flash" });
      const expected = await run(here, options), actual = await run(there, options);
      const what = `${dtype} ${layout} ${nameOf(lengths)} ${JSON.stringify(options)}`;
      const error = relativeL1(expected.out, exact.out);
      // With few keys it is the rounding of single values, which differs: 3 % of each.
      const luck = 0.004 + 0.03 / Math.sqrt(lengths.keys);
      within(relativeL1(actual.out, exact.out), 1.25 * error + luck, `relative L1 of ${what}`);
      const lseError = worstDifference(expected.lse, exact.lse);
      within(worstDifference(actual.lse, exact.lse), 1.5 * lseError + 0.02, `lse of ${what}`);
    }
    assertGreater(done, 20, "too slow to say anything");
  },
});
