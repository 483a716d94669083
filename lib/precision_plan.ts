// Precision plans: which recipe each layer and time step of a model runs, as a document, and following it.
import { cannot, checkInteger, checkOneOf, checkOptions, list, show } from "./check.ts";
import {
  type AttentionOptions,
  checkAttentionOptions,
  kernels,
  type LseOption,
  optionNames,
} from "./options.ts";
import { drawPlan } from "./precision_picture.ts";
import {
  checkChoice,
  type CostBudget,
  errorOf,
  metrics,
  type PrecisionMetric,
  type PrecisionScores,
  type ShareBudget,
} from "./precision_policy.ts";
import { type PlanOptions, type Recipe, recipeNames } from "./recipe.ts";
import type { Shape } from "./tensor.ts";

// ---- the document -------------------------------------------------------------------------------------

/** What a recipe reached at one layer and time step: the means over the samples there. */
export interface PrecisionCandidate {
  /** The recipe: a name of {@linkcode PrecisionPlanDocument.ladder}. */
  recipe: string;
  /** Every measure of its output. */
  scores: PrecisionScores;
  /** How long one call took on the device; `null` where that was not measured. */
  milliseconds: number | null;
}

/** What was found for one layer and time step. */
export interface PrecisionEntry {
  /** The layer. */
  layer: number;
  /** The time step; `null`: the entry is for every one. */
  timestep: number | null;
  /** How many samples there were. */
  samples: number;
  /** The recipe to run: a name of {@linkcode PrecisionPlanDocument.ladder}. */
  chosen: string;
  /** Every recipe, in the order of the ladder. */
  candidates: readonly PrecisionCandidate[];
}

/** The tensors that a layer of the model attends with. */
export interface LayerShape {
  /** The layer. */
  layer: number;
  /** Heads of Q. */
  heads: number;
  /** Heads of K and V. */
  kvHeads: number;
  /** Channels of Q and K. */
  headDim: number;
  /** Channels of V. */
  valueDim: number;
}

/** A recipe and the name that the plan calls it by. */
export interface PrecisionRung {
  /** The name. */
  name: string;
  /** Options of {@linkcode attention}. */
  recipe: Recipe;
}

/** A precision plan as JSON. */
export interface PrecisionPlanDocument {
  /** Says what it is. */
  format: "sage-attention-precision-plan";
  /** Version of the format. */
  version: 1;
  /** What made it. */
  created: {
    /** Version of the library. */
    library: string;
    /** The device that it ran on. */
    device: string;
    /** When, in the form of ISO 8601. */
    date: string;
  };
  /** What it is for. */
  model: {
    /** Its name; empty where none was given. */
    name: string;
    /** Every layer, in ascending order. */
    layers: readonly LayerShape[];
  };
  /** What scores were compared by. */
  metric: PrecisionMetric;
  /** The score that was good enough; this or a budget. */
  threshold?: number;
  /** What could be spent; this or a threshold. */
  budget?: ShareBudget | CostBudget;
  /** The recipes, cheapest first. */
  ladder: readonly PrecisionRung[];
  /** Every pair of layer and time step, in ascending order. */
  entries: readonly PrecisionEntry[];
}

/** What a model is, as far as it is known; what is absent is not compared. */
export interface ModelSignature {
  /** Its name. */
  name?: string;
  /** How many layers the plan has. */
  layers?: number;
  /** Heads of Q in every layer. */
  heads?: number;
  /** Heads of K and V in every layer. */
  kvHeads?: number;
  /** Channels of Q and K in every layer. */
  headDim?: number;
  /** Channels of V in every layer. */
  valueDim?: number;
}

/** What running recipes would take and reach, over all pairs of layer and time step. */
export interface PrecisionTotals {
  /** Milliseconds of one call of each; `null` where that was not measured. */
  milliseconds: number | null;
  /** The mean score, in the metric of the plan; `null` where one is not finite. */
  mean: number | null;
  /** The worst score; `null` where it is not finite. */
  worst: number | null;
}

