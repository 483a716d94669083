// Timing on a device, and data to time with.
import { type Device, type FloatDType, fromFloat32, type Tensor } from "../mod.ts";
import type { Stages } from "./format.ts";

/** Middle of some numbers, and how far apart their quartiles are in relation to it. */
export interface Timing {
  ms: number;
  noise: number;
}

/** Median and relative distance of the quartiles. */
export function summarize(samples: readonly number[]): Timing {
  const sorted = [...samples].sort((a, b) => a - b);
  const at = (share: number) => {
    const place = share * (sorted.length - 1), low = Math.floor(place);
    const high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
  };
  const ms = at(0.5);
  return { ms, noise: (at(0.75) - at(0.25)) / ms };
}

/**
 * A call that is timed by the device's own clock. Short ones are timed many at a time, so that launching does not
 * count, each on the next of its sets of buffers.
 */
export class Timed {
  readonly #device: Device;
  readonly #calls: readonly (() => void)[];
  #next = 0;
  #count: number | undefined;

  /** @param calls The same work on one set of buffers each. */
  constructor(device: Device, calls: readonly (() => void)[]) {
    this.#device = device;
    this.#calls = calls;
  }

  #enqueue(count: number): void {
    for (let i = 0; i < count; ++i) this.#calls[this.#next++ % this.#calls.length]();
  }

  /** How many calls make a sample: about a millisecond's, found after a warm-up. */
  async #burst(): Promise<number> {
    if (this.#count === undefined) {
      const few = Math.max(2, this.#calls.length);
      await this.#device.time(() => this.#enqueue(few));
      const ms = await this.#device.time(() => this.#enqueue(few)) / few;
      this.#count = Math.max(1, Math.min(50, Math.ceil(1 / ms)));
    }
    return this.#count;
  }

  /** Milliseconds of one call. */
  async sample(): Promise<number> {
    const count = await this.#burst();
    return await this.#device.time(() => this.#enqueue(count)) / count;
  }

  /** Milliseconds of the stages of one call. */
  async sampleStages(): Promise<Stages> {
    const count = await this.#burst(), sums: Stages = {};
    for (const { name, ms } of await this.#device.trace(() => this.#enqueue(count))) {
      sums[name] = (sums[name] ?? 0) + ms / count;
    }
    return sums;
  }
}

/** A call to measure; with `stages`, its parts too where it has several. */
export interface Subject {
  timed: Timed;
  stages: boolean;
}

/** Milliseconds of a call, sample by sample, and of its stages where they were asked for and are several. */
export interface Samples {
  total: number[];
  stages?: Record<string, number[]>;
}

/** What measuring a call gave. */
export interface Measurement extends Timing {
  stages?: Record<string, Timing>;
}

const leastRounds = 7;

/** One sample of each in turn, so many rounds and until the time is spent: drift meets all of them alike. */
export async function sampleTogether(
  subjects: readonly Subject[],
  rounds: number,
  budgetMs = 0,
): Promise<Samples[]> {
  const found: Samples[] = [];
  for (const { timed, stages } of subjects) {
    await timed.sample();
    const names = stages ? Object.keys(await timed.sampleStages()) : [];
    const several = names.length > 1
      ? { stages: Object.fromEntries(names.map((name): [string, number[]] => [name, []])) }
      : {};
    found.push({ total: [], ...several });
  }
  const began = performance.now();
  for (let i = 0; i < rounds || performance.now() - began < budgetMs * subjects.length; ++i) {
    for (const [j, { timed }] of subjects.entries()) {
      const { total, stages } = found[j];
      total.push(await timed.sample());
      if (!stages) continue;
      for (const [name, ms] of Object.entries(await timed.sampleStages())) stages[name].push(ms);
    }
  }
  return found;
}

/** Medians and noise of samples in turn, at least seven rounds and until the time is spent. */
export async function measureTogether(
  subjects: readonly Subject[],
  budgetMs: number,
): Promise<Measurement[]> {
  const found = await sampleTogether(subjects, leastRounds, budgetMs);
  return found.map(({ total, stages }) => ({
    ...summarize(total),
    ...stages ? { stages: mapValues(stages, summarize) } : {},
  }));
}

function mapValues<A, B>(values: Record<string, A>, map: (value: A) => B): Record<string, B> {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, map(value)]));
}

// ---- data ----------------------------------------------------------------------------------------

const poolSize = 3_000_017; // prime, so that repetitions fall on other channels, rows and heads

function normals(count: number): Float32Array {
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
  );
}

function repeat<T extends Float32Array | Uint16Array>(pool: T, target: T): T {
  let from = Math.floor(Math.random() * poolSize);
  for (let at = 0; at < target.length;) {
    const piece = pool.subarray(from, from + target.length - at);
    target.set(piece, at);
    at += piece.length;
    from = 0;
  }
  return target;
}

/** Makes tensors of normally distributed values; large ones repeat a pool. */
export class RandomTensors {
  readonly #values = normals(poolSize);
  readonly #pools: Partial<Record<FloatDType, Uint16Array>> = {};

  constructor(readonly device: Device) {}

  #bits(dtype: "bf16" | "f16"): Uint16Array {
    return this.#pools[dtype] ??= new Uint16Array(fromFloat32(this.#values, dtype).buffer);
  }

  make<D extends FloatDType>(shape: readonly number[], dtype: D): Tensor<D> {
    const count = shape.reduce((a, b) => a * b);
    const data = dtype === "f32"
      ? repeat(this.#values, new Float32Array(count))
      : repeat(this.#bits(dtype), new Uint16Array(count));
    return this.device.tensor(data, shape, { dtype }) as Tensor as Tensor<D>;
  }
}
