// Measures the accuracy of every kernel and option on synthetic and real tensors: see docs/accuracy.md.
import { parseArgs } from "@std/cli/parse-args";
import { fromFileUrl, join } from "@std/path";
import { build } from "../build.ts";
import { reference } from "../examples/demo/reference.ts";
import {
  attention,
  attentionQuantized,
  cosine,
  Device,
  type FloatDType,
  fromFloat32,
  quantize,
  relativeL1,
  rmse,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import { BuildError, runTask } from "../tools/build/toolchain.ts";
import { type Input, realInputs, type Source, syntheticInputs } from "./accuracy_inputs.ts";
import { type Figures, figuresPath, type Measures, summary } from "./accuracy_page.ts";
import { keyOf, type Recipe, recipes } from "./accuracy_recipes.ts";
import { writeAccuracy } from "./report.ts";

const help = `usage: deno task accuracy [options]

  --data FOLDER   real tensors to measure on: files of safetensors with q, k and v in f16; the figures are printed
                  and not written. Default: tests/data, whose figures make docs/accuracy.md
  --device NAME   where to compute: cpu (default) or cuda:0; on another device than the CPU, figures are printed only
  --text          leaves the picture as it is; without it Vega is asked for from npm
`;

const root = fromFileUrl(new URL("..", import.meta.url));

// ---- one input, one recipe ----------------------------------------------------------------------------

interface Tensors extends Disposable {
  q: Tensor<FloatDType>;
  k: Tensor<FloatDType>;
  v: Tensor<FloatDType>;
}

function upload(device: Device, { q, k, v, qDims, kDims, dtype }: Input): Tensors {
  const tensor = (x: Float32Array, dims: readonly number[]) =>
    device.tensor(fromFloat32(x, dtype), [...dims], { dtype }) as Tensor as Tensor<FloatDType>;
  const tensors = [tensor(q, qDims), tensor(k, kDims), tensor(v, kDims)];
  return {
    q: tensors[0],
    k: tensors[1],
    v: tensors[2],
    [Symbol.dispose]: () => tensors.forEach((one) => one.dispose()),
  };
}

/** One scale for all rows of a head; smoothed as the kernel is by default. */
async function attendPerHead(
  { q, k, v }: Tensors,
  kernel: "sage2" | "sage2-int4",
  causal: boolean,
): Promise<ArrayLike<number>> {
  const dtype = kernel === "sage2" ? "i8" : "i4", granularity = "block", smooth = dtype === "i4";
  const rows = { dtype, granularity } as const;
  using qCodes = quantize(q, { operand: "query", ...rows, groupRows: q.shape[2], smooth });
  using kCodes = quantize(k, { operand: "key", ...rows, groupRows: k.shape[2], smooth: true });
  using values = quantize(v, { operand: "value" });
  using out = attentionQuantized(qCodes, kCodes, values, { kernel, causal, outDtype: "f32" });
  return await out.data();
}

async function attend(
  tensors: Tensors,
  causal: boolean,
  { perHead, ...options }: Recipe,
): Promise<ArrayLike<number>> {
  if (perHead) return await attendPerHead(tensors, options.kernel as "sage2", causal);
  const { q, k, v } = tensors;
  const outDtype = options.kernel === "flash" ? undefined : "f32"; // flash: as it is used
  using out = attention(q, k, v, { ...options, causal, outDtype }) as Tensor<FloatDType>;
  const data = await out.data();
  return out.dtype === "bf16" ? bf16Values(data as Uint16Array) : data as ArrayLike<number>;
}

function bf16Values(codes: Uint16Array): Float32Array {
  return new Float32Array(Uint32Array.from(codes, (code) => code << 16).buffer);
}

/** Exact attention of an input. */
export function exactly({ q, k, v, qDims, kDims, causal }: Input): Float64Array {
  const [batch, heads, queries, headDim] = qDims, [, kvHeads, keys] = kDims;
  return reference(q, k, v, { batch, heads, kvHeads, queries, keys, headDim, causal });
}

/** How far each recipe is from exact attention; those that the input or the device does not allow are left out. */
export async function measure(
  device: Device,
  input: Input,
  some: readonly Recipe[] = recipes,
): Promise<Record<string, Measures>> {
  const exact = exactly(input);
  using tensors = upload(device, input);
  const figures: Record<string, Measures> = {};
  for (const recipe of some) {
    if (recipe.causal && !input.causal) continue;
    try {
      const out = await attend(tensors, input.causal, recipe);
      figures[keyOf(recipe)] = {
        cosine: cosine(out, exact),
        relativeL1: relativeL1(out, exact),
        rmse: rmse(out, exact),
      };
    } catch (error) {
      if (!(error instanceof UnsupportedError)) throw error;
    }
  }
  return figures;
}

// ---- the task -----------------------------------------------------------------------------------------

/** To six digits, so that the file shows what moved and not how sums were ordered. */
function rounded({ cosine, relativeL1, rmse }: Measures): Measures {
  const digits = (value: number) => Number(value.toPrecision(6));
  return { cosine: digits(cosine), relativeL1: digits(relativeL1), rmse: digits(rmse) };
}

async function measureAll(device: Device, sources: readonly Source[]): Promise<Figures> {
  const figures: Figures = { inputs: [], measures: {} };
  for (const [i, source] of sources.entries()) {
    const began = performance.now();
    const { name, title, real, causal, qDims } = await source.load().then(async (input) => {
      const own = Object.entries(await measure(device, input));
      figures.measures[input.name] = Object.fromEntries(
        own.map(([key, measures]) => [key, rounded(measures)]),
      );
      return input;
    });
    figures.inputs.push({ name, title, real, causal, shape: [...qDims] });
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    console.log(`${String(i + 1).padStart(2)}/${sources.length} ${title.padEnd(58)} ${seconds} s`);
  }
  return figures;
}

async function readInputs(folder: string): Promise<Source[]> {
  const inputs = await realInputs(folder).catch((error) => {
    throw new BuildError(`Cannot read the tensors in ${folder}: ${error.message}`);
  });
  if (inputs.length) return inputs;
  throw new BuildError(`Cannot measure as ${folder} must hold files of safetensors: it has none`);
}

if (import.meta.main) {
  await runTask(async () => {
    const options = parseArgs(Deno.args, {
      string: ["data", "device"],
      boolean: ["text", "help"],
      unknown: (argument: string) => {
        throw new BuildError(`Unknown argument "${argument}"; --help lists those there are`);
      },
    });
    if (options.help) return console.log(help);
    const real = await readInputs(options.data ?? join(root, "tests/data"));
    await build({ bundle: "if-possible" });
    using device = Device.open(options.device ?? "cpu");
    const figures = await measureAll(device, [...real, ...syntheticInputs]);
    console.log(`\n${summary(figures)}`);
    if (options.data !== undefined || device.kind !== "cpu") return;
    await Deno.writeTextFile(join(root, figuresPath), JSON.stringify(figures, null, 1) + "\n");
    console.log(figuresPath);
    await writeAccuracy(!options.text);
  });
}
