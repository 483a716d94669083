// How long one small call takes, from launch to result, when nothing else is under way.
import { attention, UnsupportedError } from "../mod.ts";
import { labels, variantsOf } from "./cases.ts";
import type { LatencyRow } from "./format.ts";
import { type RandomTensors, summarize } from "./measure.ts";
import { dtypeOf } from "./rows.ts";

const calls = 300;

/** Every kernel, and the one that is chosen, at one sequence of 32 heads and 128 tokens. */
export async function latencyRows(random: RandomTensors): Promise<LatencyRow[]> {
  const { device } = random, dtype = dtypeOf(device), shape = [1, 32, 128, 128];
  using x = random.make(shape, dtype);
  using out = device.empty(shape, { dtype });
  const rows: LatencyRow[] = [];
  for (const variant of [{ kernel: "auto" } as const, ...variantsOf({ causal: false })]) {
    try {
      const samples: number[] = [];
      for (let i = 0; i < calls; ++i) {
        const began = performance.now();
        attention(x, x, x, { ...variant, out });
        await device.synchronize();
        samples.push(performance.now() - began);
      }
      const { ms, noise } = summarize(samples);
      rows.push({ ...labels(variant), heads: 32, tokens: 128, headDim: 128, ms, noise });
    } catch (error) {
      if (!(error instanceof UnsupportedError)) throw error;
    }
  }
  return rows;
}
