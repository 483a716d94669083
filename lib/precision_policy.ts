// Choosing recipes: what scores mean, and which rung of a ladder each layer and time step gets for a threshold or budget.
import { cannot, checkOptions } from "./check.ts";
import { cosine, relativeL1, rmse } from "./metrics.ts";
import type { Recipe } from "./recipe.ts";

/**
 * How far an output O′ is from the reference O.
 *
 * | metric | formula | best | source |
 * |---|---|---|---|
 * | `cosine` | {@linkcode cosine} | 1 | SageAttention's policy |
 * | `relativeL1` | {@linkcode relativeL1} | 0 | |
 * | `rmse` | {@linkcode rmse} | 0 | |
 * | `cosine*(1-relativeL1)` | the product of both | 1 | SageAttention2's policy |
 */
export type PrecisionMetric = "cosine" | "relativeL1" | "rmse" | "cosine*(1-relativeL1)";

/** Every measure of one recipe; `null` where it is not finite. */
export type PrecisionScores = Readonly<Record<PrecisionMetric, number | null>>;

/** Runs the best-scoring pairs of layer and time step with the cheaper recipes. */
export interface ShareBudget {
  /**
   * The share of all pairs that each recipe of the ladder gets, but for the last, which gets the rest: of two
   * recipes `[0.7]`. The pairs that score best with the first recipe get it, then of the others those that score
   * best with the second, and so on. A share of a pair does not count.
   */
  shares: readonly number[];
}

/** Spends a cost where it lowers the error most. */
export interface CostBudget {
  /** The most that all pairs may cost, as a share of the cost of the last recipe everywhere. */
  cost: number;
  /** What each recipe of the ladder costs, in any unit. Default: the milliseconds that were measured, pair by pair. */
  costs?: readonly number[];
}

/** Which recipes to choose between, and how. */
export interface PrecisionPolicy {
  /** The recipes, cheapest first. The last one is what a pair gets that no other recipe is good enough for. */
  ladder: readonly Recipe[];
  /** What scores are compared by. Default: `"cosine*(1-relativeL1)"`. */
  metric?: PrecisionMetric;
  /** The score that is good enough: each pair gets the first recipe that reaches it. This or a budget. */
  threshold?: number;
  /** How many pairs may run the cheaper recipes, or what all may cost. This or a threshold. */
  budget?: ShareBudget | CostBudget;
}

// ---- presets ------------------------------------------------------------------------------------------

/**
 * SageAttention's policy: a layer runs `sage1-int8` where its cosine similarity is at least 99.8 %, else `sage1`.
 *
 * Source: SageAttention (arXiv 2410.02367), section 4.5.
 *
 * @returns A policy for {@linkcode calibrate}.
 *
 * @example
 * ```ts
 * import { sageAttentionPolicy } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(sageAttentionPolicy().threshold, 0.998);
 * ```
 */
export function sageAttentionPolicy(): PrecisionPolicy {
  return {
    ladder: [{ kernel: "sage1-int8" }, { kernel: "sage1" }],
    metric: "cosine",
    threshold: 0.998,
  };
}

/**
 * SageAttention2's policy: the pairs of layer and time step whose mean of cosine · (1 − relative L1) is worst with
 * `sage2-int4` run `sage2`, of 8 bits, and the rest 4 bits.
 *
 * Source: SageAttention2 (arXiv 2411.10958), adaptive quantization.
 *
 * @param options `eightBitShare`: how many run 8 bits. Default: 0.3, as for Llama 3.1.
 * @returns A policy for {@linkcode calibrate}.
 * @throws {TypeError | RangeError} Where the share is not from 0 to 1.
 *
 * @example
 * ```ts
 * import { sageAttention2Policy } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(sageAttention2Policy({ eightBitShare: 0.25 }).budget, { shares: [0.75] });
 * ```
 */
