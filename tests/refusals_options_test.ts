// Options that every function must refuse: unknown ones, wrong values, and some that contradict each other.
import {
  attention,
  attentionQuantized,
  dequantize,
  Device,
  explain,
  flashAttention,
  kernels,
  NoDeviceError,
  quantize,
  smooth,
} from "../mod.ts";

import {
  type Case,
  type ErrorClass,
  type Fixture,
  length,
  type Loose,
  refuses,
} from "./refusals.ts";

// ---- attention ----------------------------------------------------------------------------------------

const anyKernel =
  `be one of "auto", "flash", "sage1", "sage1-int8", "sage2", "sage2-int4", "sage2++", "sage-int8"`;
const anyGranularity = `be one of "token", "block", "warp", "thread"`;
const anyFloat = `be one of "f32", "f16", "bf16"`;

/** Wrong values of one option of attention(), those of another type apart from those out of range. */
const options: [string, Loose[], Loose[], string, Loose?][] = [
  ["kernel", [1, null, {}], ["sage3", "", "Flash"], anyKernel],
  ["causal", [1, "true", null], [], "be a boolean"],
  ["returnLse", [1, "yes", null], [], "be a boolean"],
  ["smoothQ", [1, "on"], [], "be a boolean"],
  ["smoothK", [0, "yes", null], [], "be a boolean"],
  ["smoothV", ["off"], [], "be a boolean"],
  ["rotate", [1, "yes", null], [], "be a boolean"],
  ["band", [1, "yes", null], [], "be a boolean", { causal: true }],
  ["firstToken", [1, "yes", null], [], "be a boolean"],
  [
    "kMeanRows",
    ["64", null, true],
    [0, 63.5, -64, NaN, 2 ** 32],
    "be a whole number from 64 to 4294967232",
  ],
  ["kMeanRows", [], [65, 100, 127], "be a multiple of 64"],
  [
    "scale",
    ["1", 1n, null, true],
    [NaN, 0, -0, -1, Infinity, -Infinity, 1e300],
    "be a positive number up to 3e+38",
  ],
  ["scale", [], [1e-60, 1e-300], "be positive in single precision"],
  ["granularity", [], ["tensor", "channel"], anyGranularity],
  ["granularity", [1, null], ["channel", "row"], anyGranularity, { kernel: "sage2" }],
  ["outDtype", [16, null], ["i8", "f64", "float"], anyFloat],
  ["pvAccumulator", [16, null], ["bf16", "i32"], `be one of "f32", "f16"`, { kernel: "sage1" }],
  ["pvRange", ["448", null], [1, 9, 100, NaN], "be one of 448, 224, 112", { kernel: "sage2++" }],
];

/** How an error shows a value. */
function shown(value: Loose): string {
  if (typeof value === "string") return JSON.stringify(value);
  if (typeof value === "bigint") return `${value}n`;
  return typeof value === "object" && value !== null ? "an Object" : String(value);
}

/** How errors of the two functions that take all options of attention begin. */
const attentions = [[attention, "Cannot run attention as"], [
  explain,
  "Cannot explain attention as",
]] as const;

refuses(
  "values of each option of attention",
  options.flatMap(([name, wrongTypes, wrongValues, must, others]): Case[] =>
    [...wrongTypes, ...wrongValues].flatMap((value): Case[] =>
      attentions.map(([call, cannot]) => ({
        name: `${call.name}() with ${Deno.inspect({ ...others, [name]: value })}`,
        call: ({ q, k, v }) => call(q, k, v, { ...others, [name]: value } as Loose),
        error: wrongTypes.includes(value) ? TypeError : RangeError,
        says: [`${cannot} ${name} must ${must}: current value is ${shown(value)}.`],
      }))
    )
  ),
);

const everyKernel = ["auto", ...kernels] as const;

