"""What this machine still has for a run: memory (a container's limit counts), GPU memory, disk.

Must not know of settings or models.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from atomic import temporary_folder
from footprint import anonymous_bytes


OLDEST_TORCH, NEWEST_TORCH = (2, 10), (2, 14)  # as requirements.txt: from ... to below


class Machine(NamedTuple):
    """Bytes that a run may take. limit: what memory is bounded by. cuda: of the device; 0 where the run uses none. folder: on the disk."""

    memory: int
    limit: str
    cuda: int
    disk: int
    folder: Path


def torch_warning(version: str = torch.__version__) -> str:
    """What to know of a torch outside the versions of requirements.txt, as a platform may have that installs nothing; "" of one within."""
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found >= NEWEST_TORCH:
        return f"torch {version} is newer than those this project is tested with (below {_dotted(NEWEST_TORCH)})."
    if found < OLDEST_TORCH:
        return (
            f"torch {version} is older than {_dotted(OLDEST_TORCH)}: its weights_only has known holes (CVE-2026-24747, before 2.6 "
            "CVE-2025-32434), so give it no checkpoint of a stranger's."
        )
    return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def read_machine(folder: Path, device: torch.device, root: Path = Path("/")) -> Machine:
    """folder: where checkpoints will lie; it need not exist. root: of the system's files, for tests.

    What this process holds is counted as free: it ends before the run begins.
    """
    own = anonymous_bytes()
    memory, limit = _fields(root / "proc/meminfo")["MemAvailable"] * 1024 + own, "free memory of the machine"
    for room, path in _cgroup_rooms(root):
        if room + own < memory:
            memory, limit = room + own, f"limit of the control group, {path}"
    cuda = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return Machine(memory, limit, cuda, shutil.disk_usage(nearest_folder(folder)).free, folder)


def nearest_folder(path: Path) -> Path:
    """The path, where it exists, else the nearest one above it: which disk it will lie on, and whether it can be made."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


@contextmanager
def scratch_near(path: Path) -> Iterator[Path]:
    """A folder to work in until the end of the block, on the disk of `path` where that can be written, else the system's.

    Those that killed processes could not remove go first.
    """
    there = nearest_folder(path)
    folder = there if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    with temporary_folder(folder / "scratch", mode=0o700) as scratch:
        yield scratch


def _fields(path: Path) -> dict[str, int]:
    """Numbers of a file of lines `name: number` or `name number`; {} where there is no such file."""
    if not path.is_file():
        return {}
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _cgroup_rooms(root: Path) -> Iterator[tuple[int, Path]]:
    """(bytes left, file of the limit) of each control group above this process that has a limit; pages of files count as left."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group, (limit, usage, cached) = top / path.lstrip("/"), names
        # In a container the path may be the host's; the limit then stands in the top folder.
        for folder in (group, *group.parents):
            text = (folder / limit).read_text().strip() if (folder / limit).is_file() else "max"
            if text.isdigit():
                used = int((folder / usage).read_text()) - _fields(folder / "memory.stat").get(cached, 0)
                yield max(0, int(text) - used), folder / limit
            if folder == top:
                break
