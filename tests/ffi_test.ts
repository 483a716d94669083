// lib/ffi.ts says the same as sage.h: a C program prints every offset and constant, and the two are compared.
import { assert, assertEquals } from "@std/assert";
import * as ffi from "../lib/ffi.ts";

const header = decodeURIComponent(new URL("../cuda/sage.h", import.meta.url).pathname);

/** Values of C expressions, by the compiler. */
async function evaluate(expressions: readonly string[]): Promise<number[]> {
  const folder = await Deno.makeTempDir();
  try {
    const lines = expressions.map((one) => `printf("%lld\\n", (long long)(${one}));`).join("\n");
    const source = `#include <stdio.h>\n#include "${header}"\nint main(void) {\n${lines}\n}\n`;
    await Deno.writeTextFile(`${folder}/values.c`, source);
    const compiled = await new Deno.Command("cc", {
      args: ["-std=c11", "-Wall", "-Werror", "-o", `${folder}/values`, `${folder}/values.c`],
    }).output();
    assert(compiled.success, new TextDecoder().decode(compiled.stderr));
    const { stdout } = await new Deno.Command(`${folder}/values`).output();
    return new TextDecoder().decode(stdout).trim().split("\n").map(Number);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** `qGroupRows` is `q_group_rows` in C. */
function snake(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

const structs: Record<string, Readonly<Record<string, number>>> = {
  sage_tensor: ffi.tensorStruct,
  sage_build_info: ffi.buildInfoStruct,
  sage_device_info: ffi.deviceInfoStruct,
  sage_memory_stats: ffi.memoryStatsStruct,
  sage_smooth_call: ffi.smoothStruct,
  sage_quantize_call: ffi.quantizeStruct,
  sage_attention_options: ffi.optionsStruct,
  sage_attention_call: ffi.attentionStruct,
  sage_attention_quantized_call: ffi.attentionQuantizedStruct,
  sage_plan: ffi.planStruct,
  sage_stage: ffi.stageStruct,
};

for (const [name, { size, ...offsets }] of Object.entries(structs)) {
  Deno.test(`offsets of ${name} are those of sage.h`, async () => {
    const fields = Object.keys(offsets);
    const found = await evaluate([
      `sizeof(${name})`,
      ...fields.map((field) => `__builtin_offsetof(${name}, ${snake(field)})`),
    ]);
    assertEquals([size, ...Object.values(offsets)], found);
  });
}

/** The constants of a record, with the prefix and spelling that sage.h gives their names. */
function spelled(
  prefix: string,
  values: Readonly<Record<string, number>>,
  spell = (name: string) => snake(name).toUpperCase(),
): [string, number][] {
  return Object.entries(values).map(([name, value]) => [`SAGE_${prefix}${spell(name)}`, value]);
}

Deno.test("constants are those of sage.h", async () => {
  const kernel = (name: string) => name.replace("++", "PP").replace("-", "_").toUpperCase();
  const range = (name: string) => ({ 448: "448_2", 224: "224_4", 112: "112_9" })[name]!;
  const constants: [string, number][] = [
    ["SAGE_ABI_VERSION", ffi.abiVersion],
    ["SAGE_CPU", ffi.cpuDevice],
    ["SAGE_DEFAULT", ffi.switchNumber(undefined)],
    ["SAGE_OFF", ffi.switchNumber(false)],
    ["SAGE_ON", ffi.switchNumber(true)],
    ...spelled("", ffi.status),
    ...spelled("", ffi.dtypeNumbers),
    ...spelled("KERNEL_", ffi.kernelNumbers, kernel),
    ...spelled("GRANULARITY_", ffi.granularityNumbers),
    ...spelled("OPERAND_", ffi.operandNumbers),
    ...spelled("ACCUMULATOR_", ffi.accumulatorNumbers),
    ...spelled("EXPONENTIAL_", ffi.exponentialNumbers),
    ...spelled("RANGE_", ffi.rangeNumbers, range),
    ...spelled("ALIGN_", ffi.alignmentNumbers, kernel),
  ];
  const found = await evaluate(constants.map(([name]) => name));
  assertEquals(constants, constants.map(([name], i) => [name, found[i]]));
});
