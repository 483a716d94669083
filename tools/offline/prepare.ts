// Decides whether the JSR packages can be had, and where they cannot puts our stand-ins into .offline/, which
// deno.json links. Without imports, so that it runs before anything can be resolved.

const root = new URL("../../", import.meta.url);
const target = new URL(".offline/", root);
const packages = ["assert", "cli", "path"];
const patienceMs = 20_000;

/** Whether Deno itself can load the packages, from its cache or from the registry. */
async function reachable(): Promise<boolean> {
  const asked = packages.map((name) =>
    new Deno.Command(Deno.execPath(), {
      args: ["cache", "--quiet", "--no-config", `jsr:@std/${name}@^1`],
      stdin: "null",
      stdout: "null",
      stderr: "null",
      signal: AbortSignal.timeout(patienceMs),
    }).output()
  );
  return (await Promise.all(asked)).every((answer) => answer.success);
}

async function remove(path: URL): Promise<void> {
  try {
    await Deno.remove(path, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

async function copy(from: URL, to: URL): Promise<void> {
  await Deno.mkdir(to, { recursive: true });
  for await (const entry of Deno.readDir(from)) {
    await Deno.copyFile(new URL(entry.name, from), new URL(entry.name, to));
  }
}

if (await reachable()) {
  await remove(target);
} else {
  for (const name of packages) {
    await copy(new URL(`tools/offline/${name}/`, root), new URL(`${name}/`, target));
  }
  console.log("JSR cannot be reached: using the stand-ins of tools/offline for @std packages");
}
