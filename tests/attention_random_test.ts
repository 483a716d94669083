// Random shapes and options: every device against the CPU.
import { assertGreater } from "@std/assert";
import {
  type AttentionOptions,
  Device,
  flashAttention,
  kernels,
  type LseOption,
  relativeL1,
} from "../mod.ts";
import {
  check,
  dtypes,
  granularities,
  nameOf,
  run,
  within,
  worstBounds,
  worstDifference,
} from "./attention.ts";
import {
  deviceNames,
  deviceTest,
  download,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { uniform } from "./reference.ts";

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

for (const name of deviceNames.filter((name) => name !== "cpu")) {
  Deno.test(`attention() on ${name} agrees with the CPU on random shapes and options`, async () => {
    using device = Device.open(name);
    using cpu = Device.open("cpu");
    const next = uniform(51);
    const upTo = (limit: number) => 1 + Math.floor(next() * limit);
    const start = Date.now();
    let done = 0;
    for (; done < 150 && Date.now() - start < 12_000; ++done) {
      const kvHeads = upTo(3);
      const lengths = {
        batch: upTo(2),
        kvHeads,
        heads: kvHeads * upTo(3),
        queries: upTo(260),
        keys: upTo(260),
        channels: upTo(256),
        width: upTo(256),
      };
      const kernel = done % 2 ? "flash" : "sage1";
      const dtype = dtypes[Math.floor(next() * 3)];
      const options: AttentionOptions & LseOption = {
        kernel,
        causal: next() < 0.5,
        scale: next() < 0.3 ? 0.05 + next() / 10 : undefined,
        ...(kernel === "sage1" && {
          granularity: granularities[Math.floor(next() * 4)],
          smoothQ: next() < 0.5,
          smoothK: next() < 0.5,
          smoothV: next() < 0.5,
        }),
      };
      const layout = next() < 0.5 ? "HND" : "NHD";
      const problem = randomProblem(lengths, dtype, 1000 + done);
      using there = uploadProblem(device, problem, dtype, layout);
      using here = uploadProblem(cpu, problem, dtype, layout);
      if (!runs(there.q, there.k, there.v, options)) continue;
      const actual = await run(there, options), expected = await run(here, options);
      const what = `${dtype} ${layout} ${nameOf(lengths)} ${JSON.stringify(options)}`;
      within(relativeL1(actual.out, expected.out), 1.3 * worstBounds.flash[dtype].all + 2e-3, what);
      within(worstDifference(actual.lse, expected.lse), 5e-3, `lse of ${what}`);
    }
    assertGreater(done, 20, "too slow to say anything");
  });
}
