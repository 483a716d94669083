// Attention: every kernel against flash, from floating-point tensors and alone, beside others' kernels.
import {
  benchCases,
  type Case,
  labels,
  planOf,
  Problem,
  type Variant,
  variantsOf,
} from "./cases.ts";
import { nameOf, speedOf } from "./format.ts";
import { RandomTensors, type Samples, sampleTogether } from "./measure.ts";
import { attentionRow, Peers, Skips } from "./peers.ts";
import { deviceBench, type Entry, lazily, openDevice, quick, rounds, say } from "./span.ts";

const device = openDevice(), random = new RandomTensors(device), skips = new Skips(say);
const peers = await Peers.start(device, quick ? 50 : 150, say, Deno.args.includes("--peers"));

function groupOf({ shape, dtype }: Case): string {
  const { headDim, causal, batch, heads, kvHeads, tokens, queries = tokens } = shape;
  const mask = queries === 1 ? "decode" : causal ? "causal" : "full";
  const shared = kvHeads === heads ? "" : ` on ${kvHeads}`;
  return `attention D=${headDim} ${mask}, batch ${batch}, ${heads} heads${shared}, ${tokens} tokens, ${dtype}`;
}

/** All kernels in turn; the tensors are there as long as that takes. */
async function sampleGroup(one: Case, able: readonly Variant[]): Promise<Samples[]> {
  using problem = new Problem(random, one);
  const subjects = able.map((variant) => ({ timed: problem.timed(variant), stages: true }));
  return await sampleTogether(subjects, rounds);
}

for (const one of benchCases(device, quick)) {
  const group = groupOf(one);
  const speed = (ms: number) =>
    speedOf(attentionRow(one, { kernel: "", endToEnd: true, peer: false, ms }));
  const add = (entry: Pick<Entry, "name" | "baseline" | "samples">) =>
    deviceBench({ group, speed, ...entry });

  const name = (variant: Variant) => nameOf(labels(variant));
  const able = variantsOf(one.shape).filter((variant) =>
    planOf(device, one, variant, (reason) => skips.skip(`${name(variant)}: ${reason}`))
  );
  const measured = lazily(() => sampleGroup(one, able));
  for (const [i, variant] of able.entries()) {
    add({
      name: name(variant),
      baseline: variant.kernel === "flash",
      samples: async () => (await measured())[i].total,
    });
    if (variant.kernel === "flash") continue;
    add({
      name: `${name(variant)}, kernel alone`,
      async samples() {
        const { total, stages } = (await measured())[i];
        return stages?.attention ?? total;
      },
    });
  }
  const others = lazily(() => peers!.samples(one, device));
  for (const { kernel, endToEnd } of await peers?.able(one, device) ?? []) {
    add({
      name: endToEnd ? kernel : `${kernel}, kernel alone`,
      samples: async () => (await others()).find((row) => row.kernel === kernel)!.samples,
    });
  }
}
