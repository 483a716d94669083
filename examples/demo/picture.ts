// The demo's picture: error against time, one panel for each set of tensors, one mark for each kernel.
import { type Kernel, kernels } from "../../mod.ts";
import { escape, svgDocument } from "../../lib/svg.ts";

/** One kernel on one device. */
export interface Mark {
  kernel: Exclude<Kernel, "auto">;
  device: string;
  milliseconds: number;
  relativeL1: number;
}

/** One set of tensors. */
export interface Panel {
  title: string;
  marks: Mark[];
}

const panelWidth = 470, panelHeight = 300;
const margin = { left: 58, right: 16, top: 34, bottom: 40 };
const head = 78, gap = 14;

/** A logarithmic axis: where a value lies, and its ticks. */
class Axis {
  readonly #low: number;
  readonly #high: number;

  constructor(values: number[], readonly from: number, readonly to: number) {
    const logs = values.map(Math.log10);
    const low = Math.min(...logs), high = Math.max(...logs);
    const room = Math.max(0.16 * (high - low), (0.6 - (high - low)) / 2);
    this.#low = low - room;
    this.#high = high + room;
  }

  at(value: number): number {
    const share = (Math.log10(value) - this.#low) / (this.#high - this.#low);
    return this.from + share * (this.to - this.from);
  }

  /** Round numbers: powers of ten alone where those are many, else some between them. */
  ticks(): number[] {
    const decades = this.#high - this.#low;
    const steps = decades > 2.5 ? [1] : decades > 0.8 ? [1, 2, 5] : [1, 2, 3, 4, 5, 7];
    const ticks: number[] = [];
    for (let power = Math.floor(this.#low); power <= Math.ceil(this.#high); ++power) {
      for (const step of steps) {
        const log = power + Math.log10(step);
        if (log >= this.#low && log <= this.#high) ticks.push(step * 10 ** power);
      }
    }
    return ticks;
  }
}

function number(value: number): string {
  return value >= 0.001 && value < 1000
    ? String(Number(value.toPrecision(1)))
    : value.toExponential(0);
}

interface Box {
  x: number;
  y: number;
  width: number;
  height: number;
}

function overlap(a: Box, b: Box): boolean {
  return a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height &&
    b.y < a.y + a.height;
}

/** A place for a label near its mark that covers nothing placed before. */
function place(x: number, y: number, width: number, taken: Box[], frame: Box): Box {
  const height = 13;
  const distances = [0, 12, -12, 22, -22, 34, -34, 46, -46, 58, -58];
  const candidates = distances.flatMap((dy) =>
    [x + 9, x - 9 - width].map((left) => ({ x: left, y: y + dy - height / 2, width, height }))
  );
  const inside = (box: Box) =>
    box.x >= frame.x && box.x + box.width <= frame.x + frame.width &&
    box.y >= frame.y && box.y + box.height <= frame.y + frame.height;
  return candidates.find((box) => inside(box) && !taken.some((other) => overlap(box, other))) ??
    candidates.find(inside) ?? candidates[0];
}

function shape(device: string, x: number, y: number, kind: string): string {
  return device === "cpu"
    ? `<circle cx="${x}" cy="${y}" r="5" class="${kind}"/>`
    : `<path d="M${x} ${y - 6.5}l6.5 6.5-6.5 6.5-6.5-6.5z" class="${kind}"/>`;
}

function drawPanel({ title, marks }: Panel): string {
  const frame: Box = {
    x: margin.left,
    y: margin.top,
    width: panelWidth - margin.left - margin.right,
    height: panelHeight - margin.top - margin.bottom,
  };
  const right = frame.x + frame.width, bottom = frame.y + frame.height;
  const x = new Axis(marks.map((mark) => mark.milliseconds), frame.x, right);
  const y = new Axis(marks.map((mark) => mark.relativeL1), bottom, frame.y);
  const parts = [`<text class="panel" x="${frame.x}" y="20">${escape(title)}</text>`];
  for (const tick of x.ticks()) {
    const at = x.at(tick).toFixed(1);
    parts.push(
      `<path class="grid" d="M${at} ${frame.y}V${bottom}"/>`,
      `<text class="faint" x="${at}" y="${bottom + 16}" text-anchor="middle">${
        number(tick)
      }</text>`,
    );
  }
  for (const tick of y.ticks()) {
    const at = y.at(tick);
    parts.push(
      `<path class="grid" d="M${frame.x} ${at.toFixed(1)}H${right}"/>`,
      `<text class="faint" x="${frame.x - 6}" y="${(at + 4).toFixed(1)}" text-anchor="end">` +
        `${number(tick)}</text>`,
    );
  }
  parts.push(
    `<text class="faint" x="${right}" y="${bottom + 33}" text-anchor="end">milliseconds →</text>`,
  );

  const points = marks.map((mark) => ({
    ...mark,
    left: x.at(mark.milliseconds),
    top: y.at(mark.relativeL1),
    kind: `k${kernels.indexOf(mark.kernel)}`,
  }));
  const taken: Box[] = points.map(({ left, top }) => ({
    x: left - 6,
    y: top - 6,
    width: 12,
    height: 12,
  }));
  for (const { kernel, left, top, kind } of points.sort((a, b) => a.top - b.top)) {
    const box = place(left, top, kernel.length * 7.8, taken, frame);
    taken.push(box);
    const middle = box.y + box.height / 2, after = box.x > left;
    if (Math.abs(middle - top) > 11) {
      const to = after ? box.x - 1 : box.x + box.width + 1;
      parts.push(
        `<path class="lead" d="M${left.toFixed(1)} ${top.toFixed(1)}L${to.toFixed(1)} ${
          middle.toFixed(1)
        }"/>`,
      );
    }
    parts.push(
      `<text class="label ${kind}" x="${(after ? box.x : box.x + box.width).toFixed(1)}" ` +
        `y="${(middle + 4).toFixed(1)}" text-anchor="${after ? "start" : "end"}">` +
        `${kernel}</text>`,
    );
  }
  for (const { device, left, top, kind } of points) {
    parts.push(shape(device, Number(left.toFixed(1)), Number(top.toFixed(1)), kind));
  }
  return parts.join("\n");
}

/**
 * Draws the panels two in a row.
 *
 * @param panels What was measured.
 * @param devices Names of the devices, as the legend shows them: ["cpu", "a processor"].
 * @returns An SVG document, readable on light and on dark ground.
 */
export function picture(panels: Panel[], devices: [string, string][]): string {
  const columns = Math.min(2, panels.length), rows = Math.ceil(panels.length / columns);
  const width = columns * panelWidth + (columns + 1) * gap;
  const height = head + rows * (panelHeight + gap);
  const legend = devices.map(([device, name], i) => {
    const left = width - 300, top = 30 + 22 * i;
    return shape(device, left, top, "faint") +
      `<text class="faint" x="${left + 14}" y="${top + 4}">${escape(`${device}: ${name}`)}</text>`;
  });
  const drawn = panels.map((panel, i) => {
    const left = gap + i % columns * (panelWidth + gap);
    const top = head + Math.floor(i / columns) * (panelHeight + gap);
    return `<g transform="translate(${left} ${top})">\n${drawPanel(panel)}\n</g>`;
  });
  return svgDocument(
    width,
    height,
    "Error against time of every attention kernel",
    `<text class="title" x="${gap + 10}" y="34">Attention kernels: error against time</text>
<text class="faint" x="${
      gap + 10
    }" y="62">Relative L1 error against float64 ↑, time of one call →. Lower left is better.</text>
${legend.join("\n")}
${drawn.join("\n")}`,
  );
}
