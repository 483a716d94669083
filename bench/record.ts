// Runs the suite on a GPU, measures every kernel there beside others' and writes bench/results/<gpu>.json.
import { parseArgs } from "@std/cli/parse-args";
import { basename, fromFileUrl, join } from "@std/path";
import {
  attention,
  type AttentionOptions,
  attentionQuantized,
  cosine,
  Device,
  explain,
  type Kernel,
  parseSafetensors,
  quantize,
  type QuantizeOptions,
  relativeL1,
  rmse,
  smooth,
  UnsupportedError,
} from "../mod.ts";
import { build } from "../build.ts";
import { reference } from "../examples/demo/reference.ts";
import { BuildError, findGpus, runTask } from "../tools/build/toolchain.ts";
import { closingLine, runSuite } from "../tools/suite.ts";
import type { Accuracy, Results, Row, Shape } from "./format.ts";
import { measure, RandomTensors } from "./measure.ts";
import { Peers } from "./peers.ts";

const help = `usage: deno task record [--quick] [--skip-tests]

  --quick        few shapes, short timings; prints instead of writing
  --skip-tests   no test run; prints instead of writing
`;

const root = fromFileUrl(new URL("..", import.meta.url));
const kernels: Exclude<Kernel, "auto">[] = [
  "flash",
  "sage1",
  "sage1-int8",
  "sage2",
  "sage2-int4",
  "sage2++",
];

function shapes(quick: boolean): Shape[] {
  const dims = quick ? [64, 128] : [64, 128, 256];
  const lengths = quick ? [1024, 8192] : [1024, 2048, 4096, 8192, 16384, 32768];
  return dims.flatMap((headDim) =>
    [false, true].flatMap((causal) =>
      lengths.map((tokens) => ({
        headDim,
        causal,
        batch: Math.max(1, Math.min(4, 32768 / tokens)),
        heads: headDim === 256 ? 16 : 32,
        tokens,
      }))
    )
  );
}

function tflops({ headDim, causal, batch, heads, tokens }: Shape, ms: number): number {
  return 4 * batch * heads * tokens ** 2 * headDim / (causal ? 2 : 1) / ms / 1e9;
}

function show(row: Row): void {
  const speed = row.tflops ? `${row.tflops.toFixed(1)} TFLOP/s` : `${row.tbs!.toFixed(2)} TB/s`;
  const what = [
    row.group,
    row.kernel,
    row.operand,
    row.accumulator,
    `D=${row.headDim}`,
    row.causal === undefined ? undefined : row.causal ? "causal" : "full",
    `B=${row.batch} N=${row.tokens}`,
    row.smooth ? "smoothed" : undefined,
    row.endToEnd ? undefined : "kernel alone",
  ].filter((part) => part !== undefined);
  console.log(`${what.join(" ").padEnd(64)} ${row.ms.toFixed(4).padStart(9)} ms  ${speed}`);
}

// ---- attention -----------------------------------------------------------------------------------

type Variant = Required<Pick<AttentionOptions, "kernel">> & Pick<AttentionOptions, "pvAccumulator">;

/** A kernel, and its accumulators where it has a choice. */
function variants(): Variant[] {
  return kernels.flatMap((kernel): Variant[] =>
    kernel === "sage1"
      ? [{ kernel, pvAccumulator: "f32" }, { kernel, pvAccumulator: "f16" }]
      : [{ kernel }]
  );
}

async function attentionRows(
  random: RandomTensors,
  shape: Shape,
  budgetMs: number,
): Promise<Row[]> {
  const { device } = random;
  const { batch, heads, tokens, headDim, causal } = shape;
  const dimensions = [batch, heads, tokens, headDim];
  using q = random.make(dimensions, "bf16");
  using k = random.make(dimensions, "bf16");
  using v = random.make(dimensions, "bf16");
  using out = device.empty(dimensions, { dtype: "bf16" });
  const rows: Row[] = [];
  for (const variant of variants()) {
    const options = { ...variant, causal };
    let implementation: string;
    try {
      implementation = explain(q, k, v, options).implementation;
    } catch (error) {
      if (!(error instanceof UnsupportedError)) throw error;
      continue;
    }
    const add = (ms: number, endToEnd: boolean) => {
      const row: Row = {
        group: "attention",
        kernel: variant.kernel,
        ...shape,
        kvHeads: heads,
        dtype: "bf16",
        endToEnd,
        ms,
        tflops: tflops(shape, ms),
        peer: false,
        ...variant.pvAccumulator ? { accumulator: variant.pvAccumulator } : {},
        implementation,
      };
      rows.push(row);
      show(row);
    };
    add(await measure(device, () => void attention(q, k, v, { ...options, out }), budgetMs), true);
    if (variant.kernel !== "sage1") continue;
    using qCodes = quantize(q, { operand: "query", granularity: "block" });
    using kCodes = quantize(k, { operand: "key", granularity: "block", smooth: true });
    using vHalf = random.make(dimensions, "f16");
    const { pvAccumulator } = variant;
    const kernelAlone = () =>
      void attentionQuantized(qCodes, kCodes, vHalf, {
        kernel: "sage1",
        pvAccumulator,
        causal,
        out,
      });
    add(await measure(device, kernelAlone, budgetMs), false);
  }
  return rows;
}

