"""What all pages share: escaping, numbers, tables, the style, the script that sorts, and the shell
that holds them.

Whatever comes from outside (layer names above all) passes through :func:`visible` and
``html.escape`` before it enters a page, so a name can neither add markup nor hide in it. The policy
of a page allows its own style and its own script by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "DASH",
    "MANY",
    "count",
    "data",
    "definitions",
    "figure",
    "name",
    "named",
    "number",
    "page",
    "percent",
    "plain_table",
    "scroll",
    "table",
    "text",
    "visible",
]

DASH = "–"  # for what is not known
MANY = 60  # layers that fill the page; more scroll in a box


def visible(value: object) -> str:
    """``str(value)`` with everything that does not print (control characters, escape sequences,
    line breaks, direction marks, lone surrogates) spelled out, so that it stays on its line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )


def text(value: object) -> str:
    """``value`` as the text of a page, or of an attribute in double quotes."""
    return html.escape(visible(value), quote=True)


def name(value: object) -> str:
    """A layer's name, as markup; a line may end after its dots."""
    return f'<span class="name">{text(value).replace(".", ".<wbr>")}</span>'


# ---- numbers -------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three significant digits; whole and large numbers in full; a dash for None."""
    if value is None:
        return DASH
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """A share in percent, with two decimals."""
    if value is None:
        return DASH
    return f"{100 * value:.2f} %" if math.isfinite(value) else str(value)


def count(how_many: int, what: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{how_many:,} {what}{'' if how_many == 1 else 's'}"


def data(value: float | None, shown: str | None = None) -> str:
    """A number of the report: as people read it, and exactly."""
    if value is None:
        return DASH
    return f'<data value="{value!r}">{number(value) if shown is None else shown}</data>'


# ---- parts ---------------------------------------------------------------------------------------


def figure(value: str, label: str) -> str:
    """A large number with what it is under it; both are markup."""
    return f"<div><b>{value}</b>{label}</div>"


def definitions(pairs: Mapping[str, str]) -> str:
    """Names, and markup of what they stand for."""
    items = (f"<dt>{text(term)}</dt><dd>{value}</dd>" for term, value in pairs.items())
    return f"<dl>{''.join(items)}</dl>"


def named(names: Sequence[str], shown: int = 4) -> str:
    """Names of layers; behind a mark that opens where they are many."""
    listed = ", ".join(map(name, names))
    if len(names) <= shown:
        return listed
    return f"<details><summary>{count(len(names), 'layer')}</summary>{listed}</details>"


def scroll(inside: str, label: str, kind: str = "") -> str:
    """A box that scrolls by itself, by keyboard too."""
    said = f"scroll {kind}".strip()
    told = f'role="region" aria-label="{text(label)}" tabindex="0"'
    return f'<div class="{said}" {told}>{inside}</div>\n'


def plain_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "numbers"
) -> str:
    """A table whose cells are plain text."""
    cells = (f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return table(header, f"<tbody>\n{''.join(cells)}</tbody>", caption, kind)


def table(header: Sequence[str], bodies: str, caption: str = "", kind: str = "numbers") -> str:
    """A table in its box; ``bodies`` is markup. Of the kind "layers" it can be sorted."""
    sortable = kind == "layers"
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{text(term)}</button></th>'
        if sortable
        else f'<th scope="col">{text(term)}</th>'
        for term in header
    )
    said = f'<p class="caption">{text(caption)}</p>' if caption else ""
    inside = f'<table class="{kind}"><thead><tr>{heads}</tr></thead>\n{bodies}</table>'
    box = f"of-{kind}" + (" many" if sortable and bodies.count("<tbody>") > MANY else "")
    return said + scroll(inside, caption.partition(".")[0] or header[0], box)


# ---- the page ------------------------------------------------------------------------------------

