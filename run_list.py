"""Lists run folders, and removes those that are neither the best of their data, nor the newest, nor unfinished.

Must not train or evaluate. Removes files that runs.py and checkpoint.py name, and folders that are empty then; nothing else, ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint import list_checkpoints
from errors import UserError
from logger import format_duration
from report_html import number, size_text
from report_read import SAME, data_of, read_run
from runs import STATUS, TRAIN_LOG, clear_folders, is_alive


class Listed(NamedTuple):
    """A run folder and what it says of its run. checkpoint_dir, tensorboard_dir: as noted in status.json, None where nothing is."""

    folder: Path
    kind: str  # "train" or "eval"
    state: str  # a state of runs.py, or "killed": it says running, and no process holds it
    step: object
    metrics: dict
    group: tuple  # runs of one group have comparable metrics
    seconds: float | None  # of its processes, pauses between them left out
    ended: float  # seconds since 1970
    num_bytes: int
    checkpoint_dir: Path | None
    tensorboard_dir: Path | None

    def words(self) -> str:
        """One line on the run."""
        found = number(self.metrics.get("ndcg@10"))
        return f"{self.state}, NDCG@10 {'unknown' if found is None else f'{found:.4f}'}, {size_text(self.num_bytes)}"


def is_run(folder: Path) -> bool:
    return any((Path(folder) / name).is_file() for name in (STATUS, TRAIN_LOG, "metrics.json"))


def find_runs(folders: Iterable[Path]) -> list[Listed]:
    """The runs that are or lie in these folders, evaluations inside run folders too, oldest first. UserError for a missing folder."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder. Give the folder that holds the run folders; it is ./logs where log_path was not set."
            )
        inside = [folder] if is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
        for run in inside:
            for path in (run, *sorted(path for path in run.glob("eval-*") if path.is_dir() and is_run(path))):
                if not path.is_symlink():  # the run is listed where it lies
                    found.setdefault(path.resolve(), path)
    return sorted(map(_listed, found.values()), key=lambda run: run.ended)


def _listed(folder: Path) -> Listed:
    run = read_run(folder, log=False)
    state = str(run.status.get("state", "unknown"))
    if state == "running" and not is_alive(folder):
        state = "killed"
    noted = [
        Path(path) if isinstance(path := run.status.get(key), str) and path else None for key in ("checkpoint_path", "tensorboard_path")
    ]
    group = (data_of(run), *(str(run.metrics.get(key)) for key in SAME))
    ended = max((path.stat().st_mtime for name in (STATUS, TRAIN_LOG, "metrics.json") if (path := folder / name).is_file()), default=0.0)
    kind = "eval" if run.status.get("kind") == "eval" else "train"
    num_bytes = _size([folder, *(path for path in noted if path is not None)])
    return Listed(folder, kind, state, run.status.get("step", "unknown"), run.metrics, group, run.seconds, ended, num_bytes, *noted)


def _size(folders: Iterable[Path]) -> int:
    """Bytes of all files below, each once: best_model.pt is a link to a checkpoint's model.pt."""
    sizes: dict[tuple[int, int], int] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                facts = path.lstat()
            except OSError:  # gone meanwhile: a run that is going on prunes its checkpoints
                continue
            sizes[facts.st_dev, facts.st_ino] = facts.st_size if path.is_file() else 0
    return sum(sizes.values())


def list_rows(runs: Sequence[Listed]) -> tuple[list[list[object]], list[str]]:
    """(rows, header) of a table, oldest first; the best of each data set is marked."""
    best = _best(runs)
    rows = []
    for run in runs:
        values = ["-" if number(run.metrics.get(key)) is None else f"{run.metrics[key]:.4f}" for key in ("hr@10", "ndcg@10")]
        time = "-" if run.seconds is None else format_duration(run.seconds)
        rows.append(
            [str(run.folder), run.kind, run.state, str(run.step), *values, time, size_text(run.num_bytes), "best" if run in best else ""]
        )
    return rows, ["run", "kind", "state", "step", "HR@10", "NDCG@10", "time", "size", ""]


def _best(runs: Sequence[Listed]) -> list[Listed]:
    """The training run with the best test NDCG@10 of each group of comparable runs; the later one of equals."""
    best: dict[tuple, Listed] = {}
    for run in runs:
        value = number(run.metrics.get("ndcg@10"))
        if run.kind == "train" and value is not None and (run.group not in best or value >= best[run.group].metrics["ndcg@10"]):
            best[run.group] = run
    return list(best.values())


def plan_removal(runs: Sequence[Listed]) -> tuple[list[tuple[Listed, str]], list[Listed]]:
    """([(run that stays, why)], [runs that can go, evaluations first]). An evaluation stays with the run whose checkpoint it judged."""
    reasons = {run.folder: "a run is going on there" for run in runs if run.state == "running"}
    for run in _best(runs):
        reasons.setdefault(run.folder, "the best of its data")
    trained = [run for run in runs if run.kind == "train"]
    if trained:
        reasons.setdefault(trained[-1].folder, "the newest")
    for run in runs:
        if run.state in ("killed", "interrupted", "unknown") and run.kind == "train" and _has_checkpoint(run):
            reasons.setdefault(run.folder, f"{run.state}: it has a checkpoint to go on from (--resume_path); remove it by hand")
    for run in runs:
        judged = str(run.metrics.get("checkpoint", ""))
        owner = next((one for one in trained if one.folder in reasons and one.checkpoint_dir and _inside(judged, one.checkpoint_dir)), None)
        if run.kind == "eval" and owner is not None:
            reasons.setdefault(run.folder, f"an evaluation of {owner.folder}")
    removed = sorted((run for run in runs if run.folder not in reasons), key=lambda run: -len(run.folder.parts))
    return [(run, reasons[run.folder]) for run in runs if run.folder in reasons], removed


def _has_checkpoint(run: Listed) -> bool:
    return run.checkpoint_dir is not None and run.checkpoint_dir.is_dir() and bool(list_checkpoints(run.checkpoint_dir))


def _inside(path: str, folder: Path) -> bool:
    return bool(path) and Path(path).resolve().is_relative_to(folder.resolve())


def remove_run(run: Listed, kept: Sequence[Listed] = ()) -> bool:
    """Remove a run's files and its folders where they are empty then; False where a process holds the run.

    A checkpoint or TensorBoard folder that a run of `kept` uses too stays as it is.
    """
    used = {path.resolve() for one in kept for path in (one.folder, one.checkpoint_dir, one.tensorboard_dir) if path is not None}
    own = [
        path if path is not None and path.is_dir() and path.resolve() not in used else None
        for path in (run.checkpoint_dir, run.tensorboard_dir)
    ]
    return clear_folders(run.folder, *own)
