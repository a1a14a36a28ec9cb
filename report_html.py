"""Markup of the report: escaping, numbers as people read them, tables, sections, the page and its style.

Must not know runs, metrics or data. Text that comes in is escaped; `Html` passes as it is.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

NONE = "–"  # stands for a value that is not known


class Html(str):
    """Text that is markup already."""


def esc(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


# ---- numbers ------------------------------------------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A number that can be shown and drawn, None for anything else (a loss that was not finite is null in train.log)."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if good else None


def metric(value: object) -> str:
    """A metric: four decimals."""
    found = number(value)
    return NONE if found is None else f"{found:.4f}"


def count(value: object) -> str:
    """A whole number with separators."""
    found = number(value)
    return NONE if found is None else f"{found:,.0f}"


def percent(share: object) -> str:
    """A share 0 to 1 as a percentage with as many digits as tell something: 0.1234 -> 12.3 %, 0.0004 -> 0.04 %."""
    found = number(share)
    if found is None:
        return NONE
    size = abs(100 * found)
    digits = 0 if size >= 99.95 or size == 0 else 1 if size >= 1 else min(6, 1 - math.floor(math.log10(size)))
    return f"{100 * found:.{digits}f} %"


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that gives one to three digits before the point: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


# ---- pieces -------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "", numbers: Iterable[int] = ()) -> Html:
    """A table that scrolls by itself where the screen is narrow. kind: a class of the style. numbers: columns set to the right."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(f"<{tag}{' class=n' if n in right else ''}>{esc(cell)}</{tag}>" for n, cell in enumerate(row))

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return Html(f'<div class="scroll"><table class="{esc(kind)}">{head}<tbody>{body}</tbody></table></div>')


def facts(rows: Iterable[tuple[object, object]]) -> Html:
    """Names and values, two columns."""
    return table([], rows, "facts")


def section(title: str, *parts: str) -> Html:
    return Html(f'<section id="{anchor(title)}"><h2>{esc(title)}</h2>{"".join(parts)}</section>')


def anchor(title: str) -> str:
    return esc(title.lower().replace(" ", "-"))


def heading(text: str) -> Html:
    return Html(f"<h3>{esc(text)}</h3>")


def note(text: object) -> Html:
    return Html(f'<p class="note">{esc(text)}</p>')


def details(title: object, *parts: str, opened: bool = False) -> Html:
    return Html(f"<details{' open' if opened else ''}><summary>{esc(title)}</summary>{''.join(parts)}</details>")


def pre(text: object) -> Html:
    return Html(f"<pre>{esc(text)}</pre>")


def tiles(rows: Iterable[tuple[str, str, str]]) -> Html:
    """Figures in large type: (name, figure, what to compare it with)."""
    boxes = (f"<div><dt>{esc(name)}</dt><dd>{esc(figure)}<small>{esc(more)}</small></dd></div>" for name, figure, more in rows)
    return Html(f'<dl class="tiles">{"".join(boxes)}</dl>')


def bar(share: float, kind: str = "c0") -> Html:
    """A bar as long as a share (0 to 1) of its cell."""
    return Html(f'<span class="bar {kind}" style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></span>')


