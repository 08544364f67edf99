"""The report's style sheet. Light, dark (as the reader's system says) and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f8fa; --ink: #1c2126; --soft: #57606a; --line: #d8dee4; --track: #e6eaef;
  --c0: #2f6fb7; --c1: #c4681c; --c2: #3b8a5a; --c3: #8657a8; --c4: #a8902a; --c5: #4a9aa5; --pale: #a9c3e0; --bad: #b3352c; --area: #2f6fb72e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1c2229; --ink: #e4e8ec; --soft: #9aa6b2; --line: #323b45; --track: #2a323b;
    --c0: #6ba6e6; --c1: #e89a55; --c2: #6cc08e; --c3: #bd95da; --c4: #d8c35c; --c5: #74c7d1; --pale: #3f5f82; --bad: #ee7f75; --area: #6ba6e633;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px 24px 48px; max-width: 980px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 6px; }
h3 { font-size: 14px; margin: 18px 0 2px; color: var(--soft); font-weight: 600; }
p { margin: 6px 0; max-width: 78ch; }
.where, .hint, footer { color: var(--soft); }
.where { overflow-wrap: anywhere; }
.lead { font-size: 17px; margin: 16px 0 18px; }
.hint { font-size: 14px; }
.warn { border-left: 4px solid var(--c1); padding: 6px 12px; background: var(--card); }
.wrong { border-left-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; }
tr.now td { font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; font-size: 14px; margin: 10px 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
svg { display: block; width: 100%; height: auto; margin: 8px 0 2px; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg text.label, svg text.word { fill: var(--ink); }
svg text.word { paint-order: stroke; stroke: var(--paper); stroke-width: 5px; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 4 3; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); }
.pale { fill: var(--pale); } .bad { fill: var(--bad); } .track { fill: var(--track); }
.curve { fill: none; stroke-width: 2; }
.k0 { stroke: var(--c0); } .k1 { stroke: var(--c1); } .k2 { stroke: var(--c2); } .k3 { stroke: var(--c3); }
.k4 { stroke: var(--c4); } .k5 { stroke: var(--c5); }
.area { fill: var(--area); } .line { fill: none; stroke: var(--c0); stroke-width: 1.5; }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); margin: 2px 0; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.key .c0 { background: var(--c0); } .key .c1 { background: var(--c1); } .key .c2 { background: var(--c2); }
.key .c3 { background: var(--c3); } .key .c4 { background: var(--c4); } .key .c5 { background: var(--c5); }
 .key .pale { background: var(--pale); } .key .bad { background: var(--bad); }
footer { margin-top: 44px; padding-top: 10px; border-top: 1px solid var(--line); font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { padding: 20px 14px 32px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 8px; }
  .chart { overflow-x: auto; } .chart svg { min-width: 620px; }
}
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --track: #e6e6e6;
    --c0: #2f6fb7; --c1: #c4681c; --c2: #3b8a5a; --c3: #8657a8; --c4: #a8902a; --c5: #4a9aa5; --pale: #a9c3e0; --bad: #b3352c; --area: #2f6fb72e;
  }
  @page { margin: 16mm 14mm; }
  body { padding: 0; max-width: none; font-size: 11pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  svg, table, .tiles, .facts, .chart { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