export function sageAttention2Policy(
  options: { eightBitShare?: number } = {},
): PrecisionPolicy {
  const action = "make a policy";
  checkOptions(action, options, ["eightBitShare"]);
  const { eightBitShare = 0.3 } = options;
  checkFraction(action, "eightBitShare", eightBitShare);
  return {
    ladder: [{ kernel: "sage2-int4" }, { kernel: "sage2" }],
    metric: "cosine*(1-relativeL1)",
    budget: { shares: [1 - eightBitShare] },
  };
}

// ---- scores -------------------------------------------------------------------------------------------

/** Every metric. */
export const metrics: readonly PrecisionMetric[] = [
  "cosine",
  "relativeL1",
  "rmse",
  "cosine*(1-relativeL1)",
];

/** Every measure of an output; of such as are not finite, NaN or infinity. */
export function score(
  actual: ArrayLike<number>,
  reference: ArrayLike<number>,
): Record<PrecisionMetric, number> {
  const similarity = cosine(actual, reference), distance = relativeL1(actual, reference);
  return {
    cosine: similarity,
    relativeL1: distance,
    rmse: rmse(actual, reference),
    "cosine*(1-relativeL1)": similarity * (1 - distance),
  };
}

/** How far a score is from the best there is: 0 is best, and what is not finite is infinitely far. */
export function errorOf(metric: PrecisionMetric, score: number | null): number {
  if (score === null) return Infinity;
  return metric === "relativeL1" || metric === "rmse" ? score : 1 - score;
}

// ---- judging policies ---------------------------------------------------------------------------------

function checkNumber(
  action: string,
  what: string,
  value: number,
  must: string,
  good: (value: number) => boolean,
): void {
  if (typeof value !== "number") throw new TypeError(cannot(action, what, must, value));
  if (!good(value)) throw new RangeError(cannot(action, what, must, value));
}

function checkFraction(action: string, what: string, value: number): void {
  checkNumber(action, what, value, "be a number from 0 to 1", (one) => one >= 0 && one <= 1);
}

function checkLength(action: string, what: string, value: readonly number[], length: number): void {
  if (!Array.isArray(value)) throw new TypeError(cannot(action, what, "be an array", value));
  if (value.length !== length) {
    throw new RangeError(cannot(action, what, `have length ${length} for this ladder`, value));
  }
}

/** What says how to choose: a threshold or a budget. */
export type Choice = Pick<PrecisionPolicy, "threshold" | "budget">;

/** Refuses a choice that is none or does not fit a ladder of so many rungs. */
export function checkChoice(action: string, { threshold, budget }: Choice, rungs: number): void {
  if ((threshold === undefined) === (budget === undefined)) {
    const must = "be given, and not both";
    throw new TypeError(cannot(action, "threshold or budget", must, [threshold, budget]));
  }
  if (budget === undefined) {
    checkNumber(action, "threshold", threshold!, "be a finite number", Number.isFinite);
  } else if (typeof budget === "object" && budget !== null && "shares" in budget) {
    checkOptions(`${action} with budget`, budget, ["shares"]);
    const { shares } = budget;
    checkLength(action, "budget.shares", shares, rungs - 1);
    shares.forEach((share, i) => checkFraction(action, `budget.shares[${i}]`, share));
    const sum = shares.reduce((a, b) => a + b, 0);
    if (sum > 1 + 1e-9) {
      throw new RangeError(cannot(action, "the sum of budget.shares", "be at most 1", sum));
    }
  } else {
    checkOptions(`${action} with budget`, budget, ["cost", "costs", "shares"]);
    const { cost, costs } = budget;
    const positive = (one: number) => one > 0 && one < Infinity;
    checkNumber(action, "budget.cost", cost, "be a positive, finite number", positive);
    if (costs === undefined) return;
    checkLength(action, "budget.costs", costs, rungs);
    costs.forEach((one, i) => {
      checkNumber(action, `budget.costs[${i}]`, one, "be a positive, finite number", positive);
      if (i > 0 && one < costs[i - 1]) {
        const must = `be at least budget.costs[${i - 1}], as the cheapest recipe comes first`;
        throw new RangeError(cannot(action, `budget.costs[${i}]`, must, one));
      }
    });
  }
}