def page(title: str, what: str, when: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page of (title, markup) sections. A content policy of its own forbids any request, whatever the text holds."""
    links = "".join(f'<a href="#{anchor(name)}">{esc(name)}</a>' for name, _ in sections)
    body = "".join(markup for _, markup in sections)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
            f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{STYLE}</style></head>\n'
            f"<body><header><p>{esc(what)}</p><h1>{esc(title)}</h1><p>{esc(when)}</p></header>"
            f"<nav>{links}</nav>\n{body}</body></html>\n")  # fmt: skip


# Colours of series are Okabe and Ito's, which colour-blind people tell apart, darker on white, lighter on black; dashes differ too.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#57606a;--edge:#d8dee4;--card:#f6f8fa;--c0:#0067b1;--c1:#c24a00;
--c2:#007d5c;--c3:#9d3f7d;--c4:#7a6a00;--c5:#5b6570;--good:#116329;--bad:#a40e26}
@media (prefers-color-scheme:dark){:root{--bg:#0f1419;--fg:#e6e9ec;--soft:#9aa5b1;--edge:#2f3944;--card:#182028;--c0:#62b6f5;--c1:#ff9f55;
--c2:#3fcf9f;--c3:#e9a0cc;--c4:#e6d34a;--c5:#aab4be;--good:#5fd38a;--bad:#ff8c8c}}
*{box-sizing:border-box}html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1rem;max-width:68rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.4rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .7rem;padding-bottom:.2rem;border-bottom:1px solid var(--edge)}
h3{font-size:.92rem;font-weight:600;margin:1.2rem 0 .3rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.88rem;margin:.6rem 0}nav a{color:var(--c0);text-decoration:none}
nav a:hover{text-decoration:underline}
.note,header p{color:var(--soft);font-size:.88rem;margin:.4rem 0;max-width:46rem}
.verdict{padding:.55rem .8rem;margin:.5rem 0;border-left:4px solid var(--soft);background:var(--card);overflow-wrap:anywhere}
.verdict.good{border-color:var(--good)}.verdict.bad{border-color:var(--bad)}
.verdict.good b{color:var(--good)}.verdict.bad b{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:.8rem 0}
.tiles div{background:var(--card);padding:.5rem .8rem;border-radius:.3rem}.tiles dt{font-size:.8rem;color:var(--soft)}
.tiles dd{margin:0;font-size:1.5rem;font-weight:600;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.78rem;font-weight:400;color:var(--soft);line-height:1.3}
.scroll{overflow-x:auto;margin:.3rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:left;padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--edge);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}td.n,th.n{text-align:right;white-space:nowrap}
table.facts td{overflow-wrap:anywhere}table.facts td:first-child{width:13rem;color:var(--soft);overflow-wrap:normal}
table.wide td{white-space:nowrap}
td:has(.bar){width:34%;min-width:3rem;padding-right:0;vertical-align:middle}
.bar{display:block;height:.65rem;min-width:1px;background:var(--c0);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.bar.c5{background:var(--c5)}
mark{background:none;color:var(--good);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.2rem 1.6rem;margin:.6rem 0}
.single{max-width:24rem;margin:.8rem 0}
figure{margin:0;break-inside:avoid;min-width:0;max-width:36rem}figcaption{font-weight:600;font-size:.88rem;margin-bottom:.15rem}
figcaption small{font-weight:400;color:var(--soft)}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg text.name{fill:var(--fg)}svg text.t0{fill:var(--c0)}svg text.t1{fill:var(--c1)}svg text.t2{fill:var(--c2)}svg text.t3{fill:var(--c3)}
svg text.t4{fill:var(--c4)}svg text.t5{fill:var(--c5)}
.grid{stroke:var(--edge);stroke-width:.7;fill:none}.axis{stroke:var(--soft);fill:none;stroke-width:.8}
.reference{stroke:var(--soft);stroke-dasharray:3 3;fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1);stroke-dasharray:6 3}
.line.c2{stroke:var(--c2);stroke-dasharray:2 3}.line.c3{stroke:var(--c3);stroke-dasharray:9 3 2 3}.line.c4{stroke:var(--c4)}
.line.c5{stroke:var(--c5);stroke-dasharray:6 3}
circle.c0,rect.c0{fill:var(--c0)}circle.c1,rect.c1{fill:var(--c1)}circle.c2,rect.c2{fill:var(--c2)}circle.c3,rect.c3{fill:var(--c3)}
circle.c4,rect.c4{fill:var(--c4)}circle.c5,rect.c5{fill:var(--c5)}
.key{font-weight:400;margin-right:.9rem;color:var(--soft);white-space:nowrap}
.key::before{content:"";display:inline-block;width:1.3rem;margin-right:.3rem;vertical-align:middle;border-top:3px solid var(--c0)}
.key.c1::before{border-top:3px dashed var(--c1)}.key.c2::before{border-top:3px dotted var(--c2)}.key.c3::before{border-top-color:var(--c3)}
.key.c4::before{border-top-color:var(--c4)}.key.c5::before{border-top:3px dashed var(--c5)}
pre{margin:.2rem 0;padding:.6rem .8rem;background:var(--card);font:.82rem/1.45 ui-monospace,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.7rem 0}summary{cursor:pointer;color:var(--soft)}
details.user{border:1px solid var(--edge);border-radius:.3rem;padding:.4rem .8rem}
details.user>summary{color:var(--fg)}details[open]>summary{margin-bottom:.4rem}
table.answers td:last-child{min-width:18rem}
@media (max-width:30rem){th,td{padding-right:.55rem}table.facts td:first-child{width:8.5rem}
table.coverage td:last-child,table.coverage th:last-child{display:none}}
@media print{:root{color-scheme:light;--bg:#fff;--fg:#000;--soft:#444;--edge:#bbb;--card:#f4f4f4;--c0:#0067b1;--c1:#c24a00;--c2:#007d5c;
--c3:#9d3f7d;--c4:#7a6a00;--c5:#5b6570;--good:#0b4d1f;--bad:#8a0c20}
nav{display:none}th{white-space:normal}table.answers{font-size:.72rem}table.answers td:last-child{min-width:12rem}
body{max-width:none;padding:0;font-size:10.5pt}.charts{grid-template-columns:1fr 1fr}h2,h3,summary{break-after:avoid}
tr{break-inside:avoid}}
"""
