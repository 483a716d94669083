// Runs the suite, measures every kernel of a device beside others' and writes bench/results/<device>.json; or sets a
// fresh run against what is stored there.
import { parseArgs } from "@std/cli/parse-args";
import { basename, fromFileUrl, join } from "@std/path";
import {
  attention,
  cosine,
  Device,
  parseSafetensors,
  relativeL1,
  rmse,
  UnsupportedError,
} from "../mod.ts";
import { build, type Manifest } from "../build.ts";
import { sourceHash } from "../tools/build/sources.ts";
import { reference } from "../examples/demo/reference.ts";
import { BuildError, runTask } from "../tools/build/toolchain.ts";
import { closingLine, runSuite } from "../tools/suite.ts";
import { labels, oldest, portableCases, recordCases, variantsOf } from "./cases.ts";
import { compare, comparisonLines } from "./compare.ts";
import {
  type Accuracy,
  describe,
  type LatencyRow,
  type MaskRow,
  nameOf,
  type Results,
  type Row,
  speedOf,
} from "./format.ts";
import { latencyRows } from "./latency.ts";
import { driverVersion, fileName, Watcher } from "./machine.ts";
import { maskRows } from "./masks.ts";
import { RandomTensors } from "./measure.ts";
import { Peers, Skips } from "./peers.ts";
import { attentionRows, portableRows, preparationRows } from "./rows.ts";

const help =
  `usage: deno task record [--device cuda:0] [--compare] [--quick] [--skip-tests] [--filter text] [--peers]
                        [--built]

  --device       "cpu" or "cuda:0"; by default the GPU where there is one
  --compare      sets the run against the stored one instead of writing it, and fails where something became worse
  --quick        few shapes; prints instead of writing
  --skip-tests   no test run; prints instead of writing
  --filter       only the tests whose name contains the text, which the record then says: "cuda"
  --built        measures dist/ as it is, which must be of these sources
  --peers        fetches others' kernels for the CPU from npm where they are not here yet
`;

const root = fromFileUrl(new URL("..", import.meta.url));

function show(row: Row): void {
  const noise = row.noise === undefined ? "" : `±${(50 * row.noise).toFixed(1)} %`;
  console.log(
    `${describe(row).padEnd(62)} ${row.ms.toPrecision(4).padStart(9)} ms ${noise.padStart(8)}  ${
      speedOf(row)
    }`,
  );
}

function showMask(row: MaskRow): void {
  const { what, against, ms, plainMs } = row;
  console.log(
    `${`${nameOf(row)}, ${what}`.padEnd(62)} ${ms.toPrecision(4).padStart(9)} ms, ${
      (plainMs / ms).toFixed(2)
    } × ${against}`,
  );
}

function showAccuracy(row: Accuracy): void {
  const { file, cosine, relativeL1 } = row;
  console.log(
    `${`accuracy ${nameOf(row)} ${file}`.padEnd(62)} L1 ${relativeL1.toFixed(5)}  cosine ${
      cosine.toFixed(6)
    }`,
  );
}

function showLatency(row: LatencyRow): void {
  console.log(`${`launch to result ${nameOf(row)}`.padEnd(62)} ${(1e3 * row.ms).toFixed(1)} µs`);
}

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
    for (const variant of variantsOf({ causal })) {
      try {
        using out = attention(qTensor, kTensor, vTensor, { ...variant, causal });
        const result = await out.data();
        const row: Accuracy = {
          file: basename(name, ".safetensors"),
          ...labels(variant),
          cosine: cosine(result, exact),
          relativeL1: relativeL1(result, exact),
          rmse: rmse(result, exact),
        };
        rows.push(row);
        showAccuracy(row);
      } catch (error) {
        if (!(error instanceof UnsupportedError)) throw error;
      }
    }
  }
  return rows;
}

/** All rows, shown as they come, and how far the machine drifted meanwhile. */
async function measureRows(
  device: Device,
  peers: Peers | undefined,
  watcher: Watcher | undefined,
  quick: boolean,
): Promise<{ rows: Row[]; masks: MaskRow[]; latency: LatencyRow[]; drift: number }> {
  const rows: Row[] = [], budgetMs = quick ? 30 : 50;
  const random = new RandomTensors(device), skips = new Skips((line) => console.log(line));
  const add = async (measure: () => Promise<Row[]>) => {
    const began = performance.now(), measured = await measure();
    const clockMHz = watcher?.clockSince(began);
    for (const row of measured) {
      rows.push(clockMHz === undefined ? row : { ...row, clockMHz });
      show(row);
    }
  };
  for (const headDim of quick ? [128] : [64, 128]) {
    await add(() => preparationRows(random, headDim, budgetMs));
  }
  const cases = recordCases(device, quick);
  for (const one of cases) {
    await add(() => attentionRows(random, one, budgetMs, skips));
    if (peers) await add(() => peers.rows(one, device));
  }
  const portable = quick ? [] : portableCases(device);
  if (portable.length) {
    using older = Device.open(device.name as "cuda", { architecture: oldest });
    const tensors = new RandomTensors(older);
    for (const one of portable) {
      await add(() => portableRows(tensors, one, oldest, budgetMs, skips));
    }
  }
  const [again] = await attentionRows(random, cases[0], budgetMs, skips);
  const first = rows.find((row) => describe(row) === describe(again))!;
  const masks = quick ? [] : await maskRows(random, budgetMs, skips);
  masks.forEach(showMask);
  const latency = await latencyRows(random);
  latency.forEach(showLatency);
  return { rows, masks, latency, drift: Math.abs(again.ms / first.ms - 1) };
}

