"""charts.py and report_html.py: ticks, labels, axes, marks inside their frame, escaping, numbers as people read them."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

import charts
from charts import Value
from report_html import Html, bar, count, esc, metric, number, percent, size_text, table


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.3, 5.2, [1, 2, 3, 4, 5]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]), (1200, 2600, [1500, 2000, 2500]),
])  # fmt: skip
def test_ticks(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "largest", "text"), [
    (1500, 2000, "1.5k"), (0, 2000, "0"), (500, 1000, "0.5k"), (2e6, 4e6, "2M"), (5e-4, 1e-3, "5e-4"), (1.5e-3, 2e-3, "1.5e-3"),
    (0, 1e-3, "0"), (0.05, 0.1, "0.05"), (200, 800, "200"),
])  # fmt: skip
def test_label(value, largest, text):
    assert charts.label(value, largest) == text


def test_thin_keeps_means_and_short_curves():
    assert charts.thin([(1, 2.0), (3, 4.0)]) == [(1, 2.0), (3, 4.0)]
    points = charts.thin([(float(i), float(i % 2)) for i in range(1200)])
    assert len(points) == 300 and all(y == 0.5 for _, y in points) and points[0][0] == 1.5


def picture(markup):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", markup, re.DOTALL).group())


def texts(markup):
    return [node.text for node in picture(markup).iter("text")]


def test_lines_are_named_at_their_ends_or_in_a_legend():
    points = [(0, 0.0), (10, 1.0)]
    assert "HR@10" in texts(charts.lines("quality", {"HR@10": points, "NDCG@10": [(0, 0.0), (10, 0.99)]}))
    many = charts.lines("runs", {f"a run with a long name {n}": points for n in range(3)})
    assert many.count('class="key') == 3 and not any("long" in str(text) for text in texts(many))
    assert 'class="key' not in charts.lines("loss", {"loss": points}) and "nothing recorded" in charts.lines("loss", {"loss": []})


def test_labels_do_not_cover_each_other():
    heights = [y for y, _ in charts.spread([(170, "a"), (171, "b"), (172, "c"), (20, "d")])]
    assert all(later - earlier >= 13 for earlier, later in pairwise(heights)) and heights[-1] <= charts.HEIGHT - charts.BOTTOM


def test_a_logarithmic_axis():
    axis = charts.log_axis([3, 4000])
    assert (axis.low, axis.high) == (1, 10_000) and axis.values == [1, 10, 100, 1000, 10_000] and axis.share(100) == pytest.approx(0.5)
    assert charts.log_axis([1, 1]).values == [1, 10]
    chart = charts.lines("popularity", {"events": [(1, 100), (10, 10), (100, 0)]}, log=True)
    assert "M46.0" in chart and len(re.search(r'class="line c0" d="(.*?)"', chart).group(1).split("L")) == 2  # 0 has no place there


def test_bars():
    chart = charts.bars("hours", list("abcd"), [0.1, 0.4, 0.3, 0.2], shares=True)
    heights = [float(node.get("height")) for node in picture(chart).iter("rect")]
    assert heights[1] == max(heights) and heights[0] == pytest.approx(heights[1] / 4, abs=0.1)
    assert "b: 40.00 %" in chart and "nothing recorded" in charts.bars("none", ["a"], [0])


def test_intervals():
    rows = [Value("slice"), Value("one", 0.2, 0.1, 0.3, "0.200"), Value("two <b>", 0.5, math.nan, math.nan, "0.5", True)]
    chart = charts.intervals("by slice", rows, reference=0.25, name="all")
    dots = [float(node.get("cx")) for node in picture(chart).iter("circle")]
    reference = float(re.search(r'class="reference" d="M([\d.]+)', chart).group(1))
    assert dots[0] < reference < dots[1] and chart.count('class="line') == 1 and "<b>" not in chart
    assert "nothing recorded" in charts.intervals("none", [Value("heading")])


def test_numbers():
    assert [percent(x) for x in (0, 0.5, 0.1234, 0.0042, 0.00004, 1, None)] == [
        "0 %",
        "50.0 %",
        "12.3 %",
        "0.42 %",
        "0.0040 %",
        "100 %",
        "–",
    ]
    assert (metric(0.12345), metric(None), count(1234567), count(True)) == ("0.1235", "–", "1,234,567", "–")
    assert [size_text(n) for n in (5, 1500, 2_500_000, 3e12)] == ["5 B", "1.5 kB", "2.5 MB", "3000.0 GB"]
    assert number(float("nan")) is None or not math.isnan(number(float("nan")))


def test_markup_passes_and_text_is_escaped():
    assert esc("<b>") == "&lt;b&gt;" and esc(Html("<b>")) == "<b>"
    assert "<td>&lt;i&gt;</td>" in table(["a"], [["<i>"]]) and "<i>" in table(["a"], [[Html("<i>")]])
    assert "width:100.0%" in bar(7) and "width:0.0%" in bar(-1)
