// mod.ts and all it imports as one ECMAScript module, by esbuild.
import { join } from "@std/path";
import { BuildError } from "./toolchain.ts";

// Not a literal in import(), so that a machine without the npm registry can load this file.
const specifier = "npm:esbuild@^0.25.0";

/** What is used of esbuild. */
interface Esbuild {
  version: string;
  build(options: unknown): Promise<unknown>;
  stop(): Promise<void>;
}

/** esbuild, or undefined where npm cannot be reached. */
export async function loadEsbuild(): Promise<Esbuild | undefined> {
  try {
    return await import(specifier);
  } catch (error) {
    if (error instanceof TypeError) return undefined;
    throw error;
  }
}

/** Writes the bundle of `root`/mod.ts to `target`; returns what made it. */
export async function writeBundle(
  esbuild: Esbuild,
  root: string,
  target: string,
): Promise<string> {
  try {
    await esbuild.build({
      absWorkingDir: root,
      entryPoints: [join(root, "mod.ts")],
      outfile: target,
      bundle: true,
      format: "esm",
      platform: "neutral",
      target: "esnext",
      logLevel: "warning",
      logOverride: {},
      banner: { js: "// SPDX-License-Identifier: Apache-2.0" },
    });
  } catch (error) {
    throw new BuildError(`Cannot bundle mod.ts: ${(error as Error).message.split("\n")[0]}`);
  } finally {
    await esbuild.stop();
  }
  return `esbuild ${esbuild.version}`;
}
