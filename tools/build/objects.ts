// Objects: compiled side by side, and only when their command or what they include has changed.
import { dirname, join, resolve } from "@std/path";
import { parseReport, summarize } from "./ptxas.ts";
import { sha256 } from "./sources.ts";
import { BuildError } from "./toolchain.ts";

/** One translation unit. */
export interface Unit {
  source: string;
  /** Path of the object, relative to the root. */
  object: string;
  /** The compiler and its version. */
  compiler: string;
  /** All that decides what the object holds, but for its source. */
  command: string[];
  /** Arguments that only make it faster. */
  speed?: string[];
  /** Where to keep what the compiler said, relative to the root: the report of -Xptxas=-v. */
  report?: string;
}

/** What made an object, kept beside it. */
interface Record {
  compiler: string;
  command: string[];
  inputs: { [path: string]: string };
  seconds: number;
}

/** Fails with one sentence where a compiler's output says why. */
export function explainFailure(what: string, program: string, output: string): BuildError {
  if (/No space left on device/i.test(output)) {
    return new BuildError(`Cannot ${what}: no space left on the disk`);
  }
  return new BuildError(`Cannot ${what}: ${program} says why above`);
}

/** Prerequisites of a make rule as -MMD writes it. */
export function parseDependencies(rule: string): string[] {
  const list = rule.replaceAll("\\\n", " ").replace(/^[^:]*:/, "");
  return [...new Set(list.trim().split(/(?<!\\)\s+/).map((path) => path.replaceAll("\\ ", " ")))]
    .filter(Boolean);
}

/** SHA-256 of a file; "" where there is none, or where it was written after `before`. */
async function hashInput(path: string, before = Infinity): Promise<string> {
  try {
    const hash = await sha256(await Deno.readFile(path));
    const { mtime } = await Deno.stat(path);
    return (mtime?.getTime() ?? 0) < before ? hash : "";
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "";
    throw error;
  }
}

async function readRecord(path: string): Promise<Record | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(path));
  } catch {
    return undefined; // no record, or a broken one: the object is made anew
  }
}

async function exists(path: string): Promise<boolean> {
  try {
    return (await Deno.stat(path)).isFile;
  } catch {
    return false;
  }
}

type HashFile = (path: string) => Promise<string>;

async function isCurrent(
  root: string,
  unit: Unit,
  record: Record,
  hashFile: HashFile,
): Promise<boolean> {
  if (record.compiler !== unit.compiler) return false;
  if (JSON.stringify(record.command) !== JSON.stringify(unit.command)) return false;
  for (const made of unit.report ? [unit.object, unit.report] : [unit.object]) {
    if (!await exists(join(root, made))) return false;
  }
  const inputs = Object.entries(record.inputs);
  const hashes = await Promise.all(inputs.map(([path]) => hashFile(path)));
  return inputs.every(([, hash], i) => hash === hashes[i]);
}

interface Compiled {
  seconds: number;
  summary?: string;
}

async function compile(root: string, unit: Unit, signal: AbortSignal): Promise<Compiled> {
  const object = join(root, unit.object);
  const part = `${object}.part.o`, rule = `${object}.d`;
  await Deno.mkdir(dirname(object), { recursive: true });
  const began = Date.now();
  const [program, ...args] = [...unit.command, ...unit.speed ?? []];
  const { success, stdout, stderr } = await new Deno.Command(program, {
    args: [...args, "-MMD", "-MF", rule, "-c", unit.source, "-o", part],
    cwd: root,
    stdin: "null",
    signal,
  }).output();
  const output = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  if (!success) {
    signal.throwIfAborted();
    await Deno.remove(part).catch(() => {});
    console.error(output.trimEnd());
    throw explainFailure(`compile ${unit.source}`, program, output);
  }
  const seconds = (Date.now() - began) / 1e3;
  const paths = parseDependencies(await Deno.readTextFile(rule));
  const hashes = await Promise.all(paths.map((path) => hashInput(resolve(root, path), began)));
  const record: Record = {
    compiler: unit.compiler,
    command: unit.command,
    inputs: Object.fromEntries(paths.map((path, i) => [path, hashes[i]])),
    seconds,
  };
  if (unit.report) await Deno.writeTextFile(join(root, unit.report), output);
  await Deno.rename(part, object);
  await Deno.writeTextFile(`${object}.json`, JSON.stringify(record));
  await Deno.remove(rule);
  return { seconds, summary: unit.report && summarize(parseReport(output)) };
}

/**
 * Brings all objects up to date, `jobs` compilers at a time, those that took longest last time first.
 * Returns whether any was made. The first failure stops the others.
 */
export async function makeObjects(
  root: string,
  units: Unit[],
  options: { jobs: number; force: boolean },
): Promise<boolean> {
  const hashes = new Map<string, Promise<string>>();
  function hashFile(path: string): Promise<string> {
    const hash = hashes.get(path) ?? hashInput(resolve(root, path));
    hashes.set(path, hash);
    return hash;
  }
  const states = await Promise.all(units.map(async (unit) => {
    const record = await readRecord(join(root, `${unit.object}.json`));
    const current = !options.force && record !== undefined &&
      await isCurrent(root, unit, record, hashFile);
    const unknown = unit.source.endsWith(".cu") ? 1e6 : 1e3;
    return { unit, current, weight: record?.seconds ?? unknown };
  }));
  const todo = states.filter((state) => !state.current).sort((a, b) => b.weight - a.weight);
  const kept = units.length - todo.length;
  if (kept) console.log(`objects     ${kept} of ${units.length} are up to date`);

  const stop = new AbortController();
  const queue = todo.map((state) => state.unit);
  let done = 0;
  async function work(): Promise<void> {
    for (let unit = queue.shift(); unit; unit = queue.shift()) {
      const { seconds, summary } = await compile(root, unit, stop.signal);
      const count = `[${String(++done).padStart(String(todo.length).length)}/${todo.length}]`;
      console.log(`${count} ${unit.source.padEnd(40)} ${seconds.toFixed(1).padStart(6)} s`);
      if (summary) console.log(`${" ".repeat(count.length)}   ${summary}`);
    }
  }
  const workers = Array.from({ length: Math.min(options.jobs, todo.length) }, async () => {
    try {
      await work();
    } catch (error) {
      queue.length = 0;
      stop.abort(error);
      throw error;
    }
  });
  await Promise.allSettled(workers);
  stop.signal.throwIfAborted();
  return todo.length > 0;
}
