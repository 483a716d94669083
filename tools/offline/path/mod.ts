// Stand-in for @std/path where JSR is out of reach: the same names from node:path.
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

export const SEPARATOR: "/" | "\\" = path.sep;

/** The last part of a path. */
export function basename(file: string, suffix?: string): string {
  return path.basename(file, suffix);
}

/** Everything but the last part. */
export function dirname(file: string): string {
  return path.dirname(file);
}

/** The extension, with its dot. */
export function extname(file: string): string {
  return path.extname(file);
}

/** Whether the path starts at a root. */
export function isAbsolute(file: string): boolean {
  return path.isAbsolute(file);
}

/** Joins parts and normalizes. */
export function join(...parts: (string | URL)[]): string {
  return path.join(...parts.map((part) => part instanceof URL ? fromFileUrl(part) : part));
}

/** Resolves parts to an absolute path. */
export function resolve(...parts: string[]): string {
  return path.resolve(...parts);
}

/** The way from one path to another. */
export function relative(from: string, to: string): string {
  return path.relative(from, to);
}

/** Resolves `.` and `..`. */
export function normalize(file: string): string {
  return path.normalize(file);
}

/** file: URL to path. */
export function fromFileUrl(url: string | URL): string {
  return fileURLToPath(url);
}

/** Absolute path to file: URL. */
export function toFileUrl(file: string): URL {
  if (!path.isAbsolute(file)) throw new TypeError(`Path must be absolute: received "${file}"`);
  return pathToFileURL(file);
}
