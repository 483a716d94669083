// Others' kernels, measured by peers.py between our own measurements, so that both meet the same GPU.
import { fromFileUrl } from "@std/path";
import type { Results, Row, Shape } from "./format.ts";

/** A running peers.py. */
export class Peers implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly #requests: WritableStreamDefaultWriter<Uint8Array>;
  readonly #lines: ReadableStreamDefaultReader<string>;
  #rest = "";
  /** Of PyTorch and cuDNN. */
  versions: Results["peers"];

  private constructor(child: Deno.ChildProcess) {
    this.#child = child;
    this.#requests = child.stdin.getWriter();
    this.#lines = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  }

  /** Starts it; undefined, after a line that says so, where there is no Python with PyTorch. */
  static async start(budgetMs: number): Promise<Peers | undefined> {
    try {
      const child = new Deno.Command("python3", {
        args: [fromFileUrl(new URL("peers.py", import.meta.url)), String(budgetMs)],
        stdin: "piped",
        stdout: "piped",
      }).spawn();
      const peers = new Peers(child);
      const [versions] = await peers.#answer<NonNullable<Results["peers"]>>();
      peers.versions = versions;
      return peers;
    } catch (error) {
      console.log(`peers       left out: ${(error as Error).message}`);
    }
  }

  /** Rows up to the empty line. */
  async #answer<T>(): Promise<T[]> {
    while (!/(^|\n)\n/.test(this.#rest)) {
      const { value, done } = await this.#lines.read();
      if (done) throw new Error("python3 with PyTorch did not run to its end");
      this.#rest += value;
    }
    const [rows, ...rest] = this.#rest.split(/(?:^|\n)\n/);
    this.#rest = rest.join("\n\n");
    return rows.split("\n").filter(Boolean).map((line) => JSON.parse(line));
  }

  async #ask<T>(request: unknown): Promise<T[]> {
    await this.#requests.write(new TextEncoder().encode(JSON.stringify(request) + "\n"));
    return await this.#answer();
  }

  /** TB/s of a copy in device memory, read and written. */
  async copy(bytes: number): Promise<number> {
    const [{ tbs }] = await this.#ask<{ tbs: number }>({ copyBytes: bytes });
    return tbs;
  }

  /** Every peer's row for a shape. */
  attention(shape: Shape): Promise<Row[]> {
    return this.#ask(shape);
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#requests.close().catch(() => {});
    await this.#child.status;
  }
}