/** What a plan gains. */
export interface PrecisionSummary {
  /** As the plan says. */
  chosen: PrecisionTotals;
  /** With the first recipe everywhere. */
  cheapest: PrecisionTotals;
  /** With the last recipe everywhere. */
  best: PrecisionTotals;
  /** How many pairs run each recipe, by its name. */
  counts: Record<string, number>;
}

const format = "sage-attention-precision-plan";
const version = 1;
const reading = "read a precision plan";

/** A recipe's name: its kernel, then what else it says. */
export function recipeName({ kernel, ...rest }: Recipe): string {
  const others = Object.entries(rest).filter(([, value]) => value !== undefined);
  return [
    kernel,
    ...others.map(([name, value]) =>
      value === true ? name : value === false ? `no ${name}` : `${name} ${value}`
    ),
  ].join(", ");
}

/** Refuses what is no recipe of any call; some recipes need a causal one. */
export function checkRecipe(action: string, recipe: Recipe): void {
  checkOptions(action, recipe, recipeNames);
  checkAttentionOptions(action, { causal: true, ...recipe }, optionNames.attention);
  if (recipe.kernel === undefined || recipe.kernel === "auto" as string) {
    throw new TypeError(cannot(action, "kernel", `be given, and not be "auto"`, recipe.kernel));
  }
}

// ---- reading ------------------------------------------------------------------------------------------

type Unknown = Record<string, unknown>;

/** A value of a document, and where it stands: refuses what should not be there in the words of that place. */
class Reader {
  constructor(readonly path: string, readonly value: unknown) {}

  /** Refuses it. */
  refuse(must: string): never {
    const Refusal = this.value === undefined || this.value === null ? TypeError : RangeError;
    throw new Refusal(cannot(reading, this.path, must, this.value));
  }

  /** A property, or an element. */
  at(key: string | number): Reader {
    const path = typeof key === "number"
      ? `${this.path}[${key}]`
      : this.path === ""
      ? key
      : `${this.path}.${key}`;
    return new Reader(path, (this.value as Unknown)[key]);
  }

  #type(good: boolean, must: string): void {
    if (!good) throw new TypeError(cannot(reading, this.path || "the document", must, this.value));
  }

  /** Itself, as an object that has no other properties. */
  object(known: readonly string[]): Reader {
    const { value } = this;
    this.#type(
      typeof value === "object" && value !== null && !Array.isArray(value),
      "be an object",
    );
    for (const name of Object.keys(value as Unknown)) {
      if (!known.includes(name)) {
        throw new TypeError(
          cannot(
            reading,
            this.at(name).path,
            `be absent, as known are ${list(known)}`,
            this.at(name).value,
          ),
        );
      }
    }
    return this;
  }

  /** Its elements. */
  array(): Reader[] {
    this.#type(Array.isArray(this.value), "be an array");
    const { length } = this.value as unknown[];
    if (length === 0) throw new RangeError(cannot(reading, this.path, "not be empty", this.value));
    return Array.from({ length }, (_, i) => this.at(i));
  }

  text(): string {
    this.#type(typeof this.value === "string", "be a string");
    return this.value as string;
  }

  oneOf<T>(allowed: readonly T[]): T {
    return checkOneOf(reading, this.path, this.value as T, allowed);
  }

  whole(low: number): number {
    checkInteger(reading, this.path, this.value as number, low);
    return this.value as number;
  }

  /** A finite number, or null. */
  measure(low = -Infinity): number | null {
    const { value } = this;
    if (value === null) return value;
    const must = low === 0 ? "be a number of at least 0, or null" : "be a finite number or null";
    this.#type(typeof value === "number", must);
    if (!Number.isFinite(value) || value as number < low) this.refuse(must);
    return value as number;
  }
}

function readLayer(reader: Reader): LayerShape {
  const names = ["layer", "heads", "kvHeads", "headDim", "valueDim"] as const;
  reader.object(names);
  const [layer, heads, kvHeads, headDim, valueDim] = names.map((name) =>
    reader.at(name).whole(name === "layer" ? 0 : 1)
  );
  if (heads % kvHeads !== 0) reader.at("heads").refuse(`be a multiple of kvHeads (${kvHeads})`);
  return { layer, heads, kvHeads, headDim, valueDim };
}

