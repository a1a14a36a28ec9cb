"""The run folder: its name, who owns it, its status, and which run and checkpoint a resumed run goes on with.

Must not know models or training; settings reach it as plain paths.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch

from atomic import make_folder, sweep, unused, write_text_atomic
from checkpoint import (
    LINK_NAME,
    clean_temporary,
    find_checkpoint,
    list_checkpoints,
    newest_valid,
    plain_json,
    read_meta,
    set_aside_newer,
)  # fmt: skip
from errors import RunError, UserError

STATES = ("running", "finished", "failed", "interrupted")
STATUS, TRAIN_LOG, LOCK = "status.json", "train.log", ".lock"
EVENTS_OWNER = ".run"  # in a TensorBoard folder: the one run folder whose events lie there
_OWN_FILES = (
    STATUS, TRAIN_LOG, "metrics.json", "report.html", "ranks.npz", "report.json", "command.txt", "environment.json", "config.resolved.yaml",
)  # fmt: skip
# The item vectors for TensorBoard's projector (board.py), in the folder of the events.
PROJECTOR_FILES = ("projector_config.pbtxt", "item_vectors.tsv", "item_metadata.tsv")
_ENVIRONMENT_VARIABLES = (
    "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


class Paths(Protocol):
    """The part of config.paths that names a run's folders; "" = not given."""

    log_path: str
    tensorboard_path: str
    checkpoint_path: str


@dataclass(frozen=True)
class RunPaths:
    """A run's folders, all made. resume_from: the valid checkpoint to go on with, None for a run from the start.

    continued: the folder held this run before, so logs are appended to. before: its status then.
    locks: of log_dir and checkpoint_dir, kept open as long as the run lives.
    """

    log_dir: Path
    tensorboard_dir: Path
    checkpoint_dir: Path
    name: str
    resume_from: Path | None = None
    continued: bool = False
    before: dict = field(default_factory=dict, repr=False, compare=False)
    locks: tuple[IO[str], ...] = field(default=(), repr=False, compare=False)


# ---- status -------------------------------------------------------------------------------------------------------------


def read_status(log_dir: Path) -> dict:
    """status.json as a dict; {} where there is none, {"state": "running"} where it cannot be read: such a run counts as unfinished."""
    path = Path(log_dir) / STATUS
    if not path.is_file():
        return {}
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {"state": "running"}
    return status if isinstance(status, dict) and status.get("state") in STATES else {"state": "running"}


def write_status(log_dir: Path, state: str, step: int, reason: str = "", **more: object) -> bool:
    """Write status.json atomically: state (one of STATES), step (updates done), reason (one line; "" where all is well).

    What prepare_run put there (name, checkpoint_path, tensorboard_path) stays. False when the disk is full, which is said once for each
    state: the old file is whole then, and "running" counts as unfinished, so nothing is lost by going on.
    """
    try:
        _put_status(log_dir, state, step, reason, **more)
    except RunError as error:
        if (str(log_dir), state) not in _said:
            _said.add((str(log_dir), state))
            old = read_status(log_dir).get("state", "nothing")
            print(f"warning: {str(error).splitlines()[0]} It says {old} in place of {state}.", file=sys.stderr, flush=True)
        return False
    return True


_said: set[tuple[str, str]] = set()  # folders and states of which write_status has warned


def _put_status(log_dir: Path, state: str, step: int, reason: str = "", **more: object) -> None:
    """write_status, but a full disk is a RunError."""
    if state not in STATES:
        raise ValueError(f"state is {state!r}; expected one of {', '.join(STATES)}")
    old = {key: value for key, value in read_status(log_dir).items() if key in ("kind", "name", "checkpoint_path", "tensorboard_path")}
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    status = {"state": state, "step": int(step), "reason": reason, "time": now, "pid": os.getpid()} | old | more
    write_text_atomic(Path(log_dir) / STATUS, json.dumps(plain_json(status), indent=1) + "\n")


