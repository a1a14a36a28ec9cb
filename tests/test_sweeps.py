"""experiments/run.py: a small sweep in child processes, its table by hand, going on after a stop, and the sweep files of the repository."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

from config import KEYS, Config, with_values
from errors import UserError
from ranks import Ranks
from report_read import read_run
from settings import dump_yaml, load_config

sys.path.insert(0, str(ROOT / "experiments"))
import run as sweeps
import synthetic

SWEEP = """
data: {tiny: "python synthetic.py {folder} --users 120 --items 90 --layout parquet --seed 3"}
settings: {hidden_units: 8, num_heads: 1, num_blocks: 1, max_steps: 3, tensorboard: false, device: cpu, batch_size: 32, baselines: false,
           holdout_fraction: 0.6}
seeds: [1, 2]
rows:
  one: {}
  two: {against: one, learning_rate: 0.1}
"""


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    return sweeps.main()


def test_a_sweep_goes_on_and_its_table_is_right(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(SWEEP)
    assert start(monkeypatch, file, "--out", out, "--seeds", 1) == 0
    content = json.loads((out / "table.json").read_text())
    runs = [read_run(out / "tiny" / row / "seed1" / "log") for row in ("one", "two")]
    for entry, run in zip(content, runs, strict=True):
        assert entry["ndcg@10"] == pytest.approx(run.metrics["ndcg@10"]) and entry["split"] == "test" and entry["seeds"] == 1
    assert content[0]["difference"] is None and len(content[1]["difference"]) == 3
    assert content[1]["difference"][0] == pytest.approx(runs[1].metrics["ndcg@10"] - runs[0].metrics["ndcg@10"], abs=1e-6)
    assert "| two |" in (out / "table.md").read_text() and "<svg" in (out / "curves.html").read_text()
    # Nothing is trained again; a run whose status is not finished is resumed.
    calls = []
    monkeypatch.setattr(sweeps.subprocess, "call", lambda command, **options: calls.append(command) or 0)
    assert start(monkeypatch, file, "--out", out, "--seeds", 1) == 0 and not calls
    status = out / "tiny" / "two" / "seed1" / "log" / "status.json"
    status.write_text(status.read_text().replace("finished", "interrupted"))
    assert start(monkeypatch, file, "--out", out, "--seeds", 1) == 0
    assert len(calls) == 1 and calls[0][-1] == "--resume"
    # A run of other data is not taken for done, nor gone on with, nor trained over; the same data elsewhere is the same.
    synthetic.generate(tmp_path / "other", users=130, items=90, layout="parquet", seed=4)
    with pytest.raises(UserError, match="one.seed1: a run of other data .store [0-9a-f]{16}. than .*other .store"):
        start(monkeypatch, file, "--out", out, "--seeds", 1, "--data", f"tiny={tmp_path / 'other'}")
    with pytest.raises(UserError, match="two.seed1: a run of other data"):  # unfinished; said before a run is trained
        start(monkeypatch, file, "--out", out, "--only", "two", "--seeds", 3, 1, "--data", f"tiny={tmp_path / 'other'}")
    assert len(calls) == 1
    (out / "data" / "tiny").rename(tmp_path / "moved")
    start(monkeypatch, file, "--out", out, "--only", "one", "--seeds", 1, "--data", f"tiny={tmp_path / 'moved'}")
    assert len(calls) == 1
    settings = out / "tiny" / "one" / "seed1" / "settings.yaml"  # the documentation in it is no setting
    settings.write_text(settings.read_text().replace("# Seed of", "# The seed of"))
    start(monkeypatch, file, "--out", out, "--only", "one", "--seeds", 1, "--data", f"tiny={tmp_path / 'moved'}")
    assert len(calls) == 1
    file.write_text(SWEEP.replace("0.1}", "0.2}"))  # other settings: the run is made anew
    start(monkeypatch, file, "--out", out, "--seeds", 1, "--data", f"tiny={tmp_path / 'moved'}")
    assert len(calls) == 2 and calls[1][-1] == "--overwrite"


def fake_run(folder, ranks, curve=(), users=None):
    rank = np.array(ranks)
    lines = [{"split": "valid", "global_step": s, "ndcg@10": v} for s, v in curve]
    return read_run(folder)._replace(
        log=lines, ranks=Ranks(np.arange(len(rank)) if users is None else users, rank, np.zeros((0, 10), np.int64), {})
    )


def test_interval_and_steps_by_hand(tmp_path):
    ours = {1: fake_run(tmp_path, [0] * 50 + [-1] * 50, [(1, 0.1), (2, 0.3)]), 2: fake_run(tmp_path, [0] * 100, [(1, 0.3)])}
    theirs = {1: fake_run(tmp_path, [-1] * 100, [(1, 0.05), (2, 0.2)]), 2: fake_run(tmp_path, [-1] * 100, [(1, 0.2)])}
    mean, low, high = sweeps.interval(ours, theirs)
    assert mean == pytest.approx(0.75) and 0.4 < low < mean < high <= 1.0
    assert sweeps.steps_to(ours, theirs) == 2 and sweeps.steps_to(theirs, ours) is None
    assert sweeps.interval(ours, {}) is None and sweeps.steps_to(ours, {}) is None


def test_interval_where_each_seed_has_users_of_its_own(tmp_path):
    def runs(ranks, users=(range(0, 100), range(200, 320))):
        found = zip((1, 2), ranks, users, strict=True)
        return {seed: fake_run(tmp_path, rank, users=np.array(of_seed)[: len(rank)]) for seed, rank, of_seed in found}

    # By hand: without spread among a seed's users only the draw of the seeds is left, each alone or both.
    half = runs([[2] * 100, [-1] * 120]), runs([[-1] * 100] + [[-1] * 120])
    assert sweeps.interval(*half) == (0.25, 0.0, 0.5)  # 1 / log2(2 + 2) in one seed of two, and as many users as each seed has
    random = np.random.default_rng(0)
    base = [random.integers(-1, 30, size) for size in (100, 120)]
    moved = [np.where(random.random(len(rank)) < 0.3, 0, rank) for rank in base]
    assert sweeps.interval(runs(base), runs(base)) == (0.0, 0.0, 0.0)
    mean, low, high = sweeps.interval(runs(moved), runs(base))
    assert 0 < low < mean < high and sweeps.interval(runs(base), runs(moved))[2] < 0
    shuffled = [random.permutation(rank) for rank in base]  # as good, user by user other
    mean, low, high = sweeps.interval(runs(shuffled), runs(base))
    assert mean == pytest.approx(0, abs=1e-12) and low < 0 < high
    # Within a seed the users of both rows must be the same, in number too.
    assert sweeps.interval(runs(moved), runs(base, (range(0, 100), range(201, 321)))) is None
    assert sweeps.interval(runs(moved), runs([base[0], base[1][:-1]])) is None


def test_rows_are_paired_by_seed(tmp_path):
    hit, miss = ([0] * 40, [(5, 0.3)]), ([-1] * 40, [(7, 0.1)])
    ours = {1: fake_run(tmp_path, *hit), 2: fake_run(tmp_path, *miss)}
    theirs = {2: fake_run(tmp_path, *miss), 3: fake_run(tmp_path, *miss)}
    assert sweeps.interval(ours, theirs) == (0.0, 0.0, 0.0) and sweeps.steps_to(ours, theirs) == 7  # seed 2 of both, not the first of each
    theirs = {2: theirs[2], 1: fake_run(tmp_path, *hit)}
    assert sweeps.interval(ours, theirs) == (0.0, 0.0, 0.0)  # the order in which they were found says nothing
    assert sweeps.interval({1: ours[1]}, {2: theirs[2]}) is None and sweeps.steps_to({1: ours[1]}, {2: theirs[2]}) is None
    for run in (*ours.values(), *theirs.values()):
        run.metrics.update({"split": "test", "hr@10": 0.5, "ndcg@10": 0.5, "score": 0.5})
    row = sweeps.Row("b", {}, "a")
    entry, cells = sweeps.row_of(row, {1: ours[1], 2: ours[2]}, {2: theirs[2]})
    assert entry["paired_seeds"] == [2] and entry["seeds"] == 2 and cells[5] == "+0.0000 (+0.0000 to +0.0000), seed 2"


def test_commits_and_data_of_the_runs_are_shown_where_they_differ(tmp_path, monkeypatch):
    def run(commit, store):
        metrics = {"split": "test", "hr@10": 0.5, "ndcg@10": 0.5, "score": 0.5}
        return fake_run(tmp_path, [0] * 9)._replace(metrics=metrics, environment={"commit": commit}, report={"fingerprint": store})

    def table(a, b):
        monkeypatch.setattr(sweeps, "finished", lambda *_: {("d", "a"): a, ("d", "b"): b})
        rows = [sweeps.Row("a", {}), sweeps.Row("b", {}, "a")]
        return sweeps.table_of(sweeps.Sweep({"d": ""}, "", [1, 2], rows, False), tmp_path, [], [])

    old, new = "0123456789" * 4, "abcdef0123" * 4 + "-dirty"
    text, content = table({1: run(old, "s")}, {1: run(old, "s")})
    assert "commit" not in text and "store" not in text and content[1]["commit"] == [old] and content[1]["store"] == ["s"]
    text, content = table({1: run(old, "s")}, {1: run(new, "s"), 2: run(old, "s")})
    assert "| commit |" in text and "| 0123456789 |" in text and "| 0123456789, abcdef0123-dirty |" in text and "store" not in text
    assert content[1]["commit"] == [old, new] and content[1]["difference"] == (0.0, 0.0, 0.0)
    text, content = table({1: run(None, "s")}, {1: run(None, "t")})  # of two data sets: both are named, none is compared
    assert "| store |" in text and "| t |" in text and content[1]["difference"] is None and content[1]["commit"] == ["unknown"]


def test_a_search_looks_at_validation_only_until_one_is_chosen(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("data: {d: ''}\nsearch: {learning_rate: [0.1, 0.2], num_blocks: [1, 2]}\n")
    sweep = sweeps.read_sweep(file)
    assert sweep.is_search and len(sweep.rows) == 4 and all(row.settings["test"] is False for row in sweep.rows)
    assert sweep.rows[1].name == "learning_rate=0.1 num_blocks=2"


VALID, TEST = {0.1: 0.2, 0.2: 0.3, 0.3: 0.1}, {0.1: 0.25, 0.2: 0.15, 0.3: 0.35}  # the best on validation is the worst on the test


MADE = {"cpu": "A CPU", "cpus": 4, "device": "cpu", "torch": "2.99"}


def fake_main(calls):
    """In place of main.py: a finished run whose NDCG@10 follows from learning rate and split alone; its settings go to `calls`."""

    def call(command, **options):
        config = load_config(["--config", command[command.index("--config") + 1]], environ={}).config
        log = Path(command[command.index("--log_path") + 1])
        log.mkdir(parents=True, exist_ok=True)
        rate, test = config.training.learning_rate, config.eval.test
        calls.append((rate, test, config.system.seed))
        value = (TEST if test else VALID)[rate] + config.system.seed / 1000
        metrics = {"split": "test" if test else "valid", "hr@10": value, "ndcg@10": value, "score": value}
        (log / "metrics.json").write_text(json.dumps(metrics))
        (log / "environment.json").write_text(json.dumps(MADE | {"commit": "beef"}))
        (log / "config.resolved.yaml").write_text(dump_yaml(with_values(config, log_path=str(log))))
        (log / "status.json").write_text(json.dumps({"state": "finished", "step": 3, "time": "2020-02-02T02:02:02+00:00"}))
        return 0

    return call


def test_a_search_tests_what_validation_chose_and_nothing_else(tmp_path, monkeypatch, capsys):
    file, out, calls = tmp_path / "s.yaml", tmp_path / "out", []
    file.write_text("data: {d: ''}\nseeds: [1, 2]\nsearch: {learning_rate: [0.1, 0.2, 0.3]}\n")
    monkeypatch.setattr(sweeps.subprocess, "call", fake_main(calls))
    assert start(monkeypatch, file, "--out", out, "--data", f"d={tmp_path}") == 0
    assert [(rate, seed) for rate, test, seed in calls if not test] == [(rate, seed) for rate in VALID for seed in (1, 2)]
    assert [call for call in calls if call[1]] == calls[-2:] == [(0.2, True, 1), (0.2, True, 2)]
    content, text = json.loads((out / "table.json").read_text()), (out / "table.md").read_text()
    assert [entry["split"] for entry in content] == ["valid"] * 3 + ["test"]
    assert content[-1]["row"] == "chosen: learning_rate=0.2" and content[-1]["ndcg@10"] == pytest.approx(0.1515)
    assert text.count("| chosen: learning_rate=0.2 | 0.1515") == 1
    # The table alone has that row too, and trains nothing; where it was not tested it says so.
    assert start(monkeypatch, file, "--out", out, "--table_only") == 0 and len(calls) == 8
    assert json.loads((out / "table.json").read_text()) == content and (out / "table.md").read_text() == text
    shutil.rmtree(out / "d" / "chosen_learning_rate=0.2")
    assert start(monkeypatch, file, "--out", out, "--table_only") == 0 and len(calls) == 8
    assert "not tested yet (chosen: learning_rate=0.2)" in (out / "table.md").read_text()
    assert json.loads((out / "table.json").read_text()) == content[:-1]


def test_figures_of_the_test_split_choose_nothing(tmp_path):
    rows = [sweeps.Row(name, {"test": False}) for name in "abc"]
    content = [{"data": "d", "row": name, "split": split, "ndcg@10": value}
               for name, split, value in (("a", "valid", 0.1), ("b", "test", 0.9), ("c", "valid", 0.2))]  # fmt: skip
    search = sweeps.Sweep({"d": "", "e": ""}, "", [1], rows, True)
    assert sweeps.chosen_of(search, content) == {"d": sweeps.Row("chosen: c", {"test": True})}
    assert sweeps.chosen_of(search, content[1:2]) == sweeps.chosen_of(search._replace(is_search=False), content) == {}


@pytest.mark.parametrize(("text", "message"), [
    ("[1", "cannot be read"), ("rows: {}", "expected data"), ("data: {d: ''}\nrow: {}", "'row'"),
    ("data: {d: ''}\nrows: {a: {lr_: 1}}", "'lr_'"),
    ("data: {d: ''}\nrows: {a: {against: b}}", "row a names 'b'"), ("data: {d: ''}\nrows: {}\nsearch: {}", "either rows or search"),
])  # fmt: skip
def test_mistakes(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        sweeps.read_sweep(tmp_path / "s.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_sweeps_of_the_repository_are_valid(path):
    sweep = sweeps.read_sweep(path)
    for row in sweep.rows:
        sweeps.settings_of(sweep, row)


def rows_written(file, out, monkeypatch, *more):
    """The files that --write_rows makes: name -> (header, settings)."""
    monkeypatch.setattr(sweeps, "ROOT", out / "root")
    assert start(monkeypatch, file, "--out", out, "--write_rows", *more) == 0
    files = sorted((out / "root" / "configs" / "experiments").iterdir())
    texts = [file.read_text() for file in files]
    headers = ["".join(line for line in text.splitlines(keepends=True) if line.startswith("#")) for text in texts]
    assert all(set(KEYS) - set(PATHS) == {key for group in yaml.safe_load(text).values() for key in group} for text in texts)
    configs = [load_config(["--config", str(file)], environ={}).config for file in files]
    return {file.name: (header, config) for file, header, config in zip(files, headers, configs, strict=True)}


PATHS = [name for name, key in KEYS.items() if key.group == "paths"]


def test_rows_are_written_whole(tmp_path, monkeypatch, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(SWEEP)
    written = rows_written(file, tmp_path, monkeypatch)
    header, config = written["small-two.yaml"]
    assert len(written) == 2 and header.startswith("# Row 'two' of small.yaml") and "--config configs/experiments/small-two.yaml" in header
    assert "Not run: no finished run of it in" in header and "commit" not in header
    sweep = sweeps.read_sweep(file)
    assert config == with_values(sweeps.settings_of(sweep, sweep.rows[1]), seed=1) and config.training.learning_rate == 0.1
    assert rows_written(file, tmp_path / "some", monkeypatch, "--only", "two", "--seeds", 5)["small-two.yaml"][1].system.seed == 5
    assert not (tmp_path / "some" / "root" / "configs" / "experiments" / "small-one.yaml").exists()


def test_rows_are_written_as_their_runs_were_made(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text("data: {d: ''}\nseeds: [1, 2, 3]\nrows: {a row: {learning_rate: 0.1}}\n")
    monkeypatch.setattr(sweeps.subprocess, "call", fake_main([]))
    assert start(monkeypatch, file, "--out", out, "--data", f"d={tmp_path}") == 0
    log = out / "d" / "a_row" / "seed3" / "log"
    (log / "environment.json").write_text(json.dumps(MADE | {"commit": "cafe"}))
    header, config = rows_written(file, out, monkeypatch)["small-a_row.yaml"]
    assert "# Run on d, seeds 1 2: 2020-02-02, commit beef, A CPU, 4 cores, cpu, torch 2.99." in header and "Not run" not in header
    assert "# Run on d, seeds 3: 2020-02-02, commit cafe, A CPU" in header and "by now" not in header and "Left out" not in header
    assert config == with_values(Config(), learning_rate=0.1, seed=1)
    # A setting without effect makes no difference, and is not written.
    resolved = log / "config.resolved.yaml"
    plain = resolved.read_text()
    resolved.write_text(plain.replace("lr_gamma: 0.5", "lr_gamma: 0.25"))
    assert plain != resolved.read_text()
    assert rows_written(file, out, monkeypatch)["small-a_row.yaml"] == (header, config)
    resolved.write_text(plain)
    # One of other settings is left out; the sweep file's settings come first, and where no run has them, the runs'.
    resolved.write_text(plain.replace("learning_rate: 0.1", "learning_rate: 0.3", 1))
    header, config = rows_written(file, out, monkeypatch)["small-a_row.yaml"]
    assert "Left out: the run on d, seed 3, which had another learning_rate." in header and "cafe" not in header
    file.write_text(file.read_text().replace("0.1", "0.2"))
    header, config = rows_written(file, out, monkeypatch)["small-a_row.yaml"]
    assert config.training.learning_rate == 0.1 and "The sweep file and the defaults ask for another learning_rate by now." in header
