// Finding, loading and leaving the native library, and turning what it answers into errors.
//
// The library is loaded for the first device and left with the last one, once no wait is under way. It is linked so
// that it stays in memory after that; leaving it is bookkeeping.
import {
  NoDeviceError,
  OutOfMemoryError,
  SageError,
  type SageErrorCode,
  UnsupportedError,
} from "./errors.ts";
import {
  buildInfoStruct,
  type NativeFunctions,
  type NativeLibrary,
  open,
  status,
  Struct,
} from "./ffi.ts";

// ---- finding ------------------------------------------------------------------------------------------

const variable = "DENO_SAGE_PATH";
const suffixes: Partial<Record<typeof Deno.build.os, string>> = { darwin: "dylib", windows: "dll" };

/** Where the library is: what the environment says, if it may be asked, else beside this module. */
function libraryPath(): string {
  if (Deno.permissions.querySync({ name: "env", variable }).state === "granted") {
    const named = Deno.env.get(variable);
    if (named) return named;
  }
  const file = `libsage.${suffixes[Deno.build.os] ?? "so"}`;
  const bundled = !import.meta.url.endsWith("/lib/library.ts"); // one file, in dist/ beside the library
  const url = new URL(bundled ? `./${file}` : `../dist/${file}`, import.meta.url);
  return url.protocol === "file:" ? decodeURIComponent(url.pathname) : url.href;
}

// ---- loading and leaving ------------------------------------------------------------------------------

let library: NativeLibrary | undefined;
let users = 0;

/** Loads the library if nobody has; every call needs one {@linkcode release}. */
export function acquire(): NativeFunctions {
  library ??= open(libraryPath());
  ++users;
  return library.symbols;
}

/** Leaves the library with its last user. */
export function release(): void {
  if (--users > 0) return;
  library?.close();
  library = undefined;
}

// ---- calling ------------------------------------------------------------------------------------------

/** Where the library writes its sentence; as synchronous calls do not overlap, one is enough. */
export const errorBytes: Uint8Array<ArrayBuffer> = new Uint8Array(1024);

/** Its size. */
export const errorSize = 1024n;

const codes: Record<number, SageErrorCode> = {
  [status.invalidArgument]: "invalid-argument",
  [status.deviceError]: "device-error",
  [status.internal]: "internal",
};

/** Throws what a status other than 0 stands for, in the words of {@linkcode errorBytes}. */
export function unwrap(result: number): void {
  if (result !== status.ok) throw nativeError(result);
}

/** The error of the call that has just failed. */
export function nativeError(result: number): SageError {
  const text = new TextDecoder().decode(errorBytes.subarray(0, errorBytes.indexOf(0)));
  const end = text.lastIndexOf("\n");
  const message = end < 0 ? text : text.slice(0, end);
  const options = end < 0 ? undefined : { cause: text.slice(end + 1) };
  switch (result) {
    case status.unsupported:
      return new UnsupportedError(message, options);
    case status.outOfMemory:
      return new OutOfMemoryError(message, options);
    case status.noDevice:
      return new NoDeviceError(message, options);
    default:
      return new SageError(codes[result] ?? "internal", message, options);
  }
}

// ---- what it is ---------------------------------------------------------------------------------------

/** What the native library was built from and for. */
export interface BuildInfo {
  /** Version of the library. */
  version: string;
  /** Version of its binary interface. */
  abiVersion: number;
  /** CUDA toolkit, such as `"13.0"`; empty for a build without CUDA. */
  cudaVersion: string;
  /** GPU architectures that it holds code for, such as `["80", "90a"]`. */
  architectures: string[];
  /** SHA-256 of its sources, in hexadecimal. */
  sourceHash: string;
  /** Whether it was built for debugging. */
  debug: boolean;
}

/**
 * Says what the native library was built from and for.
 *
 * @returns Versions, architectures and the hash of the sources.
 * @throws {LibraryNotFoundError} Where there is no library that fits.
 *
 * @example
 * ```ts
 * import { buildInfo } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(buildInfo().abiVersion, 3);
 * ```
 */
export function buildInfo(): BuildInfo {
  const native = acquire();
  try {
    const info = new Struct(buildInfoStruct.size).reset();
    unwrap(native.sage_build_describe(info.bytes, errorBytes, errorSize));
    return {
      version: info.text(buildInfoStruct.version),
      abiVersion: info.int(buildInfoStruct.abiVersion),
      cudaVersion: cudaVersion(info.int(buildInfoStruct.cudaVersion)),
      architectures: info.text(buildInfoStruct.architectures).split(" ").filter(Boolean),
      sourceHash: info.text(buildInfoStruct.sourceHash),
      debug: info.int(buildInfoStruct.debug) !== 0,
    };
  } finally {
    release();
  }
}

/** 13010 is "13.1"; 0 is "". */
export function cudaVersion(number: number): string {
  return number === 0 ? "" : `${Math.floor(number / 1000)}.${Math.floor(number % 1000 / 10)}`;
}
