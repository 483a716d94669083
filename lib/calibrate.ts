// Calibration: what each recipe of a ladder does to a model's own tensors, and the plan that follows from it.
import { attention, explain } from "./attention.ts";
import { cannot, checkInteger, checkOneOf, checkOptions, show } from "./check.ts";
import { Device } from "./device.ts";
import { type FloatDType, type TensorData, toFloat32 } from "./dtype.ts";
import { UnsupportedError } from "./errors.ts";
import { buildInfo } from "./library.ts";
import { type AttentionOptions, type FlashAttentionOptions, optionNames } from "./options.ts";
import {
  checkRecipe,
  type LayerShape,
  type ModelSignature,
  type PrecisionCandidate,
  PrecisionPlan,
  recipeName,
} from "./precision_plan.ts";
import {
  checkChoice,
  choose,
  metrics,
  type PrecisionMetric,
  type PrecisionPolicy,
  type PrecisionScores,
  score,
} from "./precision_policy.ts";
import type { Recipe } from "./recipe.ts";
import { interiorOf, Tensor } from "./tensor.ts";

/** Q, K and V of one layer of a model, as they enter attention, and the options that the model attends with. */
export interface CalibrationSample {
  /** The layer, from 0. */
  layer: number;
  /** The time step, for models that have such; either all samples of a layer have one or none. */
  timestep?: number;
  /** Queries, [B, Hq, Nq, D]. */
  q: Tensor<FloatDType>;
  /** Keys, [B, Hkv, Nk, D]. */
  k: Tensor<FloatDType>;
  /** Values, [B, Hkv, Nk, Dv]. */
  v: Tensor<FloatDType>;
  /** What is computed: mask and scale. */
  options?: Omit<FlashAttentionOptions, "out" | "outDtype">;
}

/** How far calibration is. */
export interface CalibrationProgress {
  /** Samples that are done. */
  done: number;
  /** How many there are; absent where that is not known. */
  total: number | undefined;
  /** Layer of the sample that is done. */
  layer: number;
  /** Its time step. */
  timestep: number | undefined;
}

/** Options of {@linkcode calibrate}. */
export interface CalibrateOptions extends PrecisionPolicy {
  /**
   * What the plan is for. Number of layers and channels must be those of the samples. Heads are those of the
   * samples unless they are given: for samples that hold some heads of the model only.
   */
  model?: ModelSignature;
  /**
   * What the recipes are compared with. `"exact"`: flash attention in f32, on the CPU where the samples' device
   * takes no f32. `"fast"`: flash attention of the samples' element type, where they are: errors below its own,
   * about 0.0002 in f16 and 0.002 in bf16, are not resolved then. Default: `"exact"`.
   */
  reference?: "exact" | "fast";
  /** How often each call is timed; the median counts, and 0 times nothing. Default: 3. */
  repeats?: number;
  /** How many samples there will be, for `onProgress`. Default: the length of `samples`, where it has one. */
  total?: number;
  /** Called after each sample. */
  onProgress?: (progress: CalibrationProgress) => void;
}

const action = "calibrate";

// ---- judging what comes in ----------------------------------------------------------------------------

function checkCalibrateOptions(options: CalibrateOptions): void {
  checkOptions(action, options, [
    "ladder",
    "metric",
    "threshold",
    "budget",
    "model",
    "reference",
    "repeats",
    "total",
    "onProgress",
  ]);
  const { ladder, metric, budget, model = {}, reference, repeats = 3, total, onProgress } = options;
  if (!Array.isArray(ladder)) throw new TypeError(cannot(action, "ladder", "be an array", ladder));
  if (ladder.length === 0) throw new RangeError(cannot(action, "ladder", "not be empty", ladder));
  ladder.forEach((recipe, i) => {
    checkRecipe(`calibrate with ladder[${i}]`, recipe);
    const same = ladder.findIndex((one) => recipeName(one) === recipeName(recipe));
    if (same !== i) {
      const must = `differ from ladder[${same}]`;
      throw new RangeError(cannot(action, `ladder[${i}]`, must, recipeName(recipe)));
    }
  });
  if (metric !== undefined) checkOneOf(action, "metric", metric, metrics);
  checkChoice(action, options, ladder.length);
  if (reference !== undefined) checkOneOf(action, "reference", reference, ["exact", "fast"]);
  checkInteger(action, "repeats", repeats, 0, 1000);
  if (repeats === 0 && budget && "cost" in budget && !budget.costs) {
    const must = "be at least 1 for a budget of measured cost";
    throw new RangeError(cannot(action, "repeats", must, repeats));
  }
  if (total !== undefined) checkInteger(action, "total", total, 0);
  if (onProgress !== undefined && typeof onProgress !== "function") {
    throw new TypeError(cannot(action, "onProgress", "be a function", onProgress));
  }
  checkOptions("calibrate for model", model, [
    "name",
    "layers",
    "heads",
    "kvHeads",
    "headDim",
    "valueDim",
  ]);
  const { name, ...lengths } = model;
  if (name !== undefined && typeof name !== "string") {
    throw new TypeError(cannot(action, "model.name", "be a string", name));
  }
  for (const [length, value] of Object.entries(lengths)) {
    if (value !== undefined) checkInteger(action, `model.${length}`, value, 1);
  }
}

