"""report.py: what the page says, that it asks for nothing, and that a broken run folder still gives one."""

import json
import math
import re
import shlex
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import report
from config import Config, with_values
from errors import UserError
from runs import write_start_files, write_status
from settings import dump_yaml

FILES = ("train.log", "metrics.json", "status.json", "config.resolved.yaml", "environment.json", "command.txt")
METRICS = {"split": "test", "protocol": "holdout", "hr@10": 0.10, "ndcg@10": 0.06, "score": 0.07, "num_users": 400, "num_candidates": 6000,
           "seen_removed": True, "checkpoint": "checkpoints/a/global_step40.valid_loss=5.0000", "popularity.hr@10": 0.04,
           "popularity.ndcg@10": 0.02, "popularity.score": 0.025, "recent.hr@10": 0.05, "recent.ndcg@10": 0.03, "recent.score": 0.035,
           "item2item.hr@10": 0.07, "item2item.ndcg@10": 0.04, "item2item.score": 0.05}  # fmt: skip
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "gpus": [{"name": "H200", "memory_gib": 139.0}], "commit": "ab12-dirty", "cuda": None}


def records(steps=40):
    for step in range(10, steps + 1, 10):
        yield {"global_step": step, "loss": 100 / step, "epoch": 0, "time": 1000.0 + step, "lr": 1e-3, "users_per_s": 2000.0 + step}
    yield {"global_step": steps, "epoch": 1, "time": 1041.0, "split": "valid", "ndcg@10": 0.05, "hr@10": 0.09, "valid_loss": 5.0}


@pytest.fixture
def run(tmp_path):
    """A finished run's folder."""
    folder = tmp_path / "logs" / "my run"
    folder.mkdir(parents=True)
    settings = dump_yaml(with_values(Config(), batch_size=64, log_path=str(folder)))
    write_start_files(folder, settings, ["main.py", "--batch_size", "64"], ENVIRONMENT)
    (folder / "train.log").write_text("".join(json.dumps(record) + "\n" for record in records()), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    write_status(folder, "finished", 40, name="a")
    return folder


class Page(HTMLParser):
    """Tags, attributes that load something, and the text of a page; fails where tags do not match."""

    VOID = ("meta", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.get_starttag_text().endswith("/>") or self.open[-1:] == [tag]:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(folder):
    path = report.write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


# ---- the page of a whole run --------------------------------------------------------------------------------------------


def test_sections_and_figures(run):
    page = page_of(run)
    for heading in ("Summary", "Learning curves", "Configuration", "Environment", "Commands"):
        assert heading in page.text
    assert "Beats all 3 baselines: NDCG@10 0.0600 against 0.0400 of item-to-item (+50 %), the best of them." in page.text
    assert "this model 0.1000 0.0600 0.0700" in page.text and "most recent 0.0500 0.0300 0.0350" in page.text
    assert "400 users, 6,000 candidates ranked, seen items removed" in page.text
    assert f"± {1.96 * math.sqrt(0.1 * 0.9 / 400):.4f}" in page.text
    assert "2,025 users/s (median)" in page.text  # of 2010, 2020, 2030, 2040
    assert "0:00:31" in page.text  # first to last log line
    assert "training.batch_size 64 128" in page.text and "training.learning_rate" not in page.text.split("config.resolved.yaml")[0]
    assert "name H200, memory_gib 139.0" in page.text and "cuda none" in page.text
    assert "Best validation NDCG@10: 0.0500 at step 40." in page.text


def test_asks_for_nothing(run):
    page = page_of(run)
    assert page.loads == ["data:,"]  # the empty icon: without it a browser asks a server for one
    assert not {"script", "img", "iframe", "object", "form"} & set(page.tags)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text


def test_light_dark_phone_print(run):
    page_of(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text and "@media print" in text and 'name="viewport" content="width=device-width' in text


def test_charts_are_well_formed_and_inside_their_frame(run):
    page_of(run)
    charts = re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        tree = ElementTree.fromstring(chart)
        assert tree.get("role") == "img" and tree.get("aria-label")
        labels = [node.text for node in tree.iter("text")]
        assert "step" in labels and len(labels) >= 4, labels
        for node in tree.iter("path"):
            if "line" in node.get("class"):
                numbers = [float(x) for x in re.findall(r"-?[\d.]+", node.get("d"))]
                assert all(report.LEFT <= x <= report.WIDTH for x in numbers[0::2]) and all(0 <= y <= report.HEIGHT for y in numbers[1::2])


def test_everything_is_escaped(run):
    evil = "<script>alert('x')</script>&\"'"
    write_status(run, "failed", 3, f"OSError: {evil}", name=evil)
    (run / "metrics.json").write_text(json.dumps(METRICS | {evil: evil, "checkpoint": evil, "split": evil}), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({evil: {evil: [evil]}}), encoding="utf-8")
    (run / "command.txt").write_text(f"main.py {shlex.quote(evil)}\n", encoding="utf-8")
    (run / "config.resolved.yaml").write_text(json.dumps({"model": {evil: evil}, "system": {"device": evil}}), encoding="utf-8")
    page = page_of(run)
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>") >= 8


# ---- what is missing or broken ------------------------------------------------------------------------------------------


def test_a_run_that_failed_early(tmp_path):
    write_status(tmp_path, "failed", 0, "UserError: no such folder")
    page = page_of(tmp_path)
    assert "No test metrics" in page.text and "State: failed at step 0: UserError: no such folder" in page.text
    for words in ("train.log holds no lines", "config.resolved.yaml is missing", "environment.json is missing"):
        assert words in page.text


@pytest.mark.parametrize("name", FILES)
def test_each_file_may_be_missing(run, name):
    (run / name).unlink()
    assert "Commands" in page_of(run).text


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[1, 2]", b"null", b"{", b'"text"', b"{}", b"- a\n- b\n",
                                     b'{"global_step": 1}\n', b"[" * 5000, b'{"global_step": "x", "loss": {}}\n'])  # fmt: skip
@pytest.mark.parametrize("name", FILES)
def test_each_file_may_be_garbage(run, name, content):
    (run / name).write_bytes(content)
    assert "Commands" in page_of(run).text


def test_an_empty_folder_and_values_of_any_type(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "No test metrics" in page_of(tmp_path / "empty").text
    odd = [None, True, "x", [], {}, -1, 1e308, 10**400, 1e-320]
    for value in odd:
        (run / "metrics.json").write_text(json.dumps(dict.fromkeys(METRICS, value)), encoding="utf-8")
        lines = [{"global_step": 1, "loss": 1.0}, {"global_step": 2, "loss": value, "lr": value, "users_per_s": value, "time": value}]
        (run / "train.log").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert "Commands" in page_of(run).text


def test_a_loss_that_was_not_finite_leaves_a_gap(run):
    lines = [{"global_step": step, "loss": None if step == 20 else 1.0, "time": 1.0} for step in (10, 20, 30)]
    (run / "train.log").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert report.curve(report.read_run(run), "loss") == [(10.0, 1.0), (30.0, 1.0)]


def test_an_evaluation_has_no_curves_and_nothing_to_resume(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    write_status(tmp_path, "finished", 40, kind="eval")
    page = page_of(tmp_path)
    assert "Evaluation of a checkpoint" in page.text and "--resume_path" not in page.text and "--inference_only" in page.text


def test_a_long_run_stays_small(run):
    with open(run / "train.log", "w", encoding="utf-8") as file:
        for record in records(100_000):
            file.write(json.dumps(record) + "\n")
    page_of(run)
    assert (run / "report.html").stat().st_size < 150_000


# ---- pieces -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metrics", "kind", "words"), [
    ({}, "none", "No test metrics"), ({"ndcg@10": None}, "none", "No test metrics"), ({"ndcg@10": 0.1}, "none", "no baseline"),
    ({"ndcg@10": 0.1, "recent.ndcg@10": 0.05}, "good", "Beats all 1 baselines: NDCG@10 0.1000 against 0.0500 of most recent (+100 %)"),
    ({"ndcg@10": 0.1, "recent.ndcg@10": 0.05, "popularity.ndcg@10": 0.2}, "bad",
     "Beats 1 of 2 baselines: NDCG@10 0.1000 against 0.2000 of popularity (-50 %)"),
    ({"ndcg@10": 0.1, "recent.ndcg@10": 0.1}, "bad", "Beats 0 of 1"), ({"ndcg@10": 0.0, "recent.ndcg@10": 0.0}, "bad", "Beats 0 of 1"),
])  # fmt: skip
def test_verdict(metrics, kind, words):
    found, sentence = report.verdict(metrics)
    assert found == kind and words in sentence


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.3, 5.2, [1, 2, 3, 4, 5]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]), (1200, 2600, [1500, 2000, 2500]),
])  # fmt: skip
def test_ticks(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "largest", "text"), [
    (1500, 2000, "1.5k"), (0, 2000, "0"), (500, 1000, "0.5k"), (2e6, 4e6, "2M"), (5e-4, 1e-3, "5e-4"), (1.5e-3, 2e-3, "1.5e-3"),
    (0, 1e-3, "0"), (0.05, 0.1, "0.05"), (200, 800, "200"),
])  # fmt: skip
def test_label(value, largest, text):
    assert report.label(value, largest) == text