function rounded(_key: string, value: unknown): unknown {
  return typeof value === "number" && !Number.isInteger(value)
    ? Number(value.toPrecision(6))
    : value;
}

/** The suite, or those of its tests whose name contains `filter`; what fails is shown before anything is measured. */
async function runTests(filter?: string): Promise<Results["tests"]> {
  const cores = navigator.hardwareConcurrency;
  const counts = await runSuite(root, [...filter ? ["--filter", filter] : [], "tests/"], {
    jobs: cores < 8 ? 1 : cores - 4,
  });
  console.log(closingLine(counts));
  return { ...counts, ...filter ? { filter } : {} };
}

/** What is in dist/, which must be built from the sources as they are. */
async function builtBefore(): Promise<Manifest> {
  const text = await Deno.readTextFile(join(root, "dist/manifest.json")).catch(() => {
    throw new BuildError(
      "Cannot measure dist/: there is no manifest; without --built, it is built",
    );
  });
  const manifest: Manifest = JSON.parse(text);
  const hash = await sourceHash(root);
  if (manifest.sourceHash === hash) return manifest;
  throw new BuildError(
    `Cannot measure dist/: it is of sources ${manifest.sourceHash.slice(0, 12)}, and they are ${
      hash.slice(0, 12)
    } now; without --built, they are built`,
  );
}

async function readStored(path: string): Promise<Results> {
  try {
    return JSON.parse(await Deno.readTextFile(path));
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    throw new BuildError(
      `Cannot compare: there is no record at ${path}; without --compare, one is written`,
    );
  }
}

await runTask(async () => {
  const options = parseArgs(Deno.args, {
    boolean: ["compare", "quick", "skip-tests", "peers", "built", "help"],
    string: ["device", "filter"],
    default: { device: "auto" },
    unknown: (argument: string) => {
      throw new BuildError(`Unknown argument "${argument}"; --help lists those there are`);
    },
  });
  if (options.help) return console.log(help);
  const manifest = options.built ? await builtBefore() : await build({ bundle: "if-possible" });
  const began = performance.now();
  using device = Device.open(options.device as "auto");
  const { name, kind, features, multiprocessors } = device.info;
  const say = (line: string) => console.log(line);
  say(`measures ${device}: ${name}, ${features}`);
  const target = join(root, `bench/results/${fileName(name, kind, multiprocessors)}.json`);
  const stored: Results | undefined = options.compare ? await readStored(target) : undefined;
  const writes = !options.compare && !options.quick && !options["skip-tests"];
  const tests = writes ? await runTests(options.filter) : { passed: 0, failed: 0, skipped: 0 };
  await using peers = await Peers.start(device, options.quick ? 50 : 80, say, options.peers);
  const accuracy = await accuracyRows(device);
  const watcher = kind === "cuda" ? new Watcher() : undefined;
  const copyTbs = await peers?.copy(device, 2 ** 30);
  const { rows, masks, latency, drift } = await measureRows(device, peers, watcher, options.quick);
  const results: Results = {
    device: name,
    features,
    multiprocessors,
    ...kind === "cuda" ? { driver: await driverVersion() } : {},
    date: new Date().toISOString(),
    source: manifest.sourceHash,
    compilers: manifest.compilers,
    ...await watcher?.stop(),
    tests,
    copyTbs,
    drift,
    peers: peers?.versions,
    rows,
    masks,
    latency,
    accuracy,
  };
  console.log(`measured in ${((performance.now() - began) / 1e3).toFixed(0)} s`);
  if (stored) {
    const found = compare(stored, results);
    if (options.quick) found.missing = [];
    for (const line of comparisonLines(found)) console.log(line);
    if (found.moves.some(({ change }) => change > 0)) Deno.exitCode = 1;
  } else if (!writes) {
    const { rows: _, accuracy: __, ...rest } = results;
    console.log(JSON.stringify(rest, rounded, 2));
  } else {
    const part = `${target}.part`;
    await Deno.mkdir(join(root, "bench/results"), { recursive: true });
    await Deno.writeTextFile(part, JSON.stringify(results, rounded, 1) + "\n");
    await Deno.rename(part, target);
    console.log(`written to ${target}; deno task report draws it`);
    console.log(closingLine(tests));
    if (tests.failed) Deno.exitCode = 1;
  }
});
