"""docs/RELIABILITY.md, row 12: a signal at each named point of a run; test_reliability_runs.py sends them at random."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from reliability_world import final_files, make_trainer

import checkpoint as checkpoints
import trainer as trainer_module
from dataset import Prefetcher
from logger import RunLogger, read_train_log
from updates import Updates

pytestmark = pytest.mark.reliability

# Each is a point before and one after: steps, logs, all of a save, of the links and of the pruning, all of an evaluation.
PLACES = (
    (trainer_module.Trainer, ("_accumulate", "_update", "_log_line", "_finish_epoch", "_validate", "rank", "metrics_of", "save", "_meta")),
    (Updates, ("apply", "state_dict", "averaged")), (RunLogger, ("train_line", "eval_line", "sync")), (os, ("fsync", "rename", "replace")),
    (trainer_module.Ranker, ("rank", "encode_candidates", "_seen", "_target_losses")), (trainer_module, ("write_status",)),
    (Prefetcher, ("__call__",)),
    (checkpoints, ("save_checkpoint", "_write_tensors", "_known_loss", "_put_in_place", "link", "prune", "_remove_folder")),
)  # fmt: skip
# 5 steps an epoch; the schedule changes the rate at each step, as the default does.
SETTINGS = {"num_epochs": 2, "save_every_steps": 3, "keep_last_k": 2}
KINDS = {
    "plain": SETTINGS,
    "average": SETTINGS | {"optimizer": "muon", "ema_decay": 0.9, "table_optimizer": "adam"},
    "patience": SETTINGS | {"num_epochs": 4, "patience": 1, "best_metric": "loss"},
    "cut": SETTINGS | {"max_steps": 8, "accumulate_steps": 2, "eval_every_epochs": 2},  # the last epoch ends before its last batch
}


class Points:
    """Counts the points that a run comes by, and sends it a signal at the one of a number."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = 0) -> None:
        self.at, self.names = at, []
        for owner, names in PLACES:
            for name in names:
                patch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, function):
        def wrapped(*args, **kwargs):
            self._come_by(f"before {name}")
            result = function(*args, **kwargs)
            self._come_by(f"after {name}")
            return result

        return wrapped

    def _come_by(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.at:
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[self.at % 2])  # the handler runs before this returns


def end_of(folder: Path) -> dict:
    """What a run left: the newest checkpoint by hash, which one is the best, the losses and evaluations as logged, nothing half-written."""
    best = checkpoints.find_checkpoint(folder / "best_model.pt").name
    log = read_train_log(folder / "train.log")
    keys = ("global_step", "epoch", "loss", "lr", "grad_norm", "split", "valid_loss", "hr@10", "ndcg@10", "score")
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith((".tmp", ".old")))
    return final_files(folder) | {"best": best, "left over": left, "log": [{k: line[k] for k in keys if k in line} for line in log]}


def links_of(folder: Path) -> set:
    """The links with the checkpoint that each names; that of every link is there."""
    return {(path.name, checkpoints.find_checkpoint(path).name) for path in folder.glob("*.pt")}


def train(folder: Path, settings: dict, **how):
    trainer = make_trainer(folder, num_workers=0, **settings, **how)
    trainer.fit()
    return trainer


def run_with_a_signal(folder: Path, settings: dict, at: int) -> str:
    """Train, be stopped at a point, go on; returns the point's name."""
    with pytest.MonkeyPatch.context() as patch:
        points = Points(patch, at)
        stopped = train(folder, settings)
    assert stopped.stop_signal in (signal.SIGTERM, signal.SIGINT), points.names[at - 1]
    newest = checkpoints.newest_valid(folder, pytest.fail)
    assert checkpoints.read_meta(newest)["step"] == stopped.step
    train(folder, settings, resume_from=newest)
    return points.names[at - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [pytest.param(101, marks=pytest.mark.fast), 1])
def test_a_signal_at_each_point_of_a_run(tmp_path, kind, every):
    """The run that goes on ends as the undisturbed one: weights, moments, rates, position, links, losses and evaluations.

    In the default run each 101st point, and that in the last evaluation: a signal there leaves no update to the run that goes on.
    """
    settings = KINDS[kind]
    with pytest.MonkeyPatch.context() as patch:
        points = Points(patch)
        train(tmp_path / "whole", settings)
    last = max(number for number, name in enumerate(points.names, 1) if name == "before encode_candidates")
    whole, links = end_of(tmp_path / "whole"), links_of(tmp_path / "whole")
    for at in sorted({*range(every, len(points.names) + 1, every), last}):
        folder = tmp_path / f"at{at}"
        where = run_with_a_signal(folder, settings, at)
        assert end_of(folder) == whole, (at, where)
        assert links_of(folder) <= links, (at, where)  # the checkpoint of the signal may have taken an older one's place
        shutil.rmtree(folder)
    print(f"{kind}: {len(points.names)} points")
