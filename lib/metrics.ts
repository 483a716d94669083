// How far a result is from a reference: the three metrics of the SageAttention papers, on flattened arrays.
import { cannot } from "./check.ts";

function checkLengths(what: string, actual: ArrayLike<number>, reference: ArrayLike<number>): void {
  const action = `compute ${what}`;
  if (actual.length !== reference.length) {
    throw new RangeError(
      cannot(
        action,
        "actual.length",
        `equal reference.length (${reference.length})`,
        actual.length,
      ),
    );
  }
  if (actual.length === 0) throw new RangeError(cannot(action, "actual.length", "not be 0", 0));
}

/**
 * Cosine similarity, Σ O·O′ / (√ΣO² · √ΣO′²), of two arrays; 1 is best.
 *
 * Source: SageAttention (arXiv 2410.02367), section 4.
 *
 * @param actual What was computed, O′.
 * @param reference What it should be, O.
 * @returns From −1 to 1; 1 where both are all zeros, 0 where one is.
 * @throws {RangeError} Where the lengths differ or are 0.
 *
 * @example
 * ```ts
 * import { cosine } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(cosine([2, 0], [1, 0]), 1);
 * assertEquals(cosine([0, 1], [1, 0]), 0);
 * ```
 */
export function cosine(actual: ArrayLike<number>, reference: ArrayLike<number>): number {
  checkLengths("a cosine", actual, reference);
  let product = 0, actualSquares = 0, referenceSquares = 0;
  for (let i = 0; i < reference.length; ++i) {
    product += actual[i] * reference[i];
    actualSquares += actual[i] ** 2;
    referenceSquares += reference[i] ** 2;
  }
  if (actualSquares === 0 || referenceSquares === 0) {
    return actualSquares === referenceSquares ? 1 : 0;
  }
  return product / (Math.sqrt(actualSquares) * Math.sqrt(referenceSquares));
}

/**
 * Relative L1 distance, Σ |O − O′| / Σ |O|, of two arrays; 0 is best.
 *
 * Source: SageAttention (arXiv 2410.02367), section 4.
 *
 * @param actual What was computed, O′.
 * @param reference What it should be, O.
 * @returns At least 0; where the reference is all zeros, 0 for zeros and infinity for anything else.
 * @throws {RangeError} Where the lengths differ or are 0.
 *
 * @example
 * ```ts
 * import { relativeL1 } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(relativeL1([1, 5], [1, 3]), 0.5);
 * ```
 */
export function relativeL1(actual: ArrayLike<number>, reference: ArrayLike<number>): number {
  checkLengths("a relative L1 distance", actual, reference);
  let distance = 0, sum = 0;
  for (let i = 0; i < reference.length; ++i) {
    distance += Math.abs(actual[i] - reference[i]);
    sum += Math.abs(reference[i]);
  }
  return distance === 0 ? 0 : distance / sum;
}

/**
 * Root mean square error, √ mean (O − O′)², of two arrays; 0 is best.
 *
 * Source: SageAttention (arXiv 2410.02367), section 4.
 *
 * @param actual What was computed, O′.
 * @param reference What it should be, O.
 * @returns At least 0.
 * @throws {RangeError} Where the lengths differ or are 0.
 *
 * @example
 * ```ts
 * import { rmse } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(rmse([1, 1], [0, 0]), 1);
 * ```
 */
export function rmse(actual: ArrayLike<number>, reference: ArrayLike<number>): number {
  checkLengths("a root mean square error", actual, reference);
  let squares = 0;
  for (let i = 0; i < reference.length; ++i) squares += (actual[i] - reference[i]) ** 2;
  return Math.sqrt(squares / reference.length);
}
