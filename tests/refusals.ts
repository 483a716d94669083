// Calls that must be refused: tensors to make them with, and what every one of them must leave as it was.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import {
  type Device,
  flashAttention,
  quantize,
  type QuantizedTensor,
  type Tensor,
} from "../mod.ts";
import { deviceTest } from "./devices.ts";

// deno-lint-ignore no-explicit-any
export type Loose = any; // arguments that the types forbid

/** What a case may use. */
export interface Fixture {
  device: Device;
  /** [1, 2, 16, 8] of f32, all ones. */
  q: Tensor<"f32">;
  k: Tensor<"f32">;
  v: Tensor<"f32">;
  /** A tensor that lives until the case is over. */
  make(shape: readonly number[], options?: Loose): Tensor<Loose>;
  /** A quantized tensor that lives as long. */
  pack(x: Tensor, options: Loose): QuantizedTensor;
}

/** The class of an error. */
export type ErrorClass = new (...args: Loose[]) => Error;

/** A call that must be refused, the class of the error, and what its message must say. */
export interface Case {
  name: string;
  call: (fixture: Fixture) => unknown;
  error: ErrorClass;
  says: string[];
}

/** How many elements q, k and v of the fixture have. */
export const length = 2 * 16 * 8;

/** Attention over alike keys gives their value, exactly; the smallest call that shows the device still works. */
export async function worksStill(device: Device): Promise<void> {
  using q = device.tensor(new Float16Array(2 * 16 * 64).fill(1), [1, 2, 16, 64]);
  using v = device.tensor(new Float16Array(2 * 16 * 64).fill(3), [1, 2, 16, 64]);
  using o = flashAttention(q, q, v);
  assertEquals(await o.data(), new Float16Array(2 * 16 * 64).fill(3));
}

/** A fixture, and how much memory it holds; disposing it disposes all that it made. */
function fixtureOf(device: Device): Fixture & Disposable & { held(): Held } {
  const made: Disposable[] = [];
  let held = heldOn(device);
  const keep = <T extends Disposable>(one: T): T => {
    made.push(one);
    held = heldOn(device);
    return one;
  };
  const ones = () =>
    keep(device.tensor(new Float32Array(length).fill(1), [1, 2, 16, 8])) as Tensor<"f32">;
  return {
    device,
    q: ones(),
    k: ones(),
    v: ones(),
    make: (shape, options) => keep(device.empty(shape, options)),
    pack: (x, options) => keep(quantize(x, options)),
    held: () => held,
    [Symbol.dispose]() {
      for (const one of made) one[Symbol.dispose]();
    },
  };
}

interface Held {
  allocations: number;
  bytes: number;
  streams: number;
}

function heldOn(device: Device): Held {
  const { allocations, bytes, streams } = device.memory();
  return { allocations, bytes, streams };
}

/**
 * A test of each case: the error is of exactly its class and a sentence that says what it must; nothing is left
 * behind, the fixture's tensors are as they were, and the next good call works.
 */
export function refuses(title: string, cases: readonly Case[]): void {
  for (const { name, call, error, says } of cases) {
    deviceTest(`bad input: ${title}: ${name}`, async (device) => {
      using fixture = fixtureOf(device);
      let thrown: unknown, returned: unknown;
      try {
        returned = await call(fixture);
      } catch (caught) {
        thrown = caught;
      }
      assert(thrown !== undefined, `nothing was refused, but ${returned} returned`);
      assert(
        thrown instanceof error && thrown.constructor === error,
        `${error.name} was expected, but there was ${thrown}`,
      );
      for (const words of says) assertStringIncludes(thrown.message, words);
      assert(thrown.message.endsWith("."), `no sentence: ${thrown.message}`);
      await device.synchronize();
      assertEquals(heldOn(device), fixture.held(), "something was left behind");
      for (const tensor of [fixture.q, fixture.k, fixture.v]) {
        assertEquals(await tensor.data(), new Float32Array(length).fill(1), "a tensor was changed");
      }
      await worksStill(device);
    });
  }
}
