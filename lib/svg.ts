// What every picture that is drawn by hand shares: colours for light and dark ground, and text in a document.

/** Colours that tell apart on white and on black, also for eyes that mix red and green: on light ground, on dark. */
const series: readonly (readonly [string, string])[] = [
  ["#5b6572", "#aab4c0"],
  ["#0b62c4", "#66a9ff"],
  ["#0a8f86", "#3fd0c4"],
  ["#c2410c", "#ff9a5c"],
  ["#8a2ea8", "#d896f0"],
  ["#a16207", "#e8c04a"],
  ["#be185d", "#ff8fc0"],
  ["#3f7d20", "#8fd16a"],
];

/** How many colours there are. */
export const seriesColours: number = series.length;

function palette(
  paper: string,
  ink: string,
  faint: string,
  line: string,
  ground: 0 | 1,
): string {
  return `.paper { fill: ${paper}; } text { fill: ${ink}; } .faint { fill: ${faint}; } ` +
    `.grid { stroke: ${line}; } .lead { stroke: ${faint}; } .halo { stroke: ${paper}; } ` +
    series.map((colours, i) => `.k${i} { fill: ${colours[ground]}; }`).join(" ");
}

// Plain classes: image viewers other than browsers know no CSS variables.
const style = `
svg { font: 12px system-ui, sans-serif; } .title { font-size: 18px; font-weight: 600; }
.panel { font-size: 13px; font-weight: 600; } .label { font-weight: 600; } .lead { stroke-width: .7; }
.halo { stroke-width: 3; stroke-linejoin: round; paint-order: stroke; }
${palette("#fff", "#1c2128", "#6b7480", "#e3e6ea", 0)}
@media (prefers-color-scheme: dark) {
${palette("#14171c", "#e6e9ee", "#98a2ae", "#2a2f37", 1)}
}`;

/** Text that is no markup. */
export function escape(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");
}

/**
 * A whole document. Its classes: `k0` and so on for the colours of a series, `faint`, `grid`, `title`, `panel`,
 * `label`, `halo`.
 */
export function svgDocument(width: number, height: number, about: string, content: string): string {
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="${
    escape(about)
  }">
<style>${style}</style>
<rect width="100%" height="100%" class="paper"/>
${content}
</svg>
`;
}
