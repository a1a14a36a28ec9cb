"""What the checks of docs/RELIABILITY.md share: how often to try, tiny training runs, and a process that starts whole runs by fork."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_store

import checkpoint as checkpoints
from config import Config, with_values
from dataset import make_splits
from features import TableLayout
from logger import RunLogger, read_train_log
from runs import RunPaths
from synthetic import generate
from trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "hidden_units": 16, "num_heads": 2, "num_blocks": 1, "max_seq_length": 8, "batch_size": 8, "num_epochs": 2, "dropout_rate": 0.3,
    "num_negatives": 8, "log_every_steps": 1, "protocol": "leave_one_out", "tensorboard": False, "eval_batch_size": 16, "keep_last_k": 0,
    "num_workers": 2,
}  # fmt: skip


def rounds(full: int, fast: int) -> list:
    """Parameters of a check that repeats: `fast` times in `python test.py`; in the suite as often as the issue asks.

    RELIABILITY_ROUNDS takes the place of the full number, to try a check.
    """
    full = int(os.environ.get("RELIABILITY_ROUNDS") or full)
    return [pytest.param(fast, marks=pytest.mark.fast), *([full] if full != fast else [])]  # twice the same would share folders


def make_trainer(folder: Path, resume_from: Path | None = None, store=None, embeddings=("81",), tensorboard=None, **settings) -> Trainer:
    """A trainer on a tiny store in memory."""
    store = store or tiny_store(num_users=40, num_items=30, max_events=12)
    config = with_values(Config(), **(SMALL | settings))
    folder.mkdir(parents=True, exist_ok=True)
    run = RunPaths(folder, folder / "tb", folder, folder.name, resume_from=resume_from)
    splits = make_splits(store, protocol=config.eval.protocol, holdout_fraction=0.3, target=config.eval.target, seed=config.system.seed)
    logger = RunLogger(folder, tensorboard, console=False)
    return Trainer(config, store, TableLayout.from_store(store, config.model), embeddings, splits, run, logger, torch.device("cpu"))


def state_hash(value: object) -> str:
    """A hash of tensors and plain values, bit for bit. The files' own bytes also tell which equal objects were one object."""
    total = hashlib.sha256()

    def add(value: object, where: str) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{where} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for key, item in value.items():
                add(item, f"{where}/{key}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                add(item, f"{where}[{number}]")
        else:
            total.update(f"{where} {value!r}\n".encode())

    add(value, "")
    return total.hexdigest()


def final_files(root: Path) -> dict:
    """Hashes of what the newest checkpoint holds: weights; optimiser, generators, position."""
    newest = checkpoints.newest_valid(root, pytest.fail)
    return {"folder": newest.name} | {
        name: state_hash(torch.load(newest / name, weights_only=True)) for name in (checkpoints.MODEL, checkpoints.TRAINER)
    }


def tree_hash(folder: Path) -> str:
    """A hash of all names and contents under a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(f"{path.relative_to(folder)}\n".encode())
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


class Driver:
    """A process that has imported main.py and trained nothing: each run is a fork of it, so a run starts in milliseconds.

    The tests' own process may have started threads of OpenMP, which do not survive a fork.
    """

    def __init__(self, cwd: Path) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("TRAIN_", "USER_CACHE"))}
        environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("reliability_driver.py"))]
        self.process = subprocess.Popen(command, cwd=cwd, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, flags: list, **how: object) -> dict:
        """Start main.py with these flags; how: see reliability_driver.py. Returns {"status", "seconds", "signalled"}."""
        return self.ask({"flags": [str(flag) for flag in flags]} | how)

    def ask(self, order: dict) -> dict:
        """One order to the process, one answer."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the driver died"
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def samples_of(path: Path) -> list:
    """The users of each step as a run logged them, what a resumed run did again in place of the killed run's."""
    seen: dict[int, list] = {}
    for line in path.read_text().splitlines():
        step, users = json.loads(line)
        for later in [number for number in seen if number >= step]:
            del seen[later]
        seen[step] = users
    return sorted(seen.items())


# 54 training users, 14 steps an epoch; dropout and prefetching are on.
RUN_SETTINGS = {
    "model": {"hidden_units": 16, "num_blocks": 1, "num_heads": 2, "max_seq_length": 10, "dropout_rate": 0.3},
    "training": {"batch_size": 4, "save_every_steps": 25, "keep_last_k": 3},
    "loss": {"num_negatives": 8}, "data": {"num_workers": 2}, "eval": {"eval_every_epochs": 5, "baselines": False},
    "system": {"log_every_steps": 10, "num_threads": 1, "tensorboard": False, "save_frequency": 5},
}  # fmt: skip


class Runs:
    """Runs of the same settings in forks of one process; the undisturbed one is made first."""

    def __init__(self, cwd: Path, steps: int, *flags: object) -> None:
        self.cwd, self.steps, self.driver, self.flags = cwd, steps, Driver(cwd), flags
        generate(cwd / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
        (cwd / "small.yaml").write_text(yaml.safe_dump(RUN_SETTINGS))
        self.seconds = self.run("whole")["seconds"]
        self.seconds = min(self.seconds, self.run("whole2")["seconds"])  # the first one compiled the store
        self.whole = final_files(cwd / "whole/ckpt"), samples_of(cwd / "whole/samples")
        assert len(self.whole[1]) == steps

    def run(self, name: str, *flags: object, **how: object) -> dict:
        (self.cwd / name).mkdir(exist_ok=True)
        places = ["--log_path", f"{name}/log", "--checkpoint_path", f"{name}/ckpt", "--tensorboard_path", f"{name}/tb"]
        command = ["--config", "small.yaml", "--data_path", "data", "--max_steps", self.steps, *places, *self.flags, *flags]
        return self.driver.run(command, console=f"{name}/console", samples=f"{name}/samples", **how)

    def console(self, name: str) -> str:
        return (self.cwd / name / "console").read_text(errors="replace")

    def status(self, name: str) -> dict:
        return json.loads((self.cwd / name / "log/status.json").read_text())

    def is_tested(self, name: str) -> bool:
        return (self.cwd / name / "log/metrics.json").is_file()

    def went_on_exactly(self, name: str, samples: bool = True) -> None:
        """Resume until the run is finished, and compare it with the undisturbed one. samples: the users of each step too."""
        done = self.run(name, "--resume")
        text = self.console(name)
        assert done["status"] == 0 and "Traceback" not in text, text[-2000:]
        assert self.status(name)["state"] == "finished" and self.is_tested(name) and (self.cwd / name / "log/report.html").is_file()
        assert final_files(self.cwd / name / "ckpt") == self.whole[0]
        assert not samples or samples_of(self.cwd / name / "samples") == self.whole[1]
        logs = [read_train_log(self.cwd / n / "log/train.log") for n in (name, "whole")]
        losses = [{r["global_step"]: r["loss"] for r in log if "loss" in r} for log in logs]
        assert losses[0] == losses[1]
