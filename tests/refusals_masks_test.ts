// Masks that every kind of attention must refuse: wrong windows and caps, and tensors that do not fit.
import {
  alibiSlopes,
  attention,
  attentionQuantized,
  Device,
  explain,
  flashAttention,
  SageError,
} from "../mod.ts";
import { assertThrows } from "@std/assert";
import { deviceTest, runs } from "./devices.ts";
import { type Case, length, type Loose, refuses } from "./refusals.ts";

// ---- options ------------------------------------------------------------------------------------------

const whole = "be a whole number of at least 0, or Infinity for no limit";
const options: [options: Loose, error: Case["error"], says: string][] = [
  [
    { alignment: "left" },
    RangeError,
    `alignment must be one of "bottom-right", "top-left": current value is "left".`,
  ],
  [{ alignment: 1 }, TypeError, `alignment must be one of "bottom-right", "top-left"`],
  [{ window: -1 }, RangeError, `window must ${whole}: current value is -1.`],
  [{ window: NaN }, RangeError, `window must ${whole}: current value is NaN.`],
  [{ window: 1.5 }, RangeError, `window must ${whole}: current value is 1.5.`],
  [{ window: -Infinity }, RangeError, `window must ${whole}: current value is -Infinity.`],
  [{ window: 2 ** 60 }, RangeError, `window must ${whole}`],
  [{ window: "8" }, TypeError, `window must be a number or [before, after]: current value is "8".`],
  [
    { window: null },
    TypeError,
    "window must be a number or [before, after]: current value is null.",
  ],
  [{ window: {} }, TypeError, "window must be a number or [before, after]"],
  [{ window: [1] }, TypeError, "window must be a number or [before, after]: current value is [1]."],
  [{ window: [1, 2, 3] }, TypeError, "window must be a number or [before, after]"],
  [{ window: [1, -2] }, RangeError, `window[1] must ${whole}: current value is -2.`],
  [{ window: ["1", 2] }, TypeError, `window[0] must ${whole}: current value is "1".`],
  [
    { window: [8, 2], causal: true },
    TypeError,
    "window[1] with causal must be 0 or Infinity: current value is 2.",
  ],
  [
    { softcap: 0 },
    RangeError,
    "softcap must be a positive number up to 3e+38: current value is 0.",
  ],
  [{ softcap: -5 }, RangeError, "softcap must be a positive number up to 3e+38"],
  [{ softcap: NaN }, RangeError, "softcap must be a positive number up to 3e+38"],
  [{ softcap: Infinity }, RangeError, "softcap must be a positive number up to 3e+38"],
  [{ softcap: "50" }, TypeError, "softcap must be a positive number up to 3e+38"],
  [{ softcap: 1e-60 }, RangeError, "softcap must be positive in single precision"],
];

refuses(
  "windows, alignments and caps",
  options.flatMap(([options, error, says]): Case[] => {
    const name = Deno.inspect(options);
    const run = "Cannot run attention as", show = "Cannot explain attention as";
    return [
      {
        name: `attention(), ${name}`,
        call: ({ q, k, v }) => attention(q, k, v, options),
        error,
        says: [run, says],
      },
      {
        name: `flashAttention(), ${name}`,
        call: ({ q, k, v }) => flashAttention(q, k, v, options),
        error,
        says: [run, says],
      },
      {
        name: `explain(), ${name}`,
        call: ({ q, k, v }) => explain(q, k, v, options),
        error,
        says: [show, says],
      },
      {
        name: `attentionQuantized(), ${name}`,
        call: ({ q, k, v, pack }) =>
          attentionQuantized(
            pack(q, { operand: "query" }),
            pack(k, { operand: "key" }),
            pack(v, { operand: "value" }),
            options,
          ),
        error,
        says: [run, says],
      },
    ];
  }),
);

// ---- tensors ------------------------------------------------------------------------------------------