/** Options that only one kernel takes. */
const ofOneKernel = [
  [{ pvAccumulator: "f16" }, "pvAccumulator", "sage1"],
  [{ pvRange: 448 }, "pvRange", "sage2++"],
  [{ pvRange: 112 }, "pvRange", "sage2++"],
] as const;

refuses(
  "options that contradict each other",
  attentions.flatMap(([call, cannot]): Case[] => [
    ...([
      ["smoothQ", true],
      ["smoothK", true],
      ["smoothV", true],
      ["granularity", "block"],
      ["granularity", "token"],
      ["rotate", true],
      ["firstToken", true],
      ["kMeanRows", 64],
    ] as const).map(([name, value]): Case => ({
      name: `${call.name}(), ${name} ${value} with flash`,
      call: ({ q, k, v }) => call(q, k, v, { kernel: "flash", [name]: value }),
      error: TypeError,
      says: [
        `${cannot} ${name} with kernel "flash" must be absent, as nothing is quantized: ` +
        `current value is ${shown(value)}.`,
      ],
    })),
    {
      name: `${call.name}(), band with flash`,
      call: ({ q, k, v }) => call(q, k, v, { kernel: "flash", band: true, causal: true }),
      error: TypeError,
      says: [`${cannot} band with kernel "flash" must be absent, as nothing is quantized`],
    },
    ...[undefined, false].map((causal): Case => ({
      name: `${call.name}(), band with causal ${causal}`,
      call: ({ q, k, v }) => call(q, k, v, { kernel: "sage2", band: true, causal }),
      error: TypeError,
      says: [`${cannot} causal with band must be true: current value is ${causal}.`],
    })),
    {
      name: `${call.name}(), kMeanRows without smoothK`,
      call: ({ q, k, v }) => call(q, k, v, { kernel: "sage2", kMeanRows: 64, smoothK: false }),
      error: TypeError,
      says: [`${cannot} smoothK with kMeanRows must be absent or true: current value is false.`],
    },
    ...ofOneKernel.flatMap(([option, name, only]): Case[] =>
      [...everyKernel.filter((kernel) => kernel !== only), undefined].map((kernel) => ({
        name: `${call.name}() with ${Deno.inspect(option)} and kernel ${kernel}`,
        call: ({ q, k, v }) => call(q, k, v, { ...option, ...kernel && { kernel } }),
        error: TypeError,
        says: [
          `${cannot} kernel with ${name} must be "${only}": current value is "${
            kernel ?? "auto"
          }".`,
        ],
      }))
    ),
  ]),
);

// ---- every function -----------------------------------------------------------------------------------

/** Functions that take options, how their errors begin, and options that they know. */
const takers: [string, (fixture: Fixture, options: Loose) => unknown, string, string][] = [
  ["attention", ({ q, k, v }, o) => attention(q, k, v, o), "run attention", `"smoothQ"`],
  [
    "flashAttention",
    ({ q, k, v }, o) => flashAttention(q, k, v, o),
    "run attention",
    `"causal", "alignment", "window", "softcap", "scale", "out", "outDtype", "returnLse", "mask", "sinks", "alibi".`,
  ],
  ["explain", ({ q, k, v }, o) => explain(q, k, v, o), "explain attention", `"device"`],
  ["smooth", ({ q }, o) => smooth(q, o), "smooth", `"blockRows", "outDtype".`],
  [
    "quantize",
    ({ q }, o) => quantize(q, o),
    "quantize",
    `"operand", "dtype", "granularity", "groupRows", "smooth", "range".`,
  ],
  [
    "empty",
    ({ device }, o) => device.empty([1, 1, 1, 1], o),
    "make a tensor",
    `"dtype", "layout".`,
  ],
  [
    "tensor",
    ({ device }, o) => device.tensor(new Float32Array(1), [1, 1, 1, 1], o),
    "make a tensor",
    `"dtype", "layout".`,
  ],
  ["view", ({ q }, o) => q.view(o), "view a tensor", `"batch", "heads", "tokens".`],
  [
    "dequantize",
    ({ q, pack }, o) => dequantize(pack(q, { operand: "key" }), o),
    "dequantize",
    `"outDtype".`,
  ],
  [
    "attentionQuantized",
    ({ q, k, v, pack }, o) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value" }),
        o,
      ),
    "run attention",
    `"pvRange"`,
  ],
];