def write_start_files(log_dir: Path, resolved_yaml: str, argv: Sequence[str], environment: dict) -> None:
    """Write config.resolved.yaml, command.txt (a resumed run adds its line) and environment.json. RunError when the disk is full."""
    log_dir = Path(log_dir)
    command = log_dir / "command.txt"
    before = command.read_text(encoding="utf-8", errors="replace") if command.is_file() else ""
    write_text_atomic(log_dir / "config.resolved.yaml", resolved_yaml)
    write_text_atomic(command, before + shlex.join(argv) + "\n")
    write_text_atomic(log_dir / "environment.json", json.dumps(plain_json(environment), indent=1) + "\n")


# ---- preparing ----------------------------------------------------------------------------------------------------------


def prepare_run(
    paths: Paths,
    *,
    run_name: str = "",
    resume: bool = False,
    resume_path: str | Path = "",
    overwrite: bool = False,
    now: datetime | None = None,
    base: Path = Path("."),
    log: Callable[[str], None] = print,
) -> RunPaths:
    """Choose and make a run's folders, and find the checkpoint to go on with.

    paths: those given are used exactly; the others are base/logs, base/tb_logs, base/checkpoints + `<time>-<name>`.
    resume: go on with the newest unfinished run, or start anew and say so. resume_path: go on with this run folder, checkpoint or link.
    overwrite: remove what another run left in the folders first.
    UserError where the folders hold another run and neither was asked for, or a living process uses them.
    """
    now = now or datetime.now()
    if overwrite and (resume or resume_path):
        raise UserError("--overwrite starts anew and --resume goes on: give one of them.")
    name = _default_name(run_name, now)
    if resume_path:
        run = _resume_given(Path(resume_path), paths, name, base, log)
    elif resume:
        run = _resume_newest(paths, name, base, log)
    else:
        run = _new_folders(paths, name, base)
        run = _owned_folders(run, paths, base, log) if overwrite else run
    locks = _open_folders(run)
    if not (resume or resume_path):
        _refuse_or_clear(run, overwrite, log)
    _mark_events(run)
    clean_temporary(run.checkpoint_dir)
    sweep(run.log_dir, ".+")
    for folder in (run.log_dir, run.log_dir.parent):
        _settle_evaluations(folder)
    step = 0 if run.resume_from is None else _step_of(run.resume_from)
    if resume or resume_path:
        set_aside_newer(run.checkpoint_dir, -1 if run.resume_from is None else step, log)
    before = read_status(run.log_dir)
    where = {"checkpoint_path": str(run.checkpoint_dir.resolve()), "tensorboard_path": str(run.tensorboard_dir.resolve())}
    _put_status(run.log_dir, "running", step, "", name=run.name, **where)
    return replace(run, locks=locks, before=before)


def restore_status(run: RunPaths) -> None:
    """Put back the status that a continued run had before it was refused: nothing was trained, so nothing is known that was not."""
    if run.before:
        write_text_atomic(run.log_dir / STATUS, json.dumps(run.before, indent=1) + "\n")


def prepare_eval(paths: Paths, *, run_name: str = "", now: datetime | None = None, base: Path = Path(".")) -> RunPaths:
    """The folder of an evaluation (--inference_only): `<log_path>/eval-<time>`, or base/logs/<time>-eval; never resumed or continued."""
    now = now or datetime.now()
    name = _default_name(run_name or "eval", now)
    wished = Path(paths.log_path) / f"eval-{now:%Y%m%d-%H%M%S}" if paths.log_path else Path(base) / "logs" / name
    log_dir = unused(wished)
    run = RunPaths(log_dir, Path(paths.tensorboard_path or log_dir), Path(paths.checkpoint_path or log_dir), log_dir.name)
    _make_folder(log_dir, "log_path")
    lock, _ = _take_lock(log_dir, log_dir.resolve())
    _settle_evaluations(log_dir.parent)
    write_status(log_dir, "running", 0, "", name=run.name, kind="eval")
    return replace(run, locks=() if lock is None else (lock,))


def _settle_evaluations(folder: Path) -> None:
    """Evaluations in a folder whose process was killed: their status says so from now on, and what is half-written goes."""
    for path in sorted(path.parent for path in folder.glob(f"*/{STATUS}")):
        status = read_status(path)
        if status.get("kind") == "eval" and status["state"] == "running" and not is_alive(path):
            sweep(path, ".+")
            step = status.get("step")
            write_status(path, "interrupted", step if isinstance(step, int) else 0, "its process was killed")


