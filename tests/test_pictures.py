"""pictures.py: bars are as long as their values, at the places of the axis, in the colours that tell them apart."""

import math

import numpy as np
import pytest

pytest.importorskip("PIL")

from charts import Value
from pictures import BAR, NAMES, NOTES, OTHER, WIDTH, level_bars, upright_bars


def bars_of(picture, colour):
    """(lengths, heights): for each row and each column of pixels, how many have this colour."""
    wanted = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
    mask = (picture == np.array(wanted)).all(2)
    return mask.sum(1), mask.sum(0)


def test_level_bars_have_the_lengths_of_their_values():
    rows = [Value("slice"), Value("one", 0.1), Value("two", 0.2), Value("few", 0.4, marked=True)]
    picture = level_bars("title", "words", rows, reference=0.3, name="all")
    assert picture.dtype == np.uint8 and picture.shape[1:] == (WIDTH, 3)
    # The reference line covers one column of the longest bar; a bar has a pixel more than its ends are apart.
    lengths = np.unique(bars_of(picture, BAR)[0])
    lengths = lengths[lengths > 30]
    other = bars_of(picture, OTHER)[0].max()
    assert len(lengths) == 2 and lengths[1] == pytest.approx(2 * lengths[0], abs=3) and other == pytest.approx(4 * lengths[0], abs=5)
    assert other < WIDTH - NOTES - NAMES


def test_intervals_cross_their_bar():
    without = level_bars("t", "w", [Value("one", 0.2)], reference=0.0, name="")
    with_one = level_bars("t", "w", [Value("one", 0.2, 0.1, 0.2)], reference=0.0, name="")
    changed = (without != with_one).any(2)
    assert changed.sum(1).max() > 100 and changed.sum(0).max() == 2  # a line of two pixels' width


def test_upright_bars_have_the_heights_of_their_values():
    heights = bars_of(upright_bars("title", "words", ["1", "2", "3"], [10.0, 5.0, 0.0]), BAR)[1]
    left, middle, right = (int(np.median(part[part > 5])) if (part > 5).any() else 0 for part in np.array_split(heights[54:626], 3))
    assert left == pytest.approx(2 * middle, abs=2) and left > 100 and right <= 5


@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 10, [100.0] * 3, [1e-9, 2e-9]])
def test_odd_values_give_a_picture(values):
    assert upright_bars("t", "w", [str(n) for n in range(len(values))], values).ndim == 3
    rows = [Value(str(n), value, math.nan, math.nan, "x") for n, value in enumerate(values)]
    assert level_bars("t", "w", rows, reference=0.0, name="all").ndim == 3