refuses("unknown options", [
  ...takers.flatMap(([name, call, cannot, known]): Case[] => [
    {
      name: `${name}() with an unknown option`,
      call: (fixture) => call(fixture, { tpyo: 1 }),
      error: TypeError,
      says: [`Cannot ${cannot} as options must have no property "tpyo": known options are `, known],
    },
    ...([[null, "null"], [1, "1"], ["causal", `"causal"`], [[], "[]"]] as [Loose, string][])
      .map(([options, shown]): Case => ({
        name: `${name}() with options ${shown}`,
        call: (fixture) => call(fixture, options),
        error: TypeError,
        says: [`Cannot ${cannot} as options must be an object: current value is ${shown}.`],
      })),
  ]),
  ...["kernel", "smoothK", "granularity", "pvRange", "pvAccumulator"].map((name): Case => ({
    name: `flashAttention() with ${name}`,
    call: ({ q, k, v }) => flashAttention(q, k, v, { [name]: undefined } as Loose),
    error: TypeError,
    says: [`options must have no property "${name}"`],
  })),
  {
    name: "flashAttention() with kernel sage1",
    call: ({ q, k, v }) => flashAttention(q, k, v, { kernel: "sage1" } as Loose),
    error: TypeError,
    says: [`options must have no property "kernel"`],
  },
]);

/** Wrong options of quantize(), and what it says. */
const recipes: [Loose, ErrorClass, string][] = [
  [undefined, TypeError, "options must be an object: current value is undefined"],
  [{}, TypeError, `operand must be one of "query", "key", "value": current value is undefined`],
  [
    { operand: "q" },
    RangeError,
    `operand must be one of "query", "key", "value": current value is "q"`,
  ],
  [
    { operand: "key", dtype: "f16" },
    RangeError,
    `dtype must be one of "i8", "i4", "e4m3": current value is "f16"`,
  ],
  [
    { operand: "key", granularity: "row" },
    RangeError,
    `granularity must be one of "token", "block", "warp", "thread", "channel": current value is "row"`,
  ],
  [
    { operand: "value", granularity: "thread" },
    RangeError,
    `granularity of values must be "token", "block", "warp" or "channel": current value is "thread"`,
  ],
  [{ operand: "key", smooth: 1 }, TypeError, "smooth must be a boolean: current value is 1"],
  [{ operand: "value", smooth: 1 }, TypeError, "smooth must be a boolean: current value is 1"],
  ...([
    [{}, 0, RangeError],
    [{ granularity: "block" }, 0, RangeError],
    [{}, -8, RangeError],
    [{}, 2 ** 32, RangeError],
    [{}, "64", TypeError],
  ] as [Loose, Loose, ErrorClass][]).map((
    [others, groupRows, error],
  ): typeof recipes[number] => [
    { operand: "key", ...others, groupRows },
    error,
    `groupRows must be a whole number from 1 to 4294967295: current value is ${shown(groupRows)}`,
  ]),
  ...[{}, { granularity: "thread" }].map((others): typeof recipes[number] => [
    { operand: "key", ...others, groupRows: 12 },
    RangeError,
    `groupRows with granularity "thread" must be a multiple of 8: current value is 12`,
  ]),
  [
    { operand: "key", granularity: "token", groupRows: 8 },
    TypeError,
    `groupRows with granularity "token" must be absent: current value is 8`,
  ],
  [
    { operand: "value", groupRows: 8 },
    TypeError,
    `groupRows with granularity "channel" must be absent: current value is 8`,
  ],
  ...[9, 100].map((range): typeof recipes[number] => [
    { operand: "key", range },
    TypeError,
    `range with dtype "i8" must be absent: current value is ${range}`,
  ]),
  ...[0, -1, NaN, Infinity, 449].map((range): typeof recipes[number] => [
    { operand: "value", range },
    RangeError,
    `range must be a positive number up to 448: current value is ${range}`,
  ]),
  [
    { operand: "value", smoothing: true },
    TypeError,
    `options must have no property "smoothing": known options are `,
  ],
];