function readRung(reader: Reader): PrecisionRung {
  reader.object(["name", "recipe"]);
  const inside = reader.at("recipe").object(recipeNames);
  inside.at("kernel").oneOf(kernels);
  const recipe = { ...inside.value as Recipe };
  checkRecipe(`read ${inside.path} of a precision plan`, recipe);
  const name = reader.at("name").text();
  if (name !== recipeName(recipe)) {
    reader.at("name").refuse(`be ${show(recipeName(recipe))}, as its recipe says`);
  }
  return { name, recipe };
}

function readCandidate(reader: Reader, name: string): PrecisionCandidate {
  reader.object(["recipe", "scores", "milliseconds"]);
  const recipe = reader.at("recipe").oneOf([name]);
  const inside = reader.at("scores").object(metrics);
  const scores = Object.fromEntries(
    metrics.map((metric) => [metric, inside.at(metric).measure()]),
  ) as PrecisionScores;
  return { recipe, scores, milliseconds: reader.at("milliseconds").measure(0) };
}

function readEntry(reader: Reader, ladder: readonly PrecisionRung[]): PrecisionEntry {
  reader.object(["layer", "timestep", "samples", "chosen", "candidates"]);
  const names = ladder.map(({ name }) => name), candidates = reader.at("candidates");
  const read = candidates.array();
  if (read.length !== names.length) {
    candidates.refuse(`have length ${names.length}, as ladder has`);
  }
  return {
    layer: reader.at("layer").whole(0),
    timestep: reader.at("timestep").measure(),
    samples: reader.at("samples").whole(1),
    chosen: reader.at("chosen").oneOf(names),
    candidates: read.map((candidate, i) => readCandidate(candidate, names[i])),
  };
}

/** Refuses entries whose layers are not the model's, and pairs that are there twice or out of order. */
function checkEntries(
  reader: Reader,
  entries: readonly PrecisionEntry[],
  layers: readonly LayerShape[],
): void {
  const known = layers.map(({ layer }) => layer);
  entries.forEach(({ layer, timestep }, i) => {
    const here = reader.at(i), before = entries[i - 1];
    if (!known.includes(layer)) {
      here.at("layer").refuse(`be a layer of model.layers (${known.join(", ")})`);
    }
    if (before === undefined || before.layer < layer) return;
    if (before.layer > layer) here.at("layer").refuse(`not be less than that of the entry before`);
    if (before.timestep === null || timestep === null || before.timestep >= timestep) {
      here.at("timestep").refuse(
        "be greater than that of the entry before, or be null in a layer's only entry",
      );
    }
  });
  const missing = known.find((layer) => !entries.some((entry) => entry.layer === layer));
  if (missing !== undefined) {
    throw new RangeError(
      cannot(reading, "entries", `have one for every layer of model.layers`, `none for ${missing}`),
    );
  }
}

function readDocument(value: unknown): PrecisionPlanDocument {
  const root = new Reader("", value).object([
    "format",
    "version",
    "created",
    "model",
    "metric",
    "threshold",
    "budget",
    "ladder",
    "entries",
  ]);
  root.at("format").oneOf([format]);
  if (root.at("version").value !== version) {
    root.at("version").refuse(`be ${version}, which this library reads`);
  }
  const created = root.at("created").object(["library", "device", "date"]);
  const model = root.at("model").object(["name", "layers"]);
  const layers = model.at("layers").array().map(readLayer);
  layers.forEach(({ layer }, i) => {
    if (i > 0 && layer <= layers[i - 1].layer) {
      model.at("layers").at(i).at("layer").refuse("be greater than that of the layer before");
    }
  });
  const ladder = root.at("ladder").array().map(readRung);
  ladder.forEach(({ name }, i) => {
    if (ladder.findIndex((rung) => rung.name === name) !== i) {
      root.at("ladder").at(i).at("name").refuse("differ from those before");
    }
  });
  const { threshold, budget } = value as PrecisionPlanDocument;
  checkChoice(reading, { threshold, budget }, ladder.length);
  const entries = root.at("entries").array().map((entry) => readEntry(entry, ladder));
  checkEntries(root.at("entries"), entries, layers);
  return {
    format,
    version,
    created: {
      library: created.at("library").text(),
      device: created.at("device").text(),
      date: created.at("date").text(),
    },
    model: { name: model.at("name").text(), layers },
    metric: root.at("metric").oneOf(metrics),
    ...threshold === undefined ? { budget: structuredClone(budget) } : { threshold },
    ladder,
    entries,
  };
}