def _default_name(run_name: str, now: datetime) -> str:
    return f"{now:%Y%m%d-%H%M%S}-" + (re.sub(r"[^\w.=-]+", "_", run_name).strip("._") or "run")


def _new_folders(paths: Paths, name: str, base: Path) -> RunPaths:
    """Folders as given; the others take the run's name, with a number behind it where one of them is taken."""
    if paths.log_path and (Path(paths.log_path) / STATUS).is_file():
        return _folders_of(Path(paths.log_path), paths, base)  # another run's: what it noted is what --overwrite removes
    name = (Path(paths.log_path).resolve().name or name) if paths.log_path else name
    given = {"logs": paths.log_path, "tb_logs": paths.tensorboard_path, "checkpoints": paths.checkpoint_path}
    count, free = 1, name
    while any((Path(base) / folder / free).exists() for folder, path in given.items() if not path):
        count += 1
        free = f"{name}-{count}"
    log_dir, tensorboard_dir, checkpoint_dir = (Path(path) if path else Path(base) / folder / free for folder, path in given.items())
    return RunPaths(log_dir, tensorboard_dir, checkpoint_dir, free)


def _owned_folders(run: RunPaths, paths: Paths, base: Path, log: Callable[[str], None]) -> RunPaths:
    """--overwrite: the run with new folders in place of those that status.json alone gives it and that hold what may be another's."""
    wished = {"tensorboard_dir": ("tensorboard_path", "tb_logs"), "checkpoint_dir": ("checkpoint_path", "checkpoints")}
    for where, (key, default) in wished.items():
        folder = getattr(run, where)
        if getattr(paths, key) or not folder.exists() or _owns(run.log_dir, folder):
            continue
        run = replace(run, **{where: unused(Path(base) / default / run.name)})
        log(f"--overwrite: {folder} stays as it is: nothing in it names the run in {run.log_dir}. {key} is now {getattr(run, where)}")
    return run


def _mark_events(run: RunPaths) -> None:
    """Note in a TensorBoard folder outside the run folder whose it is, while no event lies there; one that two runs share is nobody's."""
    folder, log_dir = run.tensorboard_dir, run.log_dir.resolve()
    if folder.resolve().is_relative_to(log_dir):
        return
    if not list(folder.glob("events.out.tfevents.*")):
        try:
            write_text_atomic(folder / EVENTS_OWNER, f"{log_dir}\n")
        except RunError:
            return  # a full disk: the logger says so, and goes on without events
    elif _line_of(folder / EVENTS_OWNER, 0) != str(log_dir):
        (folder / EVENTS_OWNER).unlink(missing_ok=True)


def _make_folder(path: Path, key: str) -> None:
    try:
        make_folder(path)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be made: {error.strerror}. Point {key} at a folder that can be written.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {path} cannot be written to. Point {key} at a folder that can be written.")


def _open_folders(run: RunPaths) -> tuple[IO[str], ...]:
    """Make the folders and take the locks of log_dir and checkpoint_dir; UserError when a living process holds one."""
    for path, key in ((run.log_dir, "log_path"), (run.tensorboard_dir, "tensorboard_path"), (run.checkpoint_dir, "checkpoint_path")):
        _make_folder(path, key)
    log_dir, checkpoint_dir = run.log_dir.resolve(), run.checkpoint_dir.resolve()
    wanted = [(run.log_dir, "log_path", log_dir)]
    if checkpoint_dir != log_dir:
        wanted.append((run.checkpoint_dir, "checkpoint_path", _noted_owner(checkpoint_dir) or log_dir))
    locks = []
    for path, key, owner in wanted:
        lock, holder = _take_lock(path, owner)
        if holder:
            raise UserError(f"{path}: a run is going on there (process {holder}). Wait for its end, or choose another {key}.")
        locks += [lock] if lock is not None else []
    return tuple(locks)


def _line_of(path: Path, number: int) -> str:
    """A line of a small text file; "" where there is none."""
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return words[number] if len(words) > number else ""


def _noted_owner(checkpoint_dir: Path) -> Path | None:
    """The run folder whose checkpoints lie here, as its lock file says; None where it says nothing, or where that folder is gone."""
    owner = _line_of(Path(checkpoint_dir) / LOCK, 1)
    return Path(owner) if owner and (Path(owner) / STATUS).is_file() else None