// ---- what comes before attention -----------------------------------------------------------------

async function preparationRows(
  random: RandomTensors,
  headDim: number,
  budgetMs: number,
): Promise<Row[]> {
  const { device } = random;
  const [batch, heads, tokens] = [1, 32, 32768];
  using x = random.make([batch, heads, tokens, headDim], "bf16");
  const elements = batch * heads * tokens * headDim;
  const rows: Row[] = [];
  const add = (row: Partial<Row> & Pick<Row, "group" | "kernel" | "ms" | "bytes">) => {
    const whole: Row = {
      headDim,
      batch,
      heads,
      kvHeads: heads,
      tokens,
      dtype: "bf16",
      endToEnd: true,
      tbs: row.bytes! / row.ms / 1e9,
      peer: false,
      ...row,
    };
    rows.push(whole);
    show(whole);
  };

  const recipes: QuantizeOptions[] = [
    ...(["token", "block", "warp", "thread"] as const).map((granularity) => ({
      operand: "query" as const,
      granularity,
    })),
    { operand: "query", granularity: "thread", smooth: true },
    { operand: "key", granularity: "block" },
    { operand: "key", granularity: "thread", smooth: true },
    { operand: "key", granularity: "thread", dtype: "i4" },
    { operand: "value", dtype: "e4m3", granularity: "channel" },
    { operand: "value", dtype: "i8", granularity: "channel" },
  ];
  for (const recipe of recipes) {
    using sample = quantize(x, recipe);
    // x once, but twice where a whole column must be seen before the first code can be written.
    const reads = recipe.granularity === "channel" || (recipe.smooth && recipe.operand === "key")
      ? 2
      : 1;
    const bytes = reads * 2 * elements + sample.codes.byteLength + sample.scales.byteLength +
      (sample.mean?.byteLength ?? 0);
    const ms = await measure(device, () => quantize(x, recipe).dispose(), budgetMs);
    add({
      group: "quantize",
      kernel: `${sample.codes.dtype} ${recipe.granularity}`,
      operand: recipe.operand,
      smooth: recipe.smooth ?? false,
      bytes,
      ms,
    });
  }
  for (const blockRows of [undefined, 128]) {
    using sample = smooth(x, { blockRows });
    const reads = blockRows ? 1 : 2;
    const bytes = reads * 2 * elements + sample.smoothed.byteLength + sample.mean.byteLength;
    const ms = await measure(device, () => smooth(x, { blockRows })[Symbol.dispose](), budgetMs);
    add({ group: "smooth", kernel: "smooth", ...blockRows ? { blockRows } : {}, bytes, ms });
  }
  return rows;
}

// ---- accuracy ------------------------------------------------------------------------------------

async function accuracyRows(device: Device): Promise<Accuracy[]> {
  const folder = join(root, "tests/data"), rows: Accuracy[] = [];
  const files = (await Array.fromAsync(Deno.readDir(folder))).map((entry) => entry.name)
    .filter((name) => name.endsWith(".safetensors")).sort();
  for (const name of files) {
    const content = parseSafetensors(await Deno.readFile(join(folder, name)));
    const [q, k, v] = ["q", "k", "v"].map((name) => content.get(name, "f16"));
    const causal = content.metadata.causal === "true";
    const [batch, heads, queries, headDim] = q.shape;
    const exact = reference(q.data, k.data, v.data, {
      batch,
      heads,
      kvHeads: k.shape[1],
      queries,
      keys: k.shape[2],
      headDim,
      causal,
    });
    using qTensor = device.tensor(q.data, q.shape);
    using kTensor = device.tensor(k.data, k.shape);
    using vTensor = device.tensor(v.data, v.shape);
    for (const variant of variants()) {
      try {
        using out = attention(qTensor, kTensor, vTensor, { ...variant, causal });
        const result = await out.data();
        rows.push({
          file: basename(name, ".safetensors"),
          kernel: variant.kernel,
          ...variant.pvAccumulator ? { accumulator: variant.pvAccumulator } : {},
          cosine: cosine(result, exact),
          relativeL1: relativeL1(result, exact),
          rmse: rmse(result, exact),
        });
      } catch (error) {
        if (!(error instanceof UnsupportedError)) throw error;
      }
    }
  }
  return rows;
}

