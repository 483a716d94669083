// Stand-in for @std/assert where JSR is out of reach: the same names over node:assert.
import nodeAssert from "node:assert";

// deno-lint-ignore no-explicit-any
type ErrorClass<E extends Error> = abstract new (...args: any[]) => E;

/** A failed assertion. */
export class AssertionError extends Error {
  override name = "AssertionError";
}

function suffix(message?: string): string {
  return message ? `: ${message}` : "";
}

function show(value: unknown): string {
  return Deno.inspect(value, { depth: 6, iterableLimit: 20 });
}

/** Fails unless `condition` is truthy. */
export function assert(condition: unknown, message = ""): asserts condition {
  if (!condition) throw new AssertionError(message);
}

/** Fails always. */
export function fail(message?: string): never {
  throw new AssertionError(`Failed assertion${suffix(message)}`);
}

/** Fails unless both are deeply equal. */
export function assertEquals<T>(actual: T, expected: T, message?: string): void {
  try {
    nodeAssert.deepStrictEqual(actual, expected);
  } catch (error) {
    if (!(error instanceof nodeAssert.AssertionError)) throw error;
    throw new AssertionError(
      `Values are not equal${suffix(message)}\nactual: ${show(actual)}\nexpected: ${
        show(expected)
      }`,
    );
  }
}

/** Fails if both are deeply equal. */
export function assertNotEquals<T>(actual: T, expected: T, message?: string): void {
  try {
    nodeAssert.notDeepStrictEqual(actual, expected);
  } catch (error) {
    if (!(error instanceof nodeAssert.AssertionError)) throw error;
    throw new AssertionError(`Values are equal${suffix(message)}\nboth: ${show(actual)}`);
  }
}

/** Fails unless both are the same value. */
export function assertStrictEquals<T>(
  actual: unknown,
  expected: T,
  message?: string,
): asserts actual is T {
  if (!Object.is(actual, expected)) {
    throw new AssertionError(
      `Values are not strictly equal${suffix(message)}\nactual: ${show(actual)}\nexpected: ${
        show(expected)
      }`,
    );
  }
}

/** Fails if both are the same value. */
export function assertNotStrictEquals<T>(actual: T, expected: T, message?: string): void {
  if (Object.is(actual, expected)) {
    throw new AssertionError(`Values are strictly equal${suffix(message)}: ${show(actual)}`);
  }
}

/** Fails unless the numbers differ by at most `tolerance` (default: 1e-7 of `expected`). */
export function assertAlmostEquals(
  actual: number,
  expected: number,
  tolerance?: number,
  message?: string,
): void {
  if (Object.is(actual, expected)) return;
  const allowed = tolerance ?? (Number.isFinite(expected) ? Math.abs(expected * 1e-7) : 1e-7);
  if (!(Math.abs(expected - actual) <= allowed)) {
    throw new AssertionError(
      `Expected ${actual} to be within ${allowed} of ${expected}${suffix(message)}`,
    );
  }
}

/** Fails unless `actual > expected`. */
export function assertGreater<T>(actual: T, expected: T, message?: string): void {
  if (!(actual > expected)) {
    throw new AssertionError(`Expected ${show(actual)} > ${show(expected)}${suffix(message)}`);
  }
}

/** Fails unless `actual >= expected`. */
export function assertGreaterOrEqual<T>(actual: T, expected: T, message?: string): void {
  if (!(actual >= expected)) {
    throw new AssertionError(`Expected ${show(actual)} >= ${show(expected)}${suffix(message)}`);
  }
}

/** Fails unless `actual < expected`. */
export function assertLess<T>(actual: T, expected: T, message?: string): void {
  if (!(actual < expected)) {
    throw new AssertionError(`Expected ${show(actual)} < ${show(expected)}${suffix(message)}`);
  }
}

/** Fails unless `actual <= expected`. */
export function assertLessOrEqual<T>(actual: T, expected: T, message?: string): void {
  if (!(actual <= expected)) {
    throw new AssertionError(`Expected ${show(actual)} <= ${show(expected)}${suffix(message)}`);
  }
}

/** Fails if `actual` is null or undefined. */
export function assertExists<T>(actual: T, message?: string): asserts actual is NonNullable<T> {
  if (actual === undefined || actual === null) {
    throw new AssertionError(`Expected a value: actual value is ${actual}${suffix(message)}`);
  }
}

/** Fails if `actual` is truthy. */
export function assertFalse(actual: unknown, message = ""): void {
  if (actual) throw new AssertionError(message);
}