def _owns(log_dir: Path, folder: Path) -> bool:
    """Whether what lies in a folder is this run's to remove: it is inside the run folder, or its own mark names that.

    What status.json says is no proof: it may be a copy's, or a stranger's.
    """
    log_dir, folder = Path(log_dir).resolve(), Path(folder).resolve()
    marks = (_line_of(folder / LOCK, 1), _line_of(folder / EVENTS_OWNER, 0))
    return str(log_dir) in marks or (folder.is_relative_to(log_dir) and _belongs_to_another(folder, log_dir) is None)


def _belongs_to_another(checkpoint_dir: Path, log_dir: Path) -> Path | None:
    """The other run whose checkpoints these are: a copied run folder still names those of the run it was copied from."""
    owner = _noted_owner(checkpoint_dir)
    return owner if owner is not None and owner != Path(log_dir).resolve() else None


def _take_lock(folder: Path, owner: Path | None = None) -> tuple[IO[str] | None, int]:
    """(open lock file, 0), or (None, process that holds it). The system frees the lock of a killed process by itself.

    (None, 0) where the file system has no locks, or where this very process holds it: a second run in one process follows the first.
    owner: the run folder that the lock file is to name; None leaves what it names.
    """
    owner = owner or _noted_owner(folder)
    lock = open(Path(folder) / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        text = (lock.read().splitlines() or [""])[0].strip()
        # Not by the number: two containers that share a disk may both have ours.
        ours = any(not one.closed and os.path.samestat(os.fstat(one.fileno()), os.fstat(lock.fileno())) for one in _held)
        lock.close()
        return None, 0 if ours else int(text) if text.isdigit() else -1
    except OSError:
        lock.close()
        return None, 0
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n" + (f"{owner}\n" if owner is not None else ""))
    lock.flush()
    _held.add(lock)
    return lock, 0


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()  # the locks that this process took


def is_alive(log_dir: Path) -> bool:
    """Whether a living process holds the run of this folder."""
    if not (Path(log_dir) / LOCK).is_file() or not os.access(Path(log_dir) / LOCK, os.W_OK):
        return False
    lock, holder = _take_lock(log_dir)
    if lock is not None:
        lock.close()
    return holder != 0


def _traces(run: RunPaths) -> Path | None:
    """What shows that a run lives in these folders, or None."""
    for path in (run.log_dir / STATUS, run.log_dir / TRAIN_LOG):
        if path.exists():
            return path
    found = list_checkpoints(run.checkpoint_dir)
    return found[-1] if found else None


def _refuse_or_clear(run: RunPaths, overwrite: bool, log: Callable[[str], None]) -> None:
    trace = _traces(run)
    if trace is None:
        return
    if not overwrite:
        raise UserError(
            f"{trace} belongs to another run; a new run never writes into its folder.\n"
            "Give --resume to go on with it, --overwrite to remove it and start anew, or other paths."
        )
    if other := _belongs_to_another(run.checkpoint_dir, run.log_dir):
        raise UserError(
            f"{run.checkpoint_dir} holds the checkpoints of the run in {other}; --overwrite removes those of {run.log_dir} alone.\n"
            "Give another checkpoint_path."
        )
    _clear(run.log_dir, run.checkpoint_dir, _own_or_none(run.log_dir, run.tensorboard_dir, log))


def _own_or_none(log_dir: Path, folder: Path | None, log: Callable[[str], None]) -> Path | None:
    """The folder, if it is this run's to clear; else None, and a line."""
    if folder is None or _owns(log_dir, folder):
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        log(f"{folder} stays as it is: nothing in it names the run in {log_dir}")
    return None


def _clear(log_dir: Path, checkpoint_dir: Path | None, tensorboard_dir: Path | None) -> None:
    """Remove what a run wrote, by name; what else lies there stays. status.json goes last: until then it still counts as a run's folder."""
    if checkpoint_dir is not None:
        for folder in list_checkpoints(checkpoint_dir):
            shutil.rmtree(folder)
        for path in sorted(checkpoint_dir.glob("*.pt")):
            if LINK_NAME.fullmatch(path.name):
                path.unlink()
    if tensorboard_dir is not None:
        for path in [*tensorboard_dir.glob("events.out.tfevents.*"), *(tensorboard_dir / name for name in PROJECTOR_FILES)]:
            path.unlink(missing_ok=True)
    for name in reversed(_OWN_FILES):
        (log_dir / name).unlink(missing_ok=True)


def clear_folders(log_dir: Path, checkpoint_dir: Path | None, tensorboard_dir: Path | None, log: Callable[[str], None] = print) -> bool:
    """Remove a run's files (`report.py --prune`), and each of its folders that is empty then; False where a living process holds the run.

    None for a folder that is not the run's own. One outside the run folder that does not itself name the run stays, and a line says so.
    """
    lock, holder = _take_lock(log_dir)
    if holder:
        return False
    checkpoint_dir, tensorboard_dir = (_own_or_none(log_dir, folder, log) for folder in (checkpoint_dir, tensorboard_dir))
    _clear(log_dir, checkpoint_dir, tensorboard_dir)
    for folder, name in ((checkpoint_dir, LOCK), (tensorboard_dir, EVENTS_OWNER)):
        if folder is not None:
            (folder / name).unlink(missing_ok=True)
    (log_dir / LOCK).unlink(missing_ok=True)
    if lock is not None:
        lock.close()
    folders = [folder for folder in (checkpoint_dir, tensorboard_dir, log_dir) if folder is not None]  # one may lie in the last
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return True


# ---- resuming -----------------------------------------------------------------------------------------------------------


def _step_of(checkpoint: Path) -> int:
    return int(re.search(r"global_step(\d+)", checkpoint.name).group(1))


def _folders_of(log_dir: Path, paths: Paths, base: Path) -> RunPaths:
    """The folders of the run that lives in log_dir: those given now, else those it noted, else the default ones."""
    status = read_status(log_dir)
    name = str(status.get("name") or "")
    if name in ("", ".", "..") or Path(name).name != name:  # not ours: it would lead elsewhere
        name = log_dir.resolve().name

    def choose(given: str, key: str, default: str) -> Path:
        if given:
            return Path(given)
        noted, usual = status.get(key), Path(base) / default / name
        # A run that was moved notes a place that is gone; the usual one serves then.
        return Path(noted) if isinstance(noted, str) and Path(noted).is_dir() and Path(noted) != usual.resolve() else usual

    tensorboard_dir = choose(paths.tensorboard_path, "tensorboard_path", "tb_logs")
    return RunPaths(log_dir, tensorboard_dir, choose(paths.checkpoint_path, "checkpoint_path", "checkpoints"), name, continued=True)


def _with_newest(run: RunPaths, log: Callable[[str], None]) -> RunPaths:
    """The run with its newest valid checkpoint, or from the start, said so."""
    newest = newest_valid(run.checkpoint_dir, log)
    if newest is None:
        log(f"--resume: no valid checkpoint in {run.checkpoint_dir}: not resumed")
    return replace(run, resume_from=newest)


def unfinished_runs(base: Path = Path(".")) -> list[Path]:
    """Run folders in base/logs that are neither finished nor alive nor evaluations, the one that changed its status last at the end."""
    folders = [path for path in (Path(base) / "logs").glob("*/") if (path / STATUS).is_file()]
    found = []
    for path in sorted(folders, key=lambda path: ((path / STATUS).stat().st_mtime_ns, path.name)):
        status = read_status(path)
        if status["state"] != "finished" and status.get("kind") != "eval" and not is_alive(path):
            found.append(path)
    return found


def _resume_newest(paths: Paths, name: str, base: Path, log: Callable[[str], None]) -> RunPaths:
    if paths.log_path:
        log_dir = Path(paths.log_path)
        if not (log_dir / STATUS).is_file():
            return _with_newest(_new_folders(paths, name, base), log)  # an empty folder, or one whose logs were lost
        run = _with_newest(_folders_of(log_dir, paths, base), log)
        if read_status(log_dir)["state"] == "finished":
            if run.resume_from is None:
                what = f"the run in {log_dir} is finished and has no valid checkpoint"
                raise UserError(f"--resume: {what}. Give --overwrite, or another log_path.")
            log(f"--resume: the run in {log_dir} is finished; going on from its last checkpoint (--overwrite starts anew)")
        return run
    runs = [_folders_of(path, paths, base) for path in unfinished_runs(base)]
    if paths.checkpoint_path:
        wanted = Path(paths.checkpoint_path).resolve()
        runs = [run for run in runs if Path(str(read_status(run.log_dir).get("checkpoint_path", ""))).resolve() == wanted]
    if not runs:
        log(f"--resume: no unfinished run in {Path(base) / 'logs'}: starting anew")
        return _with_newest(_new_folders(paths, name, base), log)
    for run in reversed(runs):  # one that failed before its first checkpoint must not hide an older one that has some
        run = _with_newest(run, log)
        if run.resume_from is not None:
            return run
    log("--resume: no unfinished run has a valid checkpoint: starting anew")
    return _new_folders(paths, name, base)


def _resume_given(given: Path, paths: Paths, name: str, base: Path, log: Callable[[str], None]) -> RunPaths:
    """Go on with a run folder, a folder of checkpoints, a checkpoint or a link to one."""
    if not given.exists():
        expected = "a run folder, a checkpoint folder, or a link such as best_model.pt"
        raise UserError(f"--resume_path: {given} does not exist. Expected {expected}.")
    if given.is_dir() and (given / STATUS).is_file():
        where = _folders_of(given, paths, base).checkpoint_dir
    else:
        where = given
    if list_checkpoints(where) or where != given:
        folder = newest_valid(where, log)
        if folder is None:
            raise UserError(f"--resume_path: {given}: no valid checkpoint in {where}. Start anew without --resume_path.")
    else:
        folder = find_checkpoint(where)
        read_meta(folder)  # a damaged one is refused before anything is made
    owner = _owner_of(folder, paths, base)
    run = owner or _new_folders(paths, name, base)
    inside = list_checkpoints(run.checkpoint_dir)
    mixed = bool(inside) and not _is_newest(folder, run.checkpoint_dir)
    if mixed or (owner is None and (run.log_dir / STATUS).is_file()):
        raise UserError(
            f"--resume_path: {folder} is not the newest checkpoint of the run in {run.log_dir}; going on from it would mix two runs.\n"
            "Point log_path and checkpoint_path at new folders, or give --resume to go on with the newest."
        )
    if owner is None:
        log(f"--resume_path: a new run in {run.log_dir} goes on from {folder}")
    return replace(run, resume_from=folder)


def _owner_of(folder: Path, paths: Paths, base: Path) -> RunPaths | None:
    """The run whose newest checkpoint this is: that of log_path, or one in base/logs."""
    logs = [Path(paths.log_path)] if paths.log_path else [path.parent for path in sorted((Path(base) / "logs").glob(f"*/{STATUS}"))]
    for log_dir in reversed(logs):
        if (log_dir / STATUS).is_file() and read_status(log_dir).get("kind") != "eval":
            run = _folders_of(log_dir, paths, base)
            if _is_newest(folder, run.checkpoint_dir):
                return run
    return None


def _is_newest(folder: Path, root: Path) -> bool:
    """Whether the checkpoint is the newest valid one under root. Later ones are hashed only when there are any."""
    inside = [path.resolve() for path in list_checkpoints(root)]
    if folder.resolve() not in inside:
        return False
    if inside[-1] == folder.resolve():
        return True
    newest = newest_valid(root, lambda _: None)
    return newest is not None and newest.resolve() == folder.resolve()


# ---- environment --------------------------------------------------------------------------------------------------------


def environment() -> dict:
    """What a run's speed and bits depend on: versions, processor, memory, threads, GPU, commit. No host or user name."""
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(int((_first_value("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 2),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, capability {gpu.major}.{gpu.minor}" for gpu in gpus],
        "commit": _commit(Path(__file__).resolve().parent),
        "variables": {name: os.environ[name] for name in _ENVIRONMENT_VARIABLES if name in os.environ},
    }


def _first_value(path: str, key: str) -> str | None:
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), None)


def _commit(folder: Path) -> str | None:
    """The commit of the scripts, "-dirty" behind it when they were changed; None where there is no repository or no git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # looking must not touch the index
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, env=quiet)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
