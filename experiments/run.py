"""Runs a sweep: rows of settings x seeds x data sets, each a run of main.py; one table, one picture. It can be stopped and goes on.

python experiments/run.py experiments/sweeps/beauty.yaml --data beauty=data/beauty --out sweeps/beauty
python experiments/run.py SWEEP --out FOLDER --only default ids --seeds 1 2      some of it
python experiments/run.py SWEEP --out FOLDER --table_only                        the table of what is there
python experiments/run.py SWEEP --out FOLDER --write_rows                        each row's settings to configs/experiments/

A sweep file:
  data:     {name: a command that makes the folder {folder}, or nothing where --data gives one}
  base:     settings file of all rows, or nothing for the defaults
  settings: {key: value} of all rows
  seeds:    [1, 2, 3]
  rows:     {name: {key: value}}, besides `against: other row` (whose interval is given) and `from: other row` (whose settings come first)
  search:   {key: [values]} in place of rows: every combination is a row, trained with --no-test; the best on validation is then tested

Intervals: 95 % paired bootstrap of a row's NDCG@10 less that of its `against`, over the seeds that both have: seeds are drawn, and users,
within each drawn seed where the seeds' users differ (holdout).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import yaml

from charts import lines
from atomic import write_text_atomic
from config import KEYS, Config, PathsConfig, idle_keys, with_values
from errors import ArgumentParser, UserError, run_cli
from metrics import nested_interval, paired_bootstrap
from report_compare import gains
from report_html import page, section
from report_read import Run, curve, data_of, read_run
from settings import dump_yaml, load_config
from store import fingerprint_of

SWEEP_KEYS = ("data", "base", "settings", "seeds", "rows", "search")
METRICS = ("hr@10", "ndcg@10", "score")
ORIGINS = ("commit", "store")  # of a row's runs; columns of the table where they differ
CHOSEN_BY = "ndcg@10"  # on validation, in a search


class Row(NamedTuple):
    """A row of the table. against: the row whose interval is given, "" = none."""

    name: str
    settings: dict
    against: str = ""


class Sweep(NamedTuple):
    data: dict[str, str]
    base: str
    seeds: list[int]
    rows: list[Row]
    is_search: bool


def read_sweep(path: Path) -> Sweep:
    """A sweep file, checked: UserError names an unknown key, row or setting."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict) or (unknown := [key for key in tree if key not in SWEEP_KEYS]):
        raise UserError(f"{path}: expected the keys {', '.join(SWEEP_KEYS)}{f'; found {unknown[0]!r}' if isinstance(tree, dict) else ''}.")
    if ("rows" in tree) == ("search" in tree) or not tree.get("data"):
        raise UserError(f"{path}: expected data, and either rows or search.")
    common, written = tree.get("settings") or {}, tree.get("rows") or {}
    settings: dict[str, dict] = {}
    rows = []
    for name, row in written.items():
        row = dict(row or {})
        start, against = row.pop("from", None), row.pop("against", "")
        for other in filter(None, (start, against)):
            if other not in settings:
                raise UserError(f"{path}: row {name} names {other!r}; expected a row above it.")
        settings[name] = {**(settings[start] if start else common), **row}
        rows.append(Row(name, settings[name], against))
    for values in itertools.product(*(tree.get("search") or {}).values()) if "search" in tree else ():
        chosen = dict(zip(tree["search"], values))
        rows.append(Row(" ".join(f"{key}={value}" for key, value in chosen.items()), {**common, **chosen, "test": False}))
    for row in rows:
        if not_keys := [key for key in row.settings if key not in KEYS]:
            raise UserError(f"{path}: row {row.name}: {not_keys[0]!r} is no setting.")
    return Sweep(dict(tree["data"]), tree.get("base") or "", list(tree.get("seeds") or [1]), rows, "search" in tree)


def settings_of(sweep: Sweep, row: Row) -> Config:
    """The row's whole configuration; UserError where a value does not fit."""
    base = load_config(["--config", str(ROOT / sweep.base)] if sweep.base else [], environ={}, default_file=ROOT / "nowhere.yaml").config
    return with_values(base, **row.settings)


