"""The doctor's look at what surrounds the data: environment, paths, settings, sizes. Must not open a data file or write.

Bytes unless said otherwise.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from config import KEYS, Config, warnings_for
from dataset import training_samples
from doctor_findings import FAIL, PASS, WARN, Finding, finding
from estimate import Data, num_checkpoints, size
from machine import nearest_folder, read_machine, torch_warning
from retrieval import bfloat16_is_faster
from runs import is_alive, read_status
from settings import ParsedArguments
from sizes import table_bytes

PACKAGES = {"numpy": True, "yaml": True, "tensorboard": True, "pyarrow": True, "orjson": True, "tqdm": True, "numba": False}  # needed?
FEW_BYTES, FEW_FILES = 1 << 30, 256


def check_environment(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Versions, threads, GPU, memory, open files."""
    python = platform.python_version()
    yield finding(sys.version_info >= (3, 11), FAIL, "env.python", f"Python {python}", f"Python {python}", "install Python 3.11 or later")
    warning = torch_warning()
    yield finding(not warning, WARN, "env.torch", f"torch {torch.__version__}", warning, "pip install -r requirements.txt")
    missing = {name: needed for name, needed in PACKAGES.items() if importlib.util.find_spec(name) is None}
    for name, needed in missing.items():
        text = f"{name} is not installed" + ("" if needed else ": numpy and torch do its work, several times slower")
        yield Finding(FAIL if needed else WARN, "env.packages", text, "pip install -r requirements.txt")
    if not missing:
        shown = ", ".join(f"{name} {importlib.metadata.version('pyyaml' if name == 'yaml' else name)}" for name in PACKAGES)
        yield Finding(PASS, "env.packages", shown)
    yield from _threads(config, environ)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Finding(PASS, "env.gpu", f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free")
    else:
        yield Finding(PASS, "env.gpu", "none that torch can use; training goes on the CPU")
    machine = read_machine(Path("."), torch.device("cpu"))
    yield finding(
        machine.memory > FEW_BYTES,
        WARN,
        "env.memory",
        f"{size(machine.memory)} ({machine.limit})",
        f"{size(machine.memory)} are left ({machine.limit})",
        "close what else runs, or take a larger machine",
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield finding(
        files >= FEW_FILES or files < 0, WARN, "env.open files", f"{files:,} may be open", f"only {files:,} may be open", "ulimit -n 1024"
    )


def _threads(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    asked = environ.get("OMP_NUM_THREADS", "")
    threads = config.system.num_threads or (int(asked) if asked.isdigit() else torch.get_num_threads())
    who = "num_threads" if config.system.num_threads else "OMP_NUM_THREADS" if asked.isdigit() else "torch's choice"
    yield finding(
        threads <= cores,
        WARN,
        "env.threads",
        f"{threads} threads ({who}) on {cores} cores",
        f"{threads} threads ({who}) on {cores} cores: they wait for each other",
        f"set it to {cores}, as `bash run.sh` does",
    )


def check_paths(arguments: ParsedArguments) -> Iterator[Finding]:
    """Each path, who set it, and whether it can serve."""
    paths, origins = arguments.config.paths, arguments.origins
    options = arguments.options
    goes_on = options.resume or options.resume_path or options.overwrite or options.inference_only
    for key in ("data_path", "log_path", "tensorboard_path", "checkpoint_path", "cache_path"):
        value, check = getattr(paths, key), f"paths.{key}"
        shown = f"{value or 'chosen by the run'} ({origins[key]})"
        if key == "data_path":
            yield finding(
                not value or Path(value).is_dir(),
                FAIL,
                check,
                shown if value else "demo data (no path was given)",
                f"{shown}: no such folder",
                f"set {key}{_variable(key)} to the folder that holds seq.jsonl or seq/",
            )
            continue
        there = nearest_folder(Path(value or "."))
        run = read_status(Path(value)) if key == "log_path" and value and not goes_on else {}
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "is no folder" if not there.is_dir() else "cannot be written to"
            yield Finding(FAIL, check, f"{shown}: {there} {why}", f"point {key}{_variable(key)} at a folder that can be written")
        elif shutil.disk_usage(there).free < FEW_BYTES:
            yield Finding(
                WARN, check, f"{shown}: {size(shutil.disk_usage(there).free)} left on its disk", "free some space, or take another disk"
            )
        elif run:
            state = "going on" if is_alive(Path(value)) else run["state"]
            yield Finding(
                FAIL, check, f"{shown}: holds a run ({state})", "--resume goes on with it, --overwrite removes it; or another log_path"
            )
        else:
            yield Finding(PASS, check, shown)
    if arguments.config_file is not None:
        yield Finding(PASS, "paths.config", str(arguments.config_file))


def _variable(key: str) -> str:
    return f" or {KEYS[key].env}" if KEYS[key].env else ""


def check_settings(config: Config, data: Data | None, device: torch.device) -> Iterator[Finding]:
    """Options without effect, and values that do not fit each other, the data or the machine."""
    idle = warnings_for(config)
    for line in idle:
        yield Finding(WARN, "settings.effect", line, "leave it at its default, or change what it depends on")
    if not idle:
        yield Finding(PASS, "settings.effect", "every changed setting has an effect")
    training = config.training
    slow = training.precision == "bf16" and device.type == "cpu" and not bfloat16_is_faster()
    yield finding(
        not slow and (training.precision != "fp16" or device.type == "cuda"),
        WARN,
        "settings.precision",
        training.precision,
        f"{training.precision} on this {device.type}, which has no fast arithmetic for it",
        "precision fp32",
    )
    if data is None:
        return
    num_samples = _num_training_samples(config, data)
    batches = -(-num_samples // training.batch_size)
    steps = training.max_steps or training.num_epochs * -(-batches // training.accumulate_steps)
    yield finding(
        num_samples >= training.batch_size,
        WARN,
        "settings.batch_size",
        f"{training.batch_size:,} of {num_samples:,} training samples; {batches:,} batches an epoch",
        f"batch_size {training.batch_size:,}, but {num_samples:,} training samples: an epoch is one small step",
        f"batch_size {max(1, num_samples // 8)} or less",
    )
    longest = max(training.warmup_steps, training.table_warmup_steps)
    yield finding(
        longest < steps,
        WARN,
        "settings.warmup_steps",
        f"{longest:,} of {steps:,} steps",
        f"{longest:,} warm-up steps of {steps:,} in all: the learning rate never gets to its value",
        "a smaller warmup_steps",
    )
    events = data.splits.train.lengths()
    cut = float((events > config.model.max_seq_length + 1).mean())
    yield finding(
        cut < 0.5,
        WARN,
        "settings.max_seq_length",
        f"{config.model.max_seq_length}; longer histories: {cut:.1%} of the users",
        f"{config.model.max_seq_length}: {cut:.0%} of the users have more events, and only their newest are targets",
        f"max_seq_length {-(-int(np.quantile(events, 0.9, method='lower')) // 10) * 10} holds nine users of ten",
    )


def _num_training_samples(config: Config, data: Data) -> int:
    return training_samples(config.data.targets_per_sample, data.splits.train, config.model.max_seq_length).num_samples


def check_sizes(config: Config, data: Data, device: torch.device) -> Iterator[Finding]:
    """Table, its state and averages against memory, checkpoints against the disk; a lower bound (--estimate says it all)."""
    machine = read_machine(Path(config.paths.checkpoint_path or "."), device)
    table = table_bytes(data.layout)
    state = 2 * table if config.training.table_optimizer == "adam" else 4 * data.layout.num_rows  # the others are row-wise
    held = table + state + (2 * table if config.training.ema_decay else 0)
    room, where = (machine.cuda, "on the GPU") if device.type == "cuda" else (machine.memory, machine.limit)
    yield finding(
        held < room,
        FAIL,
        "settings.memory",
        f"joint table and its state {size(held)} of {size(room)} ({where}); --estimate says all",
        f"joint table and its state take {size(held)}; there are {size(room)} ({where})",
        "--estimate names what helps: hash_rows, a smaller embedding_dim, a row-wise table_optimizer",
    )
    count = num_checkpoints(config, -(-_num_training_samples(config, data) // config.training.batch_size))
    disk = count * held
    yield finding(
        disk < machine.disk,
        FAIL,
        "settings.disk",
        f"{count} checkpoints, {size(disk)} of {size(machine.disk)} free",
        f"{count} checkpoints take {size(disk)}; {size(machine.disk)} are free",
        "keep_last_k 1, or another checkpoint_path",
    )