// ---- the machine and its other kernels -----------------------------------------------------------

async function query(fields: string): Promise<string[]> {
  const { stdout } = await new Deno.Command("nvidia-smi", {
    args: [`--query-gpu=${fields}`, "--format=csv,noheader,nounits", "--id=0"],
  }).output();
  return new TextDecoder().decode(stdout).trim().split(/,\s*/);
}

/** Clocks and power, looked at twice a second until stopped. */
function watch(): { stop(): Promise<Pick<Results, "clocks" | "power">> } {
  const child = new Deno.Command("nvidia-smi", {
    args: [
      "--query-gpu=clocks.sm,power.draw,clocks.max.sm,clocks.mem,power.limit",
      "--format=csv,noheader,nounits",
      "--id=0",
      "--loop-ms=500",
    ],
    stdout: "piped",
    stderr: "null",
  }).spawn();
  const text = new Response(child.stdout).text();
  return {
    async stop() {
      child.kill("SIGTERM");
      await child.status;
      const samples = (await text).trim().split("\n").map((line) => line.split(",").map(Number))
        .filter((values) => values.length === 5);
      const column = (i: number) => samples.map((values) => values[i]).sort((a, b) => a - b);
      const sm = column(0), power = column(1), last = samples.at(-1) ?? [0, 0, 0, 0, 0];
      return {
        clocks: {
          sm: { min: sm[0], median: sm[sm.length >> 1], max: sm.at(-1)! },
          smHighest: last[2],
          memory: last[3],
        },
        power: { limitW: last[4], medianW: power[power.length >> 1] },
      };
    },
  };
}

/** "NVIDIA H200" is h200. */
function fileName(device: string): string {
  return device.replace(/^NVIDIA (GeForce )?/, "").toLowerCase().replaceAll(/[^a-z0-9]+/g, "-");
}

function rounded(_key: string, value: unknown): unknown {
  return typeof value === "number" && !Number.isInteger(value)
    ? Number(value.toPrecision(6))
    : value;
}

await runTask(async () => {
  const options = parseArgs(Deno.args, {
    boolean: ["quick", "skip-tests", "help"],
    unknown: (argument: string) => {
      throw new BuildError(`Unknown argument "${argument}"; --help lists those there are`);
    },
  });
  if (options.help) return console.log(help);
  if (!(await findGpus()).length) {
    throw new BuildError("Cannot record: nvidia-smi shows no GPU on this machine");
  }
  const manifest = await build({ arch: "native", bundle: "if-possible" });
  const tests = options["skip-tests"]
    ? { passed: 0, failed: 0, skipped: 0 }
    : await runSuite(root, ["tests/"]);
  if (!options["skip-tests"]) console.log(closingLine(tests));

  const [driver] = await query("driver_version");
  const began = performance.now(), budgetMs = options.quick ? 50 : 80;
  const rows: Row[] = [];
  using device = Device.open("cuda:0");
  const { name } = device.info;
  await using peers = await Peers.start(budgetMs);
  const accuracy = await accuracyRows(device);
  const random = new RandomTensors(device);
  const watcher = watch();
  const copyTbs = await peers?.copy(2 ** 30);
  for (const headDim of options.quick ? [128] : [64, 128]) {
    rows.push(...await preparationRows(random, headDim, budgetMs));
  }
  for (const shape of shapes(options.quick)) {
    rows.push(...await attentionRows(random, shape, budgetMs));
    for (const row of await peers?.attention(shape) ?? []) {
      rows.push(row);
      show(row);
    }
  }
  const results: Results = {
    device: name,
    driver,
    date: new Date().toISOString(),
    source: manifest.sourceHash,
    compilers: manifest.compilers,
    ...await watcher.stop(),
    tests,
    copyTbs,
    peers: peers?.versions,
    rows,
    accuracy,
  };
  console.log(`measured in ${((performance.now() - began) / 1e3).toFixed(0)} s`);
  if (options.quick || options["skip-tests"]) {
    console.log(JSON.stringify({ ...results, rows: undefined }, rounded, 2));
  } else {
    const target = join(root, `bench/results/${fileName(name)}.json`);
    await Deno.mkdir(join(root, "bench/results"), { recursive: true });
    await Deno.writeTextFile(target, JSON.stringify(results, rounded, 1) + "\n");
    console.log(`written to ${target}; deno task figures puts an H200's into the README`);
  }
  if (tests.failed) Deno.exitCode = 1;
});
