// Bool masks that tests make of a rule.
import type { Device, Tensor } from "../mod.ts";
import { count, type Dims } from "./reference.ts";

/** Whether query i of a head of a batch sees key j. */
export type Sees = (i: number, j: number, batch: number, head: number) => boolean;

/** What a mask [batch, heads, queries, keys] holds. */
export function shownBy(dims: Dims, sees: Sees): Uint8Array<ArrayBuffer> {
  const [, heads, queries, keys] = dims;
  return Uint8Array.from({ length: count(dims) }, (_, at) => {
    const row = Math.floor(at / keys), plane = Math.floor(row / queries);
    return Number(sees(row % queries, at % keys, Math.floor(plane / heads), plane % heads));
  });
}

/** The mask on a device. */
export function boolMask(device: Device, dims: Dims, sees: Sees): Tensor<"bool"> {
  return device.tensor(shownBy(dims, sees), dims, { dtype: "bool" });
}
