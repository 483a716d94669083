// The regression guard: two runs, by ratio to what was measured beside it in the same run.
import { type Accuracy, describe, nameOf, type Results, type Row } from "./format.ts";

/** A row that changed by more than both runs' noise allows. */
export interface Move {
  what: string;
  /** What its time is set in relation to. */
  yardstick: string;
  /** The new ratio over the old one, less 1: positive where it became slower. */
  change: number;
  /** How large a change the noise explains. */
  limit: number;
}

/** What a comparison finds. */
export interface Comparison {
  compared: number;
  moves: Move[];
  /** Rows of the stored run that the fresh one lacks. */
  missing: string[];
}

const leastLimit = 0.01; // below it, other clocks and addresses than last time are enough of a reason
const accuracyLimit = 0.01;

interface Yardstick {
  name: string;
  ms: number;
  noise: number;
  /** Whether both were sampled in turns; else the machine may have changed in between. */
  together: boolean;
}

function sameCase(a: Row, b: Row): boolean {
  const keys = ["group", "headDim", "causal", "batch", "heads", "kvHeads", "tokens", "queries"];
  return [...keys, "dtype"].every((key) => a[key as keyof Row] === b[key as keyof Row]);
}

/** Sages are measured by flash, flash by another's kernel; preparations by a copy or the first of them. */
const references = ["flash", "pytorch-fa2", "cudnn", "onnxruntime"];
const firstPreparation = "i8 token";

function candidates({ rows, copyTbs }: Results, row: Row): Yardstick[] {
  if (row.group === "quantize" || row.group === "smooth") {
    const first = rows.find((one) =>
      one.kernel === firstPreparation && one.headDim === row.headDim && one !== row
    );
    return [
      ...copyTbs
        ? [{ name: "a copy", ms: row.bytes! / copyTbs / 1e9, noise: 0, together: false }]
        : [],
      ...first
        ? [{ name: first.kernel, ms: first.ms, noise: first.noise ?? 0, together: true }]
        : [],
    ];
  }
  return references.flatMap((kernel) => {
    if (kernel === row.kernel) return [];
    const other = rows.find((one) => one.kernel === kernel && one.endToEnd && sameCase(one, row));
    return other
      ? [{ name: kernel, ms: other.ms, noise: other.noise ?? 0, together: !other.peer }]
      : [];
  });
}

/** Those that both runs have; else the time stands for itself. */
function yardsticks(
  stored: Results,
  old: Row,
  fresh: Results,
  now: Row,
): [before: Yardstick, after: Yardstick][] {
  const there = candidates(fresh, now);
  const pairs = candidates(stored, old).flatMap((one): [Yardstick, Yardstick][] => {
    const other = there.find(({ name }) => name === one.name);
    return other ? [[one, other]] : [];
  });
  const itself = { name: "its own time", ms: 1, noise: 0, together: false };
  return pairs.length ? pairs : [[itself, itself]];
}

/**
 * What moved by more than noise against its first yardstick, and at least half as far against all others: else it is
 * the first that moved.
 */
function moveOf(stored: Results, old: Row, fresh: Results, now: Row): Move | undefined {
  const [first, ...others] = yardsticks(stored, old, fresh, now).map(([before, after]): Move => {
    const change = now.ms / after.ms / (old.ms / before.ms) - 1;
    const drift = after.together ? [] : [stored.drift ?? 0, fresh.drift ?? 0];
    const noise = [now.noise ?? 0, old.noise ?? now.noise ?? 0, before.noise, after.noise];
    const limit = Math.max(leastLimit, Math.hypot(...noise, ...drift));
    return { what: describe(now), yardstick: after.name, change, limit };
  });
  const agree = others.every(({ change }) => change / first.change >= 0.5);
  return agree && Math.abs(first.change) > first.limit ? first : undefined;
}

function accuracyMove(old: Accuracy, now: Accuracy): Move | undefined {
  const change = now.relativeL1 / old.relativeL1 - 1;
  return Math.abs(change) > accuracyLimit
    ? {
      what: `accuracy ${nameOf(now)} ${now.file}`,
      yardstick: "its own error",
      change,
      limit: accuracyLimit,
    }
    : undefined;
}

/** Sets a fresh run against a stored one; others' kernels are yardsticks only. */
export function compare(stored: Results, fresh: Results): Comparison {
  const found: Comparison = { compared: 0, moves: [], missing: [] };
  const take = (move: Move | undefined) => {
    ++found.compared;
    if (move) found.moves.push(move);
  };
  const freshRows = new Map(fresh.rows.map((row) => [describe(row), row]));
  for (const old of stored.rows.filter(({ peer }) => !peer)) {
    const now = freshRows.get(describe(old));
    if (now) take(moveOf(stored, old, fresh, now));
    else found.missing.push(describe(old));
  }
  for (const old of stored.accuracy) {
    const now = fresh.accuracy.find((one) => one.file === old.file && nameOf(one) === nameOf(old));
    if (now) take(accuracyMove(old, now));
    else found.missing.push(`accuracy ${nameOf(old)} ${old.file}`);
  }
  found.moves.sort((a, b) => b.change - a.change);
  return found;
}

/** The comparison in lines, what became slower first. */
export function comparisonLines({ compared, moves, missing }: Comparison): string[] {
  const percent = (share: number) => `${(100 * share).toFixed(1)} %`;
  const line = ({ what, yardstick, change, limit }: Move) =>
    `${change > 0 ? "worse " : "better"} ${(change > 0 ? "+" : "") + percent(change)} (noise ${
      percent(limit)
    }, against ${yardstick})  ${what}`;
  return [
    ...moves.map(line),
    ...missing.map((what) => `missing  ${what}`),
    `${compared} compared, ${moves.filter(({ change }) => change > 0).length} worse, ` +
    `${moves.filter(({ change }) => change < 0).length} better, ${missing.length} missing`,
  ];
}
