"""The parts of the report's page: tables that sort and filter, inlined pictures, and the page round them.

One file that loads nothing, so that it can be opened from a disk and sent to others.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

DIGITS = 4  # significant ones of a figure without a format


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None = None  # what it is sorted by, where that is a number
    look: str = ""

    def html(self) -> str:
        numeric = self.value is not None
        classes = " ".join(filter(None, ["n" if numeric else "", self.look]))
        attributes = f' class="{classes}"' if classes else ""
        attributes += f' data-v="{self.value:.9g}"' if numeric else ""
        return f"<td{attributes}>{escape(self.text)}</td>"


EMPTY = Cell("")


def figure(value: float | None, form: str = "", look: str = "") -> Cell:
    """A number; what is none is an empty cell, and what is not finite is sorted as the largest."""
    if value is None:
        return EMPTY
    if not math.isfinite(value):
        return Cell(str(value), sys.float_info.max, look)
    return Cell(format(value, form or f".{DIGITS}g"), float(value), look)


@dataclass(frozen=True)
class Column:
    head: str
    cell: Callable[[dict], Cell]
    title: str = ""  # what the head means


def text(key: str) -> Callable[[dict], Cell]:
    return lambda row: Cell(str(row.get(key, "")))


def table(caption: str, columns: Iterable[Column], rows: list) -> str:
    """Columns that are empty throughout are left out."""
    made = [(column, [column.cell(row) for row in rows]) for column in columns]
    made = [(column, cells) for column, cells in made if any(cell.text for cell in cells)]
    heads = "".join(_head(column, any(cell.value is not None for cell in cells)) for column, cells in made)
    lines = [f"<tr>{''.join(cell.html() for cell in line)}</tr>" for line in zip(*(cells for _, cells in made), strict=True)]
    return TABLE.substitute(caption=escape(caption), heads=heads, lines="\n".join(lines), count=len(lines))


def _head(column: Column, numeric: bool) -> str:
    title = f' title="{escape(column.title)}"' if column.title else ""
    look = ' class="n"' if numeric else ""
    return f'<th scope="col"{look} aria-sort="none"><button type="button"{title}>{escape(column.head)}</button></th>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    lines = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{"".join(lines)}</dl>'


def picture(path: Path, name: str, what: str) -> str:
    """An SVG within the page. Its ids get a name of their own: those of two pictures would be taken for each other."""
    svg = path.read_text()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1]
    svg = re.sub(r'(<svg[^>]*) width="[\d.]+pt"', r"\g<1>", svg, count=1)
    svg = re.sub(r'(<svg[^>]*) height="[\d.]+pt"', rf'\g<1> role="img" aria-label="{escape(what)}"', svg, count=1)
    style = f"width:{float(width) * 4 / 3:.0f}px"
    caption = f"<figcaption>{escape(what)}</figcaption>"
    return f'<figure><div class="scroll" tabindex="0"><div style="{style}">{svg}</div></div>{caption}</figure>'


def page(title: str, contents: str, main: str) -> str:
    return PAGE.substitute(title=escape(title), style=STYLE, script=SCRIPT, contents=contents, main=main)


TABLE = Template("""<div class="table">
<div class="tools"><h4>$caption</h4>
<label>Filter <input type="search" autocomplete="off" placeholder="words that a row has"></label>
<output>$count rows</output></div>
<div class="scroll tall" tabindex="0" role="region" aria-label="$caption"><table><thead><tr>$heads</tr></thead><tbody>
$lines
</tbody></table></div></div>
""")

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1>
<nav aria-label="Contents"><ul>$contents</ul></nav></header>
<main>
$main
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1f2328; --quiet: #59636e; --line: #d1d9e0; --head: #f6f8fa;
  --link: #0969da; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --quiet: #9198a1; --line: #3d444d; --head: #161b22; --link: #58a6ff;
    --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
header, main { max-width: 90rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.5rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 0; flex: 1 1 16rem; }
a { color: var(--link); }
p { max-width: 60rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; margin: 0; padding: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 0.25rem 1.5rem;
  margin: 0; }
.facts div { display: flex; gap: 0.5rem; min-width: 0; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0 2rem; }
figcaption { color: var(--quiet); font-size: 0.875rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.tall { max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
.table { margin: 1rem 0 2rem; }
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center; margin-bottom: 0.5rem; }
.tools output { color: var(--quiet); font-size: 0.875rem; min-width: 8rem; }
input { font: inherit; font-size: 0.875rem; padding: 0.25rem 0.5rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--back); color: var(--text); }
table { border-collapse: separate; border-spacing: 0; font-size: 0.8125rem; font-variant-numeric: tabular-nums; width: 100%; }
th { position: sticky; top: 0; background: var(--head); padding: 0; border-bottom: 1px solid var(--line); }
th:not(.n) { text-align: left; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: 0.4rem 0.6rem; cursor: pointer; font-weight: 600;
  white-space: nowrap; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
th button::after { content: " \\2195"; color: var(--quiet); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: " \\2191"; color: var(--link); }
th[aria-sort="descending"] button::after { content: " \\2193"; color: var(--link); }
td { padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
.n { text-align: right; }
td.long { white-space: normal; min-width: 18rem; }
td.bad { color: var(--bad); font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--head); }
tr[hidden] { display: none; }
"""

# Rows without a value stay at the end, whichever way it is sorted; words are compared as people read numbers in them.
SCRIPT = """
"use strict";
const words = new Intl.Collator("en", {numeric: true});
const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
const numeric = (row, i) => row.cells[i].dataset.v !== undefined;

function compare(a, b, i, sign) {
  const [x, y] = [value(a, i), value(b, i)];
  if (x === "" || y === "") return (x === "") - (y === "");
  if (numeric(a, i) && numeric(b, i)) return sign * (x - y);
  return sign * words.compare(x, y);
}

function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  const rows = [...body.rows].sort((a, b) => compare(a, b, head.cellIndex, up ? 1 : -1));
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}

function filter(box) {
  const wanted = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const part = box.closest(".table"), rows = [...part.querySelector("tbody").rows];
  let shown = 0;
  for (const row of rows) {
    const text = [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase();
    row.hidden = !wanted.every(word => text.includes(word));
    shown += !row.hidden;
  }
  part.querySelector("output").value = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.parentElement));
}
for (const box of document.querySelectorAll(".tools input")) box.addEventListener("input", () => filter(box));
"""