const tensors: [
  name: string,
  option: string,
  shape: number[],
  Loose,
  Case["error"],
  says: string,
][] = [
  [
    "another batch",
    "mask",
    [2, 2, 16, 16],
    {},
    RangeError,
    "mask must have shape [1, 1 or 2, 1 or 16, 16]: current value is [2, 2, 16, 16].",
  ],
  [
    "another count of heads",
    "mask",
    [1, 4, 16, 16],
    {},
    RangeError,
    "mask must have shape [1, 1 or 2, 1 or 16, 16]",
  ],
  [
    "other queries",
    "mask",
    [1, 1, 15, 16],
    { dtype: "bool" },
    RangeError,
    "mask must have shape [1, 1 or 2, 1 or 16, 16]",
  ],
  [
    "one key",
    "mask",
    [1, 1, 16, 1],
    { dtype: "bool" },
    RangeError,
    "mask must have shape [1, 1 or 2, 1 or 16, 16]",
  ],
  [
    "another layout",
    "mask",
    [1, 2, 16, 16],
    { layout: "NHD" },
    RangeError,
    "mask must have shape [1, 1 or 16, 1 or 2, 16]: current value is [1, 2, 16, 16].",
  ],
  [
    "codes",
    "mask",
    [1, 1, 16, 16],
    { dtype: "i8" },
    RangeError,
    `mask.dtype must be one of "bool", "f32", "f16", "bf16": current value is "i8".`,
  ],
  [
    "f16",
    "sinks",
    [1, 2, 1, 1],
    { dtype: "f16" },
    RangeError,
    `sinks.dtype must be one of "f32": current value is "f16".`,
  ],
  [
    "one head",
    "sinks",
    [1, 1, 1, 1],
    {},
    RangeError,
    "sinks must have shape [1, 2, 1, 1]: current value is [1, 1, 1, 1].",
  ],
  ["a batch", "sinks", [2, 2, 1, 1], {}, RangeError, "sinks must have shape [1, 2, 1, 1]"],
  ["one head", "alibi", [1, 1, 1, 1], {}, RangeError, "alibi must have shape [1, 2, 1, 1]"],
  ["rows", "alibi", [1, 2, 16, 1], {}, RangeError, "alibi must have shape [1, 2, 1, 1]"],
  [
    "bool",
    "alibi",
    [1, 2, 1, 1],
    { dtype: "bool" },
    RangeError,
    `alibi.dtype must be one of "f32": current value is "bool".`,
  ],
];

const functions = [attention, flashAttention, explain] as const;

refuses("tensors of masks", [
  ...functions.flatMap((run) => [
    ...tensors.map(([name, option, shape, spec, error, says]): Case => ({
      name: `${run.name}(), ${option}: ${name}`,
      call: ({ q, k, v, make }) => (run as Loose)(q, k, v, { [option]: make(shape, spec) }),
      error,
      says: [says],
    })),
    ...["mask", "sinks", "alibi"].flatMap((option): Case[] => [
      ...[null, true, new Float32Array(4), { shape: [1, 1, 1, 16] }].map((value): Case => ({
        name: `${run.name}(), ${option}: ${Deno.inspect(value)}`,
        call: ({ q, k, v }) => (run as Loose)(q, k, v, { [option]: value }),
        error: TypeError,
        says: [`${option} must be a Tensor: current value is `],
      })),
      {
        name: `${run.name}(), ${option} of another device`,
        call: ({ q, k, v }) => {
          using other = Device.open("cpu");
          using tensor = other.tensor(new Float32Array(2), [1, 2, 1, 1]);
          return (run as Loose)(q, k, v, { [option]: tensor });
        },
        error: TypeError,
        says: [`${option} must belong to the same Device object as the other tensors`],
      },
    ]),
  ]),
  ...["mask", "sinks", "alibi"].map((option): Case => ({
    name: `attentionQuantized() with ${option}`,
    call: ({ q, k, v, pack, make }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value" }),
        { [option]: make([1, 2, 1, 1]) } as Loose,
      ),
    error: TypeError,
    says: [`Cannot run attention as options must have no property "${option}": known options are `],
  })),
  ...([[0, RangeError], [1.5, RangeError], ["8", TypeError], [2 ** 21, RangeError]] as const).map((
    [heads, error],
  ): Case => ({
    name: `alibiSlopes() of ${heads}`,
    call: () => alibiSlopes(heads as Loose),
    error,
    says: ["Cannot make slopes as heads must be a whole number from 1 to 1048576"],
  })),
]);

deviceTest("an output must not lie in a mask", (device) => {
  using q = device.tensor(new Float32Array(length), [1, 2, 16, 8]);
  using v = device.tensor(new Float32Array(2 * 16 * 16), [1, 2, 16, 16]);
  using mask = device.tensor(new Float32Array(2 * 16 * 16), [1, 2, 16, 16]);
  const options = { kernel: "sage1", mask } as const;
  if (!runs(q, q, v, options)) return;
  const out = mask;
  assertThrows(() => attention(q, q, v, { ...options, out }), SageError, "o must not overlap mask");
});