function freeze<T>(value: T): T {
  if (typeof value === "object" && value !== null) {
    Object.values(value).forEach(freeze);
    Object.freeze(value);
  }
  return value;
}

// ---- the plan -----------------------------------------------------------------------------------------

/**
 * Which recipe each layer and time step of a model runs; {@linkcode calibrate} makes it, {@linkcode attention}
 * follows it. It never changes, and is kept as JSON: `JSON.stringify(plan)` and {@linkcode PrecisionPlan.parse}.
 *
 * Time steps are those that were calibrated: for another one the nearest counts, of two equally near ones the
 * smaller. A layer that was calibrated without time steps has one entry, for all.
 *
 * @example
 * ```ts
 * import { attention, calibrate, Device, PrecisionPlan, sageAttentionPolicy } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * const data = Float32Array.from({ length: 2 * 64 * 16 }, (_, i) => Math.sin(i * i));
 * using x = device.tensor(data, [1, 2, 64, 16]);
 * const made = await calibrate([{ layer: 0, q: x, k: x, v: x }], sageAttentionPolicy());
 *
 * const plan = PrecisionPlan.parse(JSON.stringify(made), { layers: 1, headDim: 16 });
 * using o = attention(x, x, x, { plan, layer: 0, causal: true });
 *
 * assertEquals(plan.recipe(0), made.recipe(0));
 * assertEquals(o.shape, x.shape);
 * ```
 */
export class PrecisionPlan {
  /** What made it. */
  readonly created: PrecisionPlanDocument["created"];
  /** What it is for. */
  readonly model: PrecisionPlanDocument["model"];
  /** What scores were compared by. */
  readonly metric: PrecisionMetric;
  /** The recipes, cheapest first. */
  readonly ladder: readonly PrecisionRung[];
  /** Every pair of layer and time step, in ascending order. */
  readonly entries: readonly PrecisionEntry[];
  readonly #document: PrecisionPlanDocument;
  readonly #layers: ReadonlyMap<number, readonly PrecisionEntry[]>;
  readonly #recipes: ReadonlyMap<string, Recipe>;

  private constructor(document: PrecisionPlanDocument) {
    this.#document = document;
    this.#layers = Map.groupBy(document.entries, ({ layer }) => layer);
    this.#recipes = new Map(document.ladder.map(({ name, recipe }) => [name, recipe]));
    ({
      created: this.created,
      model: this.model,
      metric: this.metric,
      ladder: this.ladder,
      entries: this.entries,
    } = document);
    Object.freeze(this);
  }

  /**
   * Reads a plan.
   *
   * @param text JSON, as `JSON.stringify(plan)` gives it.
   * @param model What the plan must be for; what is absent is not compared.
   * @returns The plan.
   * @throws {TypeError | RangeError} Where the text is no such JSON, or the plan is of another version or for
   * another model; the message names the place in the document.
   */
  static parse(text: string, model?: ModelSignature): PrecisionPlan {
    if (typeof text !== "string") throw new TypeError(cannot(reading, "text", "be a string", text));
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (error) {
      throw new RangeError(cannot(reading, "text", "be JSON", (error as Error).message));
    }
    return PrecisionPlan.fromJSON(value, model);
  }

  /**
   * Makes a plan of what `JSON.parse` gave.
   *
   * @param value The document; it is copied.
   * @param model What the plan must be for; what is absent is not compared.
   * @returns The plan.
   * @throws {TypeError | RangeError} As {@linkcode PrecisionPlan.parse} does.
   */
  static fromJSON(value: unknown, model: ModelSignature = {}): PrecisionPlan {
    const document = freeze(readDocument(value));
    checkModel(document.model, model);
    return new PrecisionPlan(document);
  }

