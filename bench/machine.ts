// The machine that is measured: what it is called, and what a GPU's clocks and power do meanwhile.
import type { Results } from "./format.ts";

/** What one look at the GPU shows. */
interface Look {
  at: number; // performance.now()
  sm: number;
  power: number;
  smHighest: number;
  memory: number;
  powerLimit: number;
}

const fields = "clocks.sm,power.draw,clocks.max.sm,clocks.mem,power.limit";

/** Version of the NVIDIA driver. */
export async function driverVersion(): Promise<string> {
  const { stdout } = await new Deno.Command("nvidia-smi", {
    args: ["--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
  }).output();
  return new TextDecoder().decode(stdout).trim();
}

/** Looks at clocks and power of the first GPU five times a second until stopped. */
export class Watcher {
  readonly #child: Deno.ChildProcess;
  readonly #looks: Look[] = [];
  readonly #reading: Promise<void>;

  constructor() {
    this.#child = new Deno.Command("nvidia-smi", {
      args: [`--query-gpu=${fields}`, "--format=csv,noheader,nounits", "--id=0", "--loop-ms=200"],
      stdout: "piped",
      stderr: "null",
    }).spawn();
    this.#reading = this.#read();
  }

  async #read(): Promise<void> {
    let rest = "";
    for await (const text of this.#child.stdout.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        const [sm, power, smHighest, memory, powerLimit] = line.split(",").map(Number);
        if (Number.isFinite(powerLimit)) {
          this.#looks.push({ at: performance.now(), sm, power, smHighest, memory, powerLimit });
        }
      }
    }
  }

  /** The SMs' clock in the middle of what was seen since a time of performance.now(). */
  clockSince(began: number): number | undefined {
    const seen = this.#looks.filter(({ at }) => at >= began).map(({ sm }) => sm);
    return (seen.length ? seen : this.#looks.slice(-1).map(({ sm }) => sm))
      .sort((a, b) => a - b)[seen.length >> 1];
  }

  /** Ends it and sums up; nothing where the driver told nothing. */
  async stop(): Promise<Pick<Results, "clocks" | "power">> {
    this.#child.kill("SIGTERM");
    await this.#child.status;
    await this.#reading;
    const last = this.#looks.at(-1);
    if (!last) return {};
    const sorted = (of: (look: Look) => number) => this.#looks.map(of).sort((a, b) => a - b);
    const sm = sorted((look) => look.sm), power = sorted((look) => look.power);
    return {
      clocks: {
        sm: { min: sm[0], median: sm[sm.length >> 1], max: sm.at(-1)! },
        smHighest: last.smHighest,
        memory: last.memory,
      },
      power: { limitW: last.powerLimit, medianW: power[power.length >> 1] },
    };
  }
}

/** "NVIDIA H200" is h200, "Intel(R) Xeon(R) Processor" with two threads cpu-intel-xeon-processor-2. */
export function fileName(device: string, kind: "cpu" | "cuda", threads: number): string {
  const words = device.replace(/^NVIDIA (GeForce )?/, "").replaceAll(/\((R|TM)\)/gi, " ")
    .toLowerCase().replaceAll(/[^a-z0-9]+/g, "-").replaceAll(/^-|-$/g, "");
  return kind === "cpu" ? `cpu-${words}-${threads}` : words;
}
