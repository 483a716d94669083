// Formats C++ and CUDA with clang-format, or with --check says what is not formatted.
import { fromFileUrl } from "@std/path";
import { filesBelow } from "./build/sources.ts";

const version = "1.8.0"; // of the npm package: clang-format 15
const root = fromFileUrl(new URL("..", import.meta.url));

/** Exit code for "clang-format cannot be had", so that a caller can tell it from "not formatted". */
export const notAvailable = 3;

async function clangFormat(args: string[]): Promise<boolean> {
  const { success } = await new Deno.Command("npx", {
    args: ["-y", `clang-format@${version}`, ...args],
    cwd: root,
    stdin: "null",
    env: { NPM_CONFIG_LOGLEVEL: "error" },
  }).spawn().status;
  return success;
}

if (import.meta.main) {
  const files = [...await filesBelow(root, "cuda"), ...await filesBelow(root, "tests")]
    .filter((file) => /\.(c|h|cpp|cu|cuh)$/.test(file));
  const available = await clangFormat(["--version"]).catch(() => false);
  if (!available) {
    console.error("error: clang-format cannot be had from npm");
    Deno.exit(notAvailable);
  }
  const mode = Deno.args.includes("--check") ? ["--dry-run", "-Werror"] : ["-i"];
  if (!await clangFormat([...mode, ...files])) Deno.exit(1);
}
