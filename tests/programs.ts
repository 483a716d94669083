// The programs of examples/ as a user starts them.
import { fromFileUrl } from "@std/path";

/** Runs `examples/<name>.ts` with these permissions, in the project's root. */
export async function runExample(
  name: string,
  permissions: readonly string[],
  args: readonly string[],
): Promise<{ code: number; text: string; errors: string }> {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "--no-prompt", ...permissions, `examples/${name}.ts`, ...args],
    cwd: fromFileUrl(new URL("..", import.meta.url)),
    env: { NO_COLOR: "1" },
  }).output();
  const decoder = new TextDecoder();
  return { code, text: decoder.decode(stdout), errors: decoder.decode(stderr) };
}