// ---- choosing -----------------------------------------------------------------------------------------

/** One recipe at one layer and time step. */
export interface Candidate {
  /** Its score in the metric that counts. */
  score: number | null;
  /** How long one call took; `null` where that was not measured. */
  milliseconds: number | null;
}

/** Which rung of the ladder each pair of layer and time step gets. */
export function choose(
  action: string,
  metric: PrecisionMetric,
  { threshold, budget }: Choice,
  pairs: readonly (readonly Candidate[])[],
): number[] {
  const errors = pairs.map((rungs) => rungs.map(({ score }) => errorOf(metric, score)));
  if (budget === undefined) {
    const enough = errorOf(metric, threshold!);
    return errors.map((rungs) => {
      const first = rungs.findIndex((error) => error <= enough);
      return first < 0 ? rungs.length - 1 : first;
    });
  }
  if ("shares" in budget) return chooseByShares(budget.shares, errors);
  const costs = budget.costs
    ? pairs.map(() => budget.costs!)
    : pairs.map((rungs) => rungs.map(({ milliseconds }) => milliseconds!));
  return chooseByCost(action, budget.cost, errors, costs);
}

function chooseByShares(shares: readonly number[], errors: readonly number[][]): number[] {
  const chosen = errors.map(() => shares.length);
  let left = errors.map((_, pair) => pair);
  shares.forEach((share, rung) => {
    const count = Math.floor(share * errors.length + 1e-9);
    left.sort((a, b) => compare(errors[a][rung], errors[b][rung]) || a - b);
    for (const pair of left.slice(0, count)) chosen[pair] = rung;
    left = left.slice(count);
  });
  return chosen;
}

/** Also where both are infinite. */
function compare(a: number, b: number): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** From one rung to a dearer one that is better. */
interface Step {
  pair: number;
  from: number;
  to: number;
  cost: number;
  gain: number; // of error for each unit of cost
}

/** Starts with the cheapest everywhere and takes the steps up that gain most for their cost, as far as that reaches. */
function chooseByCost(
  action: string,
  share: number,
  errors: readonly number[][],
  costs: readonly (readonly number[])[],
): number[] {
  const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
  const dearest = sum(costs.map((rungs) => rungs[rungs.length - 1]));
  const chosen = costs.map((rungs) => rungs.indexOf(Math.min(...rungs)));
  const least = sum(chosen.map((rung, pair) => costs[pair][rung]));
  let left = share * dearest * (1 + 1e-9) - least;
  if (left < 0) {
    const must = `be at least ${(least / dearest).toPrecision(3)}, which the cheapest recipes cost`;
    throw new RangeError(cannot(action, "budget.cost", must, share));
  }
  const steps = errors.flatMap((_, pair) =>
    steepest(pair, chosen[pair], errors[pair], costs[pair])
  );
  steps.sort((a, b) => compare(b.gain, a.gain));
  for (const { pair, from, to, cost } of steps) {
    if (chosen[pair] !== from || cost > left) continue;
    chosen[pair] = to;
    left -= cost;
  }
  return chosen;
}

/** The steps of one pair from its cheapest rung to its best, each the one that gains most: gains only fall. */
function steepest(
  pair: number,
  cheapest: number,
  errors: readonly number[],
  costs: readonly number[],
): Step[] {
  const steps: Step[] = [];
  for (let from = cheapest;;) {
    let best: Step | undefined;
    for (let to = 0; to < errors.length; ++to) {
      if (!(errors[to] < errors[from])) continue;
      const cost = costs[to] - costs[from], gain = (errors[from] - errors[to]) / cost;
      const order = best
        ? compare(best.gain, gain) || compare(cost, best.cost) ||
          compare(errors[to], errors[best.to])
        : -1;
      if (order < 0) best = { pair, from, to, cost, gain };
    }
    if (!best) return steps;
    best.gain = Math.min(best.gain, steps.at(-1)?.gain ?? Infinity); // despite rounding
    steps.push(best);
    from = best.to;
  }
}