def test_thin_keeps_means_and_short_curves():
    assert report.thin([(1, 2.0), (3, 4.0)]) == [(1, 2.0), (3, 4.0)]
    points = report.thin([(float(i), float(i % 2)) for i in range(1200)])
    assert len(points) == 300 and all(y == 0.5 for _, y in points) and points[0][0] == 1.5


def test_commands_can_be_pasted(run):
    commands = dict(report.commands(report.read_run(run)))
    settings = str(run / "config.resolved.yaml")
    assert shlex.split(commands["resume"]) == ["python", "main.py", "--config", settings, "--resume_path", str(run)]
    assert shlex.split(commands["evaluate"])[2:] == ["--inference_only", "--state_dict_path", METRICS["checkpoint"]]
    assert shlex.split(commands["infer"])[0] == f"MODEL_OUTPUT_PATH={METRICS['checkpoint']}"
    again = next(line for what, line in commands.items() if what.startswith("reproduce"))
    # The commit without its mark, and folders of its own: a new run never writes into another's.
    assert shlex.split(again) == ["git", "checkout", "ab12", "&&", "python", "main.py", "--config", settings, "--log_path", f"{run}-again"]
    assert commands["this run was started with"] == "python main.py --batch_size 64"


# ---- command line -------------------------------------------------------------------------------------------------------


def test_command_line(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_status(other, "interrupted", 1)
    assert report.main([str(run), str(other)]) == 0
    assert (run / "report.html").is_file() and (other / "report.html").is_file()
    assert capsys.readouterr().out.count("written: ") == 2
    assert report.main(["--help"]) == 0 and "report.py RUN" in capsys.readouterr().out


def test_command_line_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="no run folder given"):
        report.main([])
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="plain: no run folder; expected status.json") as caught:
        report.main([str(run), str(tmp_path / "plain")])
    assert len(str(caught.value).splitlines()) <= 3
    assert not (run / "report.html").exists()  # nothing is written before all folders are looked at