/** A sample's own options: those of a flash attention that writes nowhere in particular. */
function ownOptions({ options = {} }: CalibrationSample, index: number): AttentionOptions {
  const known = optionNames.flash.filter((name) =>
    !["out", "outDtype", "returnLse"].includes(name)
  );
  checkOptions(`calibrate with the options of sample ${index}`, options, known);
  return options;
}

/** The layer's tensors; refuses a sample that is none. */
function shapeOf(sample: CalibrationSample, index: number, model: ModelSignature): LayerShape {
  if (typeof sample !== "object" || sample === null) {
    throw new TypeError(cannot(action, `sample ${index}`, "be an object", sample));
  }
  checkOptions(`calibrate with sample ${index}`, sample, [
    "layer",
    "timestep",
    "q",
    "k",
    "v",
    "options",
  ]);
  const { layer, timestep, q, k, v } = sample, of = `of sample ${index}`;
  checkInteger(action, `layer ${of}`, layer, 0);
  if (timestep !== undefined) {
    const must = "be a finite number or absent";
    if (typeof timestep !== "number") {
      throw new TypeError(cannot(action, `timestep ${of}`, must, timestep));
    }
    if (!Number.isFinite(timestep)) {
      throw new RangeError(cannot(action, `timestep ${of}`, must, timestep));
    }
  }
  const [qShape, kShape, vShape] = [["q", q], ["k", k], ["v", v]].map(([name, tensor]) =>
    interiorOf(action, `${name} ${of}`, tensor as Tensor).geometry.shape
  );
  const found = {
    layer,
    heads: model.heads ?? qShape[1],
    kvHeads: model.kvHeads ?? kShape[1],
    headDim: qShape[3],
    valueDim: vShape[3],
  };
  for (const name of ["headDim", "valueDim"] as const) {
    if (model[name] !== undefined && model[name] !== found[name]) {
      throw new RangeError(
        cannot(action, `${name} ${of}`, `be that of the model (${model[name]})`, found[name]),
      );
    }
  }
  return found;
}

// ---- measuring ----------------------------------------------------------------------------------------

/** The values of a tensor in the order of its layout. */
async function valuesOf(tensor: Tensor<FloatDType>): Promise<Float32Array> {
  return toFloat32(await tensor.data(), tensor.dtype);
}

/** Where the reference is computed, and what of the samples is copied for that. */
class Reference implements Disposable {
  #cpu: Device | undefined;

  constructor(readonly exact: boolean) {}

  /** Exact attention of a sample, in the order of q's layout. */
  async run({ q, k, v, options }: CalibrationSample): Promise<Float32Array> {
    const flash = { ...options, kernel: "flash", outDtype: "f32" } as const;
    if (!this.exact) {
      using out = attention(q, k, v, flash);
      return await out.data();
    }
    const home = this.#takesSingle(q.device) ? q.device : this.#cpu ??= Device.open("cpu");
    using copies = new DisposableStack();
    const copy = async (tensor: Tensor, single: boolean) => {
      const { shape, layout, dtype } = tensor, data = await tensor.data();
      const to = single ? "f32" : dtype;
      const values: TensorData = single ? toFloat32(data, dtype) : data;
      return copies.use(home.tensor(values, shape, { dtype: to, layout }));
    };
    const [q32, k32, v32] = [await copy(q, true), await copy(k, true), await copy(v, true)];
    const moved: Record<string, unknown> = { ...flash };
    for (const [name, value] of Object.entries(flash)) {
      if (value as unknown instanceof Tensor) {
        moved[name] = await copy(value as unknown as Tensor, false);
      }
    }
    using out = attention(q32, k32, v32, moved as typeof flash);
    return await out.data() as Float32Array;
  }

