// Turns the records into docs/benchmarks.md, docs/scaling.md, docs/accuracy.md, their pictures and the README's
// figures.
import { parseArgs } from "@std/cli/parse-args";
import { basename, fromFileUrl, join } from "@std/path";
import { BuildError, runTask } from "../tools/build/toolchain.ts";
import { accuracyPage, type Figures, figuresPath } from "./accuracy_page.ts";
import { accuracyPicture } from "./accuracy_picture.ts";
import type { Results } from "./format.ts";
import { draw, loadVega, type Picture, pictures } from "./report_pictures.ts";
import {
  bytesTable,
  gpuTable,
  lengthsTable,
  memoryTable,
  millionTable,
  modelTable,
  ringTable,
  sizesTable,
} from "./report_scaling.ts";
import {
  accuracyTable,
  between,
  decodeTable,
  distinct,
  latencyTable,
  lengthTable,
  maskTable,
  otherShapes,
  portableTable,
  preparationTable,
  provenance,
  readmeFigures,
  squareRows,
  suiteLine,
} from "./report_tables.ts";

const help = `usage: deno task report [--text]

  --text   leaves the pictures as they are; without it Vega is asked for from npm
`;

const root = fromFileUrl(new URL("..", import.meta.url));

/** A record and its name. */
export interface Named {
  name: string;
  results: Results;
}

/** The record that the README and docs/scaling.md show. */
const shown = "h200";

/** Where the pictures are, seen from docs/. */
const pictureFolder = "pictures";

/** Every record, the shown one first. */
export async function readRecords(): Promise<Named[]> {
  const folder = join(root, "bench/results"), records: Named[] = [];
  for await (const entry of Deno.readDir(folder)) {
    if (!entry.name.endsWith(".json")) continue;
    const results = JSON.parse(await Deno.readTextFile(join(folder, entry.name)));
    records.push({ name: basename(entry.name, ".json"), results });
  }
  const order = ({ name }: Named) => name === shown ? "" : name;
  return records.sort((a, b) => order(a) < order(b) ? -1 : 1);
}

function image({ name, alt }: Picture): string {
  return `![${alt}](${pictureFolder}/${name}.svg)`;
}

function section(heading: string, ...parts: string[]): string {
  const content = parts.filter(Boolean);
  return content.length ? `### ${heading}\n\n${content.join("\n\n")}` : "";
}

function drawn(all: readonly Picture[], kind: string): string {
  const found = all.find(({ name }) => name.endsWith(`-${kind}`));
  return found ? image(found) : "";
}

/** The part of docs/benchmarks.md about one record. */
function recordSection({ name, results }: Named): string {
  const all = pictures(results, name), rows = squareRows(results);
  const lengths = distinct(rows.map(({ headDim }) => headDim)).sort((a, b) => a - b)
    .flatMap((headDim) =>
      distinct(rows.map(({ causal }) => causal!)).map((causal) =>
        `D ${headDim}, ${causal ? "causal" : "full"}:\n\n${lengthTable(results, headDim, causal)}`
      )
    );
  return [
    `## ${results.device}`,
    `${provenance(results)}. The record: [${name}.json](../bench/results/${name}.json).`,
    suiteLine(results),
    section("Speed against length", drawn(all, "speed"), ...lengths),
    section("Other shapes", otherShapes(results)),
    section("Kernels of older GPUs", portableTable(results)),
    section("Decoding", decodeTable(results)),
    section("Accuracy against speed", drawn(all, "accuracy"), accuracyTable(results)),
    section("Where the time goes", drawn(all, "stages")),
    section("Masks", maskTable(results)),
    section("One small call", latencyTable(results)),
    section("Quantizing and smoothing", preparationTable(results)),
  ].filter(Boolean).join("\n\n");
}

/** A page of the project with what the records say put in place. */
export type Page = [path: string, fill: (text: string, records: readonly Named[]) => string];