class One(NamedTuple):
    """One run of the sweep and where it lies."""

    row: Row
    data: str
    seed: int
    folder: Path


def runs_of(sweep: Sweep, out: Path, only: list[str], seeds: list[int]) -> Iterator[One]:
    for data, row, seed in itertools.product(sweep.data, sweep.rows, seeds or sweep.seeds):
        if not only or row.name in only:
            yield One(row, data, seed, out / data / re.sub(r"[^\w.=-]+", "_", row.name) / f"seed{seed}")


def state_of(run: One, config: Config, folder: Path) -> str:
    """ "done", "unfinished" or "missing"; a folder of other settings is "missing" and is made anew. UserError for a run of other data."""
    try:  # by value: a text's hash would change with the documentation in it, and finished runs be trained over
        made = load_config(["--config", str(run.folder / "settings.yaml")], environ={}).config
    except UserError:
        return "missing"  # no such file, or of keys that are gone
    if made != config:
        return "missing"
    found = read_run(run.folder / "log", log=False)
    if not found.status:
        return "missing"
    known = data_of(found)
    if known and known not in (str(folder), fingerprint := fingerprint_of(folder, config.data.max_bad_lines)):
        # It may have taken hours: a slip in --data must not train over it.
        raise UserError(f"{run.folder}: a run of other data (store {known}) than {folder} (store {fingerprint}), or of these files"
                        " before they were written anew.\nGive another --out; or remove that folder, then it is trained anew.")  # fmt: skip
    return "done" if found.status.get("state") == "finished" else "unfinished"


def config_of(sweep: Sweep, run: One) -> Config:
    return with_values(settings_of(sweep, run.row), seed=run.seed)


def train(sweep: Sweep, run: One, folder: Path) -> None:
    """Make the run, or go on with it. RuntimeError when main.py fails; KeyboardInterrupt goes through to it and stops the sweep."""
    config = config_of(sweep, run)
    state = state_of(run, config, folder)
    if state == "done":
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    file = run.folder / "settings.yaml"
    write_text_atomic(file, dump_yaml(config))
    places = {"--data_path": folder, "--log_path": run.folder / "log", "--checkpoint_path": run.folder / "checkpoints",
              "--tensorboard_path": run.folder / "tensorboard"}  # fmt: skip
    flags = [str(word) for pair in places.items() for word in pair]
    command = [sys.executable, str(ROOT / "main.py"), "--config", str(file), *flags, "--resume" if state == "unfinished" else "--overwrite"]
    print(f"{run.data}, {run.row.name}, seed {run.seed}: {state}", flush=True)
    with open(run.folder / "console.txt", "w", encoding="utf-8") as console:
        status = subprocess.call(command, stdout=console, stderr=subprocess.STDOUT, cwd=ROOT)
    if status:
        raise RuntimeError(f"{shlex.join(command)}\nended with status {status}; see {run.folder / 'console.txt'}")


# ---- what came of it ----


Seeds = dict[int, Run]  # a row's finished runs on one data set, by seed


def finished(sweep: Sweep, out: Path, only: list[str], seeds: list[int]) -> dict[tuple[str, str], Seeds]:
    """(data set, row) -> its runs that are finished and have metrics."""
    found: dict[tuple[str, str], Seeds] = {}
    for run in runs_of(sweep, out, only, seeds):
        one = read_run(run.folder / "log")
        if one.status.get("state") == "finished" and one.metrics:
            found.setdefault((run.data, run.row.name), {})[run.seed] = one
    return found


def result_of(runs: Seeds, key: str) -> np.ndarray:
    return np.array([run.metrics[key] for run in runs.values()], dtype=np.float64)


def pairs_of(runs: Seeds, others: Seeds) -> dict[int, tuple[Run, Run]]:
    """The runs of two rows of the seeds that both have."""
    return {seed: (runs[seed], others[seed]) for seed in sorted(runs.keys() & others.keys())}


