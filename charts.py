"""Charts as inline SVG: lines, bars, and values with intervals. No script, no font, no picture file; colours come from the page's style.

Must not know runs or data: points and words in, markup out. Sizes are pixels of a phone's screen; the page scales them.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from report_html import Html, esc, note

MAX_POINTS = 300  # of a curve: more cannot be told apart at the width of a page
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 46, 12, 10, 34
COLOURS = 6
CHARACTER = 7.6  # width of one at 11 px, to keep room for labels
ROW = 22  # height of a line of `intervals`
NAMES, VALUES = 132, 96  # width of its columns of text

Points = Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """Where a value lies between the ends of an axis, and its ticks."""

    low: float
    high: float
    log: bool
    values: list[float]  # of the ticks

    def share(self, value: float) -> float:
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


class Value(NamedTuple):
    """A line of `intervals`: a heading where `value` is None."""

    name: str
    value: float | None = None
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    marked: bool = False


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def label(value: float, largest: float) -> str:
    """A tick's text on an axis with this largest tick: 1500 -> 1.5k; 0.0005 -> 5e-4 where all are below 0.01."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= size and value:
            return f"{value / size:.4g}{letter}"
    if value and largest < 0.01:
        return re.sub(r"(\.0)?e-0*", "e-", f"{value:.1e}")
    return f"{value:.4g}"


def own_label(value: float) -> str:
    """A tick's text by its own size: for logarithmic axes."""
    return label(value, abs(value))


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[point] for point in points]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def linear_axis(values: Sequence[float], from_zero: bool = False, wanted: int = 5) -> Axis:
    """An axis around values with a small margin; from_zero: it begins at 0 where no value is below."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    flat = high == low or high - low < 1e-9 * max(abs(high), abs(low))
    margin = (abs(high) / 2 or 0.5) if flat else 0.04 * (high - low)
    low, high = (low if from_zero else low - margin), high + margin
    return Axis(low, high, False, ticks(low, high, wanted))


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over positive values, from one power of ten to another."""
    first, last = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    last = max(last, first + 1)
    step = -(-(last - first) // 6)
    return Axis(10.0**first, 10.0**last, True, [10.0**n for n in range(first, last + 1, step)])


def figure(title: str, body: str, words: str, *, unit: str = "", legend: str = "", size: tuple[float, float] = (WIDTH, HEIGHT)) -> Html:
    """A figure: caption, unit, legend and one SVG. words: what a screen reader says."""
    caption = f"{esc(title)}{f' <small>{esc(unit)}</small>' if unit else ''}{f'<br>{legend}' if legend else ''}"
    return Html(f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" '
                f'aria-label="{esc(title)}: {esc(words)}">{body}</svg></figure>')  # fmt: skip


def empty(title: str, why: str = "nothing recorded") -> Html:
    return Html(f"<figure><figcaption>{esc(title)}</figcaption>{note(why)}</figure>")


def text(x: float, y: float, words: object, anchor: str = "middle", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{esc(words)}</text>'


# ---- lines --------------------------------------------------------------------------------------------------------------


def lines(
    title: str,
    series: dict[str, Points],
    *,
    unit: str = "",
    x_name: str = "step",
    from_zero: bool = False,
    marks: bool = False,
    log: bool = False,
    colours: Sequence[int] | None = None,
) -> Html:
    """One line a series (name -> points), named at its end where there is room, else in a legend; a single one is named by the title.

    log: both axes logarithmic (points that are not positive are left out). marks: a dot a point. colours: of each series, 0 to 5.
    """
    hues = dict(zip(series, colours or range(len(series))))
    if log:
        series = {name: [(x, y) for x, y in points if x > 0 and y > 0] for name, points in series.items()}
    series = {name: thin(points) for name, points in series.items() if points}
    if not series:
        return empty(title)
    all_x, all_y = ([point[n] for points in series.values() for point in points] for n in (0, 1))
    across, up = (log_axis(all_x), log_axis(all_y)) if log else (linear_axis(all_x), linear_axis(all_y, from_zero))
    if not log:
        across = across._replace(values=[value for value in across.values if value == int(value) and value >= 0])
    direct = 1 < len(series) <= 3 and max(map(len, series)) <= 12
    right = RIGHT + (CHARACTER * max(map(len, series)) if direct else 0)
    parts, place = frame(across, up, right, x_name, own_label if log else None)
    ends = []
    for name, points in series.items():
        placed = [place(x, y) for x, y in points]
        parts.append(f'<path class="line c{hues[name]}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in placed)}"/>')
        if marks or len(points) == 1:
            parts += [f'<circle class="c{hues[name]}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
        ends.append((placed[-1][1], name))
    if direct:
        parts += [text(WIDTH - right + 5, y + 4, name, "start", f"t{hues[name]}") for y, name in spread(ends)]
    legend = "".join(f'<span class="key c{hues[name]}">{esc(name)}</span>' for name in series) if len(series) > 1 and not direct else ""
    last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in series.items())
    return figure(title, "".join(parts), f"by {x_name}; last: {last}", unit=unit, legend=legend)


def spread(ends: Sequence[tuple[float, str]], gap: float = 13) -> list[tuple[float, str]]:
    """Heights of labels moved apart until none covers another, inside the frame."""
    placed: list[tuple[float, str]] = []
    for y, name in sorted(ends):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, name))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [(y - over, name) for y, name in placed]


