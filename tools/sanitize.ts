// Runs small calls of every operation and kernel under NVIDIA's compute-sanitizer: `deno task sanitize`.
import { fromFileUrl } from "@std/path";
import {
  attention,
  type AttentionOptions,
  attentionQuantized,
  attentionVarlen,
  dequantize,
  Device,
  type FloatDType,
  fromFloat32,
  quantize,
  smooth,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import { type Variant, variantsOf } from "../bench/cases.ts";
import { closingLine } from "./suite.ts";

const tools = ["memcheck", "initcheck", "synccheck", "racecheck"] as const;

// ---- the calls -----------------------------------------------------------------------------------

const shapes = [
  { heads: 2, kvHeads: 1, queries: 130, keys: 333, headDim: 64 },
  { heads: 2, kvHeads: 2, queries: 257, keys: 257, headDim: 128 },
  { heads: 1, kvHeads: 1, queries: 1, keys: 200, headDim: 128 },
  { heads: 1, kvHeads: 1, queries: 140, keys: 140, headDim: 256 },
  { heads: 1, kvHeads: 1, queries: 70, keys: 90, headDim: 72 },
] as const;

/** What the variants of the benchmarks leave out, each in a kernel of another kind. */
const beyond: readonly Variant[] = [
  { kernel: "sage1", rotate: true, firstToken: true },
  { kernel: "sage2", rotate: true },
  { kernel: "sage2-int4", rotate: true },
  { kernel: "sage2", kMeanRows: 64, smoothQ: true },
  { kernel: "sage2++", band: true, causal: true },
  { kernel: "sage-int8", rotate: true, band: true, firstToken: true, kMeanRows: 128, causal: true },
];

function random<D extends FloatDType>(device: Device, shape: number[], dtype: D): Tensor<D> {
  const values = Float32Array.from(
    { length: shape.reduce((a, b) => a * b) },
    () => 2 * Math.random() - 1,
  );
  return device.tensor(fromFloat32(values, dtype), shape, { dtype }) as Tensor as Tensor<D>;
}

/** A mask with tiles that are closed, open and neither, and rows that see nothing. */
function shownKeys(device: Device, queries: number, keys: number): Tensor<"bool"> {
  const shown = Uint8Array.from({ length: queries * keys }, (_, at) => {
    const i = Math.floor(at / keys), j = at % keys;
    return Number(i % 9 !== 4 && (j >= 192 || (i >= 128 && (j < 128 || j % 3 === 0))));
  });
  return device.tensor(shown, [1, 1, queries, keys], { dtype: "bool" });
}

/** Runs a call; whether the device can. */
function tried(call: () => Disposable): boolean {
  try {
    call()[Symbol.dispose]();
    return true;
  } catch (error) {
    if (error instanceof UnsupportedError) return false;
    throw error;
  }
}

function attentionCalls(device: Device, dtype: FloatDType): number {
  let count = 0;
  for (const { heads, kvHeads, queries, keys, headDim } of shapes) {
    using q = random(device, [1, heads, queries, headDim], dtype);
    using k = random(device, [1, kvHeads, keys, headDim], dtype);
    using v = random(device, [1, kvHeads, keys, headDim], dtype);
    using sinks = random(device, [1, heads, 1, 1], "f32");
    using mask = random(device, [1, heads, queries, keys], dtype);
    using shown = shownKeys(device, queries, keys);
    const masks: readonly AttentionOptions[] = [
      { causal: false },
      { causal: true },
      { window: 40 },
      { sinks, alibi: sinks, softcap: 20 },
      { mask },
      { mask: shown },
      { mask: shown, causal: true },
      { mask: shown, window: 40 },
    ];
    for (const options of masks) {
      const { causal = false } = options;
      for (const variant of [...variantsOf({ causal }), ...beyond]) {
        const all = { ...options, causal, ...variant };
        if (tried(() => attention(q, k, v, { ...all, returnLse: true }))) count++;
      }
    }
  }
  return count;
}

function otherCalls(device: Device): number {
  let count = 0;
  using x = random(device, [1, 2, 200, 64], "f16");
  for (const operand of ["query", "key"] as const) {
    for (const dtype of ["i8", "i4"] as const) {
      using codes = quantize(x, { operand, dtype, granularity: "thread", smooth: true });
      using _back = dequantize(codes, { outDtype: "f16" });
      count += 2;
    }
  }
  const cuSeqlensQ = [0, 1, 70, 70, 200];
  using packed = random(device, [1, 2, 200, 64], "f16");
  for (const kernel of ["flash", "sage1", "sage2"] as const) {
    if (
      tried(() => attentionVarlen(packed, packed, packed, { kernel, cuSeqlensQ, causal: true }))
    ) count++;
  }
  using means = smooth(x, { blockRows: 128 });
  using q = quantize(x, { operand: "query", dtype: "i8", granularity: "block" });
  using k = quantize(x, { operand: "key", dtype: "i8", granularity: "block", smooth: true });
  if (means && tried(() => attentionQuantized(q, k, x, { causal: true }))) count++;
  return count + 3;
}

/** The calls in parts that take about as long, each for a process of its own. */
const parts: Readonly<Record<string, (device: Device) => number>> = {
  f16: (device) => attentionCalls(device, "f16"),
  bf16: (device) => attentionCalls(device, "bf16"),
  f32: (device) => attentionCalls(device, "f32"),
  others: otherCalls,
  // Kernels that older GPUs get.
  "8.0": (device) => attentionCalls(device, "f16"),
  "8.9": (device) => attentionCalls(device, "f16"),
};

function openFor(part: string): Device {
  const older = /^(\d)\.(\d)$/.exec(part);
  return older
    ? Device.open("cuda", { architecture: Number(older[1] + older[2]) })
    : Device.open("cuda");
}

async function runCalls(part: string): Promise<number> {
  try {
    using device = openFor(part);
    const count = parts[part](device);
    await device.synchronize();
    return count;
  } catch (error) {
    if (error instanceof UnsupportedError) return 0; // a GPU that is older
    throw error;
  }
}

// ---- the sanitizer -------------------------------------------------------------------------------

/** How many calls of a part one of its tools finds nothing in; undefined: it finds something. */
async function cleanCalls(tool: string, part: string): Promise<number | undefined> {
  const own = ["run", "--allow-all", fromFileUrl(import.meta.url), "--calls", part];
  const args = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "10"];
  const { success, stdout, stderr } = await new Deno.Command("compute-sanitizer", {
    args: [...args, Deno.execPath(), ...own],
    stdin: "null",
  }).output();
  const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  const calls = /(\d+) calls/.exec(text);
  if (calls && success && /ERROR SUMMARY: 0 errors|0 hazards displayed/.test(text)) {
    return Number(calls[1]);
  }
  console.error(`${tool}, ${part}: ${text.slice(0, 4000)}`);
  return undefined;
}

/** Whether a tool finds nothing in any part; tells as soon as it is known. */
async function isClean(tool: string): Promise<boolean> {
  const counts = await Promise.all(Object.keys(parts).map((part) => cleanCalls(tool, part)));
  const clean = counts.every((count) => count !== undefined);
  const calls = counts.reduce<number>((sum, count) => sum + (count ?? 0), 0);
  console.log(`${tool.padEnd(10)} ${clean ? "clean" : "FAILED"}, ${calls} calls`);
  return clean;
}

if (Deno.args[0] === "--calls") {
  console.log(`${await runCalls(Deno.args[1])} calls`);
} else {
  let passed = 0, failed = 0;
  for (const clean of await Promise.all(tools.map(isClean))) clean ? passed++ : failed++;
  console.log(closingLine({ passed, failed, skipped: 0 }));
  if (failed) Deno.exitCode = 1;
}