def interval(runs: Seeds, others: Seeds) -> tuple[float, float, float] | None:
    """Mean and ends of the paired difference in NDCG@10, over the seeds that both have and their users.

    A holdout's users are drawn by the seed, so that only the two runs of a seed need the same ones; None where they have not, for runs of
    different data, and without ranks.
    """
    pairs = pairs_of(runs, others).values()
    if not pairs or any(run.ranks is None for pair in pairs for run in pair) or len({data_of(run) for pair in pairs for run in pair}) > 1:
        return None
    users = [run.ranks.user for run, _ in pairs]
    if any(not np.array_equal(other.ranks.user, of_run) for of_run, (_, other) in zip(users, pairs)):
        return None
    ours, theirs = ([gains(run.ranks.rank, "ndcg@10") for run in side] for side in zip(*pairs))
    if all(np.array_equal(of_run, users[0]) for of_run in users):
        return paired_bootstrap(*(torch.from_numpy(np.stack(side)) for side in (ours, theirs)))
    return nested_interval([a - b for a, b in zip(ours, theirs)])


def steps_to(runs: Seeds, others: Seeds) -> int | None:
    """The mean of the first steps at which validation NDCG@10 reaches the others' best of the same seed; None where one never does."""
    found = []
    for run, other in pairs_of(runs, others).values():
        best = max((value for _, value in curve(other, "ndcg@10", "valid")), default=float("inf"))
        found.append(next((step for step, value in curve(run, "ndcg@10", "valid") if value >= best), None))
    return None if not found or None in found else round(sum(found) / len(found))


