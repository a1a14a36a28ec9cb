"""report.py: what the page says, that it asks for nothing, and that a broken run folder still gives one."""

import json
import math
import os
import re
import shlex
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from report_world import write_run
from tiny import tiny_store

import charts
import report
from config import Config, with_values
from errors import UserError
from ranks import Ranks, write_ranks
from report_compare import difference, differing_settings, gains, less_baseline, names_of, signed
from report_read import best_earlier, curve, incomparable, read_run
from report_sections import BASELINES, commands, verdict
from runs import write_start_files, write_status
from settings import dump_yaml

FILES = ("train.log", "metrics.json", "status.json", "config.resolved.yaml", "environment.json", "command.txt", "report.json", "ranks.npz")
METRICS = {"split": "test", "protocol": "holdout", "hr@10": 0.10, "ndcg@10": 0.06, "score": 0.07, "num_users": 400, "num_candidates": 6000,
           "seen_removed": True, "checkpoint": "checkpoints/a/global_step40.valid_loss=5.0000", "popularity.hr@10": 0.04,
           "popularity.ndcg@10": 0.02, "popularity.score": 0.025, "recent.hr@10": 0.05, "recent.ndcg@10": 0.03, "recent.score": 0.035,
           "item2item.hr@10": 0.07, "item2item.ndcg@10": 0.04, "item2item.score": 0.05}  # fmt: skip
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "gpus": [{"name": "H200", "memory_gib": 139.0}], "commit": "ab12-dirty", "cuda": None}


def records(steps=40):
    for step in range(10, steps + 1, 10):
        yield {"global_step": step, "loss": 100 / step, "epoch": 0, "time": 1000.0 + step, "lr": 1e-3, "grad_norm": 0.5,
               "users_per_s": 2000.0 + step, "data_wait": 0.02, "rss_gib": 0.7}  # fmt: skip
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
    for heading in ("Summary", "Learning curves", "Quality by slice", "Sample users", "Data", "Configuration", "Environment", "Commands"):
        assert heading in page.text
    assert "Beats all 3 baselines: NDCG@10 0.0600 against 0.0400 of item-to-item (+50 %), the best of them; no interval, as" in page.text
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
    assert [value for value in page.loads if not value.startswith("#")] == [
        "data:,"
    ]  # the empty icon: without it a browser asks a server for one
    assert not {"script", "img", "iframe", "object", "form"} & set(page.tags)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text