refuses("values of each option elsewhere", [
  ...recipes.map(([recipe, error, says]): Case => ({
    name: `quantize() with ${Deno.inspect(recipe)}`,
    call: ({ q }) => quantize(q, recipe),
    error,
    says: [`Cannot quantize as ${says}`],
  })),
  ...[0, -1, 1.5, NaN, 2 ** 32].map((blockRows): Case => ({
    name: `smooth(), blockRows ${blockRows}`,
    call: ({ q }) => smooth(q, { blockRows }),
    error: RangeError,
    says: [
      "Cannot smooth as blockRows must be a whole number from 1 to 4294967295: " +
      `current value is ${blockRows}.`,
    ],
  })),
  ...([["i8", RangeError], [null, TypeError]] as [Loose, ErrorClass][]).map((
    [outDtype, error],
  ): Case => ({
    name: `smooth(), outDtype ${outDtype}`,
    call: ({ q }) => smooth(q, { outDtype }),
    error,
    says: [`Cannot smooth as outDtype must ${anyFloat}: current value is ${shown(outDtype)}.`],
  })),
  {
    name: "dequantize(), outDtype",
    call: ({ q, pack }) => dequantize(pack(q, { operand: "key" }), { outDtype: "e4m3" as Loose }),
    error: RangeError,
    says: [`Cannot dequantize as outDtype must ${anyFloat}: current value is "e4m3".`],
  },
  ...["empty", "tensor"].flatMap((method): Case[] =>
    ([
      ["dtype", "f64", RangeError],
      ["dtype", "fp16", RangeError],
      ["dtype", 1, TypeError],
      ["layout", "DHN", RangeError],
      ["layout", "BHND", RangeError],
      ["layout", 0, TypeError],
      ["layout", null, TypeError],
    ] as [string, Loose, ErrorClass][]).map(([name, value, error]) => ({
      name: `${method}() with ${name} ${shown(value)}`,
      call: ({ device }) =>
        method === "empty"
          ? device.empty([1, 2, 16, 8], { [name]: value })
          : device.tensor(new Float32Array(length), [1, 2, 16, 8], { [name]: value }),
      error,
      says: [
        `Cannot make a tensor as ${name} must be one of ${
          name === "dtype" ? `"f32", "f16", "bf16", "i8", "i4", "e4m3", "bool"` : `"HND", "NHD"`
        }: current value is ${shown(value)}.`,
      ],
    }))
  ),
  {
    name: "time() of what is no function",
    call: ({ device }) => device.time(5 as Loose),
    error: TypeError,
    says: ["Cannot time work as work must be a function: current value is 5."],
  },
]);

// ---- names of devices ---------------------------------------------------------------------------------

const noNames = [
  "gpu",
  "",
  "CPU",
  "cuda:",
  "cuda:-1",
  "cuda:x",
  "cuda:0:0",
  "cpu:0",
  "auto:0",
  " cpu",
];

refuses("names of devices", [
  ...[...noNames, null, 0, 3, {}].map((name): Case => ({
    name: `device ${shown(name)}`,
    call: () => Device.open(name as Loose),
    error: typeof name === "string" ? RangeError : TypeError,
    says: [
      `Cannot open a device as name must be "auto", "cpu", "cuda" or "cuda:N": ` +
      `current value is ${shown(name)}.`,
    ],
  })),
  {
    name: "cuda:99",
    call: () => Device.open("cuda:99"),
    error: NoDeviceError,
    says: ["Cannot "],
  },
]);
