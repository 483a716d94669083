// A worker that runs attention until it is told to stop, or killed; used by bad_input_test.ts.
import { attention, Device } from "../mod.ts";

interface Scope {
  onmessage: (
    event: MessageEvent<{ device: "cpu" | "cuda:0"; tokens: number; rounds: number }>,
  ) => void;
  postMessage(message: unknown): void;
}

const scope = self as unknown as Scope;
scope.onmessage = async ({ data: { device: name, tokens, rounds } }) => {
  using device = Device.open(name);
  const ones = new Float32Array(4 * tokens * 64).fill(1);
  using x = device.tensor(Float16Array.from(ones), [1, 4, tokens, 64]);
  let wrong = 0;
  for (let round = 0; round < rounds; ++round) {
    using out = attention(x, x, x, { kernel: "sage1" });
    const data = out.data();
    scope.postMessage("started");
    wrong += (await data).filter((value) => value !== 1).length;
  }
  device.dispose();
  scope.postMessage({ wrong });
};
