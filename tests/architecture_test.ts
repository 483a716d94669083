// Device.open(name, { architecture }): the portable kernels of older GPUs, proven on a newer one, and which architectures
// a device refuses.
import { assertEquals, assertThrows } from "@std/assert";
import { Device, explain, UnsupportedError } from "../mod.ts";
import { deviceNames } from "./devices.ts";

const spec = { shape: [1, 2, 300, 64], dtype: "f16" } as const;

Deno.test("Device.open() refuses an architecture on the CPU and numbers that are none", () => {
  assertThrows(
    () => Device.open("cpu", { architecture: 80 }),
    RangeError,
    "architecture must be absent on the CPU: current value is 80",
  );
  for (const wrong of [0, -80, 8.9, NaN, 1000]) {
    assertThrows(
      () => Device.open("cpu", { architecture: wrong }),
      RangeError,
      `architecture must be a whole number from 1 to 999: current value is ${wrong}`,
    );
  }
  assertThrows(
    () => Device.open("cpu", { architecture: "80" as never }),
    TypeError,
    "architecture",
  );
  assertThrows(() => Device.open("cpu", { arch: 80 } as never), TypeError, `"arch"`);
});

Deno.test({
  name: "Device.open() refuses architectures that the GPU cannot run, and says which it can",
  ignore: !deviceNames.includes("cuda:0"),
  fn: () => {
    using own = Device.open("cuda:0");
    const { streams } = own.memory();
    const capability = Number(own.info.computeCapability) * 10;
    for (const wrong of [1, 75, 81, capability + 1, 999]) {
      assertThrows(
        () => Device.open("cuda:0", { architecture: wrong }),
        UnsupportedError,
        `current value is ${wrong}`,
      );
    }
    assertThrows(() => Device.open("cuda:0", { architecture: 75 }), UnsupportedError, "must be 80");
    assertEquals(own.memory().streams, streams, "a stream was left behind");
    using same = Device.open("cuda:0", { architecture: capability });
    const options = { kernel: "sage2" } as const;
    assertEquals(
      explain(spec, spec, spec, { ...options, device: same }),
      explain(spec, spec, spec, { ...options, device: own }),
    );
    using older = Device.open("cuda:0", { architecture: 80 });
    assertEquals(explain(spec, spec, spec, { ...options, device: older }).architecture, "sm_80");
  },
});
