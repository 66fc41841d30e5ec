// Read a picture in the language of Mermaid from standard input, and write it to standard output as SVG.
// Fails if an arrow or a text is missing in the picture, because the renderer drops silently what it cannot read.
// Its colours are those of the page around it, by day and by night.

import { readFileSync } from "node:fs";
import { renderMermaidSVG } from "beautiful-mermaid";

const source = readFileSync(0, "utf8");
const svg = renderMermaidSVG(source, {
  bg: "var(--md-default-bg-color)",
  fg: "var(--md-typeset-color)",
  line: "var(--md-default-fg-color--light)",
  muted: "var(--md-default-fg-color--light)",
  border: "var(--md-default-fg-color--lighter)",
  padding: 8,
  transparent: true,
}).replace(/style="/, 'style="max-width: 100%; height: auto; ').replace(/ *@import url.*\n/, "").replace(/font-family: [^;]*;/, "font-family: inherit;");

const arrows = source.match(/-+>>?|\.->/g).length;
const drawn = svg.match(/class="(edge|message)"/g).length;
if (arrows !== drawn) throw new Error(`the picture has ${drawn} of ${arrows} arrows:\n${source}`);

const shown = svg.replace(/<style>[^]*?<\/style>|<[^>]*>/g, " ").replace(/&quot;/g, '"').replace(/\s+/g, " ");
const texts = [...source.matchAll(/"([^"]*)"|\[([^\]"]+)\]|->>\w+: (.*)/g)].map((found) => found[1] ?? found[2] ?? found[3]);
for (const line of texts.flatMap((text) => text.split("<br>"))) {
  if (!shown.includes(line)) throw new Error(`the picture does not show "${line}":\n${source}`);
}
process.stdout.write(svg);
