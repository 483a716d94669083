// Kernels sage2, with both exponentials, and sage2++ in depth: where their sums are long, where their numbers are
// extreme, and whether they give the same bits twice.
import { assert, assertEquals } from "@std/assert";
import {
  type AttentionOptions,
  type FloatDType,
  fromFloat32,
  relativeL1,
  toFloat32,
} from "../mod.ts";
import { bits, dtypes, type FloatProblem, within, worstDifference } from "./attention.ts";
import { randomProblem, uploadProblem } from "./devices.ts";
import { count, type Dims, normal, referenceAttention, uniform } from "./reference.ts";
import { bounds, boundsOf, compare, kernelTest, optionsOf, run, solve, variants } from "./sage2.ts";

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