def table_of(sweep: Sweep, out: Path, only: list[str], seeds: list[int]) -> tuple[str, list[dict]]:
    """The table in Markdown and its content, of the runs that are finished."""
    found = finished(sweep, out, only, seeds)
    content, text = [], []
    for data in sweep.data:
        header = ["row", *METRICS, "seeds", "less", "95 % interval of NDCG@10", "minutes", "steps", "steps to its best validation"]
        rows = [
            (row, *row_of(row, runs, found.get((data, row.against), {}))) for row in sweep.rows if (runs := found.get((data, row.name)))
        ]
        several = [key for key in ORIGINS if len({origin for _, entry, _ in rows for origin in entry[key]}) > 1]
        header += several
        text += [f"**{data}**", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for row, entry, cells in rows:
            cells += [", ".join(map(short, entry[key])) for key in several]
            text.append(f"| {row.name} | {' | '.join(map(str, cells))} |")
            content.append({"data": data} | entry)
        text.append("")
    return "\n".join(text), content


def short(origin: str) -> str:
    """A commit in ten digits and what is behind them, a store's fingerprint or a path as they are."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", origin)


def row_of(row: Row, runs: Seeds, others: Seeds) -> tuple[dict, list]:
    """A row of the table: its content, and its cells behind the name."""
    some = list(runs.values())
    entry = {"row": row.name, "seeds": len(runs), "split": some[0].metrics["split"], "against": row.against}
    cells: list = []
    for key in METRICS:
        values = result_of(runs, key)
        entry[key], entry[f"{key}.sd"] = float(values.mean()), float(values.std(ddof=1)) if len(runs) > 1 else None
        cells.append(f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(runs) > 1 else ""))
    entry["paired_seeds"] = paired = list(pairs_of(runs, others))
    entry["difference"] = between = interval(runs, others)
    words = "" if between is None else f"{between[0]:+.4f} ({between[1]:+.4f} to {between[2]:+.4f})"
    if between is not None and not len(paired) == len(runs) == len(others):
        words += f", seed{'s' if len(paired) > 1 else ''} {' '.join(map(str, paired))}"
    entry["commit"] = sorted({str(run.environment.get("commit") or "unknown") for run in some})
    entry["store"] = sorted({data_of(run) or "unknown" for run in some})
    entry["minutes"] = minutes = float(np.mean([run.seconds or 0.0 for run in some]) / 60)
    entry["steps"] = int(np.mean([run.status.get("step", 0) for run in some]))
    entry["steps_to_reach"] = reach = steps_to(runs, others)
    return entry, [*cells, len(runs), row.against, words, f"{minutes:.1f}", entry["steps"], "" if reach is None else reach]


def picture_of(sweep: Sweep, out: Path, only: list[str], seeds: list[int]) -> str:
    """Validation NDCG@10 by step, a line a row (its first seed), a chart a data set: one HTML file."""
    charts = []
    for data in sweep.data:
        drawn = {}
        for run in runs_of(sweep, out, only, seeds):
            if run.data == data and run.row.name not in drawn and (points := curve(read_run(run.folder / "log"), "ndcg@10", "valid")):
                drawn[run.row.name] = points
        charts += [lines(f"{data}: validation NDCG@10", dict(itertools.islice(drawn.items(), start, start + 6)), marks=True)
                   for start in range(0, len(drawn), 6)]  # fmt: skip
    return page("Learning curves", out.name, time.strftime("%Y-%m-%d"), [("Curves", section("Curves", *charts))])


def write_rows(sweep: Sweep, path: Path, out: Path, only: list[str], seeds: list[int]) -> None:
    """configs/experiments/<sweep>-<row>.yaml: a file a row, with all settings but the paths, so that no later default changes its meaning.

    They are those that the row's finished runs in `out` were made with (the sweep file's, if some run has them); where there is no run,
    those of the sweep file. The header says which, and the runs' commits, dates and machines.
    """
    target = ROOT / "configs" / "experiments"
    target.mkdir(parents=True, exist_ok=True)
    found = finished(sweep, out, only, seeds)
    for row in sweep.rows:
        if only and row.name not in only:
            continue
        file = target / f"{path.stem}-{re.sub(r'[^0-9a-zA-Z.=-]+', '_', row.name)}.yaml"
        runs = [(data, seed, run) for data in sweep.data for seed, run in found.get((data, row.name), {}).items()]
        asked = without_place(settings_of(sweep, row))
        made = [without_place(load_config(["--config", str(run.folder / "config.resolved.yaml")], environ={}).config) for *_, run in runs]
        taken = made[0] if made and asked not in made else asked
        same = [run for run, config in zip(runs, made) if config == taken]
        header = [f"Row {row.name!r} of {path.name}: all its settings but the paths.",
                  f"  python main.py --config configs/experiments/{file.name} --data_path FOLDER",
                  *(origins_of(same) or [f"Not run: no finished run of it in {out}."])]  # fmt: skip
        header += [f"Left out: the run on {data}, seed {seed}, which had another {', '.join(differing(config, taken))}."
                   for (data, seed, _), config in zip(runs, made) if config != taken]  # fmt: skip
        if taken != asked:
            header.append(f"The sweep file and the defaults ask for another {', '.join(differing(asked, taken))} by now.")
        whole = dump_yaml(with_values(taken, seed=same[0][1] if same else (seeds or sweep.seeds)[0])).splitlines()
        values = [line for line in whole if line and not line.lstrip().startswith("#")]
        write_text_atomic(file, "\n".join([*(f"# {line}" for line in header), *values[: values.index("paths:")]]) + "\n")
        print(f"written: {file}")


def without_place(config: Config) -> Config:
    """What two runs of a row have alike: all but the paths, the seed, and what has no effect under the other settings."""
    plain = replace(config, paths=PathsConfig())
    return with_values(plain, **{name: KEYS[name].default for name in idle_keys(plain)}, seed=0)


def differing(config: Config, other: Config) -> list[str]:
    return [name for name in KEYS if config.get(name) != other.get(name)]


def origins_of(runs: list[tuple[str, int, Run]]) -> list[str]:
    """A line for each data set, day, commit and machine that the runs (data set, seed, run) were made with."""
    seeds: dict[tuple, list[int]] = {}
    for data, seed, run in runs:
        of = {key: run.environment.get(key) or f"{key} unknown" for key in ("commit", "cpu", "cpus", "device", "torch")}
        place = f"{of['cpu']}, {of['cpus']} cores, {of['device']}, torch {of['torch']}"
        seeds.setdefault((data, str(run.status.get("time", "date unknown"))[:10], of["commit"], place), []).append(seed)
    return [
        f"Run on {data}, seeds {' '.join(map(str, of))}: {day}, commit {commit}, {place}."
        for (data, day, commit, place), of in seeds.items()
    ]


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("sweep", type=Path)
    add("--out", type=Path, required=True, help="where runs, table.md, table.json and curves.html go")
    add("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="a folder that is there, in place of the sweep's command")
    add("--only", nargs="+", default=[], metavar="ROW")
    add("--seeds", nargs="+", type=int, default=[])
    add("--table_only", action="store_true")
    add("--write_rows", action="store_true")
    add("--debug", action="store_true")
    options = parser.parse_args()
    sweep = read_sweep(options.sweep)
    given = dict(pair.split("=", 1) for pair in options.data if "=" in pair)
    for name, known in ((n, sweep.data) for n in given):
        if name not in known:
            raise UserError(f"--data {name}: no such data set; the sweep has {', '.join(known)}.")
    if unknown := [name for name in options.only if name not in {row.name for row in sweep.rows}]:
        raise UserError(f"--only {unknown[0]}: no such row; the sweep has {', '.join(row.name for row in sweep.rows)}.")
    for row in sweep.rows:
        settings_of(sweep, row)  # all mistakes before the first run
    if options.write_rows:
        write_rows(sweep, options.sweep, options.out, options.only, options.seeds)
        return 0
    folders = {} if options.table_only else {data: folder_of(sweep, data, given, options.out) for data in sweep.data}
    runs = [] if options.table_only else list(runs_of(sweep, options.out, options.only, options.seeds))
    for run in runs:
        state_of(run, config_of(sweep, run), folders[run.data])  # one of other data is said before the first is trained
    for run in runs:
        train(sweep, run, folders[run.data])
    return finish(sweep, options, folders)


def finish(sweep: Sweep, options: argparse.Namespace, folders: dict[str, Path]) -> int:
    """Write and show the table; after a search with the row that validation chose, which is tested unless the table alone is asked for."""
    text, content = table_of(sweep, options.out, options.only, options.seeds)
    for data, row in chosen_of(sweep, content).items():
        tested = Sweep({data: sweep.data[data]}, sweep.base, sweep.seeds, [row], False)
        for run in () if options.table_only else runs_of(tested, options.out, [], options.seeds):
            train(tested, run, folders[data])
        more, entries = table_of(tested, options.out, [], options.seeds)
        more = more if entries else f"**{data}**: not tested yet ({row.name}).\n"
        text, content = text + f"\nThe one with the best validation NDCG@10, on the test split:\n\n{more}", content + entries
    options.out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(options.out / "table.md", text + "\n")
    write_text_atomic(options.out / "table.json", json.dumps(content, indent=1))
    write_text_atomic(options.out / "curves.html", picture_of(sweep, options.out, options.only, options.seeds))
    print(text)
    return 0


def chosen_of(sweep: Sweep, content: list[dict]) -> dict[str, Row]:
    """Data set -> the row of a search with the best validation NDCG@10, to be tested; the test split's figures choose nothing."""
    chosen = {}
    for data in sweep.data if sweep.is_search else ():
        entries = [entry for entry in content if entry["data"] == data and entry["split"] == "valid"]
        if entries:
            best = max(entries, key=lambda entry: entry[CHOSEN_BY])["row"]
            row = next(row for row in sweep.rows if row.name == best)
            chosen[data] = Row(f"chosen: {row.name}", row.settings | {"test": True})
    return chosen


def folder_of(sweep: Sweep, data: str, given: dict[str, str], out: Path) -> Path:
    """The data set's folder: the given one, or made by the sweep's command, once."""
    if data in given:
        return Path(given[data]).resolve()
    folder = (out / "data" / data).resolve()
    if not sweep.data[data]:
        raise UserError(f"data set {data}: expected its folder as --data {data}=FOLDER.")
    if not folder.is_dir():
        command = sweep.data[data].format(folder=folder)
        print(command, flush=True)
        if subprocess.call([sys.executable, *shlex.split(command)[1:]], cwd=ROOT):
            raise UserError(f"data set {data}: its command failed: {command}")
    return folder


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
