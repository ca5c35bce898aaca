"""How the page of a report looks, and how its tables are sorted."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --faint: #656b73;
  --line: #e3e5e8; --band: #f6f7f8; --accent: #0068a8; --warn: #b45f06; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e6e8ea; --faint: #9aa1a9;
  --line: #2d3136; --band: #1b1e22; --accent: #62b3ec; --warn: #e8a33d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 80rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h1, td.name, td.notes, dt, dd, li { overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .5rem; font-size: 1.15rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: .95rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.about, .faint { color: var(--faint); }
.warning { margin: 1rem 0; padding: .5rem .75rem; border-left: 4px solid var(--warn);
  background: var(--band); }
.faint { font-size: .85rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: 1.25rem 1.5rem; margin: 1.75rem 0 0; }
.figures div { border-top: 2px solid var(--ink); padding-top: .4rem; }
.figures div:first-child { border-color: var(--accent); }
p.faint, .figures span { line-height: 1.4; }
.figures span { display: block; }
.figures dt { font-size: .85rem; color: var(--faint); }
.figures dd { margin: 0; }
.figures b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-bottom: .6rem;
  font-size: .85rem; color: var(--faint); }
.legend span::before { content: ""; display: inline-block; width: .6rem; height: .6rem;
  margin-right: .4rem; border: 1.5px solid var(--faint); border-radius: 50%; }
.legend .final::before { background: var(--accent); border-color: var(--accent); }
.chart { display: flex; max-width: calc((var(--axis) + var(--width)) * 1px); }
.chart svg { display: block; width: 100%; height: auto; }
.chart .axis { flex: none; width: calc(var(--axis) * 1px); }
.chart .plot { flex: 0 1 auto; min-width: 0; overflow-x: auto; }
.chart .plot svg { width: calc(var(--width) * 1px); }
.chart text { font-size: 11px; fill: var(--faint); }
.chart .title { font-size: 12px; font-weight: 600; fill: var(--ink); }
.chart .end { text-anchor: end; }
.chart .band { fill: var(--band); }
.chart .grid { stroke: var(--line); fill: none; }
.chart .stem { stroke: var(--faint); stroke-opacity: .45; fill: none; }
.chart .nearest { fill: var(--paper); stroke: var(--faint); stroke-width: 1.3; }
.chart .final, .chart .bar { fill: var(--accent); }
.chart .hit { fill: transparent; }
.chart .layer:hover .hit { fill: var(--accent); fill-opacity: .13; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.4; }
.wide table { width: 100%; }
th, td { padding: .32rem .6rem .32rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 400; }
.n { text-align: right; white-space: nowrap; }
td.name { min-width: 11rem; position: sticky; left: 0; background: var(--paper); }
td.notes { min-width: 9rem; padding-right: 0; color: var(--faint); }
th button { all: unset; cursor: pointer; color: inherit; }
th button:hover { color: var(--accent); }
th button:focus-visible, .plot:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.share { width: 10rem; }
.share i { display: block; height: .55rem; margin-top: .32rem; background: var(--accent); }
.pair { display: flex; flex-wrap: wrap; gap: .5rem 4rem; align-items: flex-start; }
.pair dl { flex: 0 1 18rem; }
.values { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: 0 2.5rem; margin: 0; font-size: .82rem; line-height: 1.4; }
.values div { display: flex; justify-content: space-between; gap: 1rem; padding: .32rem 0;
  border-bottom: 1px solid var(--line); }
.values dd { margin: 0; text-align: right; }
dl.reasons dt { font-weight: 600; margin-top: .75rem; }
dl.reasons dd { margin: 0; }
@media (max-width: 72rem) { .wide table { font-size: .75rem; }
  th, td { padding-right: .4rem; } td.name { min-width: 8rem; } td.notes { min-width: 7rem; } }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  td.name { min-width: 9rem; } }
@media print {
  @page { margin: 12mm; }
  :root { color-scheme: light; --paper: #fff; --ink: #000; --faint: #444; --line: #ccc;
    --band: #f3f3f3; --accent: #005a94; }
  html { font-size: 12px; }
  body { font-size: 9pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 1.5rem; }
  h2, h3, .legend { break-after: avoid; }
  tr, .chart, .values div { break-inside: avoid; }
  .figures { grid-template-columns: repeat(6, 1fr); gap: .75rem; }
  .figures b { font-size: 1.1rem; }
  .wide { overflow: visible; }
  .wide table { font-size: 6pt; }
  td.name { position: static; }
  td.name { min-width: 13rem; }
  td.notes { min-width: 0; }
  .wide th, .wide td { padding-right: .35rem; }
  .chart .axis { flex: var(--axis) 1 0; width: auto; }
  .chart .plot { flex: var(--width) 1 0; overflow: visible; }
  .chart .plot svg, .chart .axis svg { width: 100%; }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex, numbers = head.classList.contains("n");
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numbers;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = numbers ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b));
    const rows = [...body.rows].sort(order);
    body.append(...(down ? rows.reverse() : rows));
  });
}
"""