/** Fails unless `actual` is an instance of `type`. */
export function assertInstanceOf<T>(
  actual: unknown,
  // deno-lint-ignore no-explicit-any
  type: abstract new (...args: any[]) => T,
  message?: string,
): asserts actual is T {
  if (!(actual instanceof type)) {
    throw new AssertionError(
      `Expected an instance of ${type.name}: actual value is ${show(actual)}${suffix(message)}`,
    );
  }
}

/** Fails unless `actual` contains `expected`. */
export function assertStringIncludes(actual: string, expected: string, message?: string): void {
  if (!actual.includes(expected)) {
    throw new AssertionError(`Expected "${actual}" to contain "${expected}"${suffix(message)}`);
  }
}

/** Fails unless `actual` holds every one of `expected`, compared deeply. */
export function assertArrayIncludes<T>(
  actual: ArrayLike<T>,
  expected: ArrayLike<T>,
  message?: string,
): void {
  const has = (wanted: T) =>
    Array.from(actual).some((value) => {
      try {
        nodeAssert.deepStrictEqual(value, wanted);
        return true;
      } catch {
        return false;
      }
    });
  const missing = Array.from(expected).filter((value) => !has(value));
  if (missing.length) {
    throw new AssertionError(
      `Expected ${show(actual)} to hold ${show(expected)}${suffix(message)}\nmissing: ${
        show(missing)
      }`,
    );
  }
}

/** Fails unless `actual` matches. */
export function assertMatch(actual: string, expected: RegExp, message?: string): void {
  if (!expected.test(actual)) {
    throw new AssertionError(`Expected "${actual}" to match ${expected}${suffix(message)}`);
  }
}

/** Fails if `actual` matches. */
export function assertNotMatch(actual: string, expected: RegExp, message?: string): void {
  if (expected.test(actual)) {
    throw new AssertionError(`Expected "${actual}" not to match ${expected}${suffix(message)}`);
  }
}

/** Fails unless `error` is an `errorClass` whose message contains `includes`. */
export function assertIsError<E extends Error = Error>(
  error: unknown,
  errorClass?: ErrorClass<E>,
  includes?: string | RegExp,
  message?: string,
): asserts error is E {
  if (!(error instanceof Error)) {
    throw new AssertionError(`Expected an Error: actual value is ${show(error)}${suffix(message)}`);
  }
  if (errorClass && !(error instanceof errorClass)) {
    throw new AssertionError(
      `Expected error to be instance of "${errorClass.name}", but was "${error.constructor.name}"` +
        `${suffix(message)}\n${error.stack}`,
    );
  }
  const matches = includes === undefined ||
    (typeof includes === "string"
      ? error.message.includes(includes)
      : includes.test(error.message));
  if (!matches) {
    throw new AssertionError(
      `Expected error message to include ${show(includes)}, but got ${show(error.message)}` +
        suffix(message),
    );
  }
}

type Includes = [includes?: string, message?: string];

function judge(error: unknown, args: unknown[]): unknown {
  if (typeof args[0] === "function") {
    assertIsError(error, args[0] as ErrorClass<Error>, ...(args.slice(1) as Includes));
  }
  return error;
}

function nothingThrown(how: string, args: unknown[]): never {
  const message = (typeof args[0] === "function" ? args[2] : args[0]) as string | undefined;
  throw new AssertionError(`Expected function to ${how}${suffix(message)}`);
}

/** Fails unless `body` throws; returns what it threw. */
export function assertThrows(body: () => unknown, message?: string): unknown;
/** Fails unless `body` throws an `errorClass` whose message contains `includes`. */
export function assertThrows<E extends Error = Error>(
  body: () => unknown,
  errorClass: ErrorClass<E>,
  includes?: string,
  message?: string,
): E;
export function assertThrows(body: () => unknown, ...args: unknown[]): unknown {
  try {
    body();
  } catch (error) {
    return judge(error, args);
  }
  nothingThrown("throw", args);
}

/** Fails unless the promise of `body` rejects; returns the reason. */
export function assertRejects(body: () => PromiseLike<unknown>, message?: string): Promise<unknown>;
/** Fails unless the promise of `body` rejects with an `errorClass` whose message contains `includes`. */
export function assertRejects<E extends Error = Error>(
  body: () => PromiseLike<unknown>,
  errorClass: ErrorClass<E>,
  includes?: string,
  message?: string,
): Promise<E>;
export async function assertRejects(
  body: () => PromiseLike<unknown>,
  ...args: unknown[]
): Promise<unknown> {
  let promise: PromiseLike<unknown>;
  try {
    promise = body();
  } catch (error) {
    throw new AssertionError(`Function threw when expected to reject: ${error}`);
  }
  try {
    await promise;
  } catch (error) {
    return judge(error, args);
  }
  nothingThrown("reject", args);
}
