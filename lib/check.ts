// Judging arguments: the one wording of every refusal, and the checks that several functions share.

/** Any value in a few words. */
export function show(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value);
  if (typeof value === "bigint") return `${value}n`;
  if (typeof value === "function") return "a function";
  if (Array.isArray(value)) {
    return `[${value.slice(0, 8).map(show).join(", ")}${value.length > 8 ? ", ..." : ""}]`;
  }
  if (typeof value !== "object" || value === null) return String(value);
  const kind = Object.getPrototypeOf(value)?.constructor?.name ?? "object";
  return `${/^[AEIOU]/.test(kind) ? "an" : "a"} ${kind}`;
}

/** `"a", "b"` */
export function list(values: readonly unknown[]): string {
  return values.map(show).join(", ");
}

/** The wording of every refusal: "Cannot `action` as `what` must `must`: current value is `value`." */
export function cannot(action: string, what: string, must: string, value: unknown): string {
  return `Cannot ${action} as ${what} must ${must}: current value is ${show(value)}.`;
}

/** Refuses a value that is not in a list: a `TypeError` where even its type is another. */
export function checkOneOf<T>(action: string, what: string, value: T, allowed: readonly T[]): T {
  if (allowed.includes(value)) return value;
  const Refusal = typeof value === typeof allowed[0] ? RangeError : TypeError;
  throw new Refusal(cannot(action, what, `be one of ${list(allowed)}`, value));
}

/** Refuses what is not an object of known properties. */
export function checkOptions(action: string, options: object, known: readonly string[]): void {
  if (typeof options !== "object" || options === null || Array.isArray(options)) {
    throw new TypeError(cannot(action, "options", "be an object", options));
  }
  for (const name in options) {
    if (!known.includes(name)) {
      throw new TypeError(
        `Cannot ${action} as options must have no property ${show(name)}: ` +
          `known options are ${list(known)}.`,
      );
    }
  }
}

/** Refuses what is neither a boolean nor absent. */
export function checkBoolean(action: string, what: string, value: boolean | undefined): void {
  if (value !== undefined && typeof value !== "boolean") {
    throw new TypeError(cannot(action, what, "be a boolean", value));
  }
}

/** Refuses what is not a whole number of a range. */
export function checkInteger(
  action: string,
  what: string,
  value: number,
  low: number,
  high: number = Number.MAX_SAFE_INTEGER,
): void {
  const must = `be a whole number from ${low} to ${
    high === Number.MAX_SAFE_INTEGER ? "2^53 - 1" : high
  }`;
  if (typeof value !== "number") throw new TypeError(cannot(action, what, must, value));
  if (!Number.isSafeInteger(value) || value < low || value > high) {
    throw new RangeError(cannot(action, what, must, value));
  }
}

/** Refuses what is not a number within (0, `high`]. */
export function checkPositive(
  action: string,
  what: string,
  value: number,
  high: number = Number.MAX_VALUE,
): void {
  const must = `be a positive${
    high === Number.MAX_VALUE ? ", finite number" : ` number up to ${high}`
  }`;
  if (typeof value !== "number") throw new TypeError(cannot(action, what, must, value));
  if (!(value > 0 && value <= high)) throw new RangeError(cannot(action, what, must, value));
}
