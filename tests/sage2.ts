// What the tests of sage2 and sage2++ share: their choices, bounds, and a run held against float64.
import { assertEquals } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  cosine,
  Device,
  explain,
  type FloatDType,
  NoDeviceError,
  relativeL1,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import {
  type FloatProblem,
  type Tensors,
  type Values,
  within,
  worstDifference,
  worstRow,
} from "./attention.ts";
import { download, poisoned, uploadProblem } from "./devices.ts";
import type { Dims } from "./reference.ts";

export type Exponential = "exact" | "fast";
export type Variant = Exponential | "sage2++";

export const exponentials: readonly Exponential[] = ["exact", "fast"];
export const variants: readonly Variant[] = [...exponentials, "sage2++"];

/** The options that ask for it. */
export function optionsOf(variant: Variant): AttentionOptions {
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
export const present = new Set(deviceNames.filter(hasKernel));

/** One test for the CPU and one for CUDA, skipped where there is no such device or kernel. */
export function kernelTest(name: string, body: (device: Device) => Promise<void>): void {
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
export const bounds: Record<Variant, { all: number; row: number; lse: number }> = {
  exact: { all: 0.049, row: 0.11, lse: 0.031 },
  fast: { all: 0.054, row: 0.11, lse: 0.04 },
  "sage2++": { all: 0.049, row: 0.11, lse: 0.031 },
};

/**
 * The log-sum-exp of fast exponentials is that of P as it was coded. On CUDA a maximum is kept until a score exceeds it
 * by 4 (base 2), so the largest P of a row is not exact either, which shows with few keys.
 */
export function boundsOf(device: Device, variant: Variant): typeof bounds.exact {
  const bound = bounds[variant];
  const room = device.kind === "cuda" && variant === "fast" ? 1.5 : 1;
  return { ...bound, lse: room * bound.lse };
}

/** Compares with float64: all of it, every row, and the angle; few numbers by their largest difference. */
export function compare(
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
export async function run(
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
export async function solve(
  device: Device,
  problem: FloatProblem,
  dtype: FloatDType,
  options: AttentionOptions,
): Promise<{ out: Values; lse: Values }> {
  using tensors = uploadProblem(device, problem, dtype);
  return await run(tensors, options);
}
