// Quantized operands: attentionQuantized() agrees with the definition, and with attention() on the same numbers.
import { assertEquals, assertLess } from "@std/assert";
import {
  type AttentionOptions,
  attentionQuantized,
  fromFloat32,
  type Kernel,
  kernels,
  quantize,
  relativeL1,
  smooth,
  toFloat32,
} from "../mod.ts";
import {
  biased,
  exactly,
  granularities,
  hasOwnGroups,
  lseDifference,
  meanBounds,
  rounding,
  run,
  sageKernels,
  smoothings,
  type Tensors,
  type TestKernel,
  type Values,
  within,
  worstBounds,
  worstDifference,
  worstRow,
} from "./attention.ts";
import { deviceTest, download, randomProblem, runs, uploadProblem } from "./devices.ts";
import { referenceAttention } from "./reference.ts";

deviceTest("attentionQuantized() agrees with the definition", async (device) => {
  const lengths = { queries: 190, keys: 140, heads: 4, kvHeads: 2, channels: 72, width: 40 };
  const problem = randomProblem(lengths, "f16", 60);
  using inputs = uploadProblem(device, problem, "f16");
  const { q, k, v } = inputs;
  for (const causal of [false, true]) {
    const expected = referenceAttention(problem, { causal });
    for (const kernel of kernels.slice(1) as Exclude<Kernel, "auto" | "flash">[]) {
      if (!runs(q, k, v, { kernel })) continue;
      for (const granularity of granularities) {
        const dtype = kernel === "sage2-int4" ? "i4" : "i8", smoothQ = kernel === "sage2-int4";
        using qCodes = quantize(q, { operand: "query", dtype, granularity, smooth: smoothQ });
        using kCodes = quantize(k, { operand: "key", dtype, granularity, smooth: true });
        using values = kernel === "sage1" ? smooth(v) : quantize(v, {
          operand: "value",
          dtype: kernel.endsWith("int8") ? "i8" : "e4m3",
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
        assertLess(relativeL1(out, expected.out), meanBounds[kernel].l1 + rounding.f16, what);
        assertLess(lseDifference(lse, expected.lse), meanBounds[kernel].lse, `lse of ${what}`);
      }
    }
  }
});

/** Options that only one kernel has. */
function variants(kernel: TestKernel): AttentionOptions[] {
  return [
    ...granularities.map((granularity) => ({ kernel, granularity })),
    ...(kernel === "sage1" ? [{ kernel, pvAccumulator: "f16" as const }] : []),
    ...(kernel === "sage2++"
      ? ([448, 224, 112] as const).map((pvRange) => ({ kernel, pvRange }))
      : []),
  ];
}

/** attentionQuantized() on operands quantized as attention() with the same options would. */
async function runQuantized(
  { q, k, v }: Tensors,
  options: AttentionOptions & { kernel: TestKernel },
): Promise<{ out: Values; lse: Values }> {
  const { granularity, smoothQ, smoothK, smoothV, ...rest } = options, { kernel } = options;
  const rows = {
    dtype: kernel === "sage2-int4" ? "i4" : "i8",
    granularity: granularity ?? (kernel.startsWith("sage1") ? "block" : "thread"),
  } as const;
  using qCodes = quantize(q, { operand: "query", ...rows, smooth: smoothQ });
  using kCodes = quantize(k, { operand: "key", ...rows, smooth: smoothK });
  const value = { operand: "value", smooth: smoothV } as const;
  const range = kernel === "sage2++"
    ? { 448: 2.25, 224: 4.5, 112: 9 }[options.pvRange ?? 112]
    : undefined;
  using values = kernel !== "sage1"
    ? quantize(v, kernel.endsWith("int8") ? { ...value, dtype: "i8" } : { ...value, range })
    : smoothV
    ? smooth(v)
    : v.view({});
  using result = attentionQuantized(qCodes, kCodes, values, {
    ...rest as Parameters<typeof attentionQuantized>[3],
    returnLse: true,
  });
  return { out: await download(result.out), lse: await download(result.lse) };
}

for (const kernel of sageKernels) {
  deviceTest(`attention() and attentionQuantized() agree: ${kernel}`, async (device) => {
    const lengths = {
      batch: 2,
      heads: 4,
      kvHeads: 2,
      queries: 150,
      keys: 200,
      channels: 64,
      width: 40,
    };
    const problem = randomProblem(lengths, "f16", 21);
    problem.k = toFloat32(fromFloat32(biased(problem.k, 64, 2, 22), "f16"), "f16");
    using tensors = uploadProblem(device, problem, "f16");
    const exact = [false, true].map((causal) => referenceAttention(problem, { causal }));
    let turn = 0;
    for (const variant of variants(kernel)) {
      for (const smoothing of smoothings) {
        const causal = turn++ % 2 === 1;
        const options = { ...variant, ...smoothing, causal, kernel };
        if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
        const { out, lse } = await run(tensors, exactly(options));
        const whole = await runQuantized(tensors, options);
        const name = JSON.stringify(options), { smoothQ, smoothK } = smoothing;
        // ΔS, and what mean(K) adds to the log-sum-exp, come from codes there and from floats here.
        // sage-int8 divides by sums of codes, some of which that rounds to the other side.
        const int4 = kernel === "sage2-int4", eight = kernel === "sage-int8" ? 0.0042 : 0.0029;
        const outBound = smoothQ ? int4 ? 0.062 : 0.0122 : 1e-4;
        const lseBound = smoothK ? int4 ? 1.56 : 0.09 : smoothQ ? int4 ? 0.05 : eight : 1e-4;
        if (!hasOwnGroups(tensors, options)) {
          within(relativeL1(whole.out, out), outBound, `quantized operands, ${name}`);
          within(worstDifference(whole.lse, lse), lseBound, `lse of quantized operands, ${name}`);
        }
        if (!smoothK) continue;
        const reference = exact[causal ? 1 : 0];
        within(relativeL1(out, reference.out), 1.1 * worstBounds[kernel].f16.all, name);
        within(
          worstRow(out, reference.out, 40),
          1.25 * worstBounds[kernel].f16.row,
          `row, ${name}`,
        );
      }
    }
  });
}
