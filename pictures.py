"""Bar charts as pixels, for TensorBoard's images. Drawn with Pillow, which TensorBoard brings; the report's charts are SVG (charts.py).

Must not know metrics or data: names and values in, an array (height, width, 3) uint8 out. Sizes are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from charts import Axis, Value, label, linear_axis, shorten
from errors import RunError

WIDTH, NAMES, NOTES, EDGE, HEAD, FOOT, ROW = 640, 150, 110, 14, 60, 30, 22
PLOT = 220  # height of upright bars
WHITE, INK, SOFT, GRID, BAR, OTHER = "#ffffff", "#1b1f24", "#57606a", "#d8dee4", "#0067b1", "#c24a00"  # as the report's on white
TEXT, TITLE = 13, 16  # sizes of type
PLAIN = str.maketrans({"–": "-", "…": "..", "≤": "<"})  # what Pillow's own font has no sign for


class _Canvas:
    """A white picture with text in Pillow's own font. RunError where Pillow is missing."""

    def __init__(self, height: int, title: str, words: str) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise RunError(f"no pictures in TensorBoard ({error}): pip install pillow, or --no-tensorboard_figures") from None
        self._image = Image.new("RGB", (WIDTH, height), WHITE)
        self._draw = ImageDraw.Draw(self._image)
        self._fonts = {size: ImageFont.load_default(size) for size in (TEXT, TITLE)}
        self.text(EDGE, 18, title, INK, size=TITLE)
        self.text(EDGE, 38, words, SOFT)

    def text(self, x: float, y: float, words: str, colour: str, *, size: int = TEXT, anchor: str = "lm") -> None:
        """White lies behind it: no line crosses it. anchor: l, m, r = x is the left end, the middle, the right end; m = y is the middle."""
        words = words.translate(PLAIN)
        self._draw.rectangle(self._draw.textbbox((x, y), words, font=self._fonts[size], anchor=anchor), fill=WHITE)
        self._draw.text((x, y), words, fill=colour, font=self._fonts[size], anchor=anchor)

    def line(self, *points: tuple[float, float], colour: str, width: int = 1) -> None:
        self._draw.line(points, fill=colour, width=width)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self._draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=colour)

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image)


def level_bars(title: str, words: str, rows: Sequence[Value], *, reference: float, name: str) -> np.ndarray:
    """A line a value: name, a bar from 0 with its interval, figure; a line of another colour at `reference`, called `name`.

    Values are 0 or more. Rows without a value are headings; marked ones have the other colour. Returns (height, 640, 3) uint8.
    """
    ends = [x for row in rows if row.value is not None for x in (row.value, row.high) if math.isfinite(x)]
    axis, bottom = linear_axis([*ends, reference, 0.0], True, 4), HEAD + 20 + ROW * len(rows)
    canvas = _Canvas(bottom + FOOT, title, words)

    def place(x: float) -> float:
        return NAMES + axis.share(x) * (WIDTH - NOTES - NAMES)

    for value in axis.values:
        canvas.line((place(value), HEAD + 16), (place(value), bottom), colour=GRID)
        canvas.text(place(value), bottom + 12, label(value, max(map(abs, axis.values))), SOFT, anchor="mm")
    for n, row in enumerate(rows):
        y = HEAD + 20 + ROW * n + ROW // 2
        if row.value is None:
            canvas.text(EDGE, y, row.name, SOFT)
            continue
        canvas.text(EDGE + 12, y, shorten(row.name, 18), INK)
        canvas.box(place(0.0), y - 6, place(row.value), y + 6, OTHER if row.marked else BAR)
        if math.isfinite(row.low) and math.isfinite(row.high):
            canvas.line((place(row.low), y), (place(row.high), y), colour=INK, width=2)
        canvas.text(WIDTH - EDGE, y, row.note, INK, anchor="rm")
    canvas.line((place(reference), HEAD + 12), (place(reference), bottom), colour=INK)
    canvas.text(place(reference), HEAD + 4, name, INK, anchor="mm")
    return canvas.pixels()


def upright_bars(title: str, words: str, names: Sequence[str], values: Sequence[float]) -> np.ndarray:
    """A bar a name, its value over it. Values are 0 or more. Returns (height, 640, 3) uint8."""
    bottom = HEAD + PLOT
    canvas = _Canvas(bottom + FOOT, title, words)
    axis = linear_axis([*values, 0.0], True, 4) if any(values) else Axis(0.0, 1.0, False, [0.0, 1.0])
    left, slot = EDGE + 40, (WIDTH - 2 * EDGE - 40) / max(1, len(values))

    def height(value: float) -> float:
        return bottom - axis.share(value) * (PLOT - 16)

    for value in axis.values:
        canvas.line((left, height(value)), (WIDTH - EDGE, height(value)), colour=GRID)
        canvas.text(left - 6, height(value), label(value, max(map(abs, axis.values))), SOFT, anchor="rm")
    for n, (name, value) in enumerate(zip(names, values)):
        middle = left + (n + 0.5) * slot
        canvas.box(middle - 0.4 * slot, height(value), middle + 0.4 * slot, bottom, BAR)
        canvas.text(middle, height(value) - 9, f"{value:.3g}", INK, anchor="mm")
        canvas.text(middle, bottom + 14, name, INK, anchor="mm")
    return canvas.pixels()
