// What ptxas says of a kernel (-Xptxas=-v): registers, memory beside them, and what it could not do well.

/** A kernel, or a function that it calls. */
export interface FunctionUse {
  /** Its mangled name. */
  name: string;
  /** Of a thread; 0 for a function, which counts among those of its kernels. */
  registers: number;
  /** Bytes of local memory: arrays that did not fit into registers, and what was spilled. */
  stackBytes: number;
  spillStoreBytes: number;
  spillLoadBytes: number;
}

/** What was said of a translation unit. */
export interface Report {
  functions: FunctionUse[];
  /** Notes on performance, such as wgmma instructions that wait for each other. */
  notes: string[];
}

/** C7519 says that a wait was put where the source has one too. */
const harmless = ["C7519"];

/** The report that ptxas wrote for one architecture. */
export function parseReport(text: string): Report {
  const functions: FunctionUse[] = [];
  const notes: string[] = [];
  for (const line of text.split("\n")) {
    const [, name] = /Function properties for (\S+)/.exec(line) ?? [];
    if (name) {
      functions.push({ name, registers: 0, stackBytes: 0, spillStoreBytes: 0, spillLoadBytes: 0 });
    }
    const [, code] = /\((C75\d\d)\)/.exec(line) ?? [];
    if (code ? !harmless.includes(code) : line.includes("Potential Performance Loss")) {
      notes.push(line.trim());
    }
    const last = functions.at(-1);
    if (!last) continue;
    const memory = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/
      .exec(line);
    if (memory) {
      [last.stackBytes, last.spillStoreBytes, last.spillLoadBytes] = memory.slice(1)
        .map(Number);
    }
    const [, registers] = /Used (\d+) registers/.exec(line) ?? [];
    if (registers) last.registers = Number(registers);
  }
  return { functions, notes };
}

/** Each thing in a report that costs speed, in words. */
export function findWaste({ functions, notes }: Report): string[] {
  const spills = functions
    .filter((one) => one.stackBytes || one.spillStoreBytes || one.spillLoadBytes)
    .map((one) =>
      `${one.name}: ${one.stackBytes} bytes of local memory, ${one.spillStoreBytes} spilled and ` +
      `${one.spillLoadBytes} loaded again`
    );
  return [...spills, ...notes];
}

/** One line that sums a report up. */
export function summarize(report: Report): string {
  const registers = report.functions.map((one) => one.registers).filter((number) => number > 0);
  const least = Math.min(...registers), most = Math.max(...registers);
  const range = least === most ? `${most}` : `${least} to ${most}`;
  const count = `${registers.length} ${registers.length === 1 ? "kernel" : "kernels"}`;
  const waste = findWaste(report).length;
  if (!registers.length) return "no kernels";
  const warnings = `${waste} ${waste === 1 ? "warning" : "warnings"}, see its report`;
  return `${count}, ${range} registers, ${waste ? warnings : "no spills"}`;
}