  #takesSingle(device: Device): boolean {
    const spec = { shape: [1, 1, 1, 64], dtype: "f32" } as const;
    try {
      explain(spec, spec, spec, { kernel: "flash", device });
      return true;
    } catch (error) {
      if (error instanceof UnsupportedError) return false;
      throw error;
    }
  }

  [Symbol.dispose](): void {
    this.#cpu?.dispose();
  }
}

/** One recipe on one sample. */
interface Measured {
  scores: Record<PrecisionMetric, number>;
  milliseconds: number | undefined;
}

function median(values: number[]): number | undefined {
  return values.sort((a, b) => a - b)[values.length >> 1];
}

async function measure(
  { q, k, v, options }: CalibrationSample,
  recipe: Recipe,
  reference: Float32Array,
  repeats: number,
): Promise<Measured> {
  const all = { ...options, ...recipe };
  using out = attention(q, k, v, all);
  const scores = score(await valuesOf(out), reference);
  const times: number[] = [];
  for (let i = 0; i < repeats; ++i) {
    times.push(await q.device.time(() => void attention(q, k, v, { ...all, out })));
  }
  return { scores, milliseconds: median(times) };
}

// ---- putting together ---------------------------------------------------------------------------------

/** All samples of one layer and time step: of each sample, every recipe. */
interface Pair {
  layer: number;
  timestep: number | null;
  samples: Measured[][];
}

function mean(values: readonly number[]): number | null {
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return Number.isFinite(mean) ? mean : null;
}

function candidatesOf({ samples }: Pair, ladder: readonly Recipe[]): PrecisionCandidate[] {
  return ladder.map((recipe, i) => {
    const measured = samples.map((sample) => sample[i]);
    const times = measured.map(({ milliseconds }) => milliseconds ?? NaN);
    return {
      recipe: recipeName(recipe),
      scores: Object.fromEntries(
        metrics.map((metric) => [metric, mean(measured.map(({ scores }) => scores[metric]))]),
      ) as PrecisionScores,
      milliseconds: mean(times),
    };
  });
}

/** What is known after so many samples. */
class Findings {
  readonly pairs = new Map<string, Pair>();
  readonly layers = new Map<number, LayerShape>();
  device: string | undefined;

  /** Takes a sample's place; refuses one that contradicts those before. */
  pairOf(sample: CalibrationSample, index: number, shape: LayerShape): Pair {
    const { layer, timestep = null, q } = sample, before = this.layers.get(layer);
    this.device ??= q.device.name;
    if (q.device.name !== this.device) {
      const must = `be ${this.device}, as that of the samples before`;
      throw new RangeError(cannot(action, `device of sample ${index}`, must, q.device.name));
    }
    if (before) {
      for (const name of ["heads", "kvHeads", "headDim", "valueDim"] as const) {
        if (shape[name] === before[name]) continue;
        const must = `be ${before[name]}, as in other samples of layer ${layer}`;
        throw new RangeError(cannot(action, `${name} of sample ${index}`, must, shape[name]));
      }
      const steps = [...this.pairs.values()].find((pair) => pair.layer === layer)!.timestep;
      if ((steps === null) !== (timestep === null)) {
        const must = `be ${
          steps === null ? "absent" : "given"
        }, as in other samples of layer ${layer}`;
        throw new TypeError(
          cannot(action, `timestep of sample ${index}`, must, sample.timestep),
        );
      }
    }
    this.layers.set(layer, shape);
    const key = show([layer, timestep]);
    const pair = this.pairs.get(key) ?? { layer, timestep, samples: [] };
    this.pairs.set(key, pair);
    return pair;
  }
}

