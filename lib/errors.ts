// What can go wrong: one class to catch everything, and one for each case a caller would handle apart.

/** Says which kind of failure a {@linkcode SageError} is. */
export type SageErrorCode =
  | "invalid-argument"
  | "unsupported"
  | "out-of-memory"
  | "no-device"
  | "device-error"
  | "internal"
  | "disposed"
  | "library-not-found"
  | "library-unusable"
  | "abi-mismatch";

/**
 * Anything that a device or the native library refused or failed to do.
 *
 * Arguments that can be judged without a device are reported as `TypeError` or `RangeError` instead, before
 * anything is asked of the library. `cause`, where it is present, is the place in the library's sources that
 * noticed the failure, such as `"cuda/plan.cpp:120"`.
 *
 * @example
 * ```ts
 * import { Device, SageError } from "@sage/attention";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * try {
 *   device.empty([1, 1, 2 ** 40, 64]);
 * } catch (error) {
 *   assert(error instanceof SageError);
 *   assert(error.code === "out-of-memory");
 * }
 * ```
 */
export class SageError extends Error {
  /** The class. */
  override name = "SageError";
  /** Which kind of failure this is. */
  readonly code: SageErrorCode;

  /**
   * Makes an error.
   *
   * @param code Which kind of failure this is.
   * @param message One sentence.
   * @param options `cause`: where it was noticed.
   */
  constructor(code: SageErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/** There is no such device, no NVIDIA driver, or a driver that is too old; the message says which. */
export class NoDeviceError extends SageError {
  /** The class. */
  override name = "NoDeviceError";

  /**
   * Makes an error.
   *
   * @param message One sentence.
   * @param options `cause`: where it was noticed.
   */
  constructor(message: string, options?: ErrorOptions) {
    super("no-device", message, options);
  }
}

/** The device has too little memory left. Nothing was allocated and smaller calls still work. */
export class OutOfMemoryError extends SageError {
  /** The class. */
  override name = "OutOfMemoryError";

  /**
   * Makes an error.
   *
   * @param message One sentence.
   * @param options `cause`: where it was noticed.
   */
  constructor(message: string, options?: ErrorOptions) {
    super("out-of-memory", message, options);
  }
}

/** A valid request that this device, or this build of the library, cannot run. */
export class UnsupportedError extends SageError {
  /** The class. */
  override name = "UnsupportedError";

  /**
   * Makes an error.
   *
   * @param message One sentence, with what is supported.
   * @param options `cause`: where it was noticed.
   */
  constructor(message: string, options?: ErrorOptions) {
    super("unsupported", message, options);
  }
}

/** A device or a tensor was used after its end. */
export class DisposedError extends SageError {
  /** The class. */
  override name = "DisposedError";

  /**
   * Makes an error.
   *
   * @param message One sentence.
   */
  constructor(message: string) {
    super("disposed", message);
  }
}

/**
 * The native library is missing (`code` is `"library-not-found"`), cannot be loaded (`"library-unusable"`), or
 * belongs to another version of this module (`"abi-mismatch"`).
 */
export class LibraryNotFoundError extends SageError {
  /** The class. */
  override name = "LibraryNotFoundError";

  /**
   * Makes an error.
   *
   * @param code Which of the three it is.
   * @param message What to do about it.
   * @param options `cause`: what the system said.
   */
  constructor(
    code: "library-not-found" | "library-unusable" | "abi-mismatch",
    message: string,
    options?: ErrorOptions,
  ) {
    super(code, message, options);
  }
}