  /** The document. */
  toJSON(): PrecisionPlanDocument {
    return this.#document;
  }

  /**
   * What the plan knows of a layer and time step.
   *
   * @param layer The layer.
   * @param timestep The time step: of those in the plan the nearest counts, of two equally near ones the smaller.
   * @returns The entry.
   * @throws {TypeError | RangeError} Where the plan lacks the layer, or has time steps there and none is given.
   */
  entry(layer: number, timestep?: number): PrecisionEntry {
    const action = "follow a precision plan";
    const entries = this.#layers.get(layer);
    if (!entries) {
      checkInteger(action, "layer", layer, 0);
      checkOneOf(action, "layer", layer, [...this.#layers.keys()]);
    }
    const steps = entries!.map((entry) => entry.timestep);
    const needed = steps[0] !== null;
    const must = needed
      ? `be a finite number, as the plan has time steps for layer ${layer}`
      : "be a finite number or absent";
    if (timestep === undefined ? needed : typeof timestep !== "number") {
      throw new TypeError(cannot(action, "timestep", must, timestep));
    }
    if (timestep !== undefined && !Number.isFinite(timestep)) {
      throw new RangeError(cannot(action, "timestep", must, timestep));
    }
    if (!needed) return entries![0];
    let nearest = 0;
    const between = (i: number) => steps[i]! / 2 + steps[i + 1]! / 2;
    while (nearest + 1 < steps.length && timestep! > between(nearest)) ++nearest;
    return entries![nearest];
  }

  /**
   * What to run.
   *
   * @param layer The layer.
   * @param timestep The time step: of those in the plan the nearest counts, of two equally near ones the smaller.
   * @returns Options of {@linkcode attention}.
   * @throws {TypeError | RangeError} Where the plan lacks the layer, or has time steps there and none is given.
   */
  recipe(layer: number, timestep?: number): Recipe {
    return this.#recipes.get(this.entry(layer, timestep).chosen)!;
  }

  /**
   * Says what the plan gains over the first and the last recipe everywhere.
   *
   * @returns Times and scores, as they were measured.
   */
  summary(): PrecisionSummary {
    const { entries, metric, ladder } = this;
    const total = (pick: (entry: PrecisionEntry) => PrecisionCandidate): PrecisionTotals => {
      const picked = entries.map(pick);
      const times = picked.map(({ milliseconds }) => milliseconds);
      const scores = picked.map(({ scores }) => scores[metric]);
      const known = scores.filter((score) => score !== null);
      const whole = known.length === scores.length;
      return {
        milliseconds: times.includes(null) ? null : times.reduce((a, b) => a! + b!, 0),
        mean: whole ? known.reduce((a, b) => a + b, 0) / known.length : null,
        worst: whole
          ? known.reduce((a, b) => errorOf(metric, a) > errorOf(metric, b) ? a : b)
          : null,
      };
    };
    const counts = ladder.map(({ name }): [string, number] => [
      name,
      entries.filter(({ chosen }) => chosen === name).length,
    ]);
    return {
      chosen: total(chosenOf),
      cheapest: total(({ candidates }) => candidates[0]),
      best: total(({ candidates }) => candidates[candidates.length - 1]),
      counts: Object.fromEntries(counts),
    };
  }

  /**
   * Draws the plan: layers from top to bottom, time steps from left to right, a colour for each recipe, the
   * stronger the larger the error is.
   *
   * @returns An SVG document, readable on light and on dark ground.
   */
  toSVG(): string {
    return drawPlan(this.#document);
  }

  /** What it is for and what it runs, in a line. */
  toString(): string {
    const { counts } = this.summary();
    const shares = Object.entries(counts).map(([name, count]) => `${count} × ${name}`);
    return `PrecisionPlan for ${this.model.name || "a model"}: ${shares.join("; ")}`;
  }
}

/** The candidate that an entry chose. */
export function chosenOf({ chosen, candidates }: PrecisionEntry): PrecisionCandidate {
  return candidates.find(({ recipe }) => recipe === chosen)!;
}

/** Refuses a plan for another model. */
function checkModel(
  { name, layers }: PrecisionPlanDocument["model"],
  expected: ModelSignature,
): void {
  checkOptions("compare models", expected, [
    "name",
    "layers",
    "heads",
    "kvHeads",
    "headDim",
    "valueDim",
  ]);
  const { name: expectedName, layers: count, ...lengths } = expected;
  if (expectedName !== undefined && expectedName !== name) {
    throw new RangeError(cannot(reading, "model.name", `be ${show(expectedName)}`, name));
  }
  if (count !== undefined && count !== layers.length) {
    throw new RangeError(cannot(reading, "model.layers", `have length ${count}`, layers.length));
  }
  for (const [length, value] of Object.entries(lengths) as [keyof typeof lengths, number][]) {
    layers.forEach((layer, i) => {
      if (value !== undefined && layer[length] !== value) {
        throw new RangeError(
          cannot(reading, `model.layers[${i}].${length}`, `be ${value}`, layer[length]),
        );
      }
    });
  }
}

// ---- following it -------------------------------------------------------------------------------------

/** Options without a plan, and what the plan asked for. */
export interface Followed<T> {
  options: Omit<T, keyof PlanOptions>;
  /** What the tensors must be; absent where there is no plan. */
  layer?: LayerShape;
  /** Why this recipe, in one sentence; absent where there is no plan. */
  reason?: string;
}

/** Puts a plan's recipe in the place of plan, layer and time step; refuses options that it contradicts. */
export function followPlan<T extends AttentionOptions & LseOption>(
  action: string,
  given: T,
): Followed<T> {
  if (given?.plan === undefined) {
    for (const name of ["layer", "timestep"] as const) {
      const value = given?.[name];
      if (value === undefined) continue;
      throw new TypeError(cannot(action, name, "be absent where there is no plan", value));
    }
    return { options: given };
  }
  const { plan, layer, timestep, ...options } = given;
  if (!(plan instanceof PrecisionPlan)) {
    throw new TypeError(cannot(action, "plan", "be a PrecisionPlan", plan));
  }
  const entry = plan.entry(layer as number, timestep),
    recipe = plan.recipe(layer as number, timestep);
  for (const name of recipeNames as (keyof Recipe)[]) {
    const value = options[name];
    if (value === undefined || value === "auto" || value === recipe[name]) continue;
    const must = recipe[name] === undefined ? "be absent" : `be absent or ${show(recipe[name])}`;
    throw new TypeError(
      cannot(
        action,
        `${name} beside a plan`,
        `${must}, as the plan says for layer ${layer}`,
        value,
      ),
    );
  }
  const score = chosenOf(entry).scores[plan.metric];
  return {
    options: { ...options, ...recipe },
    layer: plan.model.layers.find((one) => one.layer === layer)!,
    reason:
      `the precision plan${plan.model.name && ` of ${plan.model.name}`} says ${entry.chosen} ` +
      `for layer ${layer}${entry.timestep === null ? "" : ` at time step ${entry.timestep}`}, ` +
      `where its ${plan.metric} was ${
        score === null ? "not finite" : Number(score.toPrecision(5))
      }`,
  };
}

/** Refuses tensors that are not those of the plan's layer; shapes are [batch, heads, tokens, channels]. */
export function checkLayer(
  action: string,
  { layer, heads, kvHeads, headDim, valueDim }: LayerShape,
  q: Shape,
  v: Shape,
): void {
  const lengths: [string, number, number][] = [
    ["heads of q", q[1], heads],
    ["heads of k", v[1], kvHeads],
    ["channels of q", q[3], headDim],
    ["channels of v", v[3], valueDim],
  ];
  for (const [what, length, expected] of lengths) {
    if (length === expected) continue;
    throw new RangeError(
      cannot(action, what, `be ${expected}, as the plan says for layer ${layer}`, length),
    );
  }
}
