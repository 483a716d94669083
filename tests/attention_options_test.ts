// Options of attention: granularities, accumulators, ranges, scales and output types, and what explain() says of them.
import { assert, assertEquals, assertGreater } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  explain,
  flashAttention,
  type FlashAttentionOptions,
  type FloatDType,
  fromFloat32,
  kernels,
  relativeL1,
  toFloat32,
} from "../mod.ts";
import {
  bits,
  check,
  exactly,
  granularities,
  run,
  sageKernels,
  within,
  worstBounds,
  worstDifference,
} from "./attention.ts";
import {
  deviceTest,
  download,
  type Lengths,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { referenceAttention } from "./reference.ts";

/** Lengths that no block divides, and heads that share keys and values. */
const oddLengths: Lengths = {
  batch: 2,
  heads: 4,
  kvHeads: 2,
  queries: 70,
  keys: 133,
  channels: 40,
  width: 24,
};

// ---- what only some kernels take ----------------------------------------------------------------------

deviceTest("attention() takes every granularity and smoothing", async (device) => {
  const problem = randomProblem({ queries: 150, heads: 2, kvHeads: 1, channels: 64 }, "f16", 50);
  problem.k.forEach((_, i) => problem.k[i] += 4 * Math.cos(i % 64));
  for (const name of ["q", "k", "v"] as const) {
    problem[name].set(toFloat32(fromFloat32(problem[name], "f16"), "f16"));
  }
  const expected = referenceAttention(problem, { causal: true });
  for (const kernel of sageKernels) {
    for (const granularity of granularities) {
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

// ---- scales and output types --------------------------------------------------------------------------

for (const kernel of kernels) {
  deviceTest(`attention() takes any scale: ${kernel}`, async (device) => {
    const square = randomProblem({ queries: 90, channels: 48 }, "bf16", 52);
    await check(device, square, "bf16", { kernel, scale: 0.05 });
    const problem = randomProblem(oddLengths, "f16", 5);
    using tensors = uploadProblem(device, problem, "f16");
    for (const scale of [0.02, 0.5]) {
      const options = exactly({ kernel, scale });
      if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
      const { out, lse } = await run(tensors, options);
      const reference = referenceAttention(problem, { scale });
      within(
        relativeL1(out, reference.out),
        1.7 * worstBounds[kernel].f16.all,
        `relative L1 of ${kernel} scaled by ${scale}`,
      );
      within(
        worstDifference(lse, reference.lse),
        3.9 * worstBounds[kernel].f16.lse,
        `lse of ${kernel} scaled by ${scale}`,
      );
    }
  });

  deviceTest(`attention() rounds its output once: ${kernel}`, async (device) => {
    const cases: [Lengths, FloatDType, number, AttentionOptions][] = [
      [{ queries: 90, channels: 48 }, "bf16", 52, { kernel }],
      [oddLengths, "f16", 5, { kernel, causal: true }],
    ];
    for (const [lengths, dtype, seed, options] of cases) {
      using tensors = uploadProblem(device, randomProblem(lengths, dtype, seed), dtype);
      const { q, k, v } = tensors;
      if (!runs(q, k, v, options)) continue;
      using single = attention(q, k, v, { ...options, outDtype: "f32" });
      assertEquals(single.dtype, "f32");
      const precise = await download(single);
      for (const outDtype of ["f16", "bf16"] as const) {
        using rounded = attention(q, k, v, { ...options, outDtype });
        assertEquals(rounded.dtype, outDtype);
        assertEquals(
          bits(await download(rounded)),
          bits(toFloat32(fromFloat32(precise, outDtype), outDtype)),
        );
      }
    }
  });
}

// ---- what must change nothing -------------------------------------------------------------------------

deviceTest("attention() gives the same bits again, and without log-sum-exp", async (device) => {
  const cases: [Lengths, number, AttentionOptions][] = [
    [{ queries: 333, heads: 8, channels: 64 }, 55, {}],
    [oddLengths, 5, { causal: true }],
  ];
  for (const [lengths, seed, others] of cases) {
    using tensors = uploadProblem(device, randomProblem(lengths, "f16", seed), "f16");
    const { q, k, v } = tensors;
    for (const kernel of kernels) {
      const options = exactly({ kernel, ...others });
      if (!runs(q, k, v, options)) continue;
      const first = await run(tensors, options), again = await run(tensors, options);
      assertEquals(bits(again.out), bits(first.out), kernel);
      assertEquals(bits(again.lse), bits(first.lse), kernel);
      using alone = attention(q, k, v, options);
      assertEquals(bits(await download(alone)), bits(first.out), kernel);
    }
  }
});

deviceTest("flashAttention() is attention() with kernel flash", async (device) => {
  const cases: [number, FloatDType, number, FlashAttentionOptions][] = [
    [100, "f16", 54, { causal: true }],
    [70, "bf16", 1, { causal: true, scale: 0.3 }],
  ];
  for (const [queries, dtype, seed, options] of cases) {
    using tensors = uploadProblem(
      device,
      randomProblem({ queries, channels: 64 }, dtype, seed),
      dtype,
    );
    const { q, k, v } = tensors;
    if (!runs(q, k, v, { kernel: "flash", ...options })) continue;
    using alone = flashAttention(q, k, v, options);
    using both = flashAttention(q, k, v, { ...options, returnLse: true });
    const other = await run(tensors, { kernel: "flash", ...options });
    assertEquals(bits(await download(alone)), bits(other.out));
    assertEquals(bits(await download(both.out)), bits(other.out));
    assertEquals(bits(await download(both.lse)), bits(other.lse));
  }
});

// ---- plans --------------------------------------------------------------------------------------------

deviceTest("attention() with kernel auto is the kernel that explain() names", async (device) => {
  using tensors = uploadProblem(device, randomProblem({ queries: 70, channels: 64 }, "f16"), "f16");
  const { kernel } = explain(tensors.q, tensors.k, tensors.v);
  const chosen = await run(tensors, {}), named = await run(tensors, { kernel });
  assertEquals(bits(chosen.out), bits(named.out));
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
