// What the bench files share: a bench whose time is the device's, and what is printed of it.
import { Device } from "../mod.ts";
import { summarize, type Timing } from "./measure.ts";

/** Whether few and short runs were asked for. */
export const quick = Deno.args.includes("--quick");

/** Samples of a bench. */
export const rounds = quick ? 7 : 11;

/** Whether bench/run.ts shows what comes, so that Deno's own table is not to be seen. */
const lines = Deno.args.includes("--lines");

/** To stderr, as stdout is Deno's; and directly, as Deno withholds what a bench logs where it writes JSON. */
export function say(line: string): void {
  Deno.stderr.writeSync(new TextEncoder().encode(line + "\n"));
}

/** The first GPU, else the CPU; closed when the file is done. */
export function openDevice(): Device {
  const device = Device.open();
  globalThis.addEventListener("unload", () => device.dispose());
  return device;
}

/** One entry of a group. */
export interface Entry {
  group: string;
  name: string;
  baseline?: boolean;
  /** Milliseconds of one call by the device's clock, in samples; asked for when the bench runs. */
  samples(): Promise<readonly number[]>;
  /** Says how fast that is. */
  speed(ms: number): string;
}

function spin(ms: number): void {
  const end = performance.now() + ms;
  while (performance.now() < end);
}

const baselines = new Map<string, number>();
let shownGroup = "";

function report({ group, name, baseline, speed }: Entry, { ms, noise }: Timing): void {
  if (baseline) baselines.set(group, ms);
  if (group !== shownGroup) say(`\n${group}`);
  shownGroup = group;
  const reference = baselines.get(group);
  const ratio = reference === undefined ? "" : `${(reference / ms).toFixed(2)} ×`;
  const spread = `±${(50 * noise).toFixed(1)} %`;
  say(
    `  ${name.padEnd(28)} ${ms.toPrecision(4).padStart(9)} ms ${spread.padStart(8)} ${
      ratio.padStart(8)
    }  ${speed(ms)}`,
  );
}

/**
 * Registers a bench. Deno.bench measures with a clock of its own, which would count waking up as work; so the device
 * measures, and then each iteration keeps Deno's clock running for just as long as one of the samples.
 */
export function deviceBench(entry: Entry): void {
  const { group, name, baseline = false } = entry;
  let next = 0;
  Deno.bench({
    group,
    name,
    baseline,
    n: rounds,
    warmup: 0,
    async fn(b) {
      const samples = await entry.samples();
      if (lines && next === 0) report(entry, summarize(samples));
      const ms = samples[next++ % samples.length];
      b.start();
      spin(ms);
      b.end();
    },
  });
}

/** Remembers what is costly to make. */
export function lazily<T>(make: () => T): () => T {
  let made: { value: T } | undefined;
  return () => (made ??= { value: make() }).value;
}