_STYLE = """
:root { --paper: #fff; --ink: #1c2228; --soft: #5a6570; --line: #dde2e6; --band: #f4f6f8;
  --bar: #2f6f9f; --warn: #8a4b00; --warn-band: #fdf3e3; --good: #23693f;
  --series-0: #8c5a00; --series-1: #5b6670; --series-2: #1f5fae; --series-3: #7b3f98;
  --series-4: #1c2228; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e4e8eb; --soft: #9ba6af;
  --line: #333b42; --band: #1d2328; --bar: #6fb1e0; --warn: #f0b765; --warn-band: #30261a;
  --good: #7fc79a;
  --series-0: #e0a84a; --series-1: #a9b4bd; --series-2: #74b3f2; --series-3: #c692e0;
  --series-4: #e4e8eb; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2.2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; font-weight: 600; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.12rem; font-weight: 600; margin: 2.6rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
p { max-width: 50rem; margin: .4rem 0; }
.soft, .caption, .lead { color: var(--soft); }
.caption { font-size: .87rem; margin: 0 0 .7rem; }
.lead { margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.alert { max-width: none; background: var(--warn-band); color: var(--warn); padding: .7rem 1rem;
  border-left: 3px solid var(--warn); margin: 0 0 1.4rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.2rem; margin: 0 0 1.4rem; }
.figures div { min-width: 5rem; max-width: 15rem; color: var(--soft); font-size: .87rem;
  line-height: 1.35; }
.figures b { display: block; color: var(--ink); font-size: 1.55rem; font-weight: 600;
  line-height: 1.25; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .22rem 1.4rem;
  margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.checks dd::before { content: "✓"; color: var(--good); display: inline-block; width: 1.3em; }
.checks dd.seen::before { content: "•"; color: var(--soft); }
.checks dd.bad::before { content: "!"; color: var(--warn); font-weight: 700; }
.bad, .status { color: var(--warn); }
.status { font-weight: 600; }
summary { cursor: pointer; color: var(--soft); }
.legend { font-size: .87rem; margin: 0 0 .7rem; }
.legend dl { margin: .5rem 0; max-width: 64rem; }
dd dl { font-size: .93em; gap: .1rem 1rem; }
dd > details, .notes details { display: inline-block; vertical-align: top; max-width: 100%; }
.name { overflow-wrap: anywhere; }
.notes { margin: 0; padding: 0; list-style: none; max-width: 64rem; }
.notes li { display: grid; grid-template-columns: 2rem 1fr; margin: .3rem 0; }
.notes b { color: var(--soft); font-weight: 600; }
.notes span, .notes details { color: var(--soft); }
.scroll { overflow: auto; max-width: 100%; }
.of-numbers { width: fit-content; }
.scroll:focus-visible, button:focus-visible, summary:focus-visible { outline: 2px solid var(--bar);
  outline-offset: -2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .87rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .34rem .55rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; background: var(--paper); }
th:first-child, td:first-child, .words :is(th, td) { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
.words td:nth-child(2) { color: var(--soft); }
.three td:first-child { width: 26%; }
.three td:nth-child(2) { width: 9rem; color: var(--ink); white-space: nowrap; }
tbody tr:hover > * { background: var(--band); }
td small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.3; }
.of-layers.many { max-height: 88vh; border-bottom: 1px solid var(--line); }
.layers th { position: sticky; top: 0; z-index: 1; padding: 0; white-space: normal;
  line-height: 1.2; box-shadow: 0 1px var(--line); }
.layers th button { all: unset; display: block; width: 100%; box-sizing: border-box;
  cursor: pointer; padding: .34rem .4rem; }
.layers th button:hover { color: var(--ink); }
.layers th[aria-sort=ascending] button::after { content: " ↑"; color: var(--bar); }
.layers th[aria-sort=descending] button::after { content: " ↓"; color: var(--bar); }
.layers { font-size: .8rem; }
.layers td { padding: .3rem .4rem; }
.layers td small { font-size: .76rem; }
.layers :is(th, td):first-child { position: sticky; left: 0; z-index: 1; background: var(--paper);
  white-space: normal; min-width: 9.5rem; max-width: 15rem; line-height: 1.3; }
.layers th:first-child { z-index: 2; }
.layers td:not([data-v]) { text-align: left; }
.bar { display: block; width: 100%; min-width: 4rem; height: .28rem; margin: .2rem 0 0; }
.bar rect { fill: var(--line); }
.bar rect + rect { fill: var(--bar); }
.ref { color: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr));
  gap: 1rem 1.1rem; margin: 0; }
.of-panels { max-height: 46rem; padding-right: .3rem; }
.panels figure { margin: 0; min-width: 0; }
.panels figcaption { font-size: .78rem; line-height: 1.3; }
.panels figcaption .name { display: block; }
.panels figcaption span + span { color: var(--soft); font-variant-numeric: tabular-nums; }
.panels svg { display: block; width: 100%; height: auto; margin-top: .15rem; }
svg text { fill: var(--soft); font-size: 9px; }
.grid { stroke: var(--line); fill: none; }
.trace { fill: none; stroke: var(--bar); stroke-width: 1.6; stroke-linejoin: round; }
.here { fill: var(--ink); stroke: var(--paper); stroke-width: 1.5; }
.plot { width: 100%; min-width: 34rem; max-width: 46rem; height: auto; display: block; }
.plot text { font-size: 13px; paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
.plot .before { stroke: var(--soft); }
.plot .series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.s0 { --series: var(--series-0); } .s1 { --series: var(--series-1); }
.s2 { --series: var(--series-2); } .s3 { --series: var(--series-3); }
.s4 { --series: var(--series-4); }
.series { stroke: var(--series); }
.mark { fill: var(--series); }
@media (max-width: 40rem) { main { padding: 1.4rem 1rem 3rem; }
  dl { gap: .2rem 1rem; grid-template-columns: minmax(6rem, max-content) 1fr; }
  dt { max-width: 9rem; overflow-wrap: anywhere; } .checks { grid-template-columns: 1fr; gap: 0; }
  .checks dd { margin-bottom: .5rem; }
  .plot { min-width: 0; } .plot text { font-size: 19px; }
  .figures { gap: .9rem 1.6rem; } .figures div { min-width: 40%; max-width: 46%; }
  .layers :is(th, td):first-child { min-width: 7.5rem; max-width: 8.5rem; }
  .three, .three :is(tbody, tr, td) { display: block; } .three thead { display: none; }
  .three td { border: 0; padding: 0; } .three td:first-child { width: auto; font-weight: 600; }
  .three tr { padding: .5rem 0; border-bottom: 1px solid var(--line); } }
@media print { main { max-width: none; padding: 0; } tr, figure { break-inside: avoid; }
  .scroll { max-height: none; overflow: visible; } }
"""

