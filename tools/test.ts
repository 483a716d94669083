// The test task: builds all that this machine can compile, runs the suite on every device present, and counts.
import { fromFileUrl } from "@std/path";
import { build } from "../build.ts";
import { findCudaCompiler, runTask } from "./build/toolchain.ts";
import { closingLine, runSuite } from "./suite.ts";

const root = fromFileUrl(new URL("..", import.meta.url));

await runTask(async () => {
  const cuda = await findCudaCompiler();
  await build({ arch: cuda ? "all" : undefined, bundle: "if-possible" });
  const counts = await runSuite(root, Deno.args.length ? Deno.args : ["tests/"]);
  console.log(closingLine(counts));
  if (counts.failed) Deno.exitCode = 1;
});
