// Finds out which precision each layer of a model bears, on the Q, K and V that were captured from it; writes the plan
// as JSON and as a picture, loads it again and attends with it: calibrate.ts [folder of safetensors [target folder]].
//
// Every file holds q, k and v of one layer, and says in its metadata "model", "layer" and, where they apply, "timestep"
// and "causal": "true". Files of one model become one plan.
import {
  attention,
  calibrate,
  type CalibrationSample,
  Device,
  explain,
  type FloatDType,
  parseSafetensors,
  PrecisionPlan,
  type PrecisionPolicy,
  type PrecisionTotals,
  type Recipe,
  relativeL1,
  type Safetensors,
  sageAttention2Policy,
  sageAttentionPolicy,
  type Tensor,
  type TensorData,
  UnsupportedError,
} from "../mod.ts";
import { Progress } from "./progress.ts";

const root = new URL("../", import.meta.url);
const local = (path: string) => decodeURIComponent(new URL(path, root).pathname);
const [source = local("tests/data"), target = local("dist")] = Deno.args;

// ---- policies -----------------------------------------------------------------------------------------

/** Ours: of everything that the device has, the cheapest recipe that is off by at most 3 %. */
const ladder: Recipe[] = [
  { kernel: "sage2-int4" },
  { kernel: "sage1-int8" },
  { kernel: "sage2" },
  { kernel: "sage2", smoothQ: true },
  { kernel: "sage1" },
  { kernel: "flash" },
];

const policies: { name: string; file: string; policy: PrecisionPolicy }[] = [
  {
    name: "SageAttention: cosine of at least 99.8 %",
    file: "sage1",
    policy: sageAttentionPolicy(),
  },
  {
    name: "SageAttention2: the worst 30 % in 8 bits",
    file: "sage2",
    policy: sageAttention2Policy(),
  },
  {
    name: "every kernel: relative L1 of at most 0.03",
    file: "ladder",
    policy: { ladder, metric: "relativeL1", threshold: 0.03 },
  },
];

/** The recipes that the device has for such tensors; says which it has not. */
function available(
  ladder: readonly Recipe[],
  { q, k, v, options }: CalibrationSample,
): Recipe[] {
  return ladder.filter((recipe) => {
    try {
      explain(q, k, v, { ...options, ...recipe });
      return true;
    } catch (error) {
      if (!(error instanceof UnsupportedError)) throw error;
      console.log(`  left out: ${error.message}`);
      return false;
    }
  });
}

// ---- tensors ------------------------------------------------------------------------------------------

interface Capture {
  path: string;
  layer: number;
  timestep: number | undefined;
}

async function read(path: string): Promise<Safetensors> {
  return parseSafetensors(await Deno.readFile(path));
}

