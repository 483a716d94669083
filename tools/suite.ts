// Runs deno test and counts what it ran.

/** How many tests (and steps of tests) there were. */
export interface Counts {
  passed: number;
  failed: number;
  skipped: number;
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
  return { passed: sum("tests") - failed - skipped, failed, skipped };
}

/** Runs `deno test -A` in `root`. A run that dies, or that runs nothing, counts as a failure. */
export async function runSuite(
  root: string,
  args: string[],
  options: { quiet?: boolean } = {},
): Promise<Counts> {
  const report = await Deno.makeTempFile({ suffix: ".xml" });
  try {
    const status = await new Deno.Command(Deno.execPath(), {
      args: ["test", "--allow-all", `--junit-path=${report}`, ...args],
      cwd: root,
      stdin: "null",
      stdout: options.quiet ? "null" : "inherit",
      stderr: options.quiet ? "null" : "inherit",
    }).spawn().status;
    const counts = parseReport(await Deno.readTextFile(report));
    if (status.signal && !options.quiet) console.log(`deno test died of ${status.signal}`);
    const unseen = !status.success || counts.passed + counts.skipped === 0;
    if (unseen && counts.failed === 0) counts.failed = 1;
    return counts;
  } finally {
    await Deno.remove(report);
  }
}