def frame(
    across: Axis, up: Axis, right: float, x_name: str, words: Callable[[float], str] | None = None
) -> tuple[list[str], Callable[[float, float], tuple[float, float]]]:
    """Axes with ticks, and the function that places a point. words: a tick's text; None = by the axis's largest tick."""
    edge = WIDTH - right

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + across.share(x) * (edge - LEFT), HEIGHT - BOTTOM - up.share(y) * (HEIGHT - TOP - BOTTOM)

    def tick(value: float, axis: Axis) -> str:
        return words(value) if words else label(value, max(map(abs, axis.values)))

    parts = []
    for value in up.values:
        _, y = place(across.low, value)
        parts += [f'<path class="grid" d="M{LEFT} {y:.1f}H{edge:.1f}"/>', text(LEFT - 5, y + 4, tick(value, up), "end")]
    for value in across.values:
        x, _ = place(value, up.low)
        parts += [f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>', text(x, HEIGHT - 18, tick(value, across))]
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{edge:.1f}"/>')
    parts.append(text((LEFT + edge) / 2, HEIGHT - 4, x_name))
    return parts, place


# ---- bars ---------------------------------------------------------------------------------------------------------------


def bars(title: str, names: Sequence[str], values: Sequence[float], *, unit: str = "", x_name: str = "", shares: bool = False) -> Html:
    """Upright bars, one a name. shares: values are shares of a whole, shown in per cent. Hovering shows a bar's figure."""
    if not values or not any(values):
        return empty(title)
    scale = 100.0 if shares else 1.0
    up = linear_axis([scale * value for value in values], True, 4)
    parts, place = frame(Axis(0.0, float(len(values)), False, []), up, RIGHT, x_name)
    slot = (WIDTH - RIGHT - LEFT) / len(values)
    every = max(1, math.ceil((max(map(len, names)) * CHARACTER + 4) / slot))
    for n, (name, value) in enumerate(zip(names, values)):
        x, y = place(n, scale * value)
        shown = f"{100 * value:.2f} %" if shares else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        parts.append(f'<rect class="c0" x="{x + 0.1 * slot:.1f}" y="{y:.1f}" width="{0.8 * slot:.1f}" height="{HEIGHT - BOTTOM - y:.1f}">'
                     f"<title>{esc(name)}: {shown}</title></rect>")  # fmt: skip
        if n % every == 0:
            middle = min(x + slot / 2, WIDTH - len(name) * CHARACTER / 2)
            parts.append(text(middle, HEIGHT - 18, name))
    most = max(range(len(values)), key=values.__getitem__)
    return figure(title, "".join(parts), f"{len(values)} bars, the highest at {names[most]}", unit=unit)


# ---- values with intervals ----------------------------------------------------------------------------------------------


def intervals(title: str, rows: Sequence[Value], *, unit: str = "", reference: float | None = None, name: str = "") -> Html:
    """A line a value: name, a dot with its interval on a common axis, figure and note; a dashed line at `reference`.

    name: of the reference, written over it. Marked rows have another colour.
    """
    drawn = [row for row in rows if row.value is not None]
    if not drawn:
        return empty(title)
    ends = [x for row in drawn for x in (row.value, row.low, row.high) if x is not None and math.isfinite(x)]
    axis = linear_axis([*ends, 0.0 if reference is None else reference], min(ends) >= 0, 3)
    edge, bottom = WIDTH - VALUES, 22 + ROW * len(rows)

    def place(x: float) -> float:
        return NAMES + axis.share(x) * (edge - NAMES)

    parts = []
    for value in axis.values:
        parts.append(f'<path class="grid" d="M{place(value):.1f} 18V{bottom}"/>')
        parts.append(text(place(value), bottom + 13, label(value, max(map(abs, axis.values)))))
    if reference is not None:
        parts += [f'<path class="reference" d="M{place(reference):.1f} 14V{bottom}"/>', text(place(reference), 10, name)]
    for n, row in enumerate(rows):
        y = 22 + ROW * n + ROW / 2
        if row.value is None:
            parts.append(text(0, y + 4, row.name, "start"))
            continue
        colour = "c1" if row.marked else "c0"
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(f'<path class="line {colour}" style="stroke-dasharray:none" d="M{place(row.low):.1f} {y}H{place(row.high):.1f}"/>')
        parts.append(f'<circle class="{colour}" cx="{place(row.value):.1f}" cy="{y}" r="3.5"/>')
        parts.append(text(10, y + 4, shorten(row.name, 19), "start", "name"))
        parts.append(text(WIDTH - 1, y + 4, row.note, "end", "name"))
    words = "; ".join(f"{row.name} {row.value:.4g}" for row in drawn)
    return figure(title, "".join(parts), words, unit=unit, size=(WIDTH, bottom + 18))


def shorten(words: str, most: int) -> str:
    """Words cut at `most` characters, with an ellipsis."""
    return words if len(words) <= most else words[: most - 1] + "…"
