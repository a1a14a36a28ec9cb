"""report.html in headless Chromium: no complaint, no request, all pictures drawn, nothing wider than a phone or a page of paper."""

import re
from pathlib import Path

import pytest
from browser import Browser, find_browser
from report_world import write_run
from test_main import run_main

import report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed: apt-get install chromium")
PAPER = 718  # width of A4 less the margins that Chromium leaves, in its pixels


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The report of a run as `python main.py` makes it without data, cut short."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_main("--max_steps", 4, "--log_path", "log", "--no-tensorboard", cwd=folder)
    assert result.status == 0, result.err
    return folder / "log/report.html"


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The report of a made-up run beside an earlier one."""
    folder = tmp_path_factory.mktemp("compared")
    write_run(folder / "earlier", seed=1)
    write_run(folder / "one", seed=2)
    return report.write_report(folder / "one")


@pytest.fixture(params=["demo", "compared"])
def path(request) -> Path:
    return request.getfixturevalue(request.param)


def pictures_of(browser: Browser) -> list[float]:
    return browser.value("Array.from(document.querySelectorAll('svg')).map(s => s.getBoundingClientRect().height)")


def test_on_a_screen(path):
    with Browser() as browser:
        for width, dark in ((390, False), (390, True), (1200, False)):
            browser.open(path, width, dark=dark)
            assert browser.complaints == [] and browser.requests == [path.resolve().as_uri()]
            browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.value("document.documentElement.scrollWidth") <= width
            pictures = pictures_of(browser)
            assert len(pictures) == path.read_text(encoding="utf-8").count("<svg") >= 15 and min(pictures) > 30
            colour = browser.value("getComputedStyle(document.body).backgroundColor")
            assert (colour == "rgb(255, 255, 255)") != dark
            # Labels of charts stay inside their picture.
            outside = """Array.from(document.querySelectorAll('svg text')).filter(t => {
                const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
                return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1}).map(t => t.textContent)"""
            assert browser.value(outside) == []


def test_on_paper(path):
    """What is open is printed, on a dozen pages, white whatever the screen has, without links to click on and with all charts."""
    with Browser() as browser:
        browser.open(path, PAPER, dark=True)
        browser.print_layout()
        assert browser.value("document.documentElement.scrollWidth") <= PAPER
        assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
        pictures = pictures_of(browser)
        assert len(pictures) == path.read_text(encoding="utf-8").count("<svg") and min(pictures) > 30
        # No table is cut at the edge of the paper.
        cut = """Array.from(document.querySelectorAll('.scroll')).filter(
            s => s.checkVisibility() && s.scrollWidth > s.clientWidth + 1).map(s => s.innerText)"""
        assert browser.value(cut) == []
        pages = browser.pdf()
        assert pages.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", pages)) <= 14