function scalingPage(text: string, [{ name, results }]: readonly Named[]): string {
  const all = pictures(results, name);
  const parts: [string, string][] = [
    ["provenance", `${provenance(results)}.`],
    ["model", [drawn(all, "model"), modelTable(results)].filter(Boolean).join("\n\n")],
    ["lengths", lengthsTable(results)],
    ["bytes", bytesTable(results)],
    ["sizes", sizesTable(results)],
    ["memory", memoryTable(results)],
    ["million", millionTable(results)],
    ["gpus", gpuTable(results)],
    ["ring", ringTable(results)],
  ];
  return parts.reduce(
    (page, [marker, content]) => between(page, marker, content, "docs/scaling.md"),
    text,
  );
}

/** Every page. */
export const pages: readonly Page[] = [
  [
    "README.md",
    (text, [{ results }]) => between(text, "figures", readmeFigures(results), "README.md"),
  ],
  [
    "docs/benchmarks.md",
    (text, records) =>
      between(text, "records", records.map(recordSection).join("\n\n"), "docs/benchmarks.md"),
  ],
  ["docs/scaling.md", scalingPage],
  ["docs/accuracy.md", (_, [{ results }]) => accuracyPage(readFigures(), results)],
];

/** The figures of `deno task accuracy`. */
export function readFigures(): Figures {
  return JSON.parse(Deno.readTextFileSync(join(root, figuresPath)));
}

/** Every picture, of the records and of the accuracy. */
export function allPictures(records: readonly Named[]): Picture[] {
  const ofRecords = records.flatMap(({ name, results }) => pictures(results, name));
  return [...ofRecords, accuracyPicture(readFigures(), records[0].results)];
}

/** Markdown as `deno fmt` leaves it. */
export async function formatted(markdown: string): Promise<string> {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["fmt", "--ext=md", "-"],
    cwd: root,
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(markdown));
  await writer.close();
  const { success, stdout } = await child.output();
  if (!success) throw new Error("deno fmt refused what was to be written");
  return new TextDecoder().decode(stdout);
}

async function vega(): ReturnType<typeof loadVega> {
  return await loadVega().catch((error) => {
    throw new BuildError(
      `Cannot draw as Vega cannot be had from npm (${error.message}); --text leaves the pictures out`,
    );
  });
}

async function writePictures(records: readonly Named[]): Promise<void> {
  const libraries = await vega();
  const folder = join(root, "docs", pictureFolder);
  await Deno.mkdir(folder, { recursive: true });
  for (const entry of [...Deno.readDirSync(folder)]) {
    if (entry.name.endsWith(".svg")) await Deno.remove(join(folder, entry.name));
  }
  for (const picture of allPictures(records)) await writePicture(folder, picture, libraries);
}

async function writePicture(
  folder: string,
  picture: Picture,
  libraries: Awaited<ReturnType<typeof loadVega>>,
): Promise<void> {
  await Deno.writeTextFile(join(folder, `${picture.name}.svg`), await draw(picture, libraries));
  console.log(`docs/${pictureFolder}/${picture.name}.svg`);
}

/** Writes docs/accuracy.md, and its picture if asked for. */
export async function writeAccuracy(drawing: boolean): Promise<void> {
  const [{ results }] = await readRecords(), page = "docs/accuracy.md";
  await Deno.writeTextFile(join(root, page), await formatted(accuracyPage(readFigures(), results)));
  console.log(page);
  if (!drawing) return;
  const picture = accuracyPicture(readFigures(), results);
  await writePicture(join(root, "docs", pictureFolder), picture, await vega());
}

if (import.meta.main) {
  await runTask(async () => {
    const options = parseArgs(Deno.args, {
      boolean: ["text", "help"],
      unknown: (argument: string) => {
        throw new BuildError(`Unknown argument "${argument}"; --help lists those there are`);
      },
    });
    if (options.help) return console.log(help);
    const records = await readRecords();
    if (records[0]?.name !== shown) {
      throw new BuildError(`Cannot report: bench/results/${shown}.json is missing`);
    }
    for (const [path, fill] of pages) {
      const target = join(root, path);
      await Deno.writeTextFile(
        target,
        await formatted(fill(await Deno.readTextFile(target), records)),
      );
      console.log(path);
    }
    if (!options.text) await writePictures(records);
  });
}
