"""The report's style sheet: one column, system fonts, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f8; --card: #ffffff; --ink: #1c2126; --muted: #5c6670; --line: #dde1e5;
  --pass: #00734f; --fail: #b03c00; --unknown: #5c6670;
  --series-0: #d55e00; --series-1: #0072b2; --series-2: #009e73;
  --series-3: #cc79a7; --series-4: #e69f00; --series-5: #56b4e9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101418; --card: #181d22; --ink: #e8ebee; --muted: #9aa5b0; --line: #323a42;
    --pass: #3cc79b; --fail: #ff8a4c; --unknown: #9aa5b0;
    --series-0: #f07a24; --series-1: #4a9fe0; --series-2: #1fb98d;
  }
}
@media print { :root { --page: #ffffff; } .card { break-inside: avoid; } }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1160px; margin: 0 auto; padding: 36px 24px 64px; }
h1, h2, h3, p, ul, figure { margin: 0; }
.kicker { color: var(--muted); font-size: 14px; overflow-wrap: anywhere; }
h1 {
  font-size: 30px; line-height: 1.25; font-weight: 650; letter-spacing: -0.012em;
  margin: 10px 0 14px; text-wrap: balance; overflow-wrap: anywhere;
}
h2 { font-size: 20px; font-weight: 650; letter-spacing: -0.005em; margin: 44px 0 4px; }
h3 { font-size: 15px; font-weight: 650; margin: 0 0 2px; }
.lead { color: var(--muted); max-width: 62em; margin: 0 0 14px; text-wrap: pretty; }
.verdicts { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 0 0 22px; padding: 0; }
.verdicts div { display: flex; gap: 8px; }
.verdicts dt { font-weight: 600; white-space: nowrap; }
.verdicts dd { margin: 0; overflow-wrap: anywhere; }
.mark { display: inline-block; width: 1.15em; font-weight: 700; }
.verdict { font-weight: 600; white-space: nowrap; }
.pass { color: var(--pass); } .fail { color: var(--fail); } .unknown { color: var(--unknown); }
.numbers {
  display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0 0 20px;
}
.numbers div { background: var(--card); padding: 14px 18px 13px; }
.numbers strong { display: block; font-size: 27px; line-height: 1.2; font-weight: 650; }
.numbers span { display: block; color: var(--muted); font-size: 13.5px; overflow-wrap: anywhere; }
.numbers span.what { color: var(--ink); font-size: 14px; font-weight: 550; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 20px; margin: 0 0 16px;
}
.card.flush { padding: 2px 0; }
.scroll { overflow-x: auto; }
.plot { display: block; width: 100%; height: auto; }
.plot text { font-family: inherit; }
.plot image { image-rendering: pixelated; }
figcaption { color: var(--muted); font-size: 13.5px; max-width: 62em; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td {
  text-align: left; vertical-align: top; padding: 8px 14px;
  border-top: 1px solid var(--line); font-weight: 400;
}
thead th { color: var(--muted); font-size: 13px; border-top: 0; vertical-align: bottom; }
th[scope=row] { font-weight: 600; }
th, td { overflow-wrap: break-word; max-width: 24em; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
td small, th small { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400; }
ul.findings { list-style: none; padding: 0; }
ul.findings li {
  display: grid; grid-template-columns: 1.5em 1fr; padding: 6px 0; overflow-wrap: anywhere;
}
ul.findings li + li { border-top: 1px solid var(--line); }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--muted); font-size: 13.5px; }
code { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
footer { color: var(--muted); font-size: 13.5px; margin-top: 40px; max-width: 62em; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 720px) {
  main { padding: 20px 14px 40px; } h1 { font-size: 24px; }
  .numbers { grid-template-columns: 1fr; } .card { padding: 14px; }
}
"""
