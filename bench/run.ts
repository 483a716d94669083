// Runs the benches, shows them as they come and keeps Deno's JSON, with a GPU's clocks and power, in
// dist/bench.json.
import { parseArgs } from "@std/cli/parse-args";
import { fromFileUrl, join } from "@std/path";
import { build } from "../build.ts";
import { Device } from "../mod.ts";
import { BuildError, runTask } from "../tools/build/toolchain.ts";
import { Watcher } from "./machine.ts";

const help = `usage: deno task bench [--quick] [--peers] [--filter TEXT]

  --quick    few shapes and short runs: under half a minute
  --peers    fetches others' kernels for the CPU from npm where they are not here yet
  --filter   runs the benches whose name contains TEXT

Ratios are to the first of their group: above 1 is faster. Deno's own table: deno bench --allow-all bench/
`;

const root = fromFileUrl(new URL("..", import.meta.url));

/** What `deno bench --json` writes, as far as it is used here. */
interface Report {
  benches: {
    origin: string;
    group: string;
    name: string;
    results: { ok?: { avg: number } }[];
  }[];
}

/** What a GPU's clocks and power were meanwhile. */
function machineLines({ clocks, power }: Awaited<ReturnType<Watcher["stop"]>>): string[] {
  return [
    ...clocks
      ? [`SM clock ${clocks.sm.min} to ${clocks.sm.max} MHz, median ${clocks.sm.median}`]
      : [],
    ...power ? [`power ${power.medianW.toFixed(0)} W, limit ${power.limitW.toFixed(0)}`] : [],
  ];
}

/** Those that Deno timed itself: the others have shown themselves already. */
function showOwnTimes({ benches }: Report): void {
  let shown = "";
  for (const { origin, group, name, results } of benches) {
    const ok = results[0].ok;
    if (!ok || !origin.endsWith("ffi.bench.ts")) continue;
    if (group !== shown) console.log(`\n${group}`);
    shown = group;
    console.log(`  ${name.padEnd(28)} ${(ok.avg / 1e3).toPrecision(4).padStart(9)} µs`);
  }
}

await runTask(async () => {
  const options = parseArgs(Deno.args, {
    boolean: ["quick", "peers", "help"],
    string: ["filter"],
    unknown: (argument: string) => {
      throw new BuildError(`Unknown argument "${argument}"; --help lists those there are`);
    },
  });
  if (options.help) return console.log(help);
  await build({ bundle: "if-possible" });
  using device = Device.open();
  const { name, features } = device.info;
  console.log(`\n${device}: ${name}, ${features}`);
  const watcher = device.kind === "cuda" ? new Watcher() : undefined;
  const began = performance.now();
  const child = new Deno.Command(Deno.execPath(), {
    args: [
      ...["bench", "--allow-all", "--json"],
      ...options.filter ? [`--filter=${options.filter}`] : [],
      ...["bench/", "--", "--lines"],
      ...options.quick ? ["--quick"] : [],
      ...options.peers ? ["--peers"] : [],
    ],
    cwd: root,
    stdin: "null",
    stdout: "piped",
  }).spawn();
  const text = await new Response(child.stdout).text();
  const { success } = await child.status;
  const machine = await watcher?.stop() ?? {};
  if (text) {
    const target = join(root, "dist/bench.json"), report = JSON.parse(text);
    await Deno.writeTextFile(target, JSON.stringify({ ...report, ...machine }, null, 2));
    showOwnTimes(report);
    console.log(["", ...machineLines(machine), `written to ${target}`].join("\n"));
  }
  console.log(`done in ${((performance.now() - began) / 1e3).toFixed(0)} s`);
  if (!success) Deno.exitCode = 1;
});