def test_light_dark_phone_print(run):
    page_of(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text and "@media print" in text and 'name="viewport" content="width=device-width' in text


def test_charts_are_well_formed_and_inside_their_frame(run):
    page_of(run)
    found = re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 8
    for chart in found:
        tree = ElementTree.fromstring(chart)
        assert tree.get("role") == "img" and tree.get("aria-label")
        labels = [node.text for node in tree.iter("text")]
        assert "step" in labels and len(labels) >= 4, labels
        for node in tree.iter("path"):
            if "line" in node.get("class"):
                numbers = [float(x) for x in re.findall(r"-?[\d.]+", node.get("d"))]
                assert all(charts.LEFT <= x <= charts.WIDTH for x in numbers[0::2]) and all(0 <= y <= charts.HEIGHT for y in numbers[1::2])


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
    (run / name).unlink(missing_ok=True)
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
    assert curve(read_run(run), "loss") == [(10.0, 1.0), (30.0, 1.0)]


def test_an_evaluation_has_no_curves_and_nothing_to_resume(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    write_status(tmp_path, "finished", 40, kind="eval")
    page = page_of(tmp_path)
    assert "Evaluation of a checkpoint" in page.text and "--resume_path" not in page.text and "--inference_only" in page.text


def test_a_long_run_stays_small(run):
    with open(run / "train.log", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(100_000))
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
    found, sentence = verdict(metrics, None)
    assert found == kind and words in sentence and (("no interval, as ranks.npz is missing" in sentence) == ("Beats" in sentence))


def ranks_of(model, **baselines):
    return Ranks(np.arange(len(model)), np.array(model), np.zeros((0, 10)), {name: np.array(place) for name, place in baselines.items()})


def test_verdict_with_an_interval_over_users():
    """0.5 = NDCG of place 3 (0-based 2); every second user of 100, so the interval is that of a proportion: +- 1.96 * 0.25 / 10."""
    metrics = {"ndcg@10": 0.25, "recent.ndcg@10": 0.0, "popularity.ndcg@10": 0.0}
    half, never = [2, -1] * 50, [-1] * 100
    kind, sentence = verdict(metrics, ranks_of(half, popularity=never, recent=never))
    found = re.search(r"difference \+0\.2500, 95 % interval \+(\S+) to \+(\S+), over the same 100 users", sentence)
    assert kind == "good" and [float(x) for x in found.groups()] == pytest.approx([0.25 - 0.049, 0.25 + 0.049], abs=0.008)
    # The same figures the other way round, and rankers that find each others' misses.
    kind, sentence = verdict({"ndcg@10": 0.0, "popularity.ndcg@10": 0.25}, ranks_of(never, popularity=half))
    assert kind == "bad" and "Beats 0 of 1 baselines" in sentence and "difference −0.2500, 95 % interval −0." in sentence
    other = [-1, 2] * 48 + [-1, -1] * 2
    kind, sentence = verdict({"ndcg@10": 0.25, "popularity.ndcg@10": 0.24}, ranks_of(half, popularity=other))
    assert kind == "none" and sentence.startswith("No clear difference to the best baseline: NDCG@10 0.2500 against 0.2400")
    # No interval: an older file, and too few users.
    for ranks, why in ((ranks_of(half), "has no places of this baseline"), (ranks_of([0] * 9, recent=[1] * 9), "fewer than 30 users")):
        kind, sentence = verdict({"ndcg@10": 0.25, "recent.ndcg@10": 0.2}, ranks)
        assert kind == "good" and "Beats all 1 baselines" in sentence and f"; no interval, as {why}" in sentence.replace("ranks.npz ", "")


def test_intervals_against_baselines_are_drawn_and_in_figures(tmp_path):
    _, _, _, metrics = write_run(tmp_path / "one")
    run = read_run(tmp_path / "one")
    page = page_of(tmp_path / "one")
    for key, name in BASELINES.items():
        found = less_baseline(run.ranks, key, "ndcg@10")
        assert found.mean == pytest.approx(metrics["ndcg@10"] - metrics[f"{key}.ndcg@10"])
        row = " ".join(f"{metrics[f'{key}.{of}']:.4f}" for of in ("hr@10", "ndcg@10", "score"))
        assert f"{name} {row}" in page.text and f"{name} {signed(found.mean)} ({signed(found.low)} to {signed(found.high)})" in page.text
    assert "This model less a baseline, NDCG@10" in page.text
    # A run of before they were kept has neither the column nor a guess.
    user, rank, topk_ids, _ = run.ranks
    write_ranks(tmp_path / "one", user, rank, topk_ids, {})
    page = page_of(tmp_path / "one")
    assert "no interval, as ranks.npz has no places" in page.text and "less a baseline" not in page.text


def test_commands_can_be_pasted(run):
    lines = dict(commands(read_run(run)))
    settings = str(run / "config.resolved.yaml")
    assert shlex.split(lines["resume"]) == ["python", "main.py", "--config", settings, "--resume_path", str(run)]
    assert shlex.split(lines["evaluate"])[2:] == ["--inference_only", "--state_dict_path", METRICS["checkpoint"]]
    assert shlex.split(lines["infer"])[0] == f"MODEL_OUTPUT_PATH={METRICS['checkpoint']}"
    # Nobody takes this for a folder, and a shell does not take it for a redirection.
    assert shlex.split(lines["infer"])[1:3] == ["EVAL_DATA_PATH=<folder of users to predict>", "EVAL_RESULT_PATH=results"]
    again = next(line for what, line in lines.items() if what.startswith("reproduce"))
    # The commit without its mark, and folders of its own: a new run never writes into another's.
    assert shlex.split(again) == ["git", "checkout", "ab12", "&&", "python", "main.py", "--config", settings, "--log_path", f"{run}-again"]
    assert lines["this run was started with"] == "python main.py --batch_size 64"


@pytest.mark.parametrize(("candidates", "data", "folder"), [
    ("data-eval/predict_set.jsonl", "data", "data-eval"), ("my eval/candidate", "data", "my eval"),
    ("data/predict_set.jsonl", "data", "<folder of users to predict>"), ("all", "data", "<folder of users to predict>"),
    (None, None, "<folder of users to predict>"),
])  # fmt: skip
def test_the_folder_to_predict_is_that_of_the_candidates(run, candidates, data, folder):
    found = read_run(run)._replace(settings={"eval": {"candidates": candidates}, "paths": {"data_path": data}})
    assert shlex.split(dict(commands(found))["infer"])[1] == f"EVAL_DATA_PATH={folder}"


# ---- a tested run: data, slices, sample users ---------------------------------------------------------------------------


def test_figures_are_those_of_metrics_json(tmp_path):
    _, splits, ranking, metrics = write_run(tmp_path / "runs/one")
    page = page_of(tmp_path / "runs/one")
    own = " ".join(f"{metrics[key]:.4f}" for key in ("hr@10", "ndcg@10", "score"))
    assert f"this model {own}" in page.text
    assert f"median rank {np.median(ranking.target_ranks) + 1:,.0f}" in page.text
    tree = json.loads((tmp_path / "runs/one/report.json").read_text())
    for row in tree["quality"]["slices"]:
        assert f"{row['slice']}: {row['group']} {row['num_users']:,} {row['hr@10']:.4f} {row['ndcg@10']:.4f}" in page.text
    assert "The worst by NDCG@10, against" in page.text
    assert f"{splits.train.num_samples:,} training, {splits.valid.num_samples:,} validation, {splits.test.num_samples:,} test" in page.text
    for user in tree["samples"]["users"]:
        assert f"{user['user']} : rank {user['rank'] + 1:,} of 20, {user['num_events']} events" in page.text
    assert "✓ came next" in page.text and "Nearest items in vector space" in page.text and "colour=" in page.text
    for chart in ("Events of a user", "Gap between events", "Hour of day", "Weekday", "Popularity", "Rank of what came next"):
        assert chart in page.text
    assert "No earlier run to compare with" in page.text


def test_data_without_times_say_so(tmp_path):
    write_run(tmp_path / "one", store=tiny_store(num_users=60, has_time=False))
    page = page_of(tmp_path / "one")
    assert "These data carry no times" in page.text and "no time" in page.text and "Hour of day" not in page.text


def test_features_and_users_are_escaped(tmp_path):
    write_run(tmp_path / "one")
    path, evil = tmp_path / "one/report.json", "<script>alert(1)</script>"
    tree = json.loads(path.read_text())
    tree["samples"]["users"][0]["user"] = evil
    for item in tree["samples"]["items"].values():
        item["raw"], item["features"] = evil, {evil: [evil]}
    for row in tree["data"]["coverage"] + tree["quality"]["slices"]:
        row["name"] = row["group"] = row["slice"] = evil
    tree["data"]["notes"] = [evil]
    path.write_text(json.dumps(tree))
    page = page_of(tmp_path / "one")
    assert "script" not in page.tags and evil in page.text


@pytest.mark.parametrize("part", ["data", "quality", "samples"])
@pytest.mark.parametrize("value", [None, [], {}, "x", 7, {"users": [1]}, {"slices": [{}]}, {"users": [{}], "items": []}])
def test_a_report_json_of_another_shape(tmp_path, part, value):
    write_run(tmp_path / "one")
    path = tmp_path / "one/report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    text = page_of(tmp_path / "one").text
    assert text.count("report.json is not what this version writes") == 1 and "Commands" in text


def test_a_report_json_of_another_version(tmp_path):
    write_run(tmp_path / "one")
    path = tmp_path / "one/report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    assert page_of(tmp_path / "one").text.count("(version: expected 1, found 99); nothing is shown") == 3


def test_a_fault_of_ours_is_not_hidden(tmp_path, monkeypatch):
    write_run(tmp_path / "one")

    def broken(run):
        return run.report["data"]["no such key"]

    monkeypatch.setattr(report, "data_section", broken)
    with pytest.raises(KeyError, match="no such key"):
        report.write_report(tmp_path / "one")


def test_an_old_run_without_the_new_files(run):
    page = page_of(run)
    assert page.text.count("this run was tested before the report kept them") == 3


# ---- several runs -------------------------------------------------------------------------------------------------------


def test_gains_are_those_of_metrics():
    assert gains(np.array([0, 9, 10, -1]), "hr@10").tolist() == [1, 1, 0, 0]
    assert gains(np.array([0, 2, 10, -1]), "ndcg@10").tolist() == [1, 0.5, 0, 0]


def test_the_best_earlier_run_and_its_interval(tmp_path):
    for n, (name, skill) in enumerate((("weak", 0.1), ("strong", 0.9), ("now", 0.9), ("later", 1.0))):
        write_run(tmp_path / name, seed=n, skill=skill)
        os.utime(tmp_path / name / "metrics.json", (1000 + n, 1000 + n))
    now, strong, weak = (read_run(tmp_path / name) for name in ("now", "strong", "weak"))
    assert best_earlier(now).name == "strong" and best_earlier(weak) is None
    found = difference(strong, weak, "ndcg@10")
    exact = strong.metrics["ndcg@10"] - weak.metrics["ndcg@10"]
    assert found.mean == pytest.approx(exact) and found.low < exact < found.high and found.clear and found.num_users == 120
    assert difference(strong, strong, "hr@10")[:3] == (0, 0, 0)
    page = page_of(tmp_path / "now")
    assert "best earlier run" in page.text and "NDCG@10" in page.text and "of strong" in page.text


def test_what_cannot_be_compared(tmp_path):
    write_run(tmp_path / "one", seed=1)
    write_run(tmp_path / "two", seed=2)
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    assert incomparable(one, two) == ""
    assert incomparable(one, two._replace(metrics=two.metrics | {"num_candidates": 3})) == "another num_candidates"
    assert incomparable(one, two._replace(report={"fingerprint": "other"})) == "other data"
    assert incomparable(one, two._replace(metrics={})) == "no test metrics"
    assert incomparable(
        one._replace(settings={"paths": {"data_path": "a"}}), two._replace(report={}, settings={"paths": {"data_path": "b"}})
    )
    assert difference(one, two._replace(ranks=None), "hr@10") is None
    assert difference(one, two._replace(ranks=two.ranks._replace(user=two.ranks.user + 110)), "hr@10") is None  # 10 users in common


def test_several_runs_side_by_side(tmp_path):
    write_run(tmp_path / "a/run", seed=1, skill=0.9, batch_size=64)
    write_run(tmp_path / "b/other", seed=2, skill=0.1)
    report.main([str(tmp_path / "a/run"), str(tmp_path / "b/other")])
    page = Page((tmp_path / "a/run/report.html").read_text(encoding="utf-8"))
    assert "Runs side by side" in page.text and "Difference in NDCG@10" in page.text and "training.batch_size 64 128" in page.text
    both = [read_run(tmp_path / name) for name in ("a/run", "b/other")]
    assert f"{difference(*both, 'ndcg@10').mean:+.4f}" in page.text
    assert f"other {both[1].metrics['hr@10']:.4f} {both[1].metrics['ndcg@10']:.4f}" in page.text
    other = Page((tmp_path / "b/other/report.html").read_text(encoding="utf-8"))
    assert f"{difference(*reversed(both), 'ndcg@10').mean:+.4f}".replace("-", "−") in other.text
    assert dict(differing_settings(both)) == {"training.batch_size": [64, 128]}
    assert names_of(both) == ["run", "other"] and names_of([both[0], both[0]]) == ["1: run", "2: run"]


def test_runs_of_which_little_is_known_stand_side_by_side(run, tmp_path):
    (tmp_path / "empty").mkdir()
    write_status(tmp_path / "empty", "failed", 0)
    report.main([str(run), str(tmp_path / "empty")])
    assert "No interval for NDCG@10: empty: no test metrics" in Page((run / "report.html").read_text(encoding="utf-8")).text


# ---- command line -------------------------------------------------------------------------------------------------------


def test_command_line(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_status(other, "interrupted", 1)
    assert report.main([str(run), str(other)]) == 0
    assert (run / "report.html").is_file() and (other / "report.html").is_file()
    assert capsys.readouterr().out.count("written: ") == 2
    with pytest.raises(SystemExit) as leaving:
        report.main(["--help"])
    assert leaving.value.code == 0 and "report.py RUN" in capsys.readouterr().out


def test_command_line_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="no run folder given"):
        report.main([])
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="plain: no run folder; expected status.json") as caught:
        report.main([str(run), str(tmp_path / "plain")])
    assert len(str(caught.value).splitlines()) <= 3
    assert not (run / "report.html").exists()  # nothing is written before all folders are looked at