/**
 * Finds out which precision each layer of a model bears: runs every recipe of a ladder on tensors that were captured
 * from the model, compares the outputs with those of exact attention, and chooses a recipe for each pair of layer
 * and time step.
 *
 * Scores are those of the output in the element type of Q, against flash attention in f32, and where a pair has
 * several samples their mean. With a threshold each pair gets the first recipe that reaches it, or the last one;
 * with a budget the best-scoring pairs get the cheaper recipes. {@linkcode sageAttentionPolicy} and
 * {@linkcode sageAttention2Policy} are the papers' ways to choose.
 *
 * Sources: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958), both on adaptive quantization.
 *
 * @param samples Tensors of a device; in a generator, so that they need not all be in memory: what it declares with
 * `using` is disposed when the next sample is asked for.
 * @param options Ladder, metric, threshold or budget; model, reference and progress.
 * @returns The plan, for {@linkcode attention} and to keep.
 * @throws {TypeError | RangeError} Where an option or a sample is wrong, or samples contradict each other.
 * @throws {UnsupportedError} Where the device lacks a recipe, before any is run.
 *
 * @example
 * ```ts
 * import { calibrate, type CalibrationSample, Device } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 *
 * async function* samples(): AsyncGenerator<CalibrationSample> {
 *   for (const layer of [0, 1]) {
 *     const data = Float32Array.from({ length: 128 * 32 }, (_, i) => Math.sin(i * i * (layer + 1)));
 *     using x = device.tensor(data, [1, 1, 128, 32]); // captured from a model
 *     yield { layer, q: x, k: x, v: x, options: { causal: true } };
 *   }
 * }
 *
 * const plan = await calibrate(samples(), {
 *   ladder: [{ kernel: "sage2-int4" }, { kernel: "sage2", smoothQ: true }, { kernel: "flash" }],
 *   metric: "relativeL1",
 *   threshold: 0.0001,
 * });
 *
 * assertEquals(plan.recipe(1), { kernel: "flash" });
 * ```
 */
export async function calibrate(
  samples: Iterable<CalibrationSample> | AsyncIterable<CalibrationSample>,
  options: CalibrateOptions,
): Promise<PrecisionPlan> {
  checkCalibrateOptions(options);
  const { ladder, metric = "cosine*(1-relativeL1)", threshold, budget, onProgress } = options;
  const { model = {}, reference = "exact", repeats = 3 } = options;
  if (
    typeof samples !== "object" || samples === null ||
    !(Symbol.iterator in samples || Symbol.asyncIterator in samples)
  ) {
    throw new TypeError(cannot(action, "samples", "be iterable", samples));
  }
  const total = options.total ?? (Array.isArray(samples) ? samples.length : undefined);
  const findings = new Findings();
  using exact = new Reference(reference === "exact");
  let done = 0, deviceName = "";
  for await (const sample of samples) {
    const shape = shapeOf(sample, done, model), pair = findings.pairOf(sample, done, shape);
    const { layer, timestep, q, k, v } = sample, own = ownOptions(sample, done);
    for (const recipe of ladder) explain(q, k, v, { ...own, ...recipe });
    deviceName ||= q.device.info.name;
    const expected = await exact.run(sample);
    if (!expected.every(Number.isFinite)) {
      const must = "be finite, or nothing can be compared with it";
      const value = expected.find((value) => !Number.isFinite(value));
      throw new RangeError(cannot(action, `exact attention of sample ${done}`, must, value));
    }
    const measured: Measured[] = [];
    for (const recipe of ladder) measured.push(await measure(sample, recipe, expected, repeats));
    pair.samples.push(measured);
    ++done;
    onProgress?.({ done, total, layer, timestep });
  }
  if (done === 0) throw new RangeError(cannot(action, "samples", "not be empty", []));
  const layers = [...findings.layers.values()].sort((a, b) => a.layer - b.layer);
  if (model.layers !== undefined) {
    const missing = Array.from({ length: model.layers }, (_, i) => i)
      .find((i) => layers[i]?.layer !== i);
    if (missing !== undefined || layers.length !== model.layers) {
      const must = `hold layers 0 to ${model.layers - 1}, all of the model's`;
      throw new RangeError(cannot(action, "samples", must, layers.map(({ layer }) => layer)));
    }
  }

  const pairs = [...findings.pairs.values()]
    .sort((a, b) => a.layer - b.layer || a.timestep! - b.timestep!);
  const candidates = pairs.map((pair) => candidatesOf(pair, ladder));
  const chosen = choose(
    action,
    metric,
    { threshold, budget },
    candidates.map((rungs) =>
      rungs.map(({ scores, milliseconds }) => ({ score: scores[metric], milliseconds }))
    ),
  );
  return PrecisionPlan.fromJSON({
    format: "sage-attention-precision-plan",
    version: 1,
    created: {
      library: buildInfo().version,
      device: `${findings.device}, ${deviceName}`,
      date: new Date().toISOString(),
    },
    model: { name: model.name ?? "", layers },
    metric,
    ...threshold === undefined ? { budget } : { threshold },
    ladder: ladder.map((recipe) => ({ name: recipeName(recipe), recipe })),
    entries: pairs.map(({ layer, timestep, samples }, i) => ({
      layer,
      timestep,
      samples: samples.length,
      chosen: recipeName(ladder[chosen[i]]),
      candidates: candidates[i],
    })),
  });
}
