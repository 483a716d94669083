// Runs deno test and counts what it ran.

/** How many tests (and steps of tests) there were. */
export interface Counts {
  passed: number;
  failed: number;
  skipped: number;
  /** Names of those that failed, where the run tells them. */
  failures?: string[];
}

/** "12 passed, 0 failed", with the skipped ones where there are any. */
export function closingLine({ passed, failed, skipped }: Counts): string {
  return `${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ""}`;
}

/** What a closing line says, or undefined where the line is none. */
export function parseClosingLine(line: string): Counts | undefined {
  const match = /^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$/.exec(line.trim());
  return match
    ? { passed: Number(match[1]), failed: Number(match[2]), skipped: Number(match[3] ?? 0) }
    : undefined;
}

/** Counts in the report that `deno test --junit-path` writes. */
export function parseReport(xml: string): Counts {
  const sum = (attribute: string) =>
    [...xml.matchAll(new RegExp(`<testsuite [^>]*\\b${attribute}="(\\d+)"`, "g"))]
      .reduce((total, match) => total + Number(match[1]), 0);
  const failed = sum("failures") + sum("errors"), skipped = sum("disabled");
  const failures = [...xml.matchAll(/<testcase name="([^"]*)"[^>]*>\s*<failure/g)].map(([, name]) =>
    name.replaceAll("&quot;", '"').replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll(
      "&amp;",
      "&",
    )
  );
  return {
    passed: sum("tests") - failed - skipped,
    failed,
    skipped,
    ...failures.length ? { failures } : {},
  };
}

/** How a suite is run. */
export interface SuiteOptions {
  /** Shows nothing. */
  quiet?: boolean;
  /** Test files that run side by side, each in a process of its own; what they say is shown when they are done. */
  jobs?: number;
}

const nothing: Counts = { passed: 0, failed: 0, skipped: 0 };

function add(a: Counts, b: Counts): Counts {
  const failures = [...a.failures ?? [], ...b.failures ?? []];
  return {
    passed: a.passed + b.passed,
    failed: a.failed + b.failed,
    skipped: a.skipped + b.skipped,
    ...failures.length ? { failures } : {},
  };
}

/** One process, with all that it says in one piece where `apart`. */
async function runProcess(
  root: string,
  args: readonly string[],
  quiet: boolean,
  apart: boolean,
): Promise<Counts> {
  const report = await Deno.makeTempFile({ suffix: ".xml" });
  const output = quiet ? "null" : apart ? "piped" : "inherit";
  try {
    const child = new Deno.Command(Deno.execPath(), {
      args: ["test", "--allow-all", `--junit-path=${report}`, ...args],
      cwd: root,
      stdin: "null",
      stdout: output,
      stderr: output,
    }).spawn();
    if (output === "piped") {
      const texts = [new Response(child.stdout).text(), new Response(child.stderr).text()];
      for (const text of await Promise.all(texts)) if (text) console.log(text.trimEnd());
    }
    const { success, signal } = await child.status;
    const counts = parseReport(await Deno.readTextFile(report));
    if (signal && !quiet) console.log(`deno test died of ${signal}`);
    if (!success && counts.failed === 0) counts.failed = 1;
    return counts;
  } finally {
    await Deno.remove(report);
  }
}

async function testFiles(root: string, folder: string): Promise<string[]> {
  const files: { path: string; size: number }[] = [];
  for await (const { name } of Deno.readDir(`${root}/${folder}`)) {
    const path = `${folder}/${name}`;
    if (name.endsWith("_test.ts")) {
      files.push({ path, size: (await Deno.stat(`${root}/${path}`)).size });
    }
  }
  return files.sort((a, b) => b.size - a.size).map(({ path }) => path); // long ones first
}

/**
 * Runs `deno test -A` in `root`. A run that dies, or that runs nothing, counts as a failure. With several jobs, the
 * last argument is the folder whose files they share out.
 */
export async function runSuite(
  root: string,
  args: string[],
  { quiet = false, jobs = 1 }: SuiteOptions = {},
): Promise<Counts> {
  let total = nothing;
  if (jobs === 1) {
    total = await runProcess(root, args, quiet, false);
  } else {
    const queue = await testFiles(root, args.at(-1)!.replace(/\/$/, ""));
    await Promise.all(Array.from({ length: jobs }, async () => {
      for (let file = queue.shift(); file; file = queue.shift()) {
        const counts = await runProcess(root, [...args.slice(0, -1), file], quiet, true);
        total = add(total, counts);
      }
    }));
  }
  const { passed, failed, skipped } = total;
  return { ...total, failed: failed || (passed + skipped === 0 ? 1 : 0) };
}
