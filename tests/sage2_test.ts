// Kernels sage2, with both exponentials, and sage2++ in depth: their options, where their tiles end, smoothed
// queries, and what the CPU device makes of the same.
import { assert, assertEquals, assertGreater, assertThrows } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  attentionQuantized,
  Device,
  explain,
  fromFloat32,
  quantize,
  relativeL1,
  toFloat32,
} from "../mod.ts";
import {
  biased,
  bits,
  dtypes,
  type FloatProblem,
  nameOf,
  within,
  worstDifference,
} from "./attention.ts";
import { download, type Lengths, poisoned, randomProblem, uploadProblem } from "./devices.ts";
import { type Dims, referenceAttention, uniform } from "./reference.ts";
import {
  bounds,
  boundsOf,
  compare,
  exponentials,
  kernelTest,
  optionsOf,
  present,
  run,
  solve,
  variants,
} from "./sage2.ts";

// ---- queries ------------------------------------------------------------------------------------------

/** The same rows with zeros at their ends. */
function padded(values: Float32Array, channels: number, to: number): Float32Array {
  const rows = values.length / channels, out = new Float32Array(rows * to);
  for (let row = 0; row < rows; ++row) {
    out.set(values.subarray(row * channels, (row + 1) * channels), row * to);
  }
  return out;
}

// Rows that cannot be copied as they lie are gathered value by value.
kernelTest("makes the same of rows that end in zeros", async (device) => {
  for (const [channels, to] of [[36, 40], [61, 64], [92, 96], [127, 128]]) {
    const lengths = {
      batch: 2,
      heads: 4,
      kvHeads: 2,
      queries: 417,
      keys: 555,
      channels,
      width: 40,
    };
    for (const dtype of ["f16", "bf16"] as const) {
      const problem = randomProblem(lengths, dtype, channels);
      problem.q[5 * channels + 3] = NaN;
      problem.q[(417 + 140) * channels + 8] = Infinity;
      problem.q[(417 * 8 - 1) * channels] = -Infinity;
      problem.q.fill(0, 300 * channels, 317 * channels);
      problem.q[200 * channels + 1] = 60000;
      const dims = ([batch, heads, tokens]: Dims): Dims => [batch, heads, tokens, to];
      const wide: FloatProblem = {
        ...problem,
        q: padded(problem.q, channels, to),
        k: padded(problem.k, channels, to),
        qDims: dims(problem.qDims),
        kDims: dims(problem.kDims),
      };
      for (const variant of variants) {
        for (const causal of [false, true]) {
          const options = { ...optionsOf(variant), causal, scale: 0.1 };
          const short = await solve(device, problem, dtype, options);
          const long = await solve(device, wide, dtype, options);
          const what = `${variant} ${dtype} D${channels}`;
          assertEquals(bits(long.out), bits(short.out), what);
          assertEquals(bits(long.lse), bits(short.lse), `lse of ${what}`);
          assertEquals(long.out.filter(Number.isNaN).length, 3 * 40, `rows of NaN of ${what}`);
        }
      }
    }
  }
});

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