# Every layer is a tbody, so that rows that belong together stay together. Numbers are those of
# data-v; what has none comes last, whichever way.
_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.layers")) {
  const heads = [...table.tHead.rows[0].cells];
  const given = [...table.tBodies];
  const value = (body, k) => {
    const cell = body.rows[0].cells[k];
    if (!cell.hasAttribute("data-v")) return cell.textContent.trim();
    const v = cell.dataset.v;
    return v === "inf" ? Infinity : v === "" || v === "nan" ? null : Number(v);
  };
  heads.forEach((head, k) => head.firstElementChild.addEventListener("click", () => {
    const numeric = given.some((body) => body.rows[0].cells[k].hasAttribute("data-v"));
    const before = head.getAttribute("aria-sort");
    const down = before === "none" ? numeric : before === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = given.map((body) => [value(body, k), body]);
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = numeric ? (a > b) - (a < b) : compare(a, b);
      return down ? -order : order;
    });
    table.append(...keyed.map(([, body]) => body));
  }));
}
"""


def _hash(inside: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()


_POLICY = (
    f"default-src 'none'; style-src '{_hash(_STYLE)}'; script-src '{_hash(_SCRIPT)}'; "
    "base-uri 'none'; form-action 'none'"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """A whole document; ``body`` is markup."""
    return _PAGE.format(policy=_POLICY, title=text(title), style=_STYLE, body=body, script=_SCRIPT)
