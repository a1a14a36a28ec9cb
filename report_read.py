"""Reads run folders for the report: what a run left, its curves, and which other runs it may be compared with.

Must not judge or draw. What is missing or broken is empty, never an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from logger import read_train_log, run_seconds
from ranks import Ranks, read_ranks
from report_data import REPORT_DATA, read_json
from report_html import number
from report_shape import sound_parts
from runs import TRAIN_LOG, read_status

MAX_SIBLINGS = 500  # folders beside a run, the newest, that are looked at for the best earlier run
SAME = ("split", "protocol", "num_candidates", "seen_removed")  # of metrics.json: figures that differ here are not comparable


class Run(NamedTuple):
    """What a run folder holds; empty where a file is missing or cannot be read."""

    folder: Path
    log: list[dict]
    seconds: float | None  # of its processes, pauses between them left out
    metrics: dict
    status: dict
    settings: dict
    settings_text: str
    environment: dict
    commands: list[str]
    report: dict  # report.json's object, its parts as report_shape.py has them
    faults: dict[str, str]  # part of report.json that was left out -> what is wrong with it
    ranks: Ranks | None

    @property
    def name(self) -> str:
        return str(self.status.get("name") or self.folder.resolve().name)


def read_run(run_dir: Path, *, log: bool = True) -> Run:
    """Everything that a run folder says about its run. log: train.log too, which may be long."""
    folder = Path(run_dir)
    text = _read(folder / "config.resolved.yaml", str) or ""
    settings = _read(folder / "config.resolved.yaml", lambda t: {k: v for k, v in yaml.safe_load(t).items() if isinstance(v, dict)}) or {}
    commands = _read(folder / "command.txt", str.splitlines) or []
    lines = _read_log(folder / TRAIN_LOG) if log else []
    metrics, environment, report = (read_json(folder / name) for name in ("metrics.json", "environment.json", REPORT_DATA))
    report, faults = sound_parts(report)
    return Run(folder, lines, run_seconds(folder / TRAIN_LOG), metrics, read_status(folder), settings, text, environment, commands, report,
               faults, read_ranks(folder))  # fmt: skip


def _read(path: Path, convert: Callable) -> object:
    """The converted text of a file, None where it is missing or no such thing."""
    try:
        return convert(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return None


def _read_log(path: Path) -> list[dict]:
    try:
        return read_train_log(path)
    except (OSError, RecursionError):
        return []


def curve(run: Run, key: str, split: str | None = None) -> list[tuple[float, float]]:
    """(step, value) of the records of one split (None: training) that have a finite number under `key`."""
    pairs = [(number(record.get("global_step")), number(record.get(key))) for record in run.log if record.get("split") == split]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def data_of(run: Run) -> str:
    """What tells one data set from another: the store's fingerprint, else the data path of the settings, "" where neither is known."""
    path = run.settings.get("paths", {}).get("data_path") if isinstance(run.settings.get("paths"), dict) else None
    return str(run.report.get("fingerprint") or path or "")


def incomparable(run: Run, other: Run) -> str:
    """Why the test metrics of two runs cannot be compared; "" where they can."""
    if number(run.metrics.get("ndcg@10")) is None or number(other.metrics.get("ndcg@10")) is None:
        return "no test metrics"
    ours, theirs = data_of(run), data_of(other)
    if bool(run.report.get("fingerprint")) != bool(other.report.get("fingerprint")):  # an old run: only the path is known of both
        ours, theirs = (data_of(one._replace(report={})) for one in (run, other))
    if ours != theirs:
        return "other data"
    different = [key for key in SAME if run.metrics.get(key) != other.metrics.get(key)]
    return f"another {', '.join(different)}" if different else ""


def best_earlier(run: Run) -> Run | None:
    """The run beside this one's folder that ended earlier and has the best comparable test NDCG@10; None where there is none."""
    if number(run.metrics.get("ndcg@10")) is None:
        return None
    try:
        own = run.folder.resolve()
        with os.scandir(own.parent) as entries:
            folders = [(entry.stat().st_mtime_ns, Path(entry.path)) for entry in entries if entry.is_dir() and Path(entry.path) != own]
    except OSError:
        return None
    best = None
    for _, folder in sorted(folders)[-MAX_SIBLINGS:]:
        if not (folder / "metrics.json").is_file():
            continue
        other = read_run(folder, log=False)
        if other.status.get("kind") == "eval" or _ended(other) > _ended(run) or incomparable(run, other):
            continue
        if best is None or other.metrics["ndcg@10"] > best.metrics["ndcg@10"]:
            best = other
    return None if best is None else read_run(best.folder)


def _ended(run: Run) -> float:
    """When the test metrics were written; status.json's time has whole seconds only and is missing in odd folders."""
    try:
        return (run.folder / "metrics.json").stat().st_mtime
    except OSError:
        return float("inf")
