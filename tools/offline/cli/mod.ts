// Stand-in for @std/cli where JSR is out of reach: parseArgs, as far as it is in use here.

/** Options of {@linkcode parseArgs}. */
export interface ParseOptions {
  boolean?: readonly string[];
  string?: readonly string[];
  alias?: Readonly<Record<string, string>>;
  default?: Readonly<Record<string, unknown>>;
  unknown?: (argument: string, key?: string, value?: unknown) => unknown;
}

/** Parses `--name`, `--name=value`, `--name value`, `-n` and positional arguments. */
// deno-lint-ignore no-explicit-any
export function parseArgs(args: string[], options: ParseOptions = {}): any {
  const { boolean = [], string = [], alias = {}, unknown = () => true } = options;
  const positionals: (string | number)[] = [];
  const result: Record<string, unknown> = { _: positionals };
  for (const name of boolean) result[name] = false;
  for (const [name, value] of Object.entries(options.default ?? {})) result[name] = value;

  const rest = [...args];
  for (let argument = rest.shift(); argument !== undefined; argument = rest.shift()) {
    if (argument === "--") {
      positionals.push(...rest.splice(0));
      break;
    }
    const [, given, assigned] = /^--?([^=-][^=]*)(?:=(.*))?$/s.exec(argument) ?? [];
    if (given === undefined) {
      if (unknown(argument) !== false) positionals.push(argument);
      continue;
    }
    const name = alias[given] ?? given;
    if (boolean.includes(name)) {
      result[name] = assigned !== "false";
    } else if (string.includes(name)) {
      result[name] = assigned ??
        (rest[0] !== undefined && !rest[0].startsWith("-") ? rest.shift() : "");
    } else if (unknown(argument, given, assigned ?? true) !== false) {
      result[name] = assigned ?? true;
    }
  }
  for (const [short, name] of Object.entries(alias)) {
    if (name in result) result[short] = result[name];
  }
  return result;
}
