// Every kernel against the float64 definition: shapes, masks, layouts, types, bad numbers.
import { assert, assertAlmostEquals, assertEquals, assertGreater, assertLess } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  attentionQuantized,
  Device,
  explain,
  flashAttention,
  type FloatDType,
  fromFloat32,
  type Kernel,
  type Layout,
  quantize,
  relativeL1,
  rmse,
  smooth,
  toFloat32,
} from "../mod.ts";
import {
  deviceTest,
  download,
  kernels,
  type Lengths,
  poisoned,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { count, type Dims, type Problem, referenceAttention, uniform } from "./reference.ts";

type Values = Problem & { q: Float32Array; k: Float32Array; v: Float32Array };

/** The largest relative L1 distance and lse difference seen on N(0, 1), and 30 % more. */
const bounds: Record<Exclude<Kernel, "auto">, { l1: number; lse: number }> = {
  "flash": { l1: 0.0005, lse: 0.0005 },
  "sage1": { l1: 0.016, lse: 0.0148 },
  "sage1-int8": { l1: 0.028, lse: 0.0148 },
  "sage2": { l1: 0.05, lse: 0.0148 },
  "sage2-int4": { l1: 0.275, lse: 0.11 },
  "sage2++": { l1: 0.053, lse: 0.0148 },
};

/** Rounding of the output, which the kernels share. */
const rounding: Record<FloatDType, number> = { f32: 0, f16: 0.0004, bf16: 0.003 };

const seen: Record<string, { l1: number; lse: number }> = {};

/** Root mean square difference of log-sum-exps; rows that see nothing must have -Infinity. */
function lseDifference(actual: ArrayLike<number>, expected: Float64Array): number {
  const rows = expected.map((value, i) => {
    if (value === -Infinity) assertEquals(actual[i], -Infinity);
    return value === -Infinity ? 0 : actual[i] - value;
  });
  return rmse(rows, new Float64Array(rows.length));
}

/** Runs attention into poisoned memory and compares output and lse with the reference. */
async function check(
  device: Device,
  problem: Values,
  dtype: FloatDType,
  options: AttentionOptions,
  layout: Layout = "HND",
  expected = referenceAttention(problem, options),
): Promise<void> {
  using inputs = uploadProblem(device, problem, dtype, layout);
  const { q, k, v } = inputs;
  if (!runs(q, k, v, options)) return;
  const { kernel } = explain(q, k, v, options);
  const [batch, heads, tokens] = problem.qDims;
  using out = poisoned(device, [batch, heads, tokens, problem.vDims[3]], dtype, layout);
  using result = attention(q, k, v, { ...options, out, returnLse: true });
  const actual = await download(result.out), lse = await download(result.lse);
  const l1 = relativeL1(actual, expected.out);
  const difference = lseDifference(lse, expected.lse);
  const most = seen[kernel] ??= { l1: 0, lse: 0 };
  most.l1 = Math.max(most.l1, l1 - rounding[dtype]);
  most.lse = Math.max(most.lse, difference);
  const what = `${kernel} ${dtype} ${layout} ${JSON.stringify(problem.qDims)} ${
    JSON.stringify(problem.kDims)
  }`;
  assertLess(l1, bounds[kernel].l1 + rounding[dtype], `relative L1 of ${what}`);
  assertLess(difference, bounds[kernel].lse, `lse of ${what}`);
}
addEventListener("unload", () => Deno.env.get("SAGE_SHOW") && console.log(seen));

// ---- shapes -------------------------------------------------------------------------------------------

/** Odd lengths, head counts, types and layouts; each kernel runs all of them, with and without a mask. */
const shapes: (Lengths & { dtype: FloatDType; layout: Layout })[] = [
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
  for (const [seed, { dtype, layout, ...lengths }] of shapes.entries()) {
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

deviceTest("attention() takes every granularity and smoothing", async (device) => {
  const problem = randomProblem({ queries: 150, heads: 2, kvHeads: 1, channels: 64 }, "f16", 50);
  problem.k.forEach((_, i) => problem.k[i] += 4 * Math.cos(i % 64));
  for (const name of ["q", "k", "v"] as const) {
    problem[name].set(toFloat32(fromFloat32(problem[name], "f16"), "f16"));
  }
  const expected = referenceAttention(problem, { causal: true });
  for (const kernel of kernels.slice(1)) {
    for (const granularity of ["token", "block", "warp", "thread"] as const) {
      await check(device, problem, "f16", { kernel, granularity, causal: true }, "HND", expected);
    }
    for (const smoothQ of [false, true]) {
      for (const smoothV of [false, true]) {
        const options = { kernel, smoothQ, smoothV, causal: true };
        if (kernel === "sage2-int4" && !smoothQ) continue; // is as bad as the paper says
        await check(device, problem, "f16", options, "HND", expected);
      }
    }
  }
});

deviceTest("attention() takes every accumulator and range", async (device) => {
  const problem = randomProblem({ queries: 150, channels: 64 }, "f16", 51);
  const expected = referenceAttention(problem);
  for (const pvAccumulator of ["f32", "f16"] as const) {
    await check(device, problem, "f16", { kernel: "sage1", pvAccumulator }, "HND", expected);
  }
  for (const pvRange of [448, 224, 112] as const) {
    await check(device, problem, "f16", { kernel: "sage2++", pvRange }, "HND", expected);
  }
});

deviceTest("attention() takes any scale and output type", async (device) => {
  const problem = randomProblem({ queries: 90, channels: 48 }, "bf16", 52);
  for (const kernel of kernels) {
    await check(device, problem, "bf16", { kernel, scale: 0.05 });
    using inputs = uploadProblem(device, problem, "bf16");
    const { q, k, v } = inputs;
    if (!runs(q, k, v, { kernel })) continue;
    using wide = attention(q, k, v, { kernel, outDtype: "f32" });
    for (const outDtype of ["f16", "bf16"] as const) {
      using out = attention(q, k, v, { kernel, outDtype });
      assertEquals(out.dtype, outDtype);
      assertEquals(await out.data(), fromFloat32(await wide.data(), outDtype));
    }
  }
});

deviceTest("attention() reads and writes views of any strides", async (device) => {
  const dims: Dims = [2, 6, 80, 32];
  const all = randomProblem({ batch: 2, heads: 6, queries: 80, channels: 32 }, "f16", 53);
  for (const layout of ["HND", "NHD"] as const) {
    using inputs = uploadProblem(device, all, "f16", layout);
    using whole = poisoned(device, dims, "f16", layout);
    const ranges = { batch: [1, 2], heads: [2, 4], tokens: [3, 70] } as const;
    using q = inputs.q.view(ranges);
    using k = inputs.k.view({ ...ranges, heads: [5, 6] });
    using v = inputs.v.view({ ...ranges, heads: [0, 1] });
    using out = whole.view(ranges);
    const problem = {
      q: await download(q),
      k: await download(k),
      v: await download(v),
      qDims: [1, 2, 67, 32],
      kDims: [1, 1, 67, 32],
      vDims: [1, 1, 67, 32],
    } as const;
    for (const kernel of kernels) {
      if (!runs(q, k, v, { kernel })) continue;
      attention(q, k, v, { kernel, causal: true, out });
      const expected = referenceAttention(problem, { causal: true });
      const bound = bounds[kernel].l1 + rounding.f16;
      assertLess(relativeL1(await download(out), expected.out), bound, `${kernel} ${layout}`);
      const poison = (await download(whole)).filter(Number.isNaN).length;
      assertEquals(poison, count(dims) - count(out.shape), "wrote outside the view");
    }
  }
});

deviceTest("flashAttention() is attention() with kernel flash", async (device) => {
  const problem = randomProblem({ queries: 100, channels: 64 }, "f16", 54);
  using inputs = uploadProblem(device, problem, "f16");
  const { q, k, v } = inputs;
  using a = flashAttention(q, k, v, { causal: true });
  using b = attention(q, k, v, { kernel: "flash", causal: true });
  assertEquals(await a.data(), await b.data());
});

deviceTest("attention() twice gives the same bytes", async (device) => {
  const problem = randomProblem({ queries: 333, heads: 8, channels: 64 }, "f16", 55);
  using inputs = uploadProblem(device, problem, "f16");
  const { q, k, v } = inputs;
  for (const kernel of kernels) {
    if (!runs(q, k, v, { kernel })) continue;
    using a = attention(q, k, v, { kernel });
    using b = attention(q, k, v, { kernel });
    assertEquals(await a.data(), await b.data());
  }
});

// ---- structure: what no rounding hides ----------------------------------------------------------------

deviceTest("attention() sees every visible key once", async (device) => {
  // Q = 0 weighs all visible keys alike; channel c of V counts those with j % width = c.
  const width = 32, queries = 257;
  for (const keys of [1, 31, 64, 65, 128, 129, 200, 257, 300]) {
    for (const causal of [false, true]) {
      const problem: Values = {
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
        const options = { kernel, causal };
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
  const problem: Values = { q, k, v, qDims, kDims, vDims: kDims };
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

deviceTest("explain() says what attention() does", (device) => {
  const spec = { shape: [1, 8, 500, 64], dtype: "f16" } as const;
  const auto = explain(spec, spec, spec, { device });
  assert(auto.reason.length > 10);
  assertGreater(auto.blockQ, 0);
  const flash = explain(spec, spec, spec, { device, kernel: "flash" });
  assertEquals([flash.kernel, flash.granularity, flash.smoothK], ["flash", undefined, false]);
  const sage1 = explain(spec, spec, spec, { device, kernel: "sage1", pvAccumulator: "f16" });
  assertEquals([sage1.kernel, sage1.granularity, sage1.smoothK, sage1.pvAccumulator], [
    "sage1",
    "block",
    true,
    "f16",
  ]);
  if (device.kind === "cpu") {
    const sage2 = explain(spec, spec, spec, { device, kernel: "sage2++" });
    assertEquals([sage2.granularity, sage2.pvRange, sage2.architecture], ["thread", 112, ""]);
    assertEquals(explain(spec, spec, spec, { device, kernel: "sage2-int4" }).smoothQ, true);
  }
});

// ---- quantized operands -------------------------------------------------------------------------------

deviceTest("attentionQuantized() agrees with the definition", async (device) => {
  const lengths = { queries: 190, keys: 140, heads: 4, kvHeads: 2, channels: 72, width: 40 };
  const problem = randomProblem(lengths, "f16", 60);
  using inputs = uploadProblem(device, problem, "f16");
  const { q, k, v } = inputs;
  for (const causal of [false, true]) {
    const expected = referenceAttention(problem, { causal });
    for (const kernel of kernels.slice(1) as Exclude<Kernel, "auto" | "flash">[]) {
      if (!runs(q, k, v, { kernel })) continue;
      for (const granularity of ["token", "block", "warp", "thread"] as const) {
        const dtype = kernel === "sage2-int4" ? "i4" : "i8", smoothQ = kernel === "sage2-int4";
        using qCodes = quantize(q, { operand: "query", dtype, granularity, smooth: smoothQ });
        using kCodes = quantize(k, { operand: "key", dtype, granularity, smooth: true });
        using values = kernel === "sage1" ? smooth(v) : quantize(v, {
          operand: "value",
          dtype: kernel === "sage1-int8" ? "i8" : "e4m3",
          range: kernel === "sage2++" ? 9 : undefined,
          smooth: granularity === "warp",
        });
        using result = attentionQuantized(qCodes, kCodes, values, {
          kernel,
          causal,
          returnLse: true,
        });
        assertEquals(result.out.dtype, "f16");
        const out = await download(result.out), lse = await download(result.lse);
        const what = `${kernel} per ${granularity}`;
        assertLess(relativeL1(out, expected.out), bounds[kernel].l1 + rounding.f16, what);
        assertLess(lseDifference(lse, expected.lse), bounds[kernel].lse, `lse of ${what}`);
      }
    }
  }
});

// ---- bad numbers --------------------------------------------------------------------------------------

const badNumbers: { where: "q" | "k" | "v"; value: number }[] = [
  { where: "q", value: NaN },
  { where: "q", value: Infinity },
  { where: "q", value: -Infinity },
  { where: "k", value: NaN },
  { where: "k", value: Infinity },
  { where: "k", value: -Infinity },
  { where: "v", value: NaN },
  { where: "v", value: Infinity },
  { where: "v", value: -Infinity },
];

for (const { where, value } of badNumbers) {
  for (const causal of [false, true]) {
    deviceTest(
      `attention() keeps ${value} in ${where} to itself${causal ? ", causal" : ""}`,
      async (device) => {
        for (const dtype of ["f16", "bf16"] as const) {
          for (const bad of [0, 77, 149]) {
            const problem = randomProblem(
              { batch: 2, heads: 2, kvHeads: 2, queries: 150, channels: 32 },
              dtype,
              70,
            );
            const clean = referenceAttention(problem, { causal });
            const channel = 5, head = 1; // of the first batch entry
            problem[where][(head * 150 + bad) * 32 + channel] = value;
            using inputs = uploadProblem(device, problem, dtype);
            const { q, k, v } = inputs;
            for (const kernel of kernels) {
              if (!runs(q, k, v, { kernel, causal })) continue;
              using out = attention(q, k, v, { kernel, causal });
              const actual = await download(out);
              const what = `${kernel} ${dtype}, row ${bad}`;
              actual.forEach((number, i) => {
                const c = i % 32, n = (i >> 5) % 150, h = Math.floor(i / 32 / 150);
                const sees = h === head &&
                  (where === "q" ? n === bad : !causal || n >= bad) &&
                  (where !== "v" || c === channel);
                if (!sees) {
                  assert(
                    Number.isFinite(number),
                    `${what}: ${number} at head ${h}, row ${n}, channel ${c}`,
                  );
                } else if (where === "q") {
                  assert(Number.isNaN(number), `${what}: ${number} in row ${n}`);
                } else if (where === "v") {
                  assertEquals(number, value, `${what}: row ${n}, channel ${c}`);
                }
              });
              const untouched = (_: number, i: number) =>
                Math.floor(i / 32 / 150) !== head ||
                (where === "q" ? (i >> 5) % 150 !== bad : causal && (i >> 5) % 150 < bad);
              assertLess(
                relativeL1(actual.filter(untouched), clean.out.filter(untouched)),
                bounds[kernel].l1 + rounding[dtype],
                what,
              );
              if (where === "k") {
                // As exact attention: NaN and +Infinity make NaN, a score of -Infinity leaves the key out.
                const exact = referenceAttention(problem, { causal }).out;
                actual.forEach((number, i) => {
                  const notNumber = Number.isNaN(exact[i]);
                  if (kernel === "flash" || notNumber) {
                    assertEquals(Number.isNaN(number), notNumber, `${what}: element ${i}`);
                  }
                });
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

deviceTest("attention() bears zeros, constants and the largest values", async (device) => {
  const lengths = { queries: 129, channels: 64, heads: 2 };
  const cases: [string, FloatDType, (problem: Values) => void][] = [
    ["all zeros", "f16", ({ q, k, v }) => [q, k, v].forEach((x) => x.fill(0))],
    ["zero queries", "bf16", ({ q }) => q.fill(0)],
    ["zero values", "f16", ({ v }) => v.fill(0)],
    ["constant keys", "f16", ({ k }) => k.fill(3)],
    ["a zero channel of values", "f16", ({ v }) => v.forEach((_, i) => i % 64 || (v[i] = 0))],
    ["values up to 65504", "f16", ({ v }) => v.forEach((_, i) => v[i] = i % 3 ? 65504 : 60000)],
    ["values up to 3e38", "bf16", ({ v }) => v.forEach((_, i) => v[i] = i % 3 ? 3e38 : 2e38)],
    ["tiny values", "f16", ({ v }) => v.forEach((_, i) => v[i] *= 2 ** -14)],
    ["tiny bf16 values", "bf16", ({ v }) => v.forEach((_, i) => v[i] *= 1e-30)],
    [
      "large queries and keys",
      "f16",
      ({ q, k }) => [q, k].forEach((x) => x.forEach((_, i) => x[i] *= 3)),
    ],
  ];
  for (const [name, dtype, change] of cases) {
    const problem = randomProblem(lengths, dtype, 90);
    change(problem);
    for (const part of ["q", "k", "v"] as const) {
      problem[part].set(toFloat32(fromFloat32(problem[part], dtype), dtype));
    }
    using inputs = uploadProblem(device, problem, dtype);
    const { q, k, v } = inputs;
    const expected = referenceAttention(problem).out;
    for (const kernel of kernels) {
      if (!runs(q, k, v, { kernel })) continue;
      using out = attention(q, k, v, { kernel, outDtype: dtype === "bf16" ? "bf16" : "f32" });
      const actual = await download(out);
      assert(actual.every(Number.isFinite), `${kernel}: ${name}`);
      const bound = name.startsWith("large") ? 4 * bounds[kernel].l1 : bounds[kernel].l1;
      assertLess(relativeL1(actual, expected), bound + rounding[dtype], `${kernel}: ${name}`);
    }
  }
});

// ---- random shapes ------------------------------------------------------------------------------------

deviceTest(
  "attention() agrees with the CPU in single precision for random shapes",
  async (device) => {
    using cpu = Device.open("cpu");
    const seed = Number(Deno.env.get("SAGE_SEED") ?? 20261121);
    const milliseconds = Number(Deno.env.get("SAGE_FUZZ_MS") ?? 8000), start = performance.now();
    const next = uniform(seed);
    const upTo = (most: number) => 1 + Math.floor(next() * most);
    const pick = <T>(choices: readonly T[]) => choices[upTo(choices.length) - 1];
    for (let round = 0; round < 250 && performance.now() - start < milliseconds; ++round) {
      const kvHeads = upTo(2), dtype = pick(["f16", "bf16", "f32"] as const);
      const lengths = {
        batch: upTo(2),
        heads: kvHeads * upTo(3),
        kvHeads,
        queries: upTo(pick([10, 500])),
        keys: upTo(pick([10, 500])),
        channels: upTo(256),
        width: upTo(256),
      };
      const options = { kernel: pick(kernels), causal: pick([false, true]) };
      const layout = pick(["HND", "NHD"] as const);
      const problem = randomProblem(lengths, dtype, seed + round);
      try {
        using exact = uploadProblem(cpu, problem, "f32");
        const { q, k, v } = exact;
        using truth = flashAttention(q, k, v, { causal: options.causal, returnLse: true });
        const out = Float64Array.from(await download(truth.out));
        const lse = Float64Array.from(await download(truth.lse));
        await check(device, problem, dtype, options, layout, { out, lse });
      } catch (error) {
        const what = JSON.stringify({ seed, round, dtype, layout, ...lengths, ...options });
        throw new Error(`Random shape ${what}`, { cause: error });
      }
    }
  },
);
