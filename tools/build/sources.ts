// Which sources make which library, and the hash that names them.
import { join, relative } from "@std/path";

/** All files below `folder`, sorted, relative to `root`. */
export async function filesBelow(root: string, folder: string): Promise<string[]> {
  const found: string[] = [];
  async function visit(path: string): Promise<void> {
    for await (const entry of Deno.readDir(path)) {
      const child = join(path, entry.name);
      if (entry.isDirectory) await visit(child);
      else if (entry.isFile) found.push(relative(root, child));
    }
  }
  await visit(join(root, folder));
  return found.sort();
}

/** SHA-256 in hexadecimal. */
export async function sha256(data: string | Uint8Array<ArrayBuffer>): Promise<string> {
  const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const sourceEnding = /\.(h|cuh|cpp|cu|map)$/;

/** SHA-256 over the names and hashes of all sources in cuda/, sorted by name. */
export async function sourceHash(root: string): Promise<string> {
  const files = (await filesBelow(root, "cuda")).filter((file) => sourceEnding.test(file));
  const lines = await Promise.all(
    files.map(async (file) => `${file} ${await sha256(await Deno.readFile(join(root, file)))}\n`),
  );
  return await sha256(lines.join(""));
}

/** The translation units of a CUDA build or of a CPU-only one. */
export async function translationUnits(root: string, cuda: boolean): Promise<string[]> {
  const kernels = /^cuda\/kernels\/.*\.cu$/;
  const host = /^cuda\/(cpu\/)?[^/]+\.cpp$/;
  return (await filesBelow(root, "cuda")).filter((file) =>
    cuda ? kernels.test(file) || (host.test(file) && file !== "cuda/no_cuda.cpp") : host.test(file)
  );
}
