// Rows of a record: every kernel on a case, measured in turn.
import type { AttentionPlan, Device } from "../mod.ts";
import {
  type Case,
  labels,
  planOf,
  portableVariants,
  Problem,
  type Variant,
  variantsOf,
} from "./cases.ts";
import { nameOf, type Row } from "./format.ts";
import { type Measurement, measureTogether, type RandomTensors, Timed } from "./measure.ts";
import { attentionRow, type Skips } from "./peers.ts";
import { preparationRow, preparations, preparedShape } from "./preparation.ts";

function rowsOf(
  one: Case,
  variant: Variant,
  { implementation, blockQ: queriesAtOnce, workspaceBytes }: AttentionPlan,
  { ms, noise, stages }: Measurement,
): Row[] {
  const common = { ...labels(variant), peer: false, implementation, queriesAtOnce };
  const medians = Object.entries(stages ?? {}).map(([name, { ms }]) => [name, ms]);
  const whole = attentionRow(one, {
    ...common,
    endToEnd: true,
    ms,
    noise,
    workspaceBytes,
    ...stages ? { stages: Object.fromEntries(medians) } : {},
  });
  const alone = stages?.attention;
  return alone ? [whole, attentionRow(one, { ...common, endToEnd: false, ...alone })] : [whole];
}

/** Every kernel that the device has, from floating-point tensors and alone. */
export async function attentionRows(
  random: RandomTensors,
  one: Case,
  budgetMs: number,
  skips: Skips,
  variants = variantsOf(one.shape),
): Promise<Row[]> {
  using problem = new Problem(random, one);
  const able = variants.flatMap((variant) => {
    const name = nameOf(labels(variant));
    const plan = planOf(random.device, one, variant, (reason) => skips.skip(`${name}: ${reason}`));
    return plan ? [{ variant, plan, timed: problem.timed(variant), stages: true }] : [];
  });
  const measured = await measureTogether(able, budgetMs);
  return able.flatMap(({ variant, plan }, i) => rowsOf(one, variant, plan, measured[i]));
}

/** The kernels of an older GPU, on a device that was opened as one. */
export async function portableRows(
  random: RandomTensors,
  one: Case,
  architecture: number,
  budgetMs: number,
  skips: Skips,
): Promise<Row[]> {
  const rows = await attentionRows(random, one, budgetMs, skips, [...portableVariants]);
  return rows.map((row) => ({ ...row, group: "portable", architecture }));
}

/** Every way to quantize and to smooth. */
export async function preparationRows(
  random: RandomTensors,
  headDim: number,
  budgetMs: number,
): Promise<Row[]> {
  const { device } = random;
  using x = random.make(preparedShape(device, headDim), dtypeOf(device));
  const all = preparations(x);
  const subjects = all.map(({ call }) => ({ timed: new Timed(device, [call]), stages: false }));
  const measured = await measureTogether(subjects, budgetMs);
  return all.map((preparation, i) => preparationRow(x, preparation, measured[i]));
}

/** What programs on that device have. */
export function dtypeOf(device: Device): "bf16" | "f32" {
  return device.kind === "cpu" ? "f32" : "bf16";
}
