// Everything that must hold before a change lands: the suite as a user starts it, and the checks around it.
// Ends with one line that counts them all; a check that cannot run here counts as skipped and says why.
import { fromFileUrl } from "@std/path";
import { notAvailable } from "./format.ts";
import { closingLine, type Counts, parseClosingLine, runSuite } from "./suite.ts";

const root = fromFileUrl(new URL("..", import.meta.url));
const total: Counts = { passed: 0, failed: 0, skipped: 0 };
const failures: string[] = [];

function count(name: string, counts: Counts): void {
  total.passed += counts.passed;
  total.failed += counts.failed;
  total.skipped += counts.skipped;
  if (counts.failed) failures.push(name);
}

/** Runs `deno test` through the task; holds its closing line back, as it is not ours. */
async function suite(): Promise<void> {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["task", "test"],
    cwd: root,
    stdin: "null",
    stdout: "piped",
  }).spawn();
  let counts: Counts | undefined;
  let rest = "";
  const say = (line: string) => {
    counts = parseClosingLine(line) ?? counts;
    if (!parseClosingLine(line)) console.log(line);
  };
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    lines.forEach(say);
  }
  if (rest) say(rest);
  const { success } = await child.status;
  if (!counts || (!success && !counts.failed)) counts = { passed: 0, failed: 1, skipped: 0 };
  count("deno task test", counts);
}

/** One command, one check. */
async function check(name: string, args: string[]): Promise<void> {
  console.log(`\n${name}`);
  const { code } = await new Deno.Command(Deno.execPath(), { args, cwd: root, stdin: "null" })
    .spawn().status;
  const skipped = args.includes("tools/format.ts") && code === notAvailable;
  if (skipped) console.log(`${name}: skipped`);
  count(name, {
    passed: code === 0 ? 1 : 0,
    failed: code !== 0 && !skipped ? 1 : 0,
    skipped: skipped ? 1 : 0,
  });
}

await suite();
console.log("\ndoc tests");
count("doc tests", await runSuite(root, ["--doc", "mod.ts", "lib/", "README.md", "docs/"]));
await check("deno fmt --check", ["fmt", "--check"]);
await check("deno lint", ["lint"]);
await check("deno check", ["check", "."]);
await check("deno doc --lint", ["doc", "--lint", "mod.ts"]);
await check("deno publish --dry-run", ["publish", "--dry-run", "--allow-dirty"]);
await check("clang-format", ["run", "--allow-all", "tools/format.ts", "--check"]);

console.log("");
for (const name of failures) console.log(`failed: ${name}`);
console.log(closingLine(total));
if (total.failed) Deno.exitCode = 1;