/** The files of a folder by the short name of their model, in order of layer and time step. */
async function findCaptures(folder: string): Promise<Map<string, Capture[]>> {
  const models = new Map<string, Capture[]>();
  for await (const { name, isFile } of Deno.readDir(folder)) {
    if (!isFile || !name.endsWith(".safetensors")) continue;
    const path = `${folder}/${name}`, { metadata } = await read(path);
    const { layer = name.match(/layer(\d+)/)?.[1], timestep } = metadata;
    const model = metadata.model?.split(/[,(]/)[0].trim() || "a model";
    if (layer === undefined) {
      throw new RangeError(
        `Cannot calibrate with ${name}: neither its metadata nor its name tells the layer.`,
      );
    }
    const captures = models.get(model) ?? [];
    captures.push({
      path,
      layer: Number(layer),
      timestep: timestep === undefined ? undefined : Number(timestep),
    });
    models.set(model, captures);
  }
  if (models.size === 0) {
    throw new RangeError(`Cannot calibrate: ${folder} holds no safetensors.`);
  }
  for (const captures of models.values()) {
    captures.sort((a, b) => a.layer - b.layer || (a.timestep ?? 0) - (b.timestep ?? 0));
  }
  return models;
}

const dtypes: readonly FloatDType[] = ["f16", "bf16", "f32"];

/** One file after another on the device. */
async function* samples(
  device: Device,
  captures: readonly Capture[],
): AsyncGenerator<CalibrationSample> {
  for (const { path, layer, timestep } of captures) {
    const file = await read(path);
    const load = (name: string): Tensor<FloatDType> => {
      const dtype = dtypes.find((dtype) => file.tensors.get(name)?.dtype === dtype);
      if (!dtype) {
        throw new RangeError(
          `Cannot calibrate with ${path}: it has no ${name} in ${dtypes.join(", ")}.`,
        );
      }
      const { data, shape } = file.get(name, dtype);
      return device.tensor(data as TensorData, shape, { dtype }) as Tensor<FloatDType>;
    };
    using q = load("q"), k = load("k"), v = load("v");
    yield { layer, timestep, q, k, v, options: { causal: file.metadata.causal === "true" } };
  }
}

// ---- calibration --------------------------------------------------------------------------------------

async function planFor(
  model: string,
  device: Device,
  captures: readonly Capture[],
  policy: PrecisionPolicy,
): Promise<PrecisionPlan> {
  using bar = new Progress();
  return await calibrate(samples(device, captures), {
    ...policy,
    model: { name: model },
    repeats: 7,
    total: captures.length,
    onProgress: ({ done, total, layer }) => bar.show(done, total, `layer ${layer}`),
  });
}

// ---- what came out ------------------------------------------------------------------------------------

function short(value: number | null): string {
  return value === null ? "not finite" : value.toFixed(4);
}

function total(
  name: string,
  { milliseconds, mean, worst }: PrecisionTotals,
  best: PrecisionTotals,
): string {
  const share = Math.round(100 * milliseconds! / best.milliseconds!);
  return `  ${name.padEnd(26)}${milliseconds!.toFixed(2).padStart(8)} ms ${
    String(share).padStart(4)
  } %   mean ${short(mean)}, worst ${short(worst)}`;
}

function report(plan: PrecisionPlan): void {
  const rungs = plan.ladder.map(({ name }) => name);
  const pad = (name: string) => name.padStart(Math.max(11, name.length + 2));
  const steps = plan.entries.some(({ timestep }) => timestep !== null);
  console.log(`  ${plan.metric}`);
  console.log(`  layer${steps ? "   step" : ""}${rungs.map(pad).join("")}   runs`);
  for (const { layer, timestep, chosen, candidates } of plan.entries) {
    const scores = candidates.map(({ scores, recipe }) =>
      short(scores[plan.metric]).padStart(pad(recipe).length)
    );
    const step = steps ? String(timestep ?? "every").padStart(7) : "";
    console.log(`  ${String(layer).padStart(5)}${step}${scores.join("")}   ${chosen}`);
  }
  const { chosen, cheapest, best } = plan.summary();
  console.log(total("as planned", chosen, best));
  console.log(total(`all ${rungs[0]}`, cheapest, best));
  console.log(total(`all ${rungs.at(-1)}`, best, best));
}

/** Attends with a plan that comes from a file, on the first sample; says how far off that is. */
async function tryOut(path: string, device: Device, captures: readonly Capture[]): Promise<void> {
  const plan = PrecisionPlan.parse(await Deno.readTextFile(path));
  for await (const { layer, timestep, q, k, v, options } of samples(device, captures.slice(0, 1))) {
    using planned = attention(q, k, v, { ...options, plan, layer, timestep, outDtype: "f32" });
    using exact = attention(q, k, v, { ...options, kernel: "flash", outDtype: "f32" });
    const { reason } = explain(q, k, v, { ...options, plan, layer, timestep });
    console.log(`  loaded again: ${reason}`);
    const error = relativeL1(await planned.data(), await exact.data());
    console.log(`  and it is: relative L1 of ${error.toFixed(4)}\n`);
  }
}

// ---- the program --------------------------------------------------------------------------------------

using device = Device.open();
console.log(`${device}: ${device.info.name}, ${device.info.features}\n`);
for (const [model, captures] of await findCaptures(source)) {
  for (const { name, file, policy } of policies) {
    console.log(`${model}\n${name}`);
    let ladder: Recipe[] = [];
    for await (const sample of samples(device, captures.slice(0, 1))) {
      ladder = available(policy.ladder, sample);
    }
    if (ladder.length < policy.ladder.length && (policy.budget || ladder.length < 2)) {
      console.log("  this policy needs all of its recipes: not on this device\n");
      continue;
    }
    const plan = await planFor(model, device, captures, { ...policy, ladder });
    report(plan);
    const path = `${target}/plan-${model.toLowerCase().replaceAll(/[^a-z0-9.]+/g, "-")}-${file}`;
    await Deno.writeTextFile(`${path}.json`, JSON.stringify(plan, null, 2) + "\n");
    await Deno.writeTextFile(`${path}.svg`, plan.toSVG());
    console.log(`  written: ${path}.json and ${path}.svg`);
    await tryOut(`${path}.json`, device, captures);
  }
}
