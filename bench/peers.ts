// Others' kernels, measured by a process of their own between our own measurements, so that both meet the same machine.
import { fromFileUrl } from "@std/path";
import type { Device } from "../mod.ts";
import type { Case } from "./cases.ts";
import { cacheBytes, flopOf, type Row } from "./format.ts";
import { summarize } from "./measure.ts";

/** Takes lines about what cannot be done, each once. */
export class Skips {
  readonly #said = new Set<string>();

  constructor(readonly say: (line: string) => void) {}

  /** @param line What is skipped, and why. */
  skip(line: string): void {
    if (!this.#said.has(line)) this.say(`skipped ${line}`);
    this.#said.add(line);
  }
}

/** A kernel of another's. */
export interface Peer {
  kernel: string;
  /** Whether it starts from the floating-point tensors. */
  endToEnd: boolean;
}

interface Measured extends Peer {
  samples: number[];
}

interface Hello {
  versions: Record<string, string | number>;
  skipped: string[];
}

/** PyTorch's and what else has been installed for it on a GPU; onnxruntime on the CPU. */
function command(kind: Device["kind"], budgetMs: number, fetch: boolean): string[] {
  const path = (name: string) => fromFileUrl(new URL(name, import.meta.url));
  if (kind === "cuda") return ["python3", path("peers.py"), String(budgetMs)];
  const cached = fetch ? [] : ["--cached-only"];
  const script = path("peers_onnx.ts");
  return [Deno.execPath(), "run", "--quiet", "--allow-all", ...cached, script, String(budgetMs)];
}

/** What measures others' kernels. */
export class Peers implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly #requests: WritableStreamDefaultWriter<Uint8Array>;
  readonly #lines: ReadableStreamDefaultReader<string>;
  #rest = "";
  readonly #skips: Skips;
  /** Of the programs measured. */
  versions: Hello["versions"] = {};

  private constructor(child: Deno.ChildProcess, skips: Skips) {
    this.#child = child;
    this.#skips = skips;
    this.#requests = child.stdin.getWriter();
    this.#lines = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  }

  /**
   * Starts it; undefined, after a line that says so, where it is not installed.
   *
   * @param budgetMs How long to measure a kernel on a shape.
   * @param say Takes the lines about what is left out.
   * @param fetch Whether to ask npm for what is not here yet.
   */
  static async start(
    { kind }: Device,
    budgetMs: number,
    say: (line: string) => void,
    fetch = false,
  ): Promise<Peers | undefined> {
    const [program, ...args] = command(kind, budgetMs, fetch);
    const what = kind === "cuda" ? "python3 with PyTorch" : "onnxruntime";
    let child: Deno.ChildProcess;
    try {
      child = new Deno.Command(program, { args, stdin: "piped", stdout: "piped", stderr: "piped" })
        .spawn();
    } catch (error) {
      say(`skipped ${what}: ${(error as Error).message}`);
      return;
    }
    const peers = new Peers(child, new Skips(say));
    const complaints = new Response(child.stderr).text();
    try {
      const [{ versions, skipped }] = await peers.#answer<Hello>();
      peers.versions = versions;
      for (const line of skipped) peers.#skips.skip(line);
      return peers;
    } catch {
      await peers[Symbol.asyncDispose]();
      const hint = kind === "cpu" && !fetch ? " (--peers fetches it from npm)" : "";
      say(`skipped ${what}: ${lastLine(await complaints) ?? "it did not answer"}${hint}`);
    }
  }

  /** Rows up to the empty line. */
  async #answer<T>(): Promise<T[]> {
    while (!/(^|\n)\n/.test(this.#rest)) {
      const { value, done } = await this.#lines.read();
      if (done) throw new Error("the process that measures others' kernels ended");
      this.#rest += value;
    }
    const [rows, ...rest] = this.#rest.split(/(?:^|\n)\n/);
    this.#rest = rest.join("\n\n");
    return rows.split("\n").filter(Boolean).map((line) => JSON.parse(line));
  }

  async #ask<T>(request: unknown): Promise<T[]> {
    await this.#requests.write(new TextEncoder().encode(JSON.stringify(request) + "\n"));
    const rows = await this.#answer<T | { skipped: string }>();
    return rows.filter((row): row is T => {
      if (!(row instanceof Object && "skipped" in row)) return true;
      this.#skips.skip(row.skipped as string);
      return false;
    });
  }

  /** TB/s of a copy in device memory, read and written; undefined on the CPU. */
  async copy(device: Device, bytes: number): Promise<number | undefined> {
    if (device.kind === "cpu") return;
    const [{ ms }] = await this.#ask<{ ms: number }>({ copyBytes: bytes });
    return 2 * bytes / ms / 1e9;
  }

  /** Those that can compute a case. */
  async able(one: Case, device: Device): Promise<Peer[]> {
    return this.#comparable(one, device) ? await this.#ask<Peer>({ support: one.shape }) : [];
  }

  /** Every peer's samples for a case. */
  async samples(one: Case, device: Device): Promise<Measured[]> {
    return this.#comparable(one, device) ? await this.#ask<Measured>({ run: one.shape }) : [];
  }

  /** They compute in one element type. */
  #comparable({ dtype }: Case, { kind }: Device): boolean {
    const theirs = kind === "cuda" ? "bf16" : "f32";
    if (dtype !== theirs) {
      this.#skips.skip(`others' kernels for ${dtype}: they are measured in ${theirs}`);
    }
    return dtype === theirs;
  }

  /** Every peer's row for a case. */
  async rows(one: Case, device: Device): Promise<Row[]> {
    return (await this.samples(one, device)).map(({ kernel, endToEnd, samples }) =>
      attentionRow(one, { kernel, endToEnd, peer: true, ...summarize(samples) })
    );
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#requests.close().catch(() => {});
    await this.#child.status;
  }
}

function lastLine(text: string): string | undefined {
  return text.trim().split("\n").at(-1)?.trim() || undefined;
}

/** A row of attention: with the operations that it does, or where one token is decoded the bytes that it reads. */
export function attentionRow(
  { shape, dtype }: Case,
  row: Pick<Row, "kernel" | "endToEnd" | "peer" | "ms"> & Partial<Row>,
): Row {
  const decode = shape.queries === 1;
  return {
    group: decode ? "decode" : "attention",
    ...shape,
    dtype,
    ...decode && dtype === "bf16"
      ? { bytes: cacheBytes(shape), tbs: cacheBytes(shape) / row.ms / 1e9 }
      : { tflops: flopOf(shape) / row.ms / 1e9 },
    ...row,
  };
}
